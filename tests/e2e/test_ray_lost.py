"""Kill all of Ray in mid-run. Last of the end-to-end tests, since a new Ray has forgotten the jobs of the others."""

from api.jobs import Job
from tests.e2e.conftest import KILL_AT, KILL_SPEC
from tests.e2e.harness import Stack, assert_as_if_nothing_had_happened, follow, kill, reached


def test_a_ray_that_comes_back_empty_costs_one_attempt_and_no_bit(undisturbed: Job, stack: Stack) -> None:
    job = stack.client.submit({**KILL_SPEC, "name": "kill-all-of-ray"})
    reached(stack.client, job, KILL_AT)
    words = ("ray::", "raylet", "gcs_server", "ray/dashboard", "workers.main", "/ray/", "bin/ray")
    for process in [p for word in words for p in stack.children(word)]:
        kill(process)
    ended = follow(stack.client, job)
    assert ended.attempt == 2
    assert stack.submissions(job) == [f"{job.id}-2"]
    assert_as_if_nothing_had_happened(stack, ended, undisturbed)
