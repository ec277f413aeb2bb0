"""`lockstep-server up` with real processes. Only the first test starts Ray; the others have a stand-in for it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import boto3
import psutil
import pytest
from botocore.config import Config

from service import processes
from service.stack import read_credentials

ROOT = Path(__file__).resolve().parents[2]
MARK = "LOCKSTEP_TEST_MARK"

#: Answers like the control plane and like Ray's dashboard, whichever it is asked to be.
STAND_IN = """
import http.server, json, os, signal, sys
options = dict(word.split("=") for word in sys.argv if "=" in word)
port = int(os.environ.get("LOCKSTEP_PORT") or options["--dashboard-port"])
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "silent" in sys.argv:
    signal.pause()
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": {"result": {"result": [{"state": "ALIVE"}]}}}).encode())
    def log_message(self, *args):
        pass
http.server.HTTPServer(("127.0.0.1", port), Answers).serve_forever()
"""

#: Runs `up` as the command line does, with stand-ins for some programs.
RUN_UP = """
import json, sys
from pathlib import Path
from service.stack import Programs, UpError, installed_programs
from service.up import Options, up
told = json.loads(sys.argv[1])
installed = installed_programs()
programs = Programs(
    s3=installed.s3,
    ray=tuple(told.pop("ray")) or installed.ray,
    control_plane=tuple(told.pop("control_plane")),
)
try:
    sys.exit(up(Options(state=Path(told.pop("state")), programs=programs, **told)))
except UpError as error:
    sys.exit(str(error))
