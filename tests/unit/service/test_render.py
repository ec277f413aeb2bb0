"""What is posted to Ray: our own words only, and nothing secret."""

import json
import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.render import submission
from service.settings import Settings
from tests.fakes import job_id, prepare_spec, settings_for, train_spec

SETTINGS = settings_for(Path("/nowhere"))
SECRET = "canary-7f3a"


def test_a_training_is_our_module_with_our_arguments() -> None:
    body = submission(train_spec(), "default", job_id(1), 2, SETTINGS)
    assert body["entrypoint"] == (f"exec python -m workers.main --project default --job {job_id(1)} --attempt 2")
    assert body["submission_id"] == f"{job_id(1)}-2"
    assert body["metadata"] == {"job_name": "first", "job_id": job_id(1), "attempt": "2", "kind": "train"}
    assert "entrypoint_num_cpus" not in body


def test_a_preparation_runs_in_its_driver_and_reserves_its_cpus() -> None:
    body = submission(prepare_spec(resources={"cpus": 3}), "default", job_id(1), 1, SETTINGS)
    assert "-m workers.prepare " in body["entrypoint"]
    assert body["entrypoint_num_cpus"] == 3


def test_a_rank_that_is_gone_is_noticed_within_a_second_and_the_end_of_its_group_does_not_wait_for_it() -> None:
    variables = submission(train_spec(), "default", job_id(1), 1, SETTINGS)["runtime_env"]["env_vars"]
    assert float(variables["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"]) < 1
    assert float(variables["TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S"]) <= 5


def test_nothing_secret_of_the_control_plane_is_posted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "token"
    token.write_text(SECRET)
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "LOCKSTEP_TOKEN", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    config: Settings = settings_for(
        tmp_path, ray_token_path=token, bootstrap_key_path=token, database_url=f"postgresql://u:{SECRET}@h/d"
    )
    posted = json.dumps(submission(train_spec(), "default", job_id(1), 1, config))
    assert SECRET not in posted
    assert str(token) not in posted


@settings(max_examples=60, deadline=None)
@given(st.from_regex(r"[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?", fullmatch=True), st.integers(1, 10**6))
def test_no_spec_can_put_a_character_of_its_own_into_the_command(name: str, attempt: int) -> None:
    labels = {"team": "A b. _-"}
    for spec in (train_spec(name=name, labels=labels, data={"dataset": name}), prepare_spec(name=name, dataset=name)):
        body = submission(spec, "default", job_id(1), attempt, SETTINGS)
        assert re.fullmatch(r"[a-z0-9 ._-]+", body["entrypoint"])
        assert f" {name} " not in f"{body['entrypoint']} ".replace(f"--attempt {attempt} ", "").replace(
            "--project default", ""
        ).replace("exec python -m", "")
        assert body["submission_id"] == f"{job_id(1)}-{attempt}"


def test_an_interpreter_in_a_folder_with_a_space_stays_one_word() -> None:
    config = settings_for(Path("/nowhere"), worker_python="/opt/my env/bin/python")
    words = shlex.split(submission(train_spec(), "default", job_id(1), 1, config)["entrypoint"])
    assert words[:4] == ["exec", "/opt/my env/bin/python", "-m", "workers.main"]
