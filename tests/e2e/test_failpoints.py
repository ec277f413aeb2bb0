"""The control plane dies at each commit point of starting an attempt; started again, it submits exactly once."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from api.client import Client
from api.errors import Unreachable
from api.jobs import Job, JobState
from tests.e2e.harness import CLOCKS, Stack, follow, storage_environment, wait_until
from tests.servers import free_port

SPEC = {
    "kind": "prepare",
    "name": "once",
    "dataset": "once",
    "source": {"type": "python-stdlib", "max_bytes": 50_000},
    "tokenizer": {"vocab_size": 300},
    "split": "tail",
}


@contextmanager
def control_plane(stack: Stack, folder: Path, port: int, failpoint: str) -> Iterator[subprocess.Popen[bytes]]:
    """A second control plane beside the stack's own, with a database of its own."""
    environment = os.environ | CLOCKS | storage_environment(stack.state, stack.s3_port)
    environment |= {
        "LOCKSTEP_PORT": str(port),
        "LOCKSTEP_DATABASE_URL": f"sqlite:///{folder}/own.db",
        "LOCKSTEP_STORAGE": "s3://lockstep",
        "LOCKSTEP_RAY_ADDRESS": stack.dashboard,
        "LOCKSTEP_RAY_TOKEN_PATH": str(stack.state / "ray_token"),
        "LOCKSTEP_BOOTSTRAP_KEY_PATH": str(stack.state / "api_key"),
        "LOCKSTEP_WORKER_PYTHON": sys.executable,
        "LOCKSTEP_FAILPOINT": failpoint,
    }
    with open(folder / "own.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "service.cli", "serve"], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.soak
@pytest.mark.parametrize("failpoint", ["after_intent", "after_attempt_record", "after_submit"])
def test_a_control_plane_killed_while_starting_an_attempt_submits_it_once(
    failpoint: str, stack: Stack, tmp_path: Path
) -> None:
    port = free_port()
    with Client(f"http://127.0.0.1:{port}", (stack.state / "api_key").read_text().strip()) as client:
        with control_plane(stack, tmp_path, port, failpoint) as first:
            job = wait_until(lambda: submitted(client, failpoint), 60, "the first control plane to accept")
            wait_until(lambda: first.poll() is not None, 60, f"it to die at {failpoint}")
        with control_plane(stack, tmp_path, port, ""):
            ended = follow(client, job)
            assert ended.state is JobState.SUCCEEDED, ended.message
            assert ended.attempt == 1
            assert stack.submissions(job) == [f"{job.id}-1"]


def submitted(client: Client, key: str) -> Job | None:
    try:
        return client.submit(SPEC, idempotency_key=key)
    except Unreachable:
        return None
