"""What an end means, and how long the next attempt waits."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from api.jobs import Reason
from service.reasons import REASONS, Policy, backoff

POLICY = Policy(start_deadline=600, stop_grace=30, checkpoint_grace=300, retry_backoff=2, backoff_limit=60)


def test_every_reason_has_a_meaning() -> None:
    assert set(REASONS) == set(Reason)
    for meaning in REASONS.values():
        assert meaning.sentence
        assert meaning.retryable or not (meaning.counts or meaning.waits)
        assert meaning.waits or not meaning.counts


def test_only_faults_of_its_own_processes_use_up_a_jobs_retries() -> None:
    assert {reason for reason in Reason if REASONS[reason].counts} == {Reason.OUT_OF_MEMORY, Reason.WORKER_ERROR}


def test_what_was_planned_is_followed_by_the_next_attempt_at_once() -> None:
    at_once = {reason for reason in Reason if REASONS[reason].retryable and not REASONS[reason].waits}
    assert at_once == {
        Reason.SUPERSEDED, Reason.USER_PAUSED, Reason.PREEMPTED, Reason.RESIZED, Reason.DRAINED, Reason.REWOUND
    }  # fmt: skip


@given(st.text(max_size=24), st.integers(1, 10**6), st.floats(0.1, 100), st.floats(0.1, 1000))
def test_the_wait_is_between_a_half_and_the_whole_of_what_doubles_up_to_the_limit(
    job_id: str, setbacks: int, first: float, limit: float
) -> None:
    policy = replace(POLICY, retry_backoff=first, backoff_limit=limit)
    longest = min(first * 2.0 ** min(setbacks - 1, 100), limit)
    wait = backoff(job_id, setbacks, policy).total_seconds()
    assert longest / 2 - 1e-5 <= wait <= longest + 1e-5
    assert backoff(job_id, setbacks, policy).total_seconds() == wait


def test_jobs_that_were_lost_together_come_back_apart() -> None:
    waits = [backoff(f"job-{number}", 6, POLICY).total_seconds() for number in range(200)]
    assert len(set(waits)) == 200
    assert min(waits) < 33
    assert max(waits) > 57
    assert 42 < sum(waits) / 200 < 48
    assert len({backoff("job-1", setbacks, POLICY) for setbacks in range(6, 60)}) == 54, "nor always in the same order"
