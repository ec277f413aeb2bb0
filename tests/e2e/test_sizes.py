"""A job of flexible size takes what room there is; with `determinism: elastic` the bits do not depend on it."""

from api.jobs import Job, JobState
from tests.e2e.conftest import ELASTIC, KILL_SPEC
from tests.e2e.harness import Stack, assert_same_end, follow, reached, wait_until


def sizes(stack: Stack, job: Job) -> list[int]:
    """Return the number of workers of each attempt."""
    return [e.data["workers"] for e in stack.client.events(job.id).items if e.state is JobState.STARTING]


def at_size(stack: Stack, job: Job, workers: int) -> None:
    def there() -> bool:
        now = stack.client.get(job.id)
        assert not now.state.ended, f"it ended early: {now.message}"
        return now.state is JobState.RUNNING and now.workers == workers

    wait_until(there, 90, f"{job.name} to run with {workers} workers")


def test_one_then_four_then_two_workers_give_the_bits_of_one(alone: Job, stack: Stack) -> None:
    """Growth by itself when room appears, and less room when a job of higher priority takes it."""
    blocker = stack.client.submit({**KILL_SPEC, "name": "blocker", "steps": 100_000})
    reached(stack.client, blocker, 1)
    job = stack.client.submit({**ELASTIC, "name": "elastic", "resources": {"workers": {"min": 1, "max": 4}}})
    at_size(stack, job, 1)
    stack.client.cancel(blocker.id)
    at_size(stack, job, 4)
    urgent = {**KILL_SPEC, "name": "urgent", "priority": 10, "steps": 100_000, "resources": {"workers": 2}}
    high = stack.client.submit(urgent)
    ended = follow(stack.client, job)
    stack.client.cancel(high.id)
    assert sizes(stack, ended) == [1, 4, 2]
    assert_same_end(stack, ended, alone)
    assert follow(stack.client, high, 60).state is JobState.CANCELLED
