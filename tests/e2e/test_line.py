"""Another size after a pause, and a job that makes way for another one: the same samples, the same bits."""

import pytest

from api.jobs import Job, JobState
from tests.e2e.conftest import KILL_AT, KILL_SPEC
from tests.e2e.harness import Stack, assert_same_end, curve, follow, in_state, reached, states


@pytest.mark.soak
def test_a_job_resumed_at_another_size_trains_on_the_same_samples(undisturbed: Job, stack: Stack) -> None:
    job = stack.client.submit({**KILL_SPEC, "name": "resized"})
    reached(stack.client, job, KILL_AT)
    stack.client.pause(job.id)
    in_state(stack, job, JobState.PAUSED)
    stack.client.resume(job.id, workers=2)
    ended = follow(stack.client, job)
    assert (ended.state, ended.workers) == (JobState.SUCCEEDED, 2)
    ours, theirs = curve(stack, ended), curve(stack, undisturbed)
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], rel=1e-4)


@pytest.mark.soak
def test_a_job_that_makes_way_loses_nothing_but_time(undisturbed: Job, stack: Stack) -> None:
    low = stack.client.submit({**KILL_SPEC, "name": "low"})
    reached(stack.client, low, KILL_AT)
    urgent = {**KILL_SPEC, "name": "urgent", "priority": 10, "steps": 3, "resources": {"workers": 2}}
    high = stack.client.submit(urgent)
    assert follow(stack.client, high).state is JobState.SUCCEEDED
    ended = follow(stack.client, low)
    assert states(stack, low) == [
        "queued", "starting", "running", "pausing", "queued", "starting", "running", "succeeded",
    ]  # fmt: skip
    assert_same_end(stack, ended, undisturbed)
