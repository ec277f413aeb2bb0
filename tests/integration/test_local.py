"""The launcher without Ray: one plain process and a group by torchrun train to the bits of any other start."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from api.documents import CheckpointRef, JobDocument
from api.storage import Bucket
from tests.training import (
    events,
    layout_of,
    make_dataset,
    run_ranks,
    segment_names,
    settings_for,
    train_alone,
    train_job,
)
from workers.local import main
from workers.restore import read_checkpoint
from workers.session import Session
from workers.settings import WorkerSettings
from workers.snapshot import State
from workers.train import train

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2")


@pytest.fixture
def settings(storage: str, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorkerSettings:
    """The dataset is prepared; the launcher finds the cache where these settings have it."""
    settings = settings_for(storage, tmp_path / "cache")
    monkeypatch.setenv("LOCKSTEP_CACHE", str(settings.cache))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    make_dataset(bucket, settings)
    return settings


def launch(job: JobDocument, folder: Path, *launcher: str) -> tuple[int, str, str]:
    """Run `workers.local` on a job; return exit code, standard output and standard error."""
    path = folder / f"{job.id}.json"
    path.write_text(job.model_dump_json())
    command = [sys.executable, *launcher, "-m", "workers.local", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def launched(job: JobDocument, folder: Path, *launcher: str) -> dict[str, Any]:
    """Return the outcome of a job that must succeed: all that is on standard output."""
    code, out, err = launch(job, folder, *launcher)
    assert code == 0, err
    outcome: dict[str, Any] = json.loads(out)
    return outcome


def last_state(bucket: Bucket, job: JobDocument) -> State:
    point = CheckpointRef(segment=segment_names(bucket, job)[-1], step=12)
    return read_checkpoint(bucket, layout_of(job), point).state


def assert_same_bits(bucket: Bucket, one: JobDocument, other: JobDocument) -> None:
    ours, theirs = last_state(bucket, one), last_state(bucket, other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []


def train_in_a_group(session: Session, job: str, storage: str, cache: str) -> None:
    train(JobDocument.model_validate_json(job), session, Bucket(storage), settings_for(storage, Path(cache)))


def test_one_plain_process_trains_to_the_same_bits(bucket: Bucket, settings: WorkerSettings, tmp_path: Path) -> None:
    plain = train_job("plain")
    outcome = launched(plain, tmp_path)
    assert (outcome["outcome"], outcome["step"]) == ("succeeded", 12)
    train_alone(train_job("alone"), bucket, settings)
    assert_same_bits(bucket, plain, train_job("alone"))


def test_two_processes_of_torchrun_train_to_the_same_bits_and_speak_once(
    bucket: Bucket, settings: WorkerSettings, tmp_path: Path
) -> None:
    group, spawned = (train_job(name, resources={"workers": 2}) for name in ("group", "spawned"))
    assert launched(group, tmp_path, *TORCHRUN)["outcome"] == "succeeded"
    run_ranks(2, tmp_path / "ranks", train_in_a_group, spawned.model_dump_json(), settings.storage, str(settings.cache))
    assert_same_bits(bucket, group, spawned)


def test_a_second_start_is_a_new_attempt_and_resumes_with_torchruns_count_of_restarts(
    bucket: Bucket, settings: WorkerSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = train_job("again")
    train(job, Session(attempt=1, restart=2), bucket, settings)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    launched(job, tmp_path)
    first, second = segment_names(bucket, job)
    assert (first[:4], second[:4]) == ("1-2-", "2-1-")
    assert (12, "resumed") in events(bucket, job, second)


def test_an_outcome_that_is_no_success_is_exit_code_1(bucket: Bucket, settings: WorkerSettings, tmp_path: Path) -> None:
    job = train_job("missing").model_copy(update={"dataset_version": "v2"})
    code, out, _ = launch(job, tmp_path)
    assert (code, json.loads(out)["reason"]) == (1, "invalid_data")


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        (
            train_job("two", resources={"workers": 2}).model_dump_json(),
            "wants 2 workers, not 1; start it by torchrun --nproc-per-node 2",
        ),
        ('{"id": "x"}', "job.json holds no job document"),
        (None, "job.json holds no job document"),
    ],
    ids=["another number of processes", "another document", "no file"],
)
def test_what_cannot_be_launched_is_refused_before_the_bucket_is_touched(
    document: str | None,
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "job.json"
    if document is not None:
        path.write_text(document)
    monkeypatch.delenv("LOCKSTEP_STORAGE", raising=False)
    monkeypatch.setattr(sys, "argv", ["local", str(path)])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2
    assert complaint in capsys.readouterr().err
