"""The life of a job: which state follows which, as one pure function of (job, observation, time).

queued ──▶ starting ──▶ running ──▶ succeeded | failed
              │  ▲          │
              ▼  │          ▼
           recovering ◀─────┘           starting | running ──▶ cancelling ──▶ cancelled | failed (deadline)

"Unreachable" is not "dead": while Ray or the bucket does not answer, nothing is decided; a condition says so.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Literal

from api.documents import ResultDocument, Wish
from api.jobs import ENDED, JobState, Reason


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
class Policy:
    """Durations that decisions depend on, in seconds."""

    start_deadline: float
    stop_grace: float
    retry_backoff: float


@dataclass(frozen=True)
class JobView:
    """What a decision needs to know of a job."""

    state: JobState
    attempt: int
    faults: int
    """Faults so far that count against the retries."""
    retries: int
    ray_session: str | None
    cancel_requested: bool
    stop_reason: Reason | None
    state_since: datetime
    deadline: datetime | None


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
    control: Wish | None
    result: ResultDocument | None
    admission: str | None
    """Why the job cannot be admitted now; None if it can."""


@dataclass(frozen=True)
class Wait:
    """Change nothing; the condition, if any, tells the user what the job waits for."""

    condition: Literal["waiting", "ray_unreachable", "storage_unreachable"] | None = None
    message: str = ""


@dataclass(frozen=True)
class Begin:
    """Write down the intent of one more attempt, for the Ray session that is there now."""

    ray_session: str


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


@dataclass(frozen=True)
class StopRay:
    """End the attempt by force."""


@dataclass(frozen=True)
class Recover:
    """Give the attempt up; another one follows."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class Finish:
    state: JobState
    reason: Reason
    message: str


Decision = Wait | Begin | Submit | Move | TellStop | StopRay | Recover | Finish


@dataclass(frozen=True)
class Meaning:
    """What a reason for the end of an attempt means for the job."""

    retryable: bool
    counts: bool
    """Whether it uses up one of the spec's retries."""
    sentence: str


REASONS: dict[Reason, Meaning] = {
    Reason.COMPLETED: Meaning(False, False, "finished"),
    Reason.USER_CANCELLED: Meaning(False, False, "cancelled on request"),
    Reason.DEADLINE: Meaning(False, False, "the deadline passed; raise `deadline` or train fewer steps"),
    Reason.INVALID_DATA: Meaning(False, False, "the data cannot be used"),
    Reason.NON_FINITE_LOSS: Meaning(False, False, "loss or gradient is not finite; lower the learning rate"),
    Reason.OUT_OF_MEMORY: Meaning(False, False, "a worker ran out of memory; use a smaller micro batch"),
    Reason.UNSUPPORTED: Meaning(False, False, "the workers cannot do what the spec asks for"),
    Reason.STORAGE_UNAVAILABLE: Meaning(True, False, "the bucket did not answer"),
    Reason.WORKER_LOST: Meaning(True, True, "the driver or its workers died"),
    Reason.RAY_LOST: Meaning(True, False, "Ray lost the attempt"),
    Reason.START_TIMEOUT: Meaning(True, False, "the attempt showed no sign of life"),
    Reason.SUPERSEDED: Meaning(True, False, "a newer attempt took over"),
}

_BACKOFF_LIMIT = 60.0


def decide(job: JobView, seen: Observation, now: datetime, policy: Policy) -> Decision:
    """Return what to do about a job. Pure; the reconciler carries it out."""
    if job.state in ENDED:
        return Wait()
    late = job.deadline is not None and now >= job.deadline
    if job.state in (JobState.QUEUED, JobState.RECOVERING):
        if job.cancel_requested:
            return Finish(JobState.CANCELLED, Reason.USER_CANCELLED, "cancelled before it ran")
        if late:
            return Finish(JobState.FAILED, Reason.DEADLINE, REASONS[Reason.DEADLINE].sentence)
        return _decide_waiting(job, seen, now, policy)
    if job.state is JobState.CANCELLING:
        return _decide_cancelling(job, seen, now, policy)
    if job.cancel_requested:
        return Move(JobState.CANCELLING, "stopping on request", Reason.USER_CANCELLED)
    if late:
        return Move(JobState.CANCELLING, "stopping: the deadline passed", Reason.DEADLINE)
    return _decide_live(job, seen, now, policy)


