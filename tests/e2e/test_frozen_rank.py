"""A rank stands still: its peers' watchdogs notice, and the group is ended and started anew."""

import time

import pytest

from api.jobs import Job
from tests.e2e.conftest import KILL_AT, KILL_SPEC
from tests.e2e.harness import Stack, assert_as_if_nothing_had_happened, follow, frozen, reached, wait_until, worker


@pytest.mark.soak
def test_a_frozen_rank_is_noticed_and_the_run_goes_on(
    undisturbed: Job, stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    """The watchdog's own limit is 60 s; 30 s are left for all the rest."""
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
    assert seconds <= 90