"""


@dataclass
class Stack:
    """One running `up`."""

    process: "subprocess.Popen[str]"
    state: Path
    output: Path
    mark: str

    def says(self) -> str:
        return self.output.read_text()

    def wait_for(self, words: str, timeout: float = 60.0) -> None:
        wait_until(lambda: words in self.says() or self.process.poll() is not None, timeout)
        assert words in self.says(), self.says()

    def url(self, title: str) -> str:
        line = next(line for line in self.says().splitlines() if line.startswith(f"  {title}"))
        return next(word for word in line.split() if word.startswith("http://"))

    def port(self, title: str) -> int:
        return int(self.url(title).rsplit(":", 1)[1])

    def processes(self) -> list[psutil.Process]:
        """Whoever carries our mark, in whatever session, except `up` itself."""
        marked = processes.living(processes.marked(MARK, self.mark))
        return [process for process in marked if process.pid != self.process.pid]

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


Start = Callable[..., Stack]


@pytest.fixture
def stand_in(tmp_path: Path) -> list[str]:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    return [sys.executable, str(script)]


@pytest.fixture
def start(tmp_path: Path, stand_in: list[str]) -> Iterator[Start]:
    """Start `up` on any free ports, with stand-ins unless told otherwise; end all that a test leaves."""
    started: list[Stack] = []

    def start_up(**told: Any) -> Stack:
        mark = uuid.uuid4().hex
        ports = {"port": 0, "dashboard_port": 0, "s3_port": 0, "metrics_port": 0}
        told = {"state": str(tmp_path / "state"), "ray": stand_in, "control_plane": stand_in} | ports | told
        output = tmp_path / f"up-{mark}.txt"
        profile = str(tmp_path / "profile.json")
        environment = os.environ | {MARK: mark, "LOCKSTEP_PROFILE": profile, "PYTHONPATH": str(ROOT)}
        with open(output, "w") as file:
            process = subprocess.Popen(
                [sys.executable, "-c", RUN_UP, json.dumps(told)],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        started.append(Stack(process, Path(told["state"]), output, mark))
        return started[-1]

    yield start_up
    for stack in started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            stack.stop()
        stack.process.kill()
        stack.process.wait()
        processes.end(stack.processes, 0.0)


def test_sigterm_in_the_middle_of_a_job_leaves_no_process_no_port_and_no_ray_folder(
    start: Start, tmp_path: Path
) -> None:
    stack = start(ray=[], cpus=1, control_plane=[sys.executable, "-m", "service.cli", "serve"])
    stack.wait_for("Ctrl-C stops everything", 120)
    _, secret = read_credentials(stack.state / "credentials")
    token = (stack.state / "ray_token").read_text().strip()
    grandchild = submit_a_sleeping_job(stack.url("Ray dashboard"), token, tmp_path)
    everyone = stack.processes()
    ray_folder = next(word for word in ray_command(everyone) if word.startswith("--temp-dir")).split("=")[1]
    ports = listening(everyone)

    assert grandchild in {process.pid for process in everyone}
    assert {stack.port("API"), stack.port("S3 endpoint"), stack.port("Ray dashboard")} <= ports
    for title, words in (("Metrics", b"lockstep_jobs"), ("Ray metrics", b"ray_")):
        scraped = processes.http_get(stack.url(title))
        assert scraped is not None
        assert words in scraped[1]
    assert secret not in " ".join(word for process in everyone for word in words_of(process))
    assert secret not in str(psutil.Process(grandchild).environ())
    assert str(stack.state / "credentials") in psutil.Process(grandchild).environ().values()

    began = time.monotonic()
    assert stack.stop() == 0
    assert time.monotonic() - began < 20
    assert not stack.processes()
    assert not psutil.pid_exists(grandchild)
    assert not [port for port in ports if answers(port)]
    assert not Path(ray_folder).exists()


def test_objects_are_there_at_once_and_survive_a_killed_s3_server(start: Start) -> None:
    stack = start()
    stack.wait_for("Ctrl-C stops everything")
    bucket = client(stack)
    for number in range(20):
        key, body = f"a/{number % 3}/b/{number}", bytes(number)
        bucket.put_object(Bucket="lockstep", Key=key, Body=body)
        assert bucket.get_object(Bucket="lockstep", Key=key)["Body"].read() == body
        assert [found["Size"] for found in listed(bucket, key)] == [number]
    bucket.delete_object(Bucket="lockstep", Key="a/0/b/0")
    assert not listed(bucket, "a/0/b/0")

    server = next(process for process in stack.processes() if process.name() == "rclone")
    server.kill()
    stack.wait_for("S3 server: ready again")
    assert bucket.get_object(Bucket="lockstep", Key="a/1/b/1")["Body"].read() == bytes(1)
    assert "S3 server: ended with SIGKILL; starting it again" in stack.says()
    assert stack.stop() == 0
    assert not stack.processes()


def test_anonymous_requests_to_the_bucket_are_refused(start: Start) -> None:
    stack = start()
    stack.wait_for("Ctrl-C stops everything")
    answer = processes.http_get(f"{stack.url('S3 endpoint')}/lockstep?list-type=2")
    assert answer is not None
    assert answer[0] == 400
    assert b"UnsupportedAlgorithm" in answer[1]


def test_a_second_up_on_the_same_folder_says_who_runs_and_disturbs_nothing(start: Start) -> None:
    first = start()
    first.wait_for("Ctrl-C stops everything")
    second = start()
    assert second.process.wait(30) == 1
    assert f"process {first.process.pid} at {first.url('API')}" in second.says()
    assert answers(first.port("API"))


def test_profile_points_to_the_api_with_the_kept_key(start: Start, tmp_path: Path) -> None:
    keys = []
    for _ in range(2):
        stack = start()
        stack.wait_for("Ctrl-C stops everything")
        profile = json.loads((tmp_path / "profile.json").read_text())
        assert profile["url"] == stack.url("API")
        keys.append(profile["api_key"])
        assert stack.stop(signal.SIGINT) == 0
    assert keys[0] == keys[1] == (stack.state / "api_key").read_text().strip()


def test_sigterm_while_starting_stops_cleanly(start: Start, stand_in: list[str]) -> None:
    stack = start(ray=[*stand_in, "silent"])
    stack.wait_for("S3 server: ready")
    began = time.monotonic()
    assert stack.stop() == 0
    assert time.monotonic() - began < 10
    assert "Ctrl-C" not in stack.says()
    assert not stack.processes()


def test_a_second_signal_hurries(start: Start, stand_in: list[str]) -> None:
    stack = start(control_plane=[*stand_in, "deaf"])
    stack.wait_for("Ctrl-C stops everything")
    began = time.monotonic()
    stack.process.send_signal(signal.SIGINT)
    stack.wait_for("Stopping")
    assert stack.stop(signal.SIGINT) == 0
    assert time.monotonic() - began < 4.5  # a deaf control plane is given 5 s, then as much with the others
    assert not stack.processes()


def test_up_after_a_killed_up_ends_what_that_one_left(start: Start) -> None:
    killed = start()
    killed.wait_for("Ctrl-C stops everything")
    killed.process.kill()
    killed.process.wait()
    assert killed.processes()
    stack = start()
    stack.wait_for("Ctrl-C stops everything")
    assert not killed.processes()
    assert stack.stop() == 0


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("port", "--port"),
        ("dashboard_port", "--dashboard-port"),
        ("s3_port", "--s3-port"),
        ("metrics_port", "--metrics-port"),
    ],
)
def test_a_named_port_that_is_busy_is_an_error_that_names_the_option(start: Start, name: str, option: str) -> None:
    with busy_port() as port:
        stack = start(**{name: port})
        assert stack.process.wait(30) == 1
        assert f"Port {port} is busy; choose another with {option} " in stack.says()
        assert not stack.processes()


def test_busy_default_ports_move(start: Start) -> None:
    with contextlib.ExitStack() as held:
        for default in (8700, 8265, 9000, 8701):
            if processes.is_free(default):
                held.enter_context(busy_port(default))
        stack = start(port=None, dashboard_port=None, s3_port=None, metrics_port=None)
        stack.wait_for("Ctrl-C stops everything")
        assert f"API port 8700 is busy; using {stack.port('API')} (--port chooses one)" in stack.says()
        assert stack.port("Ray dashboard") != 8265
        assert stack.port("S3 endpoint") != 9000
        assert not stack.url("Metrics").endswith(":8701/metrics")


# What the tests look with


def submit_a_sleeping_job(dashboard: str, token: str, folder: Path) -> int:
    """Submit a Ray job that sleeps, and return the pid of what it left behind before that.

    Its child is gone; its grandchild has no parent in the job, a session of its own, and no ear for SIGTERM.
    """
    told, script = folder / "grandchild", folder / "sleeper.py"
    script.write_text(
        textwrap.dedent(f"""
            import os, pathlib, signal, time
            if child := os.fork():
                os.waitpid(child, 0)
                time.sleep(600)
            os.setsid()
            if os.fork():
                os._exit(0)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            pathlib.Path({str(told)!r}).write_text(f"{{os.getpid()}}\\n")
            time.sleep(600)
        """)
    )
    body = {"entrypoint": f"{sys.executable} {script}", "submission_id": "sleeper"}
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = Request(f"{dashboard}/api/jobs/", json.dumps(body).encode(), headers)
    with build_opener(ProxyHandler({})).open(request, timeout=30) as answer:
        assert json.load(answer)["submission_id"] == "sleeper"
    wait_until(lambda: told.exists() and told.read_text().endswith("\n"), 60)
    return int(told.read_text())


def client(stack: Stack) -> Any:
    access, secret = read_credentials(stack.state / "credentials")
    return boto3.client(
        "s3",
        endpoint_url=stack.url("S3 endpoint"),
        aws_access_key_id=access,
        aws_secret_access_key=secret,
        region_name="us-east-1",
        config=Config(
            signature_version="s3v4",
            response_checksum_validation="when_required",
            request_checksum_calculation="when_required",
            s3={"addressing_style": "path"},
        ),
    )


def listed(bucket: Any, prefix: str) -> list[Any]:
    found = bucket.list_objects_v2(Bucket="lockstep", Prefix=prefix).get("Contents", [])
    return [entry for entry in found if entry["Key"] == prefix]


def words_of(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def ray_command(everyone: list[psutil.Process]) -> list[str]:
    return next(words for words in map(words_of, everyone) if "--block" in words)


def listening(everyone: list[psutil.Process]) -> set[int]:
    ports = set()
    for process in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            sockets = process.net_connections("tcp")
            ports |= {found.laddr.port for found in sockets if found.status == psutil.CONN_LISTEN}
    return ports


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def busy_port(port: int = 0) -> Iterator[int]:
    with socket.socket() as held:
        held.bind(("127.0.0.1", port))
        held.listen()
        yield held.getsockname()[1]


def wait_until(condition: Callable[[], bool], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.05)
