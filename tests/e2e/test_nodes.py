"""Several machines, as far as one can be several: further Ray nodes join the cluster, are drained, and die."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest

from api.jobs import Job, JobState
from service.processes import end, living, tree
from service.stack import installed_programs
from tests.e2e.conftest import ELASTIC, KILL_AT, KILL_SPEC
from tests.e2e.harness import Stack, assert_same_end, follow, reached, wait_until
from tests.e2e.test_sizes import at_size, sizes


class Machine:
    """A further Ray node with its processes."""

    def __init__(self, stack: Stack, cpus: int) -> None:
        self._stack, self._known = stack, set(self._nodes())
        (gcs,) = stack.children("gcs/gcs_server")
        (port,) = [word.partition("=")[2] for word in gcs.cmdline() if word.startswith("--gcs_server_port=")]
        self._environment = gcs.environ()
        options = ["--block", f"--address=127.0.0.1:{port}", f"--num-cpus={cpus}", "--disable-usage-stats"]
        ports = ["--min-worker-port=0", "--max-worker-port=0", "--node-ip-address=127.0.0.1"]
        self.process = psutil.Popen(
            [*installed_programs().ray, "start", *options, *ports], env=self._environment, start_new_session=True
        )
        (self.id,) = wait_until(lambda: set(self._nodes()) - self._known, 60, "the node to join")

    def drain(self) -> None:
        """Say that it goes in a minute, as an autoscaler or a spot market does."""
        options = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test", f"--node-id={self.id}"]
        command = [*installed_programs().ray, "drain-node", *options, "--deadline-remaining-seconds=60"]
        assert psutil.Popen([*command, f"--address={self._gcs()}"], env=self._environment).wait(60) == 0

    def _gcs(self) -> str:
        return next(word.partition("=")[2] for word in self.process.cmdline() if word.startswith("--address="))

    def die(self) -> None:
        """All of it at once, as a machine does."""
        for process in tree(self.process.pid):
            process.kill()

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


@pytest.mark.parametrize("goes", [Machine.drain, Machine.die])
def test_a_machine_that_goes_takes_no_bit_with_it(
    goes: Callable[[Machine], None], undisturbed: Job, stack: Stack
) -> None:
    blocker = stack.client.submit({**KILL_SPEC, "name": "blocker", "steps": 100_000})
    reached(stack.client, blocker, 1)
    with machine(stack, cpus=3) as other:
        job = stack.client.submit({**KILL_SPEC, "name": goes.__name__})
        reached(stack.client, job, KILL_AT)
        goes(other)
        stack.client.cancel(blocker.id)
        ended = follow(stack.client, job)
    resumed = [e.data["step"] for e in stack.client.events(ended.id).items if e.type == "resumed"]
    assert len(resumed) == 1
    assert resumed[0] >= (KILL_AT if goes is Machine.drain else 20)
    assert_same_end(stack, ended, undisturbed)


def test_a_flexible_job_grows_onto_a_new_machine_and_outlives_it(alone: Job, stack: Stack) -> None:
    size = {"workers": {"min": 2, "max": 4}, "cpus": 1}
    blocker = stack.client.submit({**KILL_SPEC, "name": "blocker", "steps": 100_000, "resources": {"workers": 2}})
    reached(stack.client, blocker, 1)
    job = stack.client.submit({**ELASTIC, "name": "grows", "resources": size})
    at_size(stack, job, 2)
    with machine(stack, cpus=2) as other:
        at_size(stack, job, 4)
        other.die()
        ended = follow(stack.client, job)
    stack.client.cancel(blocker.id)
    assert ended.state is JobState.SUCCEEDED, ended.message
    assert sizes(stack, ended) == [2, 4, 2]
    assert_same_end(stack, ended, alone)
    assert follow(stack.client, blocker, 60).state is JobState.CANCELLED
