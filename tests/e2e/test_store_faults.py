"""A store that fails, and one that is away, for real runs under Ray: training waits where it must; no bit changes."""

import time

import pytest

from api.jobs import Job, JobState
from tests.e2e.conftest import KILL_AT, KILL_SPEC
from tests.e2e.harness import Stack, assert_same_end, follow, reached, wait_until
from tests.faults.proxy import Fault
from tests.soak import soak

#: Longer than a rank may stand still (LOCKSTEP_HANG_SECONDS), in either form.
OUTAGE = soak(120.0, 25.0)


def test_a_run_of_which_every_fifth_request_fails_ends_as_if_nothing_had_happened(
    undisturbed: Job, stack: Stack
) -> None:
    share = 0.2 / 4
    faults = (
        Fault("error", rate=share, seed=1),
        Fault("error", rate=share, seed=2, status=503, code="SlowDown"),
        Fault("reset", rate=share, seed=3),
        Fault("lost_reply", rate=share, seed=4),
    )
    with stack.faults(*faults) as happened:
        job = stack.client.submit({**KILL_SPEC, "name": "bad-store"})
        ended = follow(stack.client, job)
    assert happened().total() > 50
    assert ended.attempt == 1
    assert_same_end(stack, ended, undisturbed)


@pytest.mark.soak
def test_a_run_outlives_a_store_that_is_gone(undisturbed: Job, stack: Stack) -> None:
    job = stack.client.submit({**KILL_SPEC, "name": "no-store"})
    reached(stack.client, job, KILL_AT)
    with stack.faults(away=True):
        left = time.monotonic()
        wait_until(lambda: conditions(stack, job) == ["storage_unreachable"], 30, "the job to say what is wrong")
        time.sleep(OUTAGE - (time.monotonic() - left))
        assert stack.client.get(job.id).state is JobState.RUNNING
    ended = follow(stack.client, job)
    assert len({c.segment for c in stack.client.checkpoints(job.id).items}) == 1, "no worker group was started anew"
    assert ended.attempt == 1
    assert_same_end(stack, ended, undisturbed)


def conditions(stack: Stack, job: Job) -> list[str]:
    return [condition.type for condition in stack.client.get(job.id).conditions]
