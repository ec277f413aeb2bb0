"""Pause, resume, an end of the driver, cancel and retry, fork: the same bits as if nothing had happened."""

import pytest

from api.jobs import Job, JobState
from tests.e2e.conftest import KILL_AT, KILL_SPEC
from tests.e2e.harness import (
    Stack,
    assert_same_bits,
    assert_same_end,
    curve,
    drivers,
    final_state,
    follow,
    in_state,
    reached,
    reasons,
    wait_until,
)


def test_a_paused_job_lets_go_of_its_workers_and_goes_on_where_it_was(undisturbed: Job, stack: Stack) -> None:
    job = stack.client.submit({**KILL_SPEC, "name": "paused"})
    reached(stack.client, job, KILL_AT)
    stack.client.pause(job.id)
    paused = in_state(stack, job, JobState.PAUSED)
    # The pause's own; metric lines come every third step.
    assert stack.client.checkpoints(job.id).items[-1].step >= paused.progress.step
    wait_until(lambda: not drivers(stack, job), 30, "its driver to end")
    stack.client.resume(job.id)
    ended = follow(stack.client, job)
    assert ended.attempt == 2
    assert_same_end(stack, ended, undisturbed)


def test_sigterm_to_the_driver_leads_to_a_checkpoint_and_another_attempt(undisturbed: Job, stack: Stack) -> None:
    job = stack.client.submit({**KILL_SPEC, "name": "told-to-end"})
    told = reached(stack.client, job, KILL_AT)
    (driver,) = drivers(stack, job)
    driver.terminate()
    ended = follow(stack.client, job)
    (resumed,) = [event for event in stack.client.events(job.id).items if event.type == "resumed"]
    assert resumed.data["step"] >= told.progress.step
    assert reasons(stack, ended) == ["drained"]
    assert ended.attempt == 2
    assert_same_end(stack, ended, undisturbed)


def test_a_job_cancelled_with_a_checkpoint_is_retried_from_there_and_forked_from_another(
    undisturbed: Job, stack: Stack
) -> None:
    job = stack.client.submit({**KILL_SPEC, "name": "cancelled"})
    reached(stack.client, job, KILL_AT)
    stack.client.cancel(job.id, keep_checkpoint=True)
    cancelled = follow(stack.client, job, 60)
    assert cancelled.state is JobState.CANCELLED
    kept = stack.client.checkpoints(job.id).items[-1].step
    assert kept >= KILL_AT
    retry = stack.client.retry(job.id)
    # Beside it, one worker goes its own way from a checkpoint that the job had passed.
    changes = {"schedule": {"type": "constant"}, "steps": 30, "resources": {"workers": 1}}
    fork = stack.client.submit({**KILL_SPEC, **changes, "name": "fork", "init": {"from_job": job.id, "step": 20}})

    ended = follow(stack.client, retry)
    assert (ended.state, ended.attempt) == (JobState.SUCCEEDED, 1)
    assert next(step for step, _ in curve(stack, ended)) > kept
    assert_same_bits(final_state(stack, ended), final_state(stack, undisturbed))

    forked = follow(stack.client, fork)
    assert forked.state is JobState.SUCCEEDED, forked.message
    ours, theirs = dict(curve(stack, forked)), dict(curve(stack, undisturbed))
    # The first line is of step 21 alone: what its source had summed up by step 20 stays there.
    assert list(ours) == [21, 24, 27, 30]
    assert ours[24] == pytest.approx(theirs[24], rel=0.02)
    assert ours[30] != theirs[30]
    assert stack.client.get(job.id).state is JobState.CANCELLED
