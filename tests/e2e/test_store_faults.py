"""A store that fails, and one that is away, for real runs under Ray: training waits where it must; no bit changes."""

import time
from dataclasses import replace

import pytest

from api.jobs import Job, JobState
from tests.e2e.conftest import KILL_AT, KILL_SPEC
from tests.e2e.harness import Stack, assert_same_end, follow, reached, wait_until
from tests.faults.proxy import Fault
from tests.soak import soak

#: Longer than a rank may stand still (LOCKSTEP_HANG_SECONDS), in either form.
OUTAGE = soak(120.0, 25.0)


@pytest.mark.soak
def test_a_run_with_a_bad_store_that_is_gone_for_a_while_ends_as_if_nothing_had_happened(
    undisturbed: Job, stack: Stack
) -> None:
    """One request in five fails, in one of four ways, from the job's beginning to its end."""
    kinds = (Fault("error"), Fault("error", status=503, code="SlowDown"), Fault("reset"), Fault("lost_reply"))
    faults = [replace(fault, rate=0.2 / len(kinds), seed=seed) for seed, fault in enumerate(kinds)]
    with stack.faults(*faults) as happened:
        job = stack.client.submit({**KILL_SPEC, "name": "bad-store"})
        reached(stack.client, job, KILL_AT)
        with stack.faults(*faults, away=True):
            left = time.monotonic()
            wait_until(lambda: conditions(stack, job) == ["storage_unreachable"], 30, "the job to say what is wrong")
            time.sleep(max(0.0, OUTAGE - (time.monotonic() - left)))
            assert stack.client.get(job.id).state is JobState.RUNNING
        ended = follow(stack.client, job)
        assert happened().total() > 50
    assert len({c.segment for c in stack.client.checkpoints(job.id).items}) == 1, "no worker group was started anew"
    assert ended.attempt == 1
    assert_same_end(stack, ended, undisturbed)


def conditions(stack: Stack, job: Job) -> list[str]:
    return [condition.type for condition in stack.client.get(job.id).conditions]
