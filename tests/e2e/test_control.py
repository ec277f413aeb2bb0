"""Pause, resume and preempt a running job: the same bits at the same size, the same samples at another one."""

import pytest

from api.jobs import Job, JobState
from tests.e2e.conftest import KILL_AT, KILL_SPEC
from tests.e2e.harness import Stack, assert_same_bits, curve, final_state, follow, reached, wait_until


def states(stack: Stack, job: Job) -> list[str]:
    return [event.state.value for event in stack.client.events(job.id).items if event.state is not None]


def in_state(stack: Stack, job: Job, state: JobState, seconds: float = 60) -> Job:
    def there() -> Job | None:
        now = stack.client.get(job.id)
        assert not now.state.ended or now.state is state, now.message
        return now if now.state is state else None

    found: Job = wait_until(there, seconds, f"{job.name} to be {state}")
    return found


def assert_same_end(stack: Stack, ended: Job, undisturbed: Job) -> None:
    assert ended.state is JobState.SUCCEEDED, ended.message
    assert_same_bits(final_state(stack, ended), final_state(stack, undisturbed))
    assert curve(stack, ended) == curve(stack, undisturbed)
    assert ended.result["eval_loss"] == undisturbed.result["eval_loss"]


def test_a_paused_job_lets_go_of_its_workers_and_goes_on_where_it_was(undisturbed: Job, stack: Stack) -> None:
    job = stack.client.submit({**KILL_SPEC, "name": "paused"})
    reached(stack.client, job, KILL_AT)
    stack.client.pause(job.id)
    paused = in_state(stack, job, JobState.PAUSED)
    # The pause's own; metric lines come every third step.
    assert stack.client.checkpoints(job.id).items[-1].step >= paused.progress.step
    wait_until(
        lambda: not [p for p in stack.children("workers.main") if job.id in p.cmdline()], 30, "its driver to end"
    )
    stack.client.resume(job.id)
    ended = follow(stack.client, job)
    assert ended.attempt == 2
    assert_same_end(stack, ended, undisturbed)


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
