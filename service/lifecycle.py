"""The life of a job: which state follows which, as one pure function of (job, observation, time).

queued ──▶ starting ──▶ running ──▶ succeeded | failed
  ▲  │        │  ▲         │
  │  │        ▼  │         │
  │  │     recovering ◀────┤
  │  ▼                     ▼
paused ◀──────────────  pausing             pausing ──▶ queued (preempted) | recovering (another size)
any live state ──▶ cancelling ──▶ cancelled | failed (deadline)

"Unreachable" is not "dead": while Ray or the bucket does not answer, nothing is decided; a condition says so.
What each reason for the end of an attempt means stands in `service/reasons.py`.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Literal

from api.documents import ControlDocument, FaultDocument, ResultDocument
from api.jobs import ENDED, JobState, Reason
from service.reasons import REASONS, Policy, backoff


class RayStatus(StrEnum):
    """What Ray says of a submission id."""

    UNREACHABLE = "unreachable"
    ABSENT = "absent"
    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def over(self) -> bool:
        return self in (RayStatus.ABSENT, RayStatus.SUCCEEDED, RayStatus.FAILED, RayStatus.STOPPED)


@dataclass(frozen=True)
class JobView:
    """What a decision needs to know of a job."""

    id: str
    state: JobState
    attempt: int
    faults: int
    """Faults of its own processes so far; they count against the retries."""
    retries: int
    setbacks: int
    """Attempts lost in a row, none of which ran for long."""
    ray_session: str | None
    cancel_requested: bool
    keep_checkpoint: bool
    """Whether a cancelled run shall write a checkpoint first."""
    pause_requested: bool
    stop_reason: Reason | None
    """Why the present attempt is being stopped."""
    state_since: datetime
    not_before: datetime | None
    """When the next attempt may begin."""
    deadline: datetime | None


@dataclass(frozen=True)
class Turn:
    """What the schedule says of a job in this pass (service/schedule.py)."""

    workers: int | None = None
    """Start with that many now, or if it runs: restart with that many."""
    make_way_for: str | None = None
    """The job of higher priority that needs the room."""
    stranded: bool = False
    """There is no room any more for its attempt, which only starts: machines are gone."""
    wait: str = ""
    """Why it must wait on, in numbers."""


@dataclass(frozen=True)
class Observation:
    """What was seen of the present attempt. `None` for what could not be seen."""

    ray: RayStatus
    ray_session: str | None
    ray_message: str
    bucket_reachable: bool
    bucket_message: str
    began: bool
    """A segment of this attempt exists."""
    control: ControlDocument | None
    result: ResultDocument | None
    fault: FaultDocument | None
    """What ended the attempt's driver, if it could say so."""
    turn: Turn
    hung: str | None
    """Why the run must be taken for hung; None while it moves, or while that cannot be told."""


@dataclass(frozen=True)
class Wait:
    """Change nothing; the condition, if any, tells the user what the job waits for."""

    condition: Literal["waiting", "ray_unreachable", "storage_unreachable"] | None = None
    message: str = ""


@dataclass(frozen=True)
class Begin:
    """Write down the intent of one more attempt, for the Ray session that is there now, with so many workers."""

    ray_session: str
    workers: int


@dataclass(frozen=True)
class Submit:
    """Write the attempt's documents and post it to Ray."""


@dataclass(frozen=True)
class Move:
    """Go to another live state."""

    state: JobState
    message: str
    stop_reason: Reason | None = None


@dataclass(frozen=True)
class TellStop:
    """Write the wish to stop into the attempt's control object."""

    control: ControlDocument


@dataclass(frozen=True)
class StopRay:
    """End the attempt by force."""


@dataclass(frozen=True)
class Recover:
    """Give the attempt up; another one follows."""

    reason: Reason
    message: str
    not_before: datetime
    setbacks: int


@dataclass(frozen=True)
class Finish:
    state: JobState
    reason: Reason
    message: str


Decision = Wait | Begin | Submit | Move | TellStop | StopRay | Recover | Finish


IDLE = (JobState.QUEUED, JobState.RECOVERING, JobState.PAUSED)
"""Without an attempt, and in the line or out of it by a user's wish."""


