"""Ray's API stands still: nothing follows from that about a job."""

import time

import pytest

from api.jobs import Job, JobState
from tests.e2e.conftest import KILL_AT, KILL_SPEC
from tests.e2e.harness import (
    Stack,
    assert_same_end,
    follow,
    frozen,
    reached,
    states,
    wait_until,
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
