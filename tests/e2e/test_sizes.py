"""A job of flexible size on a cluster that grows and shrinks. Its bits at every size are a matter of
tests/integration/test_train_many_processes.py, too, without Ray."""

from contextlib import ExitStack
from itertools import groupby

import pytest

from api.jobs import Job, JobState
from tests.e2e.conftest import ELASTIC
from tests.e2e.harness import Stack, assert_same_end, follow, reached, taken, wait_until
from tests.e2e.test_nodes import machine


def sizes(stack: Stack, job: Job) -> list[int]:
    """Return the number of workers of each attempt."""
    return [e.data["workers"] for e in stack.client.events(job.id).items if e.state is JobState.STARTING]


def trains_with(stack: Stack, job: Job, workers: int) -> None:
    """Wait until a job has done steps with so many workers."""

    def there() -> Job | None:
        now = stack.client.get(job.id)
        assert not now.state.ended, f"it ended early: {now.message}"
        return now if now.state is JobState.RUNNING and now.workers == workers else None

    begun = wait_until(there, 90, f"{job.name} to run with {workers} workers")
    reached(stack.client, job, begun.progress.step + 10)


@pytest.mark.soak
def test_one_then_four_then_two_workers_give_the_bits_of_one(alone: Job, stack: Stack) -> None:
    """A flexible job takes what room there is: it grows onto a machine that joins, and shrinks when that dies."""
    with ExitStack() as machines:
        with taken(stack, cpus=3):
            job = stack.client.submit({**ELASTIC, "name": "elastic", "resources": {"workers": {"min": 1, "max": 4}}})
            trains_with(stack, job, 1)
            other = machines.enter_context(machine(stack, cpus=3))
            trains_with(stack, job, 4)
        with taken(stack, cpus=2):
            other.die()
            ended = follow(stack.client, job)
    assert ended.state is JobState.SUCCEEDED, ended.message
    # Until Ray knows that the machine is dead, another attempt with four may begin; it is taken back.
    assert [size for size, _ in groupby(sizes(stack, ended))] == [1, 4, 2]
    assert_same_end(stack, ended, alone)