def decide(job: JobView, seen: Observation, now: datetime, policy: Policy) -> Decision:
    """Return what to do about a job. Pure; the reconciler carries it out."""
    if job.state in ENDED:
        return Wait()
    late = job.deadline is not None and now >= job.deadline
    if job.state in IDLE:
        if job.cancel_requested:
            return Finish(JobState.CANCELLED, Reason.USER_CANCELLED, REASONS[Reason.USER_CANCELLED].sentence)
        if late:
            return Finish(JobState.FAILED, Reason.DEADLINE, REASONS[Reason.DEADLINE].sentence)
        return _decide_idle(job, seen, now)
    if job.state is JobState.CANCELLING:
        return _decide_cancelling(job, seen, now, policy)
    if job.cancel_requested:
        return Move(JobState.CANCELLING, "stopping on request", Reason.USER_CANCELLED)
    if late:
        return Move(JobState.CANCELLING, "stopping: the deadline passed", Reason.DEADLINE)
    if job.state is JobState.PAUSING:
        return _decide_pausing(job, seen, now, policy)
    if job.pause_requested:
        return Move(JobState.PAUSING, "pausing on request", Reason.USER_PAUSED)
    return _decide_live(job, seen, now, policy)


def _decide_idle(job: JobView, seen: Observation, now: datetime) -> Decision:
    """Without an attempt: paused until it is resumed, or waiting until everything that an attempt needs is there."""
    if job.state is JobState.PAUSED:
        return Wait() if job.pause_requested else Move(JobState.QUEUED, "resumed")
    if job.pause_requested:
        return Move(JobState.PAUSED, "paused on request")
    if seen.ray is RayStatus.UNREACHABLE or seen.ray_session is None:
        return Wait("ray_unreachable", seen.ray_message)
    if not seen.bucket_reachable:
        return Wait("storage_unreachable", seen.bucket_message)
    if job.not_before is not None and now < job.not_before:
        return Wait()
    if seen.turn.workers is None:
        return Wait("waiting", seen.turn.wait)
    return Begin(seen.ray_session, seen.turn.workers)


def _decide_live(job: JobView, seen: Observation, now: datetime, policy: Policy) -> Decision:
    """Starting or running: is the attempt alive, has it ended, is it lost, must it make way?"""
    if (blind := _blind(seen)) is not None:
        return blind
    if seen.result is not None and (seen.ray.over or seen.ray_session != job.ray_session):
        return _by_result(job, seen.result, now, policy)
    if seen.ray_session != job.ray_session:
        return _lost(job, Reason.RAY_LOST, "Ray was restarted and knows nothing of this attempt", now, policy)
    late = now >= job.state_since + timedelta(seconds=policy.start_deadline)
    if seen.ray is RayStatus.ABSENT:
        if job.state is JobState.STARTING:
            refused = f"Ray took no submission in {policy.start_deadline:.0f} s"
            if late:
                return _lost(job, Reason.START_TIMEOUT, refused, now, policy)
            # A stop that the attempt was told, and that this row knows nothing of: another control plane is ahead.
            return Submit() if seen.control is None or seen.control.wish == "run" else Wait()
        return _lost(job, Reason.RAY_LOST, "Ray no longer knows this attempt", now, policy)
    if seen.ray.over:
        if seen.fault is not None:
            return _failed(job, seen.fault.reason, seen.fault.message, now, policy)
        return _lost(job, Reason.WORKER_LOST, f"Ray reports {seen.ray}: {seen.ray_message}", now, policy)
    if seen.turn.make_way_for is not None:
        return Move(JobState.PAUSING, f"making way for {seen.turn.make_way_for}", Reason.PREEMPTED)
    if job.state is JobState.STARTING:
        if seen.began:
            return Move(JobState.RUNNING, "running")
        if late:
            return _lost(job, Reason.START_TIMEOUT, f"no sign of life in {policy.start_deadline:.0f} s", now, policy)
        if seen.turn.stranded:
            return _lost(job, Reason.START_TIMEOUT, "there is no room left for it: machines are gone", now, policy)
        return Wait()
    if seen.turn.workers is not None:
        return Move(JobState.PAUSING, f"restarting with {seen.turn.workers} workers", Reason.RESIZED)
    if seen.hung is not None:
        return _lost(job, Reason.HUNG, seen.hung, now, policy)
    return Wait()


