"""Submit, follow, succeed; submit, cancel: over REST, on real Ray, with a real bucket."""

import time

import pytest

from api.errors import InvalidSpec
from api.jobs import Job, JobState, Reason
from tests.e2e.conftest import KILL_SPEC, STEPS
from tests.e2e.harness import Stack, curve, follow, reached


def test_a_dataset_is_prepared_like_any_other_job(dataset: Job, stack: Stack) -> None:
    types = [event.type for event in stack.client.events(dataset.id).items]
    assert types.count("progress") == 4
    assert dataset.progress.step == dataset.progress.total_steps == 4
    assert dataset.result["vocab_size"] == 512
    assert dataset.result["train_tokens"] > 50_000


def test_a_job_succeeds_and_leaves_its_history(undisturbed: Job, stack: Stack) -> None:
    events = stack.client.events(undisturbed.id).items
    states = [event.state for event in events if event.state]
    assert states == [JobState.QUEUED, JobState.STARTING, JobState.RUNNING, JobState.SUCCEEDED]
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    steps = [step for step, _ in curve(stack, undisturbed)]
    assert steps == list(range(3, STEPS + 1, 3))
    checkpoints = stack.client.checkpoints(undisturbed.id).items
    assert [c.step for c in checkpoints] == list(range(10, STEPS + 1, 10))
    assert all(c.parts == 3 for c in checkpoints)
    evaluations = stack.client.metrics(undisturbed.id, keys=["eval_loss"]).items
    assert [p.step for p in evaluations] == [20, 40, 60]
    assert undisturbed.result["eval_loss"] == evaluations[-1].values["eval_loss"] < 6.3  # ln 512 is 6.24
    assert undisturbed.result["sample"].startswith("\n")
    assert {line.rank for line in stack.client.logs(undisturbed.id).items} == {0, 1, 2}


def test_ray_shows_the_job_by_name_and_id_and_the_train_run_with_its_workers(undisturbed: Job, stack: Stack) -> None:
    (row,) = [r for r in stack.ray("/api/jobs/") if (r["metadata"] or {}).get("job_id") == undisturbed.id]
    assert row["metadata"]["job_name"] == "kill-me"
    assert row["status"] == "SUCCEEDED"
    run = stack.train_run(f"{undisturbed.id}-1")
    assert run["status"] == "FINISHED"
    assert [len(attempt["workers"]) for attempt in run["attempts"]] == [3]


def test_a_cancelled_job_stops_within_a_step_and_keeps_its_history(dataset: Job, stack: Stack) -> None:
    job = stack.client.submit({**KILL_SPEC, "name": "cancel-me", "steps": 100_000})
    reached(stack.client, job, 6)
    asked = time.monotonic()
    stack.client.cancel(job.id)
    ended = follow(stack.client, job, 30)
    assert (ended.state, ended.reason) == (JobState.CANCELLED, Reason.USER_CANCELLED)
    assert time.monotonic() - asked < 15
    # Stopped by the loop itself, not by force: the last words of rank 0 are in the bucket.
    assert stack.train_run(f"{job.id}-1")["status"] == "FINISHED"


def test_a_job_that_never_fits_is_refused_in_numbers_and_a_queued_one_can_be_cancelled(
    dataset: Job, stack: Stack
) -> None:
    long = stack.client.submit({**KILL_SPEC, "name": "long", "steps": 100_000})
    second = stack.client.submit({**KILL_SPEC, "name": "second"})
    reached(stack.client, long, 1)
    waiting = stack.client.get(second.id)
    assert waiting.state is JobState.QUEUED
    assert waiting.conditions[0].message.startswith("needs 3 × 1 CPU, 1 CPU ")
    assert waiting.conditions[0].message == "needs 3 × 1 CPU, 1 CPU free"
    with pytest.raises(InvalidSpec, match="needs 6 × 1 CPU, but the whole cluster has 4 CPU"):
        stack.client.submit({**KILL_SPEC, "name": "too-large", "resources": {"workers": 6}})
    stack.client.cancel(second.id)
    assert follow(stack.client, second, 15).state is JobState.CANCELLED
    assert stack.submissions(second) == []
    stack.client.cancel(long.id)
    assert follow(stack.client, long, 60).state is JobState.CANCELLED
