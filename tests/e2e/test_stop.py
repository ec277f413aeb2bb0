"""The very last end-to-end test: it stops the stack, with a job in the middle of a step."""

import os
import time

import psutil

from api.jobs import Job
from service.processes import marked
from service.stack import MARKER
from tests.e2e.conftest import KILL_SPEC
from tests.e2e.harness import Stack, reached


def listening(pids: set[int]) -> list[int]:
    """Return the ports on which any of these processes listens."""
    found = psutil.net_connections("tcp")
    return [c.laddr.port for c in found if c.laddr and c.status == psutil.CONN_LISTEN and c.pid in pids]


def test_sigterm_in_mid_step_leaves_no_process_and_no_port_within_30_seconds(dataset: Job, stack: Stack) -> None:
    job = stack.client.submit({**KILL_SPEC, "name": "in-mid-step", "steps": 100_000})
    reached(stack.client, job, 3)
    before = {process.pid for process in stack.process.children(recursive=True)}
    ports = listening(before)
    assert len(before) > 10
    assert len(ports) > 5
    asked = time.monotonic()
    stack.process.terminate()
    assert stack.process.wait(30) == 0
    assert time.monotonic() - asked < 30
    assert [pid for pid in before if psutil.pid_exists(pid)] == []
    assert marked(MARKER, str(stack.state)) == []
    assert not set(ports) & set(listening(set(psutil.pids()) - {os.getpid()}))
