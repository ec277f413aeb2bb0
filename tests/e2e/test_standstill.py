"""What stands still: Ray's API, of which nothing follows about a job, and a rank, which is ended and started anew."""

import time

import pytest

from api.jobs import Job, JobState
from tests.e2e.conftest import KILL_AT, KILL_SPEC
from tests.e2e.harness import (
    Stack,
    assert_as_if_nothing_had_happened,
    assert_same_end,
    follow,
    frozen,
    reached,
    states,
    wait_until,
    worker,
)
from tests.soak import soak


@pytest.mark.soak
def test_while_rays_api_is_silent_no_job_changes_its_state(undisturbed: Job, stack: Stack) -> None:
    job = stack.client.submit({**KILL_SPEC, "name": "silent-ray"})
    reached(stack.client, job, KILL_AT)
    (dashboard,) = stack.children("dashboard/dashboard.py")
    with frozen(dashboard):
        began = time.monotonic()
        waiting = stack.client.submit({**KILL_SPEC, "name": "meanwhile"})
        wait_until(lambda: stack.client.get(waiting.id).conditions, 30, "the new job to say what it waits for")
        time.sleep(max(0.0, soak(60.0, 10.0) - (time.monotonic() - began)))
        for one, state in ((job, JobState.RUNNING), (waiting, JobState.QUEUED)):
            now = stack.client.get(one.id)
            assert (now.state, [c.type for c in now.conditions]) == (state, ["ray_unreachable"])
        stack.client.cancel(waiting.id)
    ended = follow(stack.client, job)
    assert states(stack, ended) == ["queued", "starting", "running", "succeeded"]
    assert_same_end(stack, ended, undisturbed)
    assert follow(stack.client, waiting, 30).state is JobState.CANCELLED
    assert stack.submissions(waiting) == []


@pytest.mark.soak
def test_a_frozen_rank_is_noticed_and_the_run_goes_on(
    undisturbed: Job, stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the full form with the watchdog's own limit of 60 s; 30 s are left for all the rest."""
    job = stack.client.submit({**KILL_SPEC, "name": "frozen-rank"})
    reached(stack.client, job, KILL_AT)
    with frozen(worker(stack, job, rank=1)):
        began = time.monotonic()
        wait_until(lambda: "resumed" in [e.type for e in stack.client.events(job.id).items], 120, "it to be resumed")
        seconds = time.monotonic() - began
    with capsys.disabled():
        print(f"\na frozen rank: resumed after {seconds:.1f} s")
    ended = follow(stack.client, job)
    assert any("nothing has moved for" in line.text for line in stack.client.logs(job.id).items), "its stacks"
    assert ended.attempt == 1
    assert_as_if_nothing_had_happened(stack, ended, undisturbed)
    assert seconds <= soak(90, 50)
