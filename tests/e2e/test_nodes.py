"""Several machines, as far as one can be several: further Ray nodes join the cluster, are drained, and die."""

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from api.jobs import Job, JobState
from service.processes import end, living, tree
from service.stack import installed_programs
from tests.e2e.conftest import ELASTIC
from tests.e2e.harness import Stack, assert_same_end, follow, in_state, kill, reached, reasons, taken, wait_until


class Machine:
    """A further Ray node with its processes."""

    def __init__(self, stack: Stack, cpus: int) -> None:
        self._stack = stack
        (gcs,) = stack.children("gcs/gcs_server")
        self._environment = gcs.environ()
        port = next(word.partition("=")[2] for word in gcs.cmdline() if word.startswith("--gcs_server_port="))
        self._address = f"--address=127.0.0.1:{port}"
        others = set(self._nodes())
        options = ("--block", self._address, f"--num-cpus={cpus}", "--disable-usage-stats")
        ports = ("--node-ip-address=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0")
        self.process = self._ray("start", *options, *ports)
        (self.id,) = wait_until(lambda: set(self._nodes()) - others, 60, "the node to join")

    def drain(self) -> None:
        """Say that it goes in a minute, as an autoscaler or a spot market does."""
        reason = ("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=a test")
        when = ("--deadline-remaining-seconds=60", f"--node-id={self.id}")
        assert self._ray("drain-node", self._address, *reason, *when).wait(60) == 0

    def die(self) -> None:
        """All of it at once, as a machine does."""
        for process in tree(self.process.pid):
            kill(process)

    def _ray(self, *words: str) -> psutil.Popen:
        return psutil.Popen([*installed_programs().ray, *words], env=self._environment, start_new_session=True)

    def _nodes(self) -> list[str]:
        rows = self._stack.ray("/api/v0/nodes?limit=1000")["data"]["result"]["result"]
        return [row["node_id"] for row in rows if row["state"] == "ALIVE"]


@contextmanager
def machine(stack: Stack, cpus: int) -> Iterator[Machine]:
    """Add a machine for as long as the block lasts."""
    made = Machine(stack, cpus)
    members = tree(made.process.pid)
    try:
        yield made
    finally:
        members += tree(made.process.pid)
        end(lambda: living(members), 5.0)
        made.process.wait(10)


@pytest.mark.soak
def test_a_job_leaves_a_machine_that_is_drained_by_a_checkpoint(alone: Job, stack: Stack) -> None:
    with machine(stack, cpus=2) as other:
        with taken(stack, cpus=4):
            job = stack.client.submit({**ELASTIC, "name": "moves", "resources": {"workers": 2}})
            told = reached(stack.client, job, 10)
            other.drain()
            in_state(stack, job, JobState.RECOVERING)
        ended = follow(stack.client, job)
    (resumed,) = [e.data["step"] for e in stack.client.events(job.id).items if e.type == "resumed"]
    assert resumed > told.progress.step
    assert reasons(stack, ended) == ["drained"]
    assert_same_end(stack, ended, alone)
