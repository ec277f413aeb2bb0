"""`make demo`: the whole path on one machine, as a user would go it, over REST; then everything is stopped again."""

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from api import show
from api.client import Client
from api.errors import LockstepError
from api.jobs import Job, JobState
from api.profile import load

EXAMPLES = Path(__file__).parents[1] / "deploy" / "examples"
_START_SECONDS = 120.0
_STOP_SECONDS = 40.0


class DemoFailed(LockstepError):
    """The demo did not come to its end; the message says where."""


def demo() -> int:
    """Prepare a dataset, train on it, show the result; return the exit code."""
    console = Console()
    began = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: the stack must not outlive us
    try:
        with local_stack() as client:
            prepared = run_job(console, client, "stdlib.yaml", "Preparing a dataset from Python's own sources")
            trained = run_job(console, client, "stdlib-gpt.yaml", "Training a 3 M parameter decoder on two workers")
            show_result(console, prepared, trained, client)
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    except LockstepError as error:
        console.print(f"[red]The demo failed:[/red] {error}")
        return 1
    console.print(f"Done in {time.monotonic() - began:.0f} s; everything that the demo started is stopped again.")
    return 0


@contextmanager
def local_stack() -> Iterator[Client]:
    """Run `up` on temporary state and free ports, so that no running stack is touched; stop it at the end."""
    with tempfile.TemporaryDirectory(prefix="lockstep-demo-") as folder:
        profile = Path(folder) / "profile.json"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LOCKSTEP_")}
        environment |= {"LOCKSTEP_PROFILE": str(profile), "PYTHONUNBUFFERED": "1"}
        # The example needs two workers, also on a machine with a single core.
        cpus = str(max(2, os.cpu_count() or 1))
        ports = [word for name in ("port", "dashboard-port", "s3-port", "metrics-port") for word in (f"--{name}", "0")]
        command = [sys.executable, "-m", "service.cli", "up", "--state", f"{folder}/state", "--cpus", cpus, *ports]
        up = subprocess.Popen(command, env=environment, start_new_session=True)  # every word is ours  # nosec B603
        try:
            found = wait_for(profile, up)
            with Client(found.url, found.api_key) as client:
                wait_until_ready(client, up)
                yield client
        finally:
            stop(up)


def wait_for(profile: Path, up: "subprocess.Popen[bytes]") -> Any:
    """Return the client's profile once `up` has written it."""
    deadline = time.monotonic() + _START_SECONDS
    while not profile.exists():
        check_alive(up, deadline)
        time.sleep(0.2)
    return load({"LOCKSTEP_PROFILE": str(profile)})


def wait_until_ready(client: Client, up: "subprocess.Popen[bytes]") -> None:
    """Wait for the database, the bucket and Ray."""
    deadline = time.monotonic() + _START_SECONDS
    while any(check.status != "ok" for check in client.ready().checks.values()):
        check_alive(up, deadline)
        time.sleep(0.5)


def check_alive(up: "subprocess.Popen[bytes]", deadline: float) -> None:
    if up.poll() is not None:
        raise DemoFailed(f"the local stack ended with exit code {up.returncode}; its messages are above")
    if time.monotonic() > deadline:
        raise DemoFailed(f"the local stack was not ready within {_START_SECONDS:.0f} s")


def stop(up: "subprocess.Popen[bytes]") -> None:
    up.send_signal(signal.SIGTERM)
    try:
        up.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        up.kill()
        raise DemoFailed("the local stack did not stop in time") from None


def run_job(console: Console, client: Client, example: str, title: str) -> Job:
    """Submit an example over REST and follow it to its end; DemoFailed unless it succeeds."""
    console.rule(title)
    job = client.submit(yaml.safe_load((EXAMPLES / example).read_text()))
    console.print(f"deploy/examples/{example} → {job.id}")
    ended = show.watch(console, client.follow(job.id), with_result=False)
    if ended is None or ended.state is not JobState.SUCCEEDED:
        state = f"{ended.state}: {ended.message}" if ended else "still running"
        for line in client.logs(job.id).items[-20:]:
            console.print(f"  rank {line.rank}: {line.text}", markup=False)
        raise DemoFailed(f"job {job.id} is {state}")
    return ended


def show_result(console: Console, prepared: Job, trained: Job, client: Client) -> None:
    """Print losses side by side, the generated text, where the checkpoints are, and what `make up` leaves open."""
    console.rule("Result")
    losses = {
        "unigram frequencies of the same data": trained.result.get("unigram_loss"),
        "the trained model": trained.result["eval_loss"],
    }
    figures = Table("on the eval split", "loss (nats/token)", "perplexity", box=None, header_style="bold")
    for name, value in losses.items():
        if value is not None:
            figures.add_row(name, f"{value:.3f}", f"{math.exp(value):.1f}")
    checkpoints = client.checkpoints(trained.id).items
    steps = ", ".join(str(checkpoint.step) for checkpoint in checkpoints)
    console.print(figures)
    console.print("\nThe model writes:", style="bold")
    console.print(Text(str(trained.result["sample"]).rstrip(), style="green"))
    console.print("\nCheckpoints, complete and verified:", style="bold")
    console.print(f"  steps {steps}; {checkpoints[-1].size / 2**20:.1f} MiB each, weights and optimizer; the last at")
    console.print(f"  {checkpoints[-1].prefix} in the bucket (which goes with the demo)", soft_wrap=True)
    console.print(f"  trained on {prepared.result['dataset']}", soft_wrap=True)
    console.print("\nThe same stack, left running, is `make up`; by default at", style="bold")
    console.print("  API docs       http://127.0.0.1:8700/docs\n  Ray dashboard  http://127.0.0.1:8265\n")
