"""The state machine: a table with every state and branch, and properties under any sequence of observations."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.documents import ResultDocument
from api.jobs import ENDED, JobState, Reason
from service.lifecycle import (
    REASONS,
    Begin,
    Decision,
    Finish,
    JobView,
    Move,
    Observation,
    Policy,
    RayStatus,
    Recover,
    StopRay,
    Submit,
    TellStop,
    Wait,
    backoff,
    decide,
)

T0 = datetime(2026, 11, 23, tzinfo=UTC)
POLICY = Policy(start_deadline=600, stop_grace=30, retry_backoff=2)
QUEUED = JobView(JobState.QUEUED, 0, 0, 3, None, False, None, T0, None)
STARTING = replace(QUEUED, state=JobState.STARTING, attempt=1, ray_session="s1")
RUNNING = replace(STARTING, state=JobState.RUNNING)
RECOVERING = replace(STARTING, state=JobState.RECOVERING)
CANCELLING = replace(RUNNING, state=JobState.CANCELLING, cancel_requested=True, stop_reason=Reason.USER_CANCELLED)
EXPIRING = replace(CANCELLING, cancel_requested=False, stop_reason=Reason.DEADLINE)
SEEN = Observation(RayStatus.RUNNING, "s1", "", True, "", True, "run", None, None)
NOTHING = replace(SEEN, ray=RayStatus.ABSENT, began=False, control=None)
NO_RAY = replace(NOTHING, ray=RayStatus.UNREACHABLE, ray_session=None, ray_message="Ray is silent")
NO_BUCKET = replace(SEEN, bucket_reachable=False, bucket_message="S3 is silent", began=False, control=None)
RAY_WAIT, BUCKET_WAIT = Wait("ray_unreachable", "Ray is silent"), Wait("storage_unreachable", "S3 is silent")


def result(outcome: str, reason: Reason, message: str = "so it was") -> ResultDocument:
    return ResultDocument.model_validate(
        {"outcome": outcome, "reason": reason, "message": message, "step": 7, "created_at": T0}
    )


DONE = result("succeeded", Reason.COMPLETED)
BAD = result("failed", Reason.INVALID_DATA)
OLD = result("stopped", Reason.SUPERSEDED)
OVER = (RayStatus.ABSENT, RayStatus.SUCCEEDED, RayStatus.FAILED, RayStatus.STOPPED)
SUCCESS = Finish(JobState.SUCCEEDED, Reason.COMPLETED, "so it was")
BAD_DATA = Finish(JobState.FAILED, Reason.INVALID_DATA, "the data cannot be used: so it was")
DEADLINE = Finish(JobState.FAILED, Reason.DEADLINE, REASONS[Reason.DEADLINE].sentence)
CANCELLED = Finish(JobState.CANCELLED, Reason.USER_CANCELLED, "cancelled on request")
CANCELLED_EARLY = Finish(JobState.CANCELLED, Reason.USER_CANCELLED, "cancelled before it ran")
STOP = Move(JobState.CANCELLING, "stopping on request", Reason.USER_CANCELLED)
EXPIRE = Move(JobState.CANCELLING, "stopping: the deadline passed", Reason.DEADLINE)
RESTARTED = Recover(Reason.RAY_LOST, "Ray was restarted and knows nothing of this attempt")

TABLE: list[tuple[str, JobView, Observation, float, Decision]] = [
    ("queued, all is there", QUEUED, NOTHING, 0, Begin("s1")),
    ("queued, Ray down", QUEUED, NO_RAY, 0, RAY_WAIT),
    ("queued, Ray without a session", QUEUED, replace(NOTHING, ray_session=None, ray_message="?"), 0,
     Wait("ray_unreachable", "?")),
    ("queued, bucket down", QUEUED, replace(NO_BUCKET, ray=RayStatus.ABSENT), 0, BUCKET_WAIT),
    ("queued, no room", QUEUED, replace(NOTHING, admission="1 job ahead"), 0, Wait("waiting", "1 job ahead")),
    ("queued, cancelled", replace(QUEUED, cancel_requested=True), NO_RAY, 0, CANCELLED_EARLY),
    ("queued, expired", replace(QUEUED, deadline=T0), NO_RAY, 0, DEADLINE),
    ("queued, cancelled and expired", replace(QUEUED, cancel_requested=True, deadline=T0), NOTHING, 0, CANCELLED_EARLY),
    ("queued, not yet expired", replace(QUEUED, deadline=T0 + timedelta(seconds=5)), NOTHING, 4.9, Begin("s1")),
    ("recovering, backing off", RECOVERING, NOTHING, 1.9, Wait()),
    ("recovering, backed off", RECOVERING, NOTHING, 2, Begin("s1")),
    ("recovering, backed off, new session", RECOVERING, replace(NOTHING, ray_session="s2"), 2, Begin("s2")),
    ("recovering, third time", replace(RECOVERING, attempt=3), NOTHING, 7.9, Wait()),
    ("recovering, no room", RECOVERING, replace(NOTHING, admission="full"), 2, Wait("waiting", "full")),
    ("recovering, Ray down", RECOVERING, NO_RAY, 99, RAY_WAIT),
    ("recovering, bucket down", RECOVERING, NO_BUCKET, 99, BUCKET_WAIT),
    ("recovering, cancelled", replace(RECOVERING, cancel_requested=True), NO_RAY, 0, CANCELLED_EARLY),
    ("recovering, expired", replace(RECOVERING, deadline=T0), NOTHING, 0, DEADLINE),
    ("starting, not posted", STARTING, NOTHING, 0, Submit()),
    ("starting, pending", STARTING, replace(NOTHING, ray=RayStatus.PENDING), 599, Wait()),
    ("starting, never alive", STARTING, replace(NOTHING, ray=RayStatus.PENDING), 600,
     Recover(Reason.START_TIMEOUT, "no sign of life in 600 s")),
    ("starting, never alive again, which is not the job's fault", replace(STARTING, faults=3),
     replace(NOTHING, ray=RayStatus.RUNNING), 600, Recover(Reason.START_TIMEOUT, "no sign of life in 600 s")),
    ("starting, Ray refuses every post", STARTING, NOTHING, 600,
     Recover(Reason.START_TIMEOUT, "Ray took no submission in 600 s")),
    ("starting, began", STARTING, SEEN, 0, Move(JobState.RUNNING, "running")),
    ("starting, began late", STARTING, SEEN, 601, Move(JobState.RUNNING, "running")),
    ("starting, Ray down", STARTING, NO_RAY, 9999, RAY_WAIT),
    ("starting, bucket down", STARTING, NO_BUCKET, 9999, BUCKET_WAIT),
    ("starting, Ray restarted", STARTING, replace(NOTHING, ray_session="s2"), 0, RESTARTED),
    ("starting, over at once", STARTING, replace(SEEN, ray=RayStatus.SUCCEEDED, result=DONE), 0, SUCCESS),
    ("starting, cancelled", replace(STARTING, cancel_requested=True), NO_RAY, 0, STOP),
    ("starting, expired", replace(STARTING, deadline=T0), NO_BUCKET, 0, EXPIRE),
    ("running, alive", RUNNING, SEEN, 99999, Wait()),
    ("running, Ray down", RUNNING, NO_RAY, 99999, RAY_WAIT),
    ("running, bucket down", RUNNING, replace(NO_BUCKET, ray=RayStatus.FAILED), 0, BUCKET_WAIT),
    ("running, result but driver not gone", RUNNING, replace(SEEN, result=DONE), 0, Wait()),
    ("running, expired", replace(RUNNING, deadline=T0), SEEN, 0, EXPIRE),
    ("running, cancelled", replace(RUNNING, cancel_requested=True), SEEN, 0, STOP),
    ("running, cancelled at its end", replace(RUNNING, cancel_requested=True),
     replace(SEEN, ray=RayStatus.SUCCEEDED, result=DONE), 0, STOP),
    ("running, Ray restarted", RUNNING, replace(SEEN, ray=RayStatus.ABSENT, ray_session="s2"), 0, RESTARTED),
    ("running, Ray restarted after the result", RUNNING,
     replace(SEEN, ray=RayStatus.ABSENT, ray_session="s2", result=DONE), 0, SUCCESS),
    ("running, forgotten", RUNNING, NOTHING, 0, Recover(Reason.RAY_LOST, "Ray no longer knows this attempt")),
    ("running, forgotten, retries used up", replace(RUNNING, faults=3), NOTHING, 0,
     Recover(Reason.RAY_LOST, "Ray no longer knows this attempt")),
    ("running, superseded", RUNNING, replace(SEEN, ray=RayStatus.SUCCEEDED, result=OLD), 0,
     Recover(Reason.SUPERSEDED, "the attempt stopped: so it was")),
    *[(f"running, {ray} with success", RUNNING, replace(SEEN, ray=ray, result=DONE), 0, SUCCESS) for ray in OVER],
    *[(f"running, {ray} with bad data", RUNNING, replace(SEEN, ray=ray, result=BAD), 0, BAD_DATA) for ray in OVER],
    *[(f"running, {ray} without a result", RUNNING, replace(SEEN, ray=ray, ray_message="exit 1"), 0,
       Recover(Reason.WORKER_LOST, f"Ray reports {ray}: exit 1")) for ray in OVER[1:]],
    ("running, died too often", replace(RUNNING, faults=3), replace(SEEN, ray=RayStatus.FAILED, ray_message="x"), 0,
     Finish(JobState.FAILED, Reason.WORKER_LOST, "the driver or its workers died, 4 times: Ray reports failed: x")),
    ("cancelling, not told", CANCELLING, SEEN, 0, TellStop()),
    ("cancelling, not told, Ray down", CANCELLING, replace(NO_RAY, control="run"), 99, TellStop()),
    ("cancelling, not told, never posted", CANCELLING, NOTHING, 0, TellStop()),
    ("cancelling, told", CANCELLING, replace(SEEN, control="cancel"), 29.9, Wait()),
    ("cancelling, impatient", CANCELLING, replace(SEEN, control="cancel"), 30, StopRay()),
    ("cancelling, impatient, bucket down", CANCELLING, NO_BUCKET, 30, StopRay()),
    ("cancelling, impatient, cannot be told", CANCELLING, SEEN, 30, StopRay()),
    ("cancelling, bucket down", CANCELLING, NO_BUCKET, 29, BUCKET_WAIT),
    ("cancelling, Ray down", CANCELLING, replace(NO_RAY, control="cancel"), 9999, RAY_WAIT),
    ("cancelling, Ray restarted", CANCELLING, replace(SEEN, control="cancel", ray_session="s2"), 0, CANCELLED),
    *[(f"cancelling, {ray}", CANCELLING, replace(SEEN, control="cancel", ray=ray), 0, CANCELLED) for ray in OVER],
    *[(f"expiring, {ray}", EXPIRING, replace(SEEN, control="cancel", ray=ray), 0, DEADLINE) for ray in OVER],
    ("cancelling, over, not told", CANCELLING, replace(SEEN, ray=RayStatus.STOPPED), 99, TellStop()),
    ("cancelling, succeeded first", CANCELLING, replace(SEEN, control="cancel", ray=RayStatus.SUCCEEDED, result=DONE),
     0, SUCCESS),
    ("cancelling, failed first", CANCELLING, replace(SEEN, control="cancel", ray=RayStatus.FAILED, result=BAD), 0,
     CANCELLED),
    ("cancelling, no reason noted", replace(CANCELLING, stop_reason=None),
     replace(SEEN, control="cancel", ray=RayStatus.STOPPED), 0, CANCELLED),
    *[(f"{state}, whatever happens", replace(RUNNING, state=state, cancel_requested=True, deadline=T0),
       replace(SEEN, ray=RayStatus.FAILED), 99, Wait()) for state in sorted(ENDED)],
]  # fmt: skip


@pytest.mark.parametrize(("job", "seen", "seconds", "expected"), [row[1:] for row in TABLE], ids=[r[0] for r in TABLE])
def test_decision(job: JobView, seen: Observation, seconds: float, expected: Decision) -> None:
    assert decide(job, seen, T0 + timedelta(seconds=seconds), POLICY) == expected


def test_the_table_names_every_state_and_every_kind_of_decision() -> None:
    assert {row[1].state for row in TABLE} == set(JobState)
    assert {type(row[4]) for row in TABLE} == {Wait, Begin, Submit, Move, TellStop, StopRay, Recover, Finish}


def test_every_reason_has_a_meaning() -> None:
    assert set(REASONS) == set(Reason)
    assert all(meaning.sentence and not (meaning.counts and not meaning.retryable) for meaning in REASONS.values())


@pytest.mark.parametrize("reason", [reason for reason in Reason if REASONS[reason].retryable])
def test_a_failure_that_may_be_retried_is_retried_within_the_budget(reason: Reason) -> None:
    seen = replace(SEEN, ray=RayStatus.FAILED, result=result("failed", reason))
    assert isinstance(decide(RUNNING, seen, T0, POLICY), Recover)
    last = decide(replace(RUNNING, faults=3), seen, T0, POLICY)
    assert isinstance(last, Finish if REASONS[reason].counts else Recover)


def test_backoff_doubles_up_to_a_minute() -> None:
    waits = [backoff(attempt, POLICY).total_seconds() for attempt in (1, 2, 3, 5, 6, 7, 60)]
    assert waits == [2, 4, 8, 32, 60, 60, 60]


results = st.one_of(
    st.none(),
    st.just(DONE),
    st.sampled_from([r for r in Reason if r is not Reason.COMPLETED]).map(lambda r: result("failed", r)),
    st.sampled_from(list(Reason)).map(lambda r: result("stopped", r)),
)


@st.composite
def observations(draw: st.DrawFn) -> Observation:
    """What the observer can report: no session without Ray, no traces without the bucket."""
    session = draw(st.sampled_from(["s1", "s2", None]))
    bucket = draw(st.booleans())
    return Observation(
        ray=draw(st.sampled_from(list(RayStatus))) if session else RayStatus.UNREACHABLE,
        ray_session=session,
        ray_message="",
        bucket_reachable=bucket,
        bucket_message="",
        began=bucket and draw(st.booleans()),
        control=draw(st.sampled_from([None, "run", "cancel", "superseded"])) if bucket else None,
        result=draw(results) if bucket else None,
        admission=draw(st.sampled_from([None, "full"])),
    )


@st.composite
def views(draw: st.DrawFn) -> JobView:
    retries = draw(st.integers(0, 3))
    return JobView(
        state=draw(st.sampled_from(list(JobState))),
        attempt=draw(st.integers(0, 5)),
        faults=draw(st.integers(0, retries)),
        retries=retries,
        ray_session=draw(st.sampled_from(["s1", "s2"])),
        cancel_requested=draw(st.booleans()),
        stop_reason=draw(st.sampled_from([None, Reason.USER_CANCELLED, Reason.DEADLINE])),
        state_since=T0,
        deadline=draw(st.sampled_from([None, T0 + timedelta(seconds=20), T0 + timedelta(days=1)])),
    )


times = st.sampled_from([0.0, 1.0, 3.0, 29.0, 31.0, 700.0]).map(lambda s: T0 + timedelta(seconds=s))


def after(job: JobView, decision: Decision, now: datetime) -> JobView:
    """Return the job after the reconciler has carried a decision out."""
    match decision:
        case Begin(session):
            return replace(job, state=JobState.STARTING, attempt=job.attempt + 1, ray_session=session, state_since=now)
        case Move(state, _, reason):
            return replace(job, state=state, stop_reason=reason or job.stop_reason, state_since=now)
        case Recover(reason):
            faults = job.faults + int(REASONS[reason].counts)
            return replace(job, state=JobState.RECOVERING, faults=faults, state_since=now)
        case Finish(state):
            return replace(job, state=state)
        case _:
            return job


@settings(max_examples=400, deadline=None)
@given(views(), observations(), times)
def test_what_cannot_be_seen_changes_no_state_and_no_end_is_left(
    job: JobView, seen: Observation, now: datetime
) -> None:
    decision = decide(job, seen, now, POLICY)
    if job.state in ENDED:
        assert decision == Wait()
    blind = seen.ray is RayStatus.UNREACHABLE or not seen.bucket_reachable
    asked = (
        job.cancel_requested or job.state is JobState.CANCELLING or (job.deadline is not None and now >= job.deadline)
    )
    if blind and not asked:
        assert isinstance(decision, Wait)
    if isinstance(decision, Begin):
        assert job.state in (JobState.QUEUED, JobState.RECOVERING)
        assert not blind and not asked and seen.admission is None  # noqa: PT018
        assert decision.ray_session == seen.ray_session
    if isinstance(decision, Submit):
        assert job.state is JobState.STARTING
        assert (seen.ray, seen.ray_session) == (RayStatus.ABSENT, job.ray_session)
    if isinstance(decision, Finish):
        assert decision.state in ENDED
    if isinstance(decision, Move):
        assert decision.state in (JobState.RUNNING, JobState.CANCELLING)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 3), st.lists(st.tuples(observations(), st.floats(0, 700)), max_size=40))
def test_faults_never_exceed_the_retries_and_attempts_are_bounded(
    retries: int, life: list[tuple[Observation, float]]
) -> None:
    job, now, uncounted, counted = replace(QUEUED, retries=retries), T0, 0, 0
    for seen, seconds in life:
        now += timedelta(seconds=seconds)
        decision = decide(job, seen, now, POLICY)
        if isinstance(decision, Recover):
            counted += REASONS[decision.reason].counts
            uncounted += not REASONS[decision.reason].counts
        job = after(job, decision, now)
        assert job.faults == counted <= retries
        assert job.attempt <= 1 + retries + uncounted


@settings(max_examples=200, deadline=None)
@given(views(), st.lists(st.tuples(observations(), st.floats(0, 60)), max_size=10), st.booleans())
def test_a_cancel_always_ends_the_job_once_ray_answers(
    job: JobView, noise: list[tuple[Observation, float]], can_be_told: bool
) -> None:
    """Then Ray runs the attempt on until it is stopped by force; perhaps the bucket takes no wish."""
    job, now, stopped, told = replace(job, cancel_requested=True), T0, False, False
    for seen, seconds in noise:
        now += timedelta(seconds=seconds)
        job = after(job, decide(job, seen, now, POLICY), now)
        assert job.state not in (JobState.QUEUED, JobState.STARTING, JobState.RUNNING, JobState.RECOVERING)
    for _ in range(8):
        now += timedelta(seconds=31)
        ray = RayStatus.STOPPED if stopped else RayStatus.RUNNING
        seen = replace(SEEN, ray=ray, ray_session=job.ray_session, control="cancel" if told else "run")
        decision = decide(job, seen, now, POLICY)
        stopped, told = stopped or isinstance(decision, StopRay), told or (can_be_told and decision == TellStop())
        job = after(job, decision, now)
    assert stopped or job.state in ENDED
    assert job.state in ENDED or not can_be_told
