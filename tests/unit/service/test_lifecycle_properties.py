"""The state machine under any sequence of observations and wishes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.documents import ControlDocument, ResultDocument
from api.jobs import ENDED, JobState, Reason
from service.lifecycle import (
    Begin,
    Decision,
    Finish,
    JobView,
    Move,
    Observation,
    RayStatus,
    Recover,
    StopRay,
    Submit,
    TellStop,
    Turn,
    Wait,
    decide,
)
from service.reasons import REASONS
from tests.unit.service.test_lifecycle_table import DIED, POLICY, QUEUED, RUNNING, SEEN, T0, fault, result

INFRASTRUCTURE = [r for r in Reason if REASONS[r].retryable and not REASONS[r].counts]
WISHES = [ControlDocument(wish="run"), ControlDocument(wish="pause"), ControlDocument(wish="cancel"),
          ControlDocument(wish="cancel", keep_checkpoint=True), ControlDocument(wish="superseded")]  # fmt: skip
SECONDS = [0.0, 1.0, 3.0, 29.0, 31.0, 301.0, 700.0]


def outcomes(reasons: Sequence[Reason]) -> st.SearchStrategy[ResultDocument | None]:
    """A result that a worker group may leave, for one of these reasons unless it is a success."""
    stopped = [r for r in Reason if not REASONS[r].waits]
    return st.one_of(
        st.none(),
        st.just(result("succeeded", Reason.COMPLETED)),
        st.sampled_from(reasons).map(lambda r: result("failed", r)),
        st.sampled_from(stopped).map(lambda r: result("stopped", r)),
    )


@st.composite
def observations(draw: st.DrawFn, reasons: Sequence[Reason] = tuple(Reason)) -> Observation:
    """What the observer can report: no session without Ray, no traces without the bucket."""
    session = draw(st.sampled_from(["s1", "s2", None]))
    bucket = draw(st.booleans())
    ray = draw(st.sampled_from([s for s in RayStatus if s is not RayStatus.UNREACHABLE]))
    failed = [r for r in reasons if r is not Reason.COMPLETED]
    turns = st.builds(
        Turn,
        workers=st.none() | st.integers(1, 4),
        make_way_for=st.none() | st.just("job-2"),
        wait=st.sampled_from(["", "full"]),
    )
    return Observation(
        ray=ray if session else RayStatus.UNREACHABLE,
        ray_session=session,
        ray_message="",
        bucket_reachable=bucket,
        bucket_message="",
        began=bucket and draw(st.booleans()),
        control=draw(st.sampled_from([None, *WISHES])) if bucket else None,
        result=draw(outcomes(failed)) if bucket else None,
        fault=draw(st.none() | st.sampled_from(failed).map(fault)) if bucket and ray.over else None,
        turn=draw(turns),
        hung=draw(st.none() | st.just("it stands still")) if bucket else None,
    )


@st.composite
def views(draw: st.DrawFn) -> JobView:
    retries = draw(st.integers(0, 3))
    return JobView(
        id="job-1",
        state=draw(st.sampled_from(list(JobState))),
        attempt=draw(st.integers(0, 5)),
        faults=draw(st.integers(0, retries)),
        retries=retries,
        setbacks=draw(st.integers(0, 40)),
        ray_session=draw(st.sampled_from(["s1", "s2"])),
        cancel_requested=draw(st.booleans()),
        keep_checkpoint=draw(st.booleans()),
        pause_requested=draw(st.booleans()),
        stop_reason=draw(st.none() | st.sampled_from(STOPS)),
        state_since=T0,
        not_before=draw(st.sampled_from([None, T0 + timedelta(seconds=2)])),
        deadline=draw(st.sampled_from([None, T0 + timedelta(seconds=20), T0 + timedelta(days=1)])),
    )


STOPS = [Reason.USER_CANCELLED, Reason.DEADLINE, Reason.USER_PAUSED, Reason.PREEMPTED, Reason.RESIZED]
times = st.sampled_from(SECONDS).map(lambda s: T0 + timedelta(seconds=s))
lives = st.lists(st.tuples(observations(), st.sampled_from(SECONDS)), max_size=12)


def after(job: JobView, decision: Decision, now: datetime) -> JobView:
    """Return the job after the reconciler has carried a decision out."""
    match decision:
        case Begin(session, _):
            starting = replace(job, state=JobState.STARTING, state_since=now, not_before=None)
            return replace(starting, attempt=job.attempt + 1, ray_session=session)
        case Move(state, _, reason):
            return replace(job, state=state, stop_reason=reason, state_since=now)
        case Recover(reason, _, not_before, setbacks):
            lost = replace(job, state=JobState.RECOVERING, stop_reason=None, state_since=now)
            faults = job.faults + int(REASONS[reason].counts)
            return replace(lost, faults=faults, setbacks=setbacks, not_before=not_before)
        case Finish(state):
            return replace(job, state=state)
        case _:
            return job


IDLE = (JobState.QUEUED, JobState.RECOVERING, JobState.PAUSED)


@settings(max_examples=300, deadline=None)
@given(views(), observations(), times)
def test_what_cannot_be_seen_changes_no_state(job: JobView, seen: Observation, now: datetime) -> None:
    """Only what a user, or a deadline, wants is taken up: to say no more than that it is wanted."""
    decision = decide(job, seen, now, POLICY)
    late = job.deadline is not None and now >= job.deadline
    if seen.ray is RayStatus.UNREACHABLE or not seen.bucket_reachable:
        if job.state is JobState.PAUSED and not job.pause_requested and not (job.cancel_requested or late):
            assert decision == Move(JobState.QUEUED, "resumed")
        elif isinstance(decision, Finish):
            assert job.state in IDLE
            assert job.cancel_requested or late
        elif isinstance(decision, Move):
            assert decision.state in (JobState.CANCELLING, JobState.PAUSING, JobState.PAUSED)
            assert job.cancel_requested or late or job.pause_requested
        else:
            assert isinstance(decision, Wait | TellStop | StopRay)
            assert isinstance(decision, Wait) or job.state in (JobState.CANCELLING, JobState.PAUSING)


@settings(max_examples=300, deadline=None)
@given(views(), observations(), times)
def test_each_decision_is_taken_only_where_it_belongs(job: JobView, seen: Observation, now: datetime) -> None:
    decision = decide(job, seen, now, POLICY)
    if job.state in ENDED:
        assert decision == Wait()
    match decision:
        case Begin(session, workers):
            assert job.state in (JobState.QUEUED, JobState.RECOVERING)
            assert not job.cancel_requested
            assert not job.pause_requested
            assert (session, workers) == (seen.ray_session, seen.turn.workers)
            assert job.not_before is None or now >= job.not_before
        case Submit():
            assert job.state is JobState.STARTING
            assert (seen.ray, seen.ray_session) == (RayStatus.ABSENT, job.ray_session)
        case Finish(state):
            assert state in ENDED
        case Recover(_, _, not_before):
            assert now <= not_before <= now + timedelta(seconds=POLICY.backoff_limit)
        case Move(state):
            assert state not in ENDED
            assert state is not JobState.STARTING
        case TellStop(control):
            assert control.wish in ("pause", "cancel")
            assert job.state in (JobState.PAUSING, JobState.CANCELLING)
        case StopRay():
            assert seen.ray not in (RayStatus.UNREACHABLE, RayStatus.ABSENT)


troubles = st.lists(st.tuples(observations(INFRASTRUCTURE), st.sampled_from(SECONDS), st.booleans()), max_size=20)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 3), troubles)
def test_a_job_whose_infrastructure_fails_never_fails(
    retries: int, life: list[tuple[Observation, float, bool]]
) -> None:
    """Nor do pauses use up anything. It may succeed; its retries are for faults of its own."""
    job, now = replace(QUEUED, retries=retries, faults=retries), T0
    for seen, seconds, pause in life:
        now += timedelta(seconds=seconds)
        job = replace(job, pause_requested=pause)
        job = after(job, decide(job, seen, now, POLICY), now)
        assert job.state is not JobState.FAILED
        assert job.faults == retries


def test_lost_workers_are_replaced_for_ever() -> None:
    job, now = replace(RUNNING, retries=2, faults=2), T0
    for _ in range(100):
        decision = decide(job, DIED, now, POLICY)
        assert isinstance(decision, Recover)
        job, now = replace(after(job, decision, now), state=JobState.RUNNING, state_since=now), decision.not_before
    assert (job.faults, job.setbacks) == (2, 100)
    assert job.not_before is not None
    assert job.not_before - T0 < 101 * timedelta(seconds=POLICY.backoff_limit)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 3), lives)
def test_own_faults_never_exceed_the_retries(retries: int, life: list[tuple[Observation, float]]) -> None:
    job, now, counted = replace(QUEUED, retries=retries), T0, 0
    for seen, seconds in life:
        now += timedelta(seconds=seconds)
        decision = decide(job, seen, now, POLICY)
        if isinstance(decision, Recover):
            counted += REASONS[decision.reason].counts
        job = after(job, decision, now)
        assert job.faults == counted <= retries


@dataclass
class Attempt:
    """What becomes of a running attempt that hears nothing, under a store that may take no wish."""

    can_be_told: bool
    stopped: bool = False
    control: ControlDocument = field(default_factory=ControlDocument)

    def seen(self, job: JobView) -> Observation:
        ray = RayStatus.STOPPED if self.stopped else RayStatus.RUNNING
        return replace(SEEN, ray=ray, ray_session=job.ray_session, control=self.control)

    def note(self, decision: Decision) -> None:
        self.stopped = self.stopped or isinstance(decision, StopRay)
        if isinstance(decision, TellStop) and self.can_be_told:
            self.control = decision.control


def settled(job: JobView, noise: list[tuple[Observation, float]], attempt: Attempt) -> Iterator[JobView]:
    """Yield the job after each decision: of the noise, and then while Ray and the bucket answer."""
    now = T0
    for seen, seconds in noise:
        now += timedelta(seconds=seconds)
        job = after(job, decide(job, seen, now, POLICY), now)
        yield job
    for _ in range(8):
        now += timedelta(seconds=POLICY.checkpoint_grace + 1)
        decision = decide(job, attempt.seen(job), now, POLICY)
        attempt.note(decision)
        job = after(job, decision, now)
        yield job


@settings(max_examples=100, deadline=None)
@given(views(), lives, st.booleans())
def test_a_cancel_always_ends_the_job_once_ray_answers(
    job: JobView, noise: list[tuple[Observation, float]], can_be_told: bool
) -> None:
    """Ray then runs the attempt on until it is stopped by force; perhaps the bucket takes no wish."""
    attempt = Attempt(can_be_told)
    states = [one.state for one in settled(replace(job, cancel_requested=True), noise, attempt)]
    assert set(states) <= {JobState.CANCELLING, *ENDED}
    assert attempt.stopped or states[-1] in ENDED
    assert states[-1] in ENDED or not can_be_told


@settings(max_examples=100, deadline=None)
@given(views(), lives, st.booleans())
def test_a_pause_always_holds_or_ends_the_job_once_ray_answers(
    job: JobView, noise: list[tuple[Observation, float]], can_be_told: bool
) -> None:
    """The same, where nobody resumes it."""
    attempt = Attempt(can_be_told)
    states = [one.state for one in settled(replace(job, pause_requested=True), noise, attempt)]
    assert not {JobState.STARTING, JobState.RUNNING} & set(states)
    held = states[-1] in (JobState.PAUSED, *ENDED)
    assert attempt.stopped or held
    assert held or not can_be_told


STRICTNESS = ["run", "pause", "cancel+", "cancel", "superseded"]
"""The wishes as the workers rank them (workers/control.py)."""
asks = st.sampled_from(["", "", "", "pause", "resume", "cancel", "keep"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(observations(), st.sampled_from(SECONDS), asks), max_size=20))
def test_the_wish_of_an_attempt_never_goes_back(life: list[tuple[Observation, float, str]]) -> None:
    job, now = QUEUED, T0
    wishes: dict[int, list[int]] = {}
    for seen, seconds, ask in life:
        now += timedelta(seconds=seconds)
        if ask in ("pause", "resume"):
            job = replace(job, pause_requested=ask == "pause")
        elif ask and not job.cancel_requested:
            job = replace(job, cancel_requested=True, keep_checkpoint=ask == "keep")
        decision = decide(job, seen, now, POLICY)
        written = wishes.setdefault(job.attempt, [])
        match decision:
            case Submit():
                written.append(STRICTNESS.index("run"))
            case TellStop(control):
                written.append(STRICTNESS.index(control.wish + "+" * control.keep_checkpoint))
            case Recover():
                written.append(STRICTNESS.index("superseded"))
        assert written == sorted(written)
        job = after(job, decision, now)


@pytest.mark.parametrize("reason", [reason for reason in Reason if REASONS[reason].retryable])
def test_a_failure_that_may_be_retried_is_retried_within_the_budget(reason: Reason) -> None:
    for seen in (replace(DIED, result=result("failed", reason)), replace(DIED, fault=fault(reason))):
        assert isinstance(decide(RUNNING, seen, T0, POLICY), Recover)
        last = decide(replace(RUNNING, faults=3), seen, T0, POLICY)
        assert isinstance(last, Finish if REASONS[reason].counts else Recover)


@pytest.mark.parametrize("reason", [r for r in Reason if not REASONS[r].retryable and r is not Reason.COMPLETED])
def test_a_failure_that_no_retry_mends_ends_the_job_at_once(reason: Reason) -> None:
    for seen in (replace(DIED, result=result("failed", reason)), replace(DIED, fault=fault(reason))):
        last = decide(RUNNING, seen, T0, POLICY)
        assert isinstance(last, Finish)
        assert (last.state, last.reason) == (JobState.FAILED, reason)
