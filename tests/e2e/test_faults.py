"""Kill a part of the system in mid-run; the job ends as if nothing had happened, to the bit."""

from collections.abc import Callable

import psutil
import pytest

from api.jobs import Job
from tests.e2e.conftest import KILL_AT, KILL_SPEC
from tests.e2e.harness import (
    Stack,
    assert_as_if_nothing_had_happened,
    drivers,
    follow,
    kill,
    reached,
    worker,
)


def one_of_three_workers(stack: Stack, job: Job) -> list[psutil.Process]:
    return [worker(stack, job, rank=1)]


@pytest.mark.parametrize(
    ("victims", "attempts", "restarts"),
    [(one_of_three_workers, 1, 1), (drivers, 2, 0)],
)
def test_a_killed_part_changes_no_bit_of_the_result(
    victims: Callable[[Stack, Job], list[psutil.Process]],
    attempts: int,
    restarts: int,
    undisturbed: Job,
    stack: Stack,
) -> None:
    job = stack.client.submit({**KILL_SPEC, "name": f"kill-{victims.__name__.replace('_', '-')}"})
    reached(stack.client, job, KILL_AT)
    for process in victims(stack, job):
        kill(process)
    ended = follow(stack.client, job)
    assert ended.attempt == attempts
    assert stack.client.checkpoints(job.id).items[-1].segment.startswith(f"{attempts}-{restarts}-")
    assert_as_if_nothing_had_happened(stack, ended, undisturbed)
