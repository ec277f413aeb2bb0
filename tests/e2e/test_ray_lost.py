"""Kill all of Ray in mid-run. Behind most other tests, since a new Ray has forgotten their jobs."""

from api.jobs import Job
from tests.e2e.conftest import KILL_AT, KILL_SPEC
from tests.e2e.harness import Stack, assert_as_if_nothing_had_happened, follow, kill_all_of_ray, reached


def test_a_ray_that_comes_back_empty_costs_one_attempt_and_no_bit(undisturbed: Job, stack: Stack) -> None:
    job = stack.client.submit({**KILL_SPEC, "name": "kill-all-of-ray"})
    reached(stack.client, job, KILL_AT)
    kill_all_of_ray(stack)
    ended = follow(stack.client, job)
    assert ended.attempt == 2
    assert stack.submissions(job) == [f"{job.id}-2"]
    assert_as_if_nothing_had_happened(stack, ended, undisturbed)