def _decide_pausing(job: JobView, seen: Observation, now: datetime, policy: Policy) -> Decision:
    """A checkpoint and then the end of the attempt was wanted; what follows depends on who wanted it."""
    reason = job.stop_reason or Reason.USER_PAUSED
    stop = _stop(job, seen, now, ControlDocument(wish="pause", reason=reason), policy.checkpoint_grace)
    if stop is not None:
        return stop
    if seen.result is not None and seen.result.outcome != "stopped":
        return _by_result(job, seen.result, now, policy)
    if reason is Reason.USER_PAUSED:
        return Move(JobState.PAUSED, "paused on request")
    if reason is Reason.PREEMPTED:
        return Move(JobState.QUEUED, REASONS[reason].sentence)
    return _lost(job, reason, REASONS[reason].sentence, now, policy)


def _decide_cancelling(job: JobView, seen: Observation, now: datetime, policy: Policy) -> Decision:
    """A stop was wanted: tell the attempt until it is over, by force after the grace."""
    reason = job.stop_reason or Reason.USER_CANCELLED
    keep = job.keep_checkpoint and reason is not Reason.DEADLINE
    wish = ControlDocument(wish="cancel", keep_checkpoint=keep, reason=reason)
    stop = _stop(job, seen, now, wish, policy.checkpoint_grace if keep else policy.stop_grace)
    if stop is not None:
        return stop
    if seen.result is not None and seen.result.outcome == "succeeded":
        return _by_result(job, seen.result, now, policy)
    state = JobState.FAILED if reason is Reason.DEADLINE else JobState.CANCELLED
    return Finish(state, reason, REASONS[reason].sentence)


def _stop(job: JobView, seen: Observation, now: datetime, wish: ControlDocument, grace: float) -> Decision | None:
    """Return what is left to do until the attempt is over; None once it is, and nobody can take it up any more."""
    answers = seen.ray is not RayStatus.UNREACHABLE
    over = answers and (seen.ray.over or seen.ray_session != job.ray_session)
    if answers and not over and now >= job.state_since + timedelta(seconds=grace):
        return StopRay()  # before another wish: the bucket may be one that takes none
    if seen.bucket_reachable and seen.control != wish:
        return TellStop(wish)
    if over and seen.bucket_reachable:
        return None
    return _blind(seen) or Wait()


def _blind(seen: Observation) -> Wait | None:
    if seen.ray is RayStatus.UNREACHABLE:
        return Wait("ray_unreachable", seen.ray_message)
    if not seen.bucket_reachable:
        return Wait("storage_unreachable", seen.bucket_message)
    return None


def _by_result(job: JobView, result: ResultDocument, now: datetime, policy: Policy) -> Decision:
    if result.outcome == "succeeded":
        return Finish(JobState.SUCCEEDED, Reason.COMPLETED, result.message)
    if result.outcome == "failed":
        return _failed(job, result.reason, result.message, now, policy)
    return _lost(job, result.reason, f"the attempt stopped: {result.message}", now, policy)


def _failed(job: JobView, reason: Reason, message: str, now: datetime, policy: Policy) -> Decision:
    """The end, if no retry can mend it."""
    if not REASONS[reason].retryable:
        return Finish(JobState.FAILED, reason, f"{REASONS[reason].sentence}: {message}")
    return _lost(job, reason, message, now, policy)


def _lost(job: JobView, reason: Reason, message: str, now: datetime, policy: Policy) -> Decision:
    """Another attempt, or the end when the retries are used up."""
    meaning = REASONS[reason]
    if meaning.counts and job.faults >= job.retries:
        return Finish(JobState.FAILED, reason, f"{meaning.sentence}, {job.faults + 1} times: {message}")
    lasted = job.state is JobState.RUNNING and now >= job.state_since + timedelta(seconds=policy.backoff_limit)
    setbacks = 1 if lasted else job.setbacks + 1
    wait = backoff(job.id, setbacks, policy) if meaning.waits else timedelta()
    return Recover(reason, message, now + wait, setbacks if meaning.waits else job.setbacks)
