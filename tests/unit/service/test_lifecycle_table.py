"""The state machine: a table with every state and branch."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from api.documents import ControlDocument, FaultDocument, ResultDocument
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
from service.reasons import REASONS, Policy, backoff

T0 = datetime(2026, 11, 23, tzinfo=UTC)
POLICY = Policy(start_deadline=600, stop_grace=30, checkpoint_grace=300, retry_backoff=2, backoff_limit=60)
QUEUED = JobView(
    id="job-1",
    state=JobState.QUEUED,
    attempt=0,
    faults=0,
    retries=3,
    setbacks=0,
    ray_session=None,
    cancel_requested=False,
    keep_checkpoint=False,
    pause_requested=False,
    stop_reason=None,
    state_since=T0,
    not_before=None,
    deadline=None,
)
STARTING = replace(QUEUED, state=JobState.STARTING, attempt=1, ray_session="s1")
RUNNING = replace(STARTING, state=JobState.RUNNING)
RECOVERING = replace(STARTING, state=JobState.RECOVERING, not_before=T0 + timedelta(seconds=2))
PAUSING = replace(RUNNING, state=JobState.PAUSING, pause_requested=True, stop_reason=Reason.USER_PAUSED)
YIELDING = replace(PAUSING, pause_requested=False, stop_reason=Reason.PREEMPTED)
RESIZING = replace(YIELDING, stop_reason=Reason.RESIZED)
PAUSED = replace(PAUSING, state=JobState.PAUSED, stop_reason=None)
CANCELLING = replace(RUNNING, state=JobState.CANCELLING, cancel_requested=True, stop_reason=Reason.USER_CANCELLED)
KEEPING = replace(CANCELLING, keep_checkpoint=True)
EXPIRING = replace(CANCELLING, cancel_requested=False, stop_reason=Reason.DEADLINE)

RUN, PAUSE = ControlDocument(wish="run"), ControlDocument(wish="pause", reason=Reason.USER_PAUSED)
CANCEL = ControlDocument(wish="cancel", reason=Reason.USER_CANCELLED)
KEEP = CANCEL.model_copy(update={"keep_checkpoint": True})
TOO_LATE = ControlDocument(wish="cancel", reason=Reason.DEADLINE)
MAKE_WAY, GROW = (PAUSE.model_copy(update={"reason": r}) for r in (Reason.PREEMPTED, Reason.RESIZED))
SEEN = Observation(
    ray=RayStatus.RUNNING,
    ray_session="s1",
    ray_message="",
    bucket_reachable=True,
    bucket_message="",
    began=True,
    control=RUN,
    result=None,
    fault=None,
    turn=Turn(),
    hung=None,
)
NOTHING = replace(SEEN, ray=RayStatus.ABSENT, began=False, control=None)
TURN = replace(NOTHING, turn=Turn(workers=2))
PENDING = replace(NOTHING, ray=RayStatus.PENDING)
NO_RAY = replace(NOTHING, ray=RayStatus.UNREACHABLE, ray_session=None, ray_message="Ray is silent")
NO_BUCKET = replace(SEEN, bucket_reachable=False, bucket_message="S3 is silent", began=False, control=None)
DIED = replace(SEEN, ray=RayStatus.FAILED, ray_message="exit 1")
WANTED = replace(SEEN, turn=Turn(make_way_for="job-2"))
GROWS = replace(SEEN, turn=Turn(workers=4))
HUNG = replace(SEEN, hung="nothing has moved for 99 s")
TOLD = replace(SEEN, control=PAUSE)
TO_YIELD, TO_GROW = replace(SEEN, control=MAKE_WAY), replace(SEEN, control=GROW)
STOPPED = replace(SEEN, ray=RayStatus.SUCCEEDED)
OVER = (RayStatus.ABSENT, RayStatus.SUCCEEDED, RayStatus.FAILED, RayStatus.STOPPED)


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


def result(outcome: str, reason: Reason, message: str = "so it was") -> ResultDocument:
    return ResultDocument.model_validate(
        {"outcome": outcome, "reason": reason, "message": message, "step": 7, "created_at": T0}
    )


def fault(reason: Reason) -> FaultDocument:
    return FaultDocument(rank=0, step=7, reason=reason, phase="step", message="rank 0 fell", created_at=T0)


def lost(reason: Reason, message: str, seconds: float = 0, setbacks: int = 1) -> Recover:
    """Another attempt, after a wait that grows with the setbacks."""
    return Recover(reason, message, at(seconds) + backoff("job-1", setbacks, POLICY), setbacks)


def planned(reason: Reason, message: str, seconds: float = 0, setbacks: int = 0) -> Recover:
    """Another attempt, at once."""
    return Recover(reason, message, at(seconds), setbacks)


def failed(reason: Reason, times: int, message: str) -> Finish:
    return Finish(JobState.FAILED, reason, f"{REASONS[reason].sentence}, {times} times: {message}")


DONE, BAD = result("succeeded", Reason.COMPLETED), result("failed", Reason.INVALID_DATA)
OLD, HALTED = result("stopped", Reason.SUPERSEDED), result("stopped", Reason.USER_PAUSED)
NO_STORE = result("failed", Reason.STORAGE_UNAVAILABLE)
LOOP = result("failed", Reason.CRASH_LOOP)
RAY_WAIT, BUCKET_WAIT = Wait("ray_unreachable", "Ray is silent"), Wait("storage_unreachable", "S3 is silent")
SUCCESS = Finish(JobState.SUCCEEDED, Reason.COMPLETED, "so it was")
BAD_DATA = Finish(JobState.FAILED, Reason.INVALID_DATA, "the data cannot be used: so it was")
LOOPED = Finish(JobState.FAILED, Reason.CRASH_LOOP, f"{REASONS[Reason.CRASH_LOOP].sentence}: so it was")
DEADLINE = Finish(JobState.FAILED, Reason.DEADLINE, REASONS[Reason.DEADLINE].sentence)
CANCELLED = Finish(JobState.CANCELLED, Reason.USER_CANCELLED, "cancelled on request")
STOP = Move(JobState.CANCELLING, "stopping on request", Reason.USER_CANCELLED)
EXPIRE = Move(JobState.CANCELLING, "stopping: the deadline passed", Reason.DEADLINE)
PAUSE_IT = Move(JobState.PAUSING, "pausing on request", Reason.USER_PAUSED)
HELD = Move(JobState.PAUSED, "paused on request")
BACK = Move(JobState.QUEUED, "a job of higher priority needed the room")
YIELD = Move(JobState.PAUSING, "making way for job-2", Reason.PREEMPTED)
RESIZE = Move(JobState.PAUSING, "restarting with 4 workers", Reason.RESIZED)
GO_ON = "it goes on with another number of workers"
RESTARTED = lost(Reason.RAY_LOST, "Ray was restarted and knows nothing of this attempt")
SILENT = "no sign of life in 600 s"

Row = tuple[str, JobView, Observation, float, Decision]
CANCEL_ASKED: dict[str, Any] = {"cancel_requested": True}
PAUSE_ASKED: dict[str, Any] = {"pause_requested": True}
LATE: dict[str, Any] = {"deadline": T0}

WAITING: list[Row] = [
    ("queued, its turn", QUEUED, TURN, 0, Begin("s1", 2)),
    ("queued, not its turn", QUEUED, replace(NOTHING, turn=Turn(wait="1 job ahead")), 0,
     Wait("waiting", "1 job ahead")),
    ("queued, Ray down", QUEUED, replace(NO_RAY, turn=Turn(workers=2)), 0, RAY_WAIT),
    ("queued, Ray without a session", QUEUED, replace(TURN, ray_session=None, ray_message="?"), 0,
     Wait("ray_unreachable", "?")),
    ("queued, bucket down", QUEUED, replace(NO_BUCKET, ray=RayStatus.ABSENT, turn=Turn(workers=2)), 0, BUCKET_WAIT),
    ("queued, cancelled", replace(QUEUED, cancel_requested=True), NO_RAY, 0, CANCELLED),
    ("queued, cancelled and paused", replace(QUEUED, **CANCEL_ASKED, **PAUSE_ASKED), TURN, 0, CANCELLED),
    ("queued, expired", replace(QUEUED, deadline=T0), NO_RAY, 0, DEADLINE),
    ("queued, cancelled and expired", replace(QUEUED, **CANCEL_ASKED, **LATE), TURN, 0, CANCELLED),
    ("queued, not yet expired", replace(QUEUED, deadline=at(5)), TURN, 4.9, Begin("s1", 2)),
    ("queued, paused", replace(QUEUED, pause_requested=True), TURN, 0, HELD),
    ("queued, paused, Ray down", replace(QUEUED, pause_requested=True), NO_RAY, 0, HELD),
    ("queued, once set back", replace(QUEUED, not_before=at(5)), TURN, 4.9, Wait()),
    ("recovering, backing off", RECOVERING, TURN, 1.9, Wait()),
    ("recovering, backed off", RECOVERING, TURN, 2, Begin("s1", 2)),
    ("recovering, another session", RECOVERING, replace(TURN, ray_session="s2"), 2, Begin("s2", 2)),
    ("recovering, no wait", replace(RECOVERING, not_before=None), TURN, 0, Begin("s1", 2)),
    ("recovering, not its turn", RECOVERING, replace(NOTHING, turn=Turn(wait="full")), 2, Wait("waiting", "full")),
    ("recovering, Ray down", RECOVERING, NO_RAY, 99, RAY_WAIT),
    ("recovering, bucket down", RECOVERING, NO_BUCKET, 99, BUCKET_WAIT),
    ("recovering, cancelled", replace(RECOVERING, cancel_requested=True), NO_RAY, 0, CANCELLED),
    ("recovering, expired", replace(RECOVERING, deadline=T0), TURN, 0, DEADLINE),
    ("recovering, paused", replace(RECOVERING, pause_requested=True), TURN, 0, HELD),
    ("paused", PAUSED, TURN, 99999, Wait()),
    ("paused, all is down", PAUSED, replace(NO_RAY, bucket_reachable=False), 99999, Wait()),
    ("paused, resumed", replace(PAUSED, pause_requested=False), NO_RAY, 0, Move(JobState.QUEUED, "resumed")),
    ("paused, cancelled", replace(PAUSED, cancel_requested=True), NO_RAY, 0, CANCELLED),
    ("paused, expired", replace(PAUSED, deadline=at(9)), TURN, 9, DEADLINE),
]  # fmt: skip

LIVE: list[Row] = [
    ("starting, not posted", STARTING, NOTHING, 0, Submit()),
    ("starting, not posted, must make way", STARTING, replace(NOTHING, turn=Turn(make_way_for="job-2")), 0, Submit()),
    ("starting, pending", STARTING, PENDING, 599, Wait()),
    ("starting, never alive", STARTING, PENDING, 600, lost(Reason.START_TIMEOUT, SILENT, 600)),
    ("starting, never alive again, which is not the job's fault", replace(STARTING, faults=3),
     replace(NOTHING, ray=RayStatus.RUNNING), 600, lost(Reason.START_TIMEOUT, SILENT, 600)),
    ("starting, Ray refuses every post", STARTING, NOTHING, 600,
     lost(Reason.START_TIMEOUT, "Ray took no submission in 600 s", 600)),
    ("starting, began", STARTING, SEEN, 0, Move(JobState.RUNNING, "running")),
    ("starting, began late", STARTING, SEEN, 601, Move(JobState.RUNNING, "running")),
    ("starting, could grow", STARTING, replace(PENDING, turn=Turn(workers=4)), 0, Wait()),
    ("starting, must make way", STARTING, replace(PENDING, turn=Turn(make_way_for="job-2")), 0, YIELD),
    ("starting, its machines are gone", STARTING, replace(PENDING, turn=Turn(stranded=True)), 5,
     lost(Reason.START_TIMEOUT, "there is no room left for it: machines are gone", 5)),
    ("starting, began on other machines", STARTING, replace(SEEN, turn=Turn(stranded=True)), 5,
     Move(JobState.RUNNING, "running")),
    ("running, stranded, which only a start can be", RUNNING, replace(SEEN, turn=Turn(stranded=True)), 0, Wait()),
    ("starting, Ray down", STARTING, NO_RAY, 9999, RAY_WAIT),
    ("starting, bucket down", STARTING, NO_BUCKET, 9999, BUCKET_WAIT),
    ("starting, Ray restarted", STARTING, replace(NOTHING, ray_session="s2"), 0, RESTARTED),
    ("starting, over at once", STARTING, replace(STOPPED, result=DONE), 0, SUCCESS),
    ("starting, cancelled", replace(STARTING, cancel_requested=True), NO_RAY, 0, STOP),
    ("starting, expired", replace(STARTING, deadline=T0), NO_BUCKET, 0, EXPIRE),
    ("starting, paused", replace(STARTING, pause_requested=True), PENDING, 0, PAUSE_IT),
    ("starting, paused, all is down", replace(STARTING, pause_requested=True), NO_RAY, 0, PAUSE_IT),
    ("running, alive", RUNNING, SEEN, 99999, Wait()),
    ("running, Ray down", RUNNING, NO_RAY, 99999, RAY_WAIT),
    ("running, bucket down", RUNNING, replace(NO_BUCKET, ray=RayStatus.FAILED), 0, BUCKET_WAIT),
    ("running, result but driver not gone", RUNNING, replace(SEEN, result=DONE), 0, Wait()),
    ("running, expired", replace(RUNNING, deadline=T0), SEEN, 0, EXPIRE),
    ("running, cancelled", replace(RUNNING, cancel_requested=True), SEEN, 0, STOP),
    ("running, cancelled and paused", replace(RUNNING, **CANCEL_ASKED, **PAUSE_ASKED), SEEN, 0, STOP),
    ("running, cancelled at its end", replace(RUNNING, **CANCEL_ASKED), replace(STOPPED, result=DONE), 0, STOP),
    ("running, paused", replace(RUNNING, pause_requested=True), SEEN, 0, PAUSE_IT),
    ("running, paused at its end", replace(RUNNING, **PAUSE_ASKED), replace(STOPPED, result=DONE), 0, PAUSE_IT),
    ("running, must make way", RUNNING, WANTED, 0, YIELD),
    ("running, must make way, but has ended", RUNNING, replace(WANTED, ray=RayStatus.SUCCEEDED, result=DONE), 0,
     SUCCESS),
    ("running, can grow", RUNNING, GROWS, 0, RESIZE),
    ("running, can grow, bucket down", RUNNING, replace(NO_BUCKET, turn=Turn(workers=4)), 0, BUCKET_WAIT),
    ("running, hung", RUNNING, HUNG, 0, lost(Reason.HUNG, "nothing has moved for 99 s")),
    ("running, hung, but has ended", RUNNING, replace(HUNG, ray=RayStatus.SUCCEEDED, result=DONE), 0, SUCCESS),
    ("running, hung, Ray down", RUNNING, replace(NO_RAY, hung="x"), 0, RAY_WAIT),
    ("starting, hung", STARTING, replace(HUNG, began=False), 0, Wait()),
    ("running, Ray restarted", RUNNING, replace(SEEN, ray=RayStatus.ABSENT, ray_session="s2"), 0, RESTARTED),
    ("running, Ray restarted after the result", RUNNING,
     replace(SEEN, ray=RayStatus.ABSENT, ray_session="s2", result=DONE), 0, SUCCESS),
    ("running, forgotten", RUNNING, NOTHING, 0, lost(Reason.RAY_LOST, "Ray no longer knows this attempt")),
    ("running, forgotten, retries used up", replace(RUNNING, faults=3), NOTHING, 0,
     lost(Reason.RAY_LOST, "Ray no longer knows this attempt")),
    ("running, superseded", RUNNING, replace(STOPPED, result=OLD), 0,
     planned(Reason.SUPERSEDED, "the attempt stopped: so it was")),
    ("running, its machine goes", RUNNING, replace(STOPPED, result=result("stopped", Reason.DRAINED)), 0,
     planned(Reason.DRAINED, "the attempt stopped: so it was")),
    *[(f"running, {ray} with success", RUNNING, replace(SEEN, ray=ray, result=DONE), 0, SUCCESS) for ray in OVER],
    *[(f"running, {ray} with bad data", RUNNING, replace(SEEN, ray=ray, result=BAD), 0, BAD_DATA) for ray in OVER],
    ("running, in a loop", RUNNING, replace(DIED, result=LOOP), 0, LOOPED),
    ("running, without a store", replace(RUNNING, faults=3), replace(DIED, result=NO_STORE), 0,
     lost(Reason.STORAGE_UNAVAILABLE, "so it was")),
    *[(f"running, {ray} without a result", RUNNING, replace(SEEN, ray=ray, ray_message="exit 1"), 0,
       lost(Reason.WORKER_LOST, f"Ray reports {ray}: exit 1")) for ray in OVER[1:]],
]  # fmt: skip

DEATHS: list[Row] = [
    ("lost a worker, retries used up", replace(RUNNING, faults=3), DIED, 0,
     lost(Reason.WORKER_LOST, "Ray reports failed: exit 1")),
    ("a fault of the infrastructure, retries used up", replace(RUNNING, faults=3),
     replace(DIED, fault=fault(Reason.STORAGE_UNAVAILABLE)), 0, lost(Reason.STORAGE_UNAVAILABLE, "rank 0 fell")),
    ("a fault of its own, retries left", replace(RUNNING, faults=2), replace(DIED, fault=fault(Reason.WORKER_ERROR)), 0,
     lost(Reason.WORKER_ERROR, "rank 0 fell")),
    ("a fault of its own, retries used up", replace(RUNNING, faults=3), replace(DIED, fault=fault(Reason.WORKER_ERROR)),
     0, failed(Reason.WORKER_ERROR, 4, "rank 0 fell")),
    ("out of memory, no retries", replace(RUNNING, retries=0), replace(DIED, fault=fault(Reason.OUT_OF_MEMORY)), 0,
     failed(Reason.OUT_OF_MEMORY, 1, "rank 0 fell")),
    ("a result says more than a fault", RUNNING, replace(DIED, fault=fault(Reason.WORKER_ERROR), result=BAD), 0,
     BAD_DATA),
    ("a fault that no retry can mend", RUNNING, replace(DIED, fault=fault(Reason.CRASH_LOOP)), 0,
     Finish(JobState.FAILED, Reason.CRASH_LOOP, f"{REASONS[Reason.CRASH_LOOP].sentence}: rank 0 fell")),
    ("set back a second time", replace(RUNNING, setbacks=1), DIED, 60 - 1,
     lost(Reason.WORKER_LOST, "Ray reports failed: exit 1", 59, setbacks=2)),
    ("set back after it ran for long", replace(RUNNING, setbacks=7), DIED, 60,
     lost(Reason.WORKER_LOST, "Ray reports failed: exit 1", 60, setbacks=1)),
    ("set back after a long start", replace(STARTING, setbacks=7), replace(DIED, began=False), 60,
     lost(Reason.WORKER_LOST, "Ray reports failed: exit 1", 60, setbacks=8)),
    ("a planned stop is no setback, and ends none", replace(RUNNING, setbacks=7), replace(STOPPED, result=OLD), 99,
     planned(Reason.SUPERSEDED, "the attempt stopped: so it was", 99, setbacks=7)),
]  # fmt: skip

PAUSES: list[Row] = [
    ("not told", PAUSING, SEEN, 0, TellStop(PAUSE)),
    ("not told, never posted", PAUSING, NOTHING, 0, TellStop(PAUSE)),
    ("not told, Ray down", PAUSING, replace(NO_RAY, control=RUN), 0, TellStop(PAUSE)),
    ("told", PAUSING, TOLD, 299.9, Wait()),
    ("told, result but driver not gone", PAUSING, replace(TOLD, result=HALTED), 0, Wait()),
    ("impatient", PAUSING, TOLD, 300, StopRay()),
    ("impatient, cannot be told", PAUSING, NO_BUCKET, 300, StopRay()),
    ("Ray down", PAUSING, replace(NO_RAY, control=PAUSE), 9999, RAY_WAIT),
    ("bucket down", PAUSING, NO_BUCKET, 299, BUCKET_WAIT),
    ("over, bucket down", PAUSING, replace(NO_BUCKET, ray=RayStatus.STOPPED), 999, BUCKET_WAIT),
    ("over, not told", PAUSING, STOPPED, 0, TellStop(PAUSE)),
    *[(f"over, {ray}", PAUSING, replace(TOLD, ray=ray), 0, HELD) for ray in OVER],
    ("over as wanted", PAUSING, replace(TOLD, ray=RayStatus.SUCCEEDED, result=HALTED), 0, HELD),
    ("stopped by force", PAUSING, replace(TOLD, ray=RayStatus.STOPPED), 301, HELD),
    ("died of its own while pausing", PAUSING, replace(TOLD, ray=RayStatus.FAILED, fault=fault(Reason.WORKER_ERROR)), 0,
     HELD),
    ("Ray restarted", PAUSING, replace(TOLD, ray=RayStatus.ABSENT, ray_session="s2"), 0, HELD),
    ("succeeded first", PAUSING, replace(TOLD, ray=RayStatus.SUCCEEDED, result=DONE), 0, SUCCESS),
    ("failed first", PAUSING, replace(TOLD, ray=RayStatus.SUCCEEDED, result=BAD), 0, BAD_DATA),
    ("failed first, but can be retried", PAUSING, replace(TOLD, ray=RayStatus.SUCCEEDED, result=NO_STORE), 0,
     lost(Reason.STORAGE_UNAVAILABLE, "so it was")),
    ("resumed before it is over", replace(PAUSING, pause_requested=False), TOLD, 0, Wait()),
    ("resumed, and over", replace(PAUSING, pause_requested=False), replace(TOLD, ray=RayStatus.SUCCEEDED), 0, HELD),
    ("no reason noted", replace(PAUSING, stop_reason=None), replace(TOLD, ray=RayStatus.STOPPED), 0, HELD),
    ("cancelled", replace(PAUSING, cancel_requested=True), TOLD, 0, STOP),
    ("expired", replace(PAUSING, deadline=T0), TOLD, 0, EXPIRE),
    ("making way, told", YIELDING, TO_YIELD, 299, Wait()),
    ("making way, nobody needs it any more", YIELDING, SEEN, 0, TellStop(MAKE_WAY)),
    ("made way", YIELDING, replace(TO_YIELD, ray=RayStatus.SUCCEEDED, result=HALTED), 9, BACK),
    ("made way by force", YIELDING, replace(TO_YIELD, ray=RayStatus.STOPPED), 301, BACK),
    ("made way, paused meanwhile", replace(YIELDING, pause_requested=True), replace(TO_YIELD, ray=RayStatus.STOPPED), 0,
     BACK),
    ("resized", RESIZING, replace(TO_GROW, ray=RayStatus.SUCCEEDED, result=HALTED), 9,
     planned(Reason.RESIZED, GO_ON, 9)),
    ("resized, set back before", replace(RESIZING, setbacks=5), replace(TO_GROW, ray=RayStatus.STOPPED), 9,
     planned(Reason.RESIZED, GO_ON, 9, setbacks=5)),
]  # fmt: skip

CANCELS: list[Row] = [
    ("not told", CANCELLING, SEEN, 0, TellStop(CANCEL)),
    ("not told, Ray down", CANCELLING, replace(NO_RAY, control=RUN), 99, TellStop(CANCEL)),
    ("not told, never posted", CANCELLING, NOTHING, 0, TellStop(CANCEL)),
    ("told to pause before", CANCELLING, TOLD, 0, TellStop(CANCEL)),
    ("told", CANCELLING, replace(SEEN, control=CANCEL), 29.9, Wait()),
    ("impatient", CANCELLING, replace(SEEN, control=CANCEL), 30, StopRay()),
    ("impatient, bucket down", CANCELLING, NO_BUCKET, 30, StopRay()),
    ("impatient, cannot be told", CANCELLING, SEEN, 30, StopRay()),
    ("bucket down", CANCELLING, NO_BUCKET, 29, BUCKET_WAIT),
    ("Ray down", CANCELLING, replace(NO_RAY, control=CANCEL), 9999, RAY_WAIT),
    ("Ray restarted", CANCELLING, replace(SEEN, control=CANCEL, ray_session="s2"), 0, CANCELLED),
    *[(str(ray), CANCELLING, replace(SEEN, control=CANCEL, ray=ray), 0, CANCELLED) for ray in OVER],
    ("over, not told", CANCELLING, replace(SEEN, ray=RayStatus.STOPPED), 99, TellStop(CANCEL)),
    ("succeeded first", CANCELLING, replace(STOPPED, control=CANCEL, result=DONE), 0, SUCCESS),
    ("failed first", CANCELLING, replace(DIED, control=CANCEL, result=BAD), 0, CANCELLED),
    ("no reason noted", replace(CANCELLING, stop_reason=None), replace(STOPPED, control=CANCEL), 0, CANCELLED),
    ("paused meanwhile", replace(CANCELLING, pause_requested=True), replace(SEEN, control=CANCEL), 0, Wait()),
    ("keeping, not told", KEEPING, SEEN, 0, TellStop(KEEP)),
    ("keeping, told to stop at once", KEEPING, replace(SEEN, control=CANCEL), 0, TellStop(KEEP)),
    ("keeping, told", KEEPING, replace(SEEN, control=KEEP), 299.9, Wait()),
    ("keeping, impatient", KEEPING, replace(SEEN, control=KEEP), 300, StopRay()),
    ("keeping, over", KEEPING, replace(STOPPED, control=KEEP), 0, CANCELLED),
    ("expiring, not told", EXPIRING, SEEN, 0, TellStop(TOO_LATE)),
    ("expiring keeps no checkpoint", replace(EXPIRING, keep_checkpoint=True), SEEN, 0, TellStop(TOO_LATE)),
    ("expiring does not wait for one", replace(EXPIRING, keep_checkpoint=True), replace(SEEN, control=TOO_LATE), 30,
     StopRay()),
    *[(f"expiring, {ray}", EXPIRING, replace(SEEN, control=TOO_LATE, ray=ray), 0, DEADLINE) for ray in OVER],
]  # fmt: skip

ENDS: list[Row] = [
    (f"{state}, whatever happens", replace(RUNNING, state=state, **CANCEL_ASKED, **PAUSE_ASKED, **LATE), DIED, 99,
     Wait())
    for state in sorted(ENDED)
]  # fmt: skip


def titled(title: str, rows: list[Row]) -> list[Row]:
    return [(f"{title}: {row[0]}", *row[1:]) for row in rows]


TABLE = [*WAITING, *LIVE, *titled("death", DEATHS), *titled("pausing", PAUSES), *titled("cancelling", CANCELS), *ENDS]


@pytest.mark.parametrize(("job", "seen", "seconds", "expected"), [row[1:] for row in TABLE], ids=[r[0] for r in TABLE])
def test_decision(job: JobView, seen: Observation, seconds: float, expected: Decision) -> None:
    assert decide(job, seen, at(seconds), POLICY) == expected


def test_the_table_names_every_state_and_every_kind_of_decision() -> None:
    assert {row[1].state for row in TABLE} == set(JobState)
    assert {type(row[4]) for row in TABLE} == {Wait, Begin, Submit, Move, TellStop, StopRay, Recover, Finish}
    assert len({row[0] for row in TABLE}) == len(TABLE)
