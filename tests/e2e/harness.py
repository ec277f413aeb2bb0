"""A running stack for end-to-end tests: real Ray, a real S3 server over HTTP, a real control plane, all by `up`."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from api.client import Client
from api.documents import CheckpointRef
from api.jobs import Event, Job, JobState
from api.layout import PROJECT, JobLayout
from api.profile import load
from api.storage import Bucket
from service.stack import read_credentials
from tests.faults.proxy import Fault
from tests.faults.stack import CONTROL
from tests.servers import free_port
from tests.soak import soak
from workers.restore import read_checkpoint
from workers.snapshot import State

#: Short clocks, in seconds.
CLOCKS = {
    "LOCKSTEP_STREAM_INTERVAL": "0.2",
    "LOCKSTEP_CONTROL_INTERVAL": "0.2",
    "LOCKSTEP_RECONCILE_INTERVAL": "0.3",
    "LOCKSTEP_RETRY_BACKOFF": "0.5",
    "LOCKSTEP_BACKOFF_LIMIT": "5",
    "LOCKSTEP_RESIZE_INTERVAL": "3",
    "LOCKSTEP_HANG_SECONDS": soak("60", "20"),
}


@dataclass
class Stack:
    """`lockstep-server up` in a process of its own."""

    state: Path
    process: psutil.Popen
    client: Client
    dashboard: str
    s3_port: int

    @property
    def bucket(self) -> Bucket:
        return Bucket("s3://lockstep")

    def children(self, word: str) -> list[psutil.Process]:
        """Return the processes below `up` whose command line has a word in it."""
        found = []
        for process in self.process.children(recursive=True):
            try:
                if word in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def ray(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return what Ray's HTTP API says, to a POST if there is a body."""
        token = (self.state / "ray_token").read_text().strip()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(f"{self.dashboard}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)

    def address(self, title: str) -> str:
        """Return where something is, by what `up` called it when all was ready."""
        said = self.state.with_suffix(".log").read_text()
        line = next(line for line in said.splitlines() if line.startswith(f"  {title} "))
        return next(word for word in line.split() if word.startswith("http://"))

    def scrape(self, title: str) -> list[Sample]:
        """Return the samples at an address for Prometheus."""
        with urllib.request.urlopen(self.address(title), timeout=10) as response:
            families = text_string_to_metric_families(response.read().decode())
            return [sample for family in families for sample in family.samples]

    def submissions(self, job: Job) -> list[str]:
        """Return the submission ids of a job that Ray knows, in order."""
        rows = self.ray("/api/jobs/")
        return sorted(row["submission_id"] for row in rows if (row["metadata"] or {}).get("job_id") == job.id)

    @contextmanager
    def faults(self, *faults: Fault, away: bool = False) -> Iterator[Callable[[], Counter[str]]]:
        """Let the store have these faults inside the block, or be away; give what counts those that happened."""
        control = self.state / CONTROL

        def said() -> dict[str, Any]:
            said: dict[str, Any] = json.loads(control.with_name(f"{CONTROL}.counts").read_text())
            return said

        def ask(wish: dict[str, Any]) -> None:
            text, partial = json.dumps(wish), control.with_suffix(".partial")
            partial.write_text(text)
            partial.rename(control)
            wait_until(lambda: said()["wish"] == text, 10, "the proxy to obey")

        before, known = Counter(said()["faults"]), json.loads(said()["wish"] or "{}")
        ask({"away": away, "faults": [asdict(fault) for fault in faults]})
        try:
            yield lambda: Counter(said()["faults"]) - before
        finally:
            ask(known)

    def train_run(self, name: str) -> Any:
        """Return a run that the dashboard's API knows of Ray Train, by its name."""
        return next(run for run in self.ray("/api/train/v2/runs/v1")["train_runs"] if run["name"] == name)


@contextmanager
def running_stack(state: Path, cpus: int, program: str = "service.cli up") -> Iterator[Stack]:
    """Start `up` on free ports; stop it with SIGTERM at the end."""
    ports = {name: free_port() for name in ("port", "dashboard-port", "s3-port", "metrics-port")}
    options = [f"--{name}={port}" for name, port in ports.items()]
    command = [sys.executable, "-m", *program.split(), "--state", str(state), "--cpus", str(cpus), *options]
    environment = os.environ | CLOCKS | {"LOCKSTEP_PROFILE": str(state.with_suffix(".profile"))}
    with open(state.with_suffix(".log"), "wb") as log:
        process = psutil.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_until(lambda: state.with_suffix(".profile").exists(), 90, "up to be ready")
        profile = load({"LOCKSTEP_PROFILE": str(state.with_suffix(".profile"))})
        os.environ.update(storage_environment(state, ports["s3-port"]))
        with Client(profile.url, profile.api_key) as client:
            stack = Stack(state, process, client, f"http://127.0.0.1:{ports['dashboard-port']}", ports["s3-port"])
            wait_until(lambda: all(c.status == "ok" for c in client.ready().checks.values()), 90, "Ray to be ready")
            yield stack
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def storage_environment(state: Path, port: int) -> dict[str, str]:
    """Return what gives this process access to the stack's bucket."""
    access, secret = read_credentials(state / "credentials")
    return {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": access,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Return the first true value of `condition`; fail after a while."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)
    return value


def follow(client: Client, job: Job, seconds: float = 240) -> Job:
    """Return the job once it has ended; a control plane that is away for a while does not matter."""
    deadline = time.monotonic() + seconds
    for update in client.follow(job.id, poll_seconds=0.2):
        job = update.job
        assert time.monotonic() < deadline, f"{job.name} is still {job.state} after {seconds} s: {job.message}"
    return job


def reached(client: Client, job: Job, step: int, seconds: float = 180) -> Job:
    """Return the job once its progress has come to a step; fail if it ends before."""

    def there() -> Job | None:
        now = client.get(job.id)
        assert not now.state.ended, f"{now.name} ended early: {now.message}"
        return now if now.progress.step >= step else None

    found: Job = wait_until(there, seconds, f"step {step} of {job.id}")
    return found


def final_state(stack: Stack, job: Job) -> State:
    """Return weights and optimizer state of a job's last checkpoint, every byte verified."""
    last = stack.client.checkpoints(job.id).items[-1]
    point = CheckpointRef(segment=last.segment, step=last.step)
    return read_checkpoint(stack.bucket, JobLayout(PROJECT, job.id), point).state


def assert_same_bits(one: State, other: State) -> None:
    """Compare every tensor, weights and optimizer alike, to the bit."""
    assert one.keys() == other.keys()
    assert any(name.startswith("optimizer.") for name in one)
    different = [name for name in one if one[name].numpy().tobytes() != other[name].numpy().tobytes()]
    assert not different, f"{len(different)} of {len(one)} tensors differ, {different[0]} the first"


def curve(stack: Stack, job: Job) -> list[tuple[int, float]]:
    """Return (step, loss) along the job's history."""
    return [(p.step, p.values["loss"]) for p in stack.client.metrics(job.id, keys=["loss"]).items]


def assert_as_if_nothing_had_happened(stack: Stack, ended: Job, undisturbed: Job) -> None:
    """The same end as the undisturbed run's; it did resume from a checkpoint."""
    assert_same_end(stack, ended, undisturbed)
    (resumed,) = [event for event in stack.client.events(ended.id).items if event.type == "resumed"]
    # The run goes on between the last look and the kill, so it may have come past more than two checkpoints.
    assert 20 <= resumed.data["step"] < ended.progress.step


def all_events(stack: Stack, job: Job) -> list[Event]:
    """Return a job's events, over as many pages as they fill."""
    events: list[Event] = []
    while page := stack.client.events(job.id, after=events[-1].seq if events else 0).items:
        events += page
    return events


def states(stack: Stack, job: Job) -> list[str]:
    """Return the states that a job went through."""
    return [event.state.value for event in all_events(stack, job) if event.state is not None]


def reasons(stack: Stack, job: Job) -> list[str]:
    """Return why a job's attempts were lost or ended, all but the last."""
    return [event.data["reason"] for event in all_events(stack, job) if event.state is JobState.RECOVERING]


def in_state(stack: Stack, job: Job, state: JobState, seconds: float = 60) -> Job:
    """Return the job once it is in a state; fail if it ends in another one before."""

    def there() -> Job | None:
        now = stack.client.get(job.id)
        assert not now.state.ended or now.state is state, now.message
        return now if now.state is state else None

    found: Job = wait_until(there, seconds, f"{job.name} to be {state}")
    return found


def assert_same_end(stack: Stack, ended: Job, undisturbed: Job) -> None:
    """Weights, optimizer, curve and evaluation equal those of a run that nothing happened to."""
    assert ended.state is JobState.SUCCEEDED, ended.message
    assert_same_bits(final_state(stack, ended), final_state(stack, undisturbed))
    assert curve(stack, ended) == curve(stack, undisturbed)
    assert ended.result["eval_loss"] == undisturbed.result["eval_loss"]


def drivers(stack: Stack, job: Job) -> list[psutil.Process]:
    """Return the driver processes of a job."""
    return [process for process in stack.children("-m workers.") if job.id in process.cmdline()]


def worker(stack: Stack, job: Job, rank: int, attempt: int = 1) -> psutil.Process:
    """Return a rank's process, of the newest worker group of an attempt."""
    group = stack.train_run(f"{job.id}-{attempt}")["attempts"][-1]
    return psutil.Process(next(w["pid"] for w in group["workers"] if w["world_rank"] == rank))


@contextmanager
def taken(stack: Stack, cpus: int) -> Iterator[Job]:
    """Let a job hold CPUs for as long as the block lasts, without using them: its only process is stopped."""
    spec = {
        "kind": "prepare",
        "name": "idle",
        "dataset": "idle",
        "source": {"type": "python-stdlib", "max_bytes": 50_000},
        "tokenizer": {"vocab_size": 300},
        "split": "tail",
        "resources": {"cpus": cpus},
    }
    job = stack.client.submit(spec)
    (driver,) = wait_until(lambda: drivers(stack, job), 60, "a job that only takes room to have it")
    with frozen(driver):
        yield job
    follow(stack.client, job, 60)


@contextmanager
def frozen(process: psutil.Process) -> Iterator[None]:
    """Stop a process (SIGSTOP) for as long as the block lasts; it may be killed meanwhile."""
    process.suspend()
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            process.resume()


def kill(process: psutil.Process) -> None:
    """kill -9, unless it is gone already."""
    with suppress(psutil.NoSuchProcess):
        process.kill()


def kill_all_of_ray(stack: Stack) -> None:
    """kill -9 to every process of Ray, workers and drivers included."""
    words = ("ray::", "raylet", "gcs_server", "ray/dashboard", "workers.main", "/ray/", "bin/ray")
    for process in [found for word in words for found in stack.children(word)]:
        kill(process)