def _decide_waiting(job: JobView, seen: Observation, now: datetime, policy: Policy) -> Decision:
    """Queued or recovering: begin an attempt when everything that it needs is there."""
    if seen.ray is RayStatus.UNREACHABLE or seen.ray_session is None:
        return Wait("ray_unreachable", seen.ray_message)
    if not seen.bucket_reachable:
        return Wait("storage_unreachable", seen.bucket_message)
    if job.state is JobState.RECOVERING and now < job.state_since + backoff(job.attempt, policy):
        return Wait()
    if seen.admission is not None:
        return Wait("waiting", seen.admission)
    return Begin(seen.ray_session)


def _decide_live(job: JobView, seen: Observation, now: datetime, policy: Policy) -> Decision:
    """Starting or running: is the attempt alive, has it ended, is it lost?"""
    if (blind := _blind(seen)) is not None:
        return blind
    if seen.result is not None and (seen.ray.over or seen.ray_session != job.ray_session):
        return _by_result(job, seen.result)
    if seen.ray_session != job.ray_session:
        return _lost(job, Reason.RAY_LOST, "Ray was restarted and knows nothing of this attempt")
    late = now >= job.state_since + timedelta(seconds=policy.start_deadline)
    if seen.ray is RayStatus.ABSENT:
        if job.state is JobState.STARTING:
            refused = f"Ray took no submission in {policy.start_deadline:.0f} s"
            return _lost(job, Reason.START_TIMEOUT, refused) if late else Submit()
        return _lost(job, Reason.RAY_LOST, "Ray no longer knows this attempt")
    if seen.ray.over:
        return _lost(job, Reason.WORKER_LOST, f"Ray reports {seen.ray}: {seen.ray_message}")
    if job.state is JobState.STARTING:
        if seen.began:
            return Move(JobState.RUNNING, "running")
        if late:
            return _lost(job, Reason.START_TIMEOUT, f"no sign of life in {policy.start_deadline:.0f} s")
    return Wait()


def _decide_cancelling(job: JobView, seen: Observation, now: datetime, policy: Policy) -> Decision:
    """A stop was wanted: tell the attempt until it is over, by force after the grace."""
    answers = seen.ray is not RayStatus.UNREACHABLE
    over = answers and (seen.ray.over or seen.ray_session != job.ray_session)
    if answers and not over and now >= job.state_since + timedelta(seconds=policy.stop_grace):
        return StopRay()  # before another wish: the bucket may be one that takes none
    if seen.bucket_reachable and seen.control != "cancel":
        return TellStop()
    if over:
        if seen.result is not None and seen.result.outcome == "succeeded":
            return _by_result(job, seen.result)
        reason = job.stop_reason or Reason.USER_CANCELLED
        state = JobState.FAILED if reason is Reason.DEADLINE else JobState.CANCELLED
        return Finish(state, reason, REASONS[reason].sentence)
    return _blind(seen) or Wait()


def _blind(seen: Observation) -> Wait | None:
    if seen.ray is RayStatus.UNREACHABLE:
        return Wait("ray_unreachable", seen.ray_message)
    if not seen.bucket_reachable:
        return Wait("storage_unreachable", seen.bucket_message)
    return None


def _by_result(job: JobView, result: ResultDocument) -> Decision:
    if result.outcome == "succeeded":
        return Finish(JobState.SUCCEEDED, Reason.COMPLETED, result.message)
    if result.outcome == "failed" and not REASONS[result.reason].retryable:
        return Finish(JobState.FAILED, result.reason, f"{REASONS[result.reason].sentence}: {result.message}")
    return _lost(job, result.reason, f"the attempt {result.outcome}: {result.message}")


def _lost(job: JobView, reason: Reason, message: str) -> Decision:
    """Another attempt, or the end when the retries are used up."""
    if REASONS[reason].counts and job.faults >= job.retries:
        return Finish(JobState.FAILED, reason, f"{REASONS[reason].sentence}, {job.faults + 1} times: {message}")
    return Recover(reason, message)


def backoff(attempt: int, policy: Policy) -> timedelta:
    """Return the wait before the attempt after this one."""
    return timedelta(seconds=min(policy.retry_backoff * 2 ** max(0, attempt - 1), _BACKOFF_LIMIT))
