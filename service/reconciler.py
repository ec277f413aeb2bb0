"""The reconciler: for every live job, observe, decide, act, apply. Forever, and from any state that a crash left.

Each act is safe to repeat: documents are rewritten with the same content, a submission id is deterministic and Ray
takes it once, and every change of state is one guarded update. What is remembered between passes, since when a run
stands still or a job is stranded, only delays an act: who has forgotten it waits anew.
"""

import logging
from collections.abc import Callable, Collection
from datetime import datetime, timedelta
from time import monotonic
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from api.documents import (
    AttemptDocument,
    CheckpointRef,
    ControlDocument,
    FinalDocument,
    HoldDocument,
    JobDocument,
    now,
)
from api.errors import LockstepError, StorageError
from api.jobs import JobState, Reason
from api.layout import JobLayout
from api.names import submission_id
from api.prepare_spec import PrepareSpec
from api.spec import TrainSpec
from api.storage import Bucket
from service.database import REFUSED
from service.failpoints import failpoint
from service.leases import LINE, Leases
from service.lifecycle import (
    IDLE,
    Begin,
    Decision,
    Finish,
    JobView,
    Move,
    Observation,
    Recover,
    StopRay,
    Submit,
    TellStop,
    Turn,
    Wait,
    decide,
)
from service.line import lasting, take_turns
from service.logs import about
from service.observer import ClusterView, observe, observe_cluster
from service.periodic import NotePass, Periodic, nobody
from service.progress import read_progress
from service.ray_backend import RayBackend, RayUnreachable
from service.reasons import REASONS, Policy
from service.render import submission
from service.rows import JobRow, NewEvent
from service.run_reader import read_attempt, read_checkpoints, read_history
from service.settings import Settings
from service.standstill import Standstill
from service.store import Store

logger = logging.getLogger("lockstep.service")


class Reconciler:
    """Drives every job of the store towards its end."""

    def __init__(
        self,
        store: Store,
        bucket: Bucket,
        ray: RayBackend,
        settings: Settings,
        leases: Leases,
        note_pass: NotePass = nobody,
        note_lost: Callable[[Reason], None] = lambda reason: None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """`note_pass` hears of each complete pass, `note_lost` of each attempt that is given up; `clock` gives
        monotonic seconds."""
        self._store, self._bucket, self._ray, self._settings, self._leases = store, bucket, ray, settings, leases
        self._note_lost, self._clock = note_lost, clock
        self._standstill = Standstill(settings.start_deadline)
        self._stranded: dict[str, datetime] = {}
        self._policy = Policy(
            start_deadline=settings.start_deadline,
            stop_grace=settings.stop_grace,
            checkpoint_grace=settings.checkpoint_grace,
            retry_backoff=settings.retry_backoff,
            backoff_limit=settings.backoff_limit,
        )
        self.loop = Periodic("reconciler", self.reconcile_all, settings.reconcile_interval, note_pass)

    def reconcile_all(self) -> None:
        """One pass over every live job, oldest first, and over what deleted jobs left.

        Whose turn it is follows from all of them; to act on a job is the matter of the control plane that leases it.
        """
        live, deleted = self._store.live(), self._store.to_purge()
        ours: Collection[str] = self._leases.share(lease_of(job) for job in (*live, *deleted) if lease_of(job) != LINE)
        if self._leases.hold(LINE):
            ours = {*ours, LINE}
        if live:
            cluster = observe_cluster(self._ray)
            turns = take_turns(live, cluster.nodes, self._settings, now(), self._store.quotas())
            self._stranded, turns = lasting(self._stranded, turns, now())
            self._standstill.keep(ours)
            for job in live:
                if self.loop.stopping:
                    return
                ours = self._leases.renewed(ours)
                if lease_of(job) in ours:
                    self._reconcile_safely(job, cluster, turns.get(job.id, Turn()))
        for job in deleted:
            if self.loop.stopping:
                return
            if job.id in ours:
                with about(job=job.id):
                    self._purge(job)

    def _reconcile_safely(self, job: JobRow, cluster: ClusterView, turn: Turn) -> None:
        """One job's trouble must not stop the others."""
        with about(job=job.id, attempt=job.attempt):
            try:
                if self._is_present(job):
                    self.reconcile(job, cluster, turn)
            except REFUSED:
                logger.exception("a bug: the database does not take that; the next pass tries again")
            except SQLAlchemyError:
                raise
            except (LockstepError, ValueError) as error:
                logger.warning("%s", error)
            except Exception:
                logger.exception("a bug; the next pass tries again")

    def _is_present(self, job: JobRow) -> bool:
        """Whether nobody has changed a job since it was read: a pass over many takes its time."""
        present = self._store.get(job.id, job.project)
        return present is not None and present.version == job.version

    def reconcile(self, job: JobRow, cluster: ClusterView, turn: Turn) -> None:
        """Observe, decide, act, apply."""
        seen = observe(job, cluster, self._ray, self._bucket, turn, self._standstill, self._clock())
        if job.attempt and seen.bucket_reachable:
            job = self._note_progress(job)
        decision = decide(view(job), seen, now(), self._policy)
        self._carry_out(job, seen, decision)

    def _carry_out(self, job: JobRow, seen: Observation, decision: Decision) -> None:
        match decision:
            case Wait(condition, message):
                self._wait(job, condition, message)
            case Begin(ray_session, workers):
                self._begin(job, ray_session, workers)
            case Submit():
                self._submit(job, seen)
            case Move(state, message, stop_reason):
                changes: dict[str, Any] = {"stop_reason": stop_reason}
                if state is JobState.RUNNING and job.started_at is None:
                    changes["started_at"] = now()
                if JobState.PAUSED in (state, job.state):
                    self._note_hold(job, paused=state is JobState.PAUSED)
                if self._enter(job, state, message, changes) is None and state is JobState.PAUSED:
                    self._correct_final(job)
            case TellStop(control):
                self._tell(job, control)
            case StopRay():
                self._ray.stop(submission_id(job.id, job.attempt))
            case Recover():
                self._recover(job, seen, decision)
            case Finish(state, reason, message):
                self._finish(job, seen, state, reason, message)

    def _wait(self, job: JobRow, condition: str | None, message: str) -> None:
        """Show what the job waits for; nothing else changes. `since` stays while the condition does."""
        old = job.conditions[0] if job.conditions else None
        if condition is None:
            if old is not None:
                self._store.apply(job, {"conditions": []})
            return
        if old is not None and (old["type"], old["message"]) == (condition, message):
            return
        same = old is not None and old["type"] == condition
        since = old["since"] if old is not None and same else now().isoformat()
        conditions = [{"type": condition, "message": message, "since": since}]
        self._store.apply(job, {"conditions": conditions}, [] if same else [NewEvent("condition", message)])

    def _begin(self, job: JobRow, ray_session: str, workers: int) -> None:
        """Write down the intent. Only after that may anything be done for the attempt."""
        attempt = job.attempt + 1
        changes = {
            "attempt": attempt,
            "attempt_at": now(),
            "ray_session": ray_session,
            "workers": workers,
            "not_before": None,
            "conditions": [],
        }
        message = f"attempt {attempt} begins"
        data = {"attempt": attempt, "workers": workers}
        if self._enter(job, JobState.STARTING, message, changes, data=data) is not None:
            failpoint("after_intent", self._settings.failpoint)

    def _submit(self, job: JobRow, seen: Observation) -> None:
        """Write the attempt down in the bucket, then post it. A failed post decides nothing: the next pass looks.

        This is the one act that no guarded update goes before. So who is late must not call back what another control
        plane has told the attempt meanwhile, and looks whether it is still wanted: before anything is written, so that
        nothing comes back of a job that was deleted, and once more before it is posted.
        """
        if not self._is_present(job):
            return
        layout = JobLayout(job.project, job.id)
        spec = job.parsed_spec
        assert job.ray_session is not None
        self._bucket.put_document(layout.job, job_document(job, spec))
        if seen.control is None:
            self._bucket.put_document(layout.control(job.attempt), ControlDocument(wish="run"))
        attempt = AttemptDocument(
            job_id=job.id,
            attempt=job.attempt,
            submission_id=submission_id(job.id, job.attempt),
            ray_session=job.ray_session,
            workers=job.workers,
            created_at=job.state_since,
        )
        self._bucket.put_document(layout.attempt(job.attempt), attempt)
        failpoint("after_attempt_record", self._settings.failpoint)
        if not self._is_present(job):
            return
        try:
            self._ray.submit(submission(spec, job.project, job.id, job.attempt, self._settings))
        except RayUnreachable as error:
            self._wait(job, "ray_unreachable", f"the submission was not confirmed: {error}")
        failpoint("after_submit", self._settings.failpoint)

    def _tell(self, job: JobRow, control: ControlDocument) -> None:
        layout = JobLayout(job.project, job.id)
        if job.started_at is None:  # perhaps never submitted; without it no rebuild would know what is wanted
            self._bucket.put_document(layout.job, job_document(job, job.parsed_spec))
        self._bucket.put_document(layout.control(job.attempt), control)

    def _note_hold(self, job: JobRow, paused: bool) -> None:
        """Before the state: a rebuild of the database must neither start what is paused nor forget what is resumed.

        An end that was written down, and then dropped because a user had just asked for the pause, is none.
        """
        if job.attempt:
            layout = JobLayout(job.project, job.id)
            hold = HoldDocument(attempt=job.attempt, paused=paused, workers=job.workers_wanted, created_at=now())
            self._bucket.put_document(layout.hold, hold)
            if paused:
                self._bucket.delete([layout.final])

    def _recover(self, job: JobRow, seen: Observation, lost: Recover) -> None:
        """Give the attempt up. Should it still live somewhere, its control object tells it that it is superseded."""
        if not seen.ray.over:  # first: whoever rebuilds the database stops nothing that was told so
            self._ray.stop(submission_id(job.id, job.attempt))
        self._tell(job, ControlDocument(wish="superseded", reason=lost.reason))
        changes = {
            "faults": job.faults + int(REASONS[lost.reason].counts),
            "setbacks": lost.setbacks,
            "not_before": lost.not_before,
            "stop_reason": None,
        }
        data = {"reason": lost.reason, "attempt": job.attempt}
        if self._enter(job, JobState.RECOVERING, lost.message, changes, data=data) is not None:
            self._note_lost(lost.reason)

    def _finish(self, job: JobRow, seen: Observation, state: JobState, reason: Reason, message: str) -> None:
        """Record the end, and with it where the history ends: the newest segment of the present attempt."""
        result = seen.result
        end = self._history_end(job)
        document = FinalDocument(state=state, reason=reason, message=message, end=end, created_at=now())
        changes = {
            "reason": reason,
            "ended_at": now(),
            "conditions": [],
            "result": result.values if result is not None and state is JobState.SUCCEEDED else {},
            "history_end": end.model_dump() if end is not None else None,
        }
        if job.attempt:
            # Before the state: a reader of the bucket alone must find the end of whatever the database calls ended.
            self._bucket.put_document(JobLayout(job.project, job.id).final, document)
        if self._enter(job, state, message, changes, data={"reason": reason}) is None and job.attempt:
            self._correct_final(job)
        self._standstill.forget(job.id)

    def _correct_final(self, job: JobRow) -> None:
        """Another control plane was faster. If that ended the job, the bucket shall tell its end and nothing else."""
        present = self._store.get(job.id, job.project)
        if present is not None and JobState(present.state).ended:
            self._bucket.put_document(JobLayout(job.project, job.id).final, final_document(present))

    def _history_end(self, job: JobRow) -> CheckpointRef | None:
        if not job.attempt:
            return None
        layout = JobLayout(job.project, job.id)
        traces = read_attempt(self._bucket, layout, job.attempt)
        if traces.segment is not None and traces.result is not None:
            return CheckpointRef(segment=traces.segment, step=traces.result.step)
        spans = read_history(self._bucket, layout, None)
        segment = traces.segment or (spans[-1].segment if spans else None)
        if segment is None:
            return None
        # A checkpoint can be newer than the newest metric line; cut off, it would be lost to every reader.
        steps = [c.step for c in read_checkpoints(self._bucket, layout, None) if c.segment == segment]
        return CheckpointRef(segment=segment, step=max([int(job.progress.get("step") or 0), *steps]))

    def _enter(
        self, job: JobRow, state: JobState, message: str, changes: dict[str, Any], data: dict[str, Any] | None = None
    ) -> JobRow | None:
        """Change the state: one guarded update and one event. None if somebody was faster; then nothing happened."""
        everything = {"conditions": [], **changes, "state": state.value, "state_since": now(), "message": message}
        applied = self._store.apply(job, everything, [NewEvent("state", message, state, data or {})])
        if applied is not None:
            with about(attempt=applied.attempt, state=state.value):
                logger.info("%s", message)
        return applied

    def _note_progress(self, job: JobRow) -> JobRow:
        """Keep progress and the workers' events with the job; return the row as it is now."""
        try:
            changes, events = read_progress(job, self._bucket)
        except StorageError:
            return job
        except ValueError as error:  # a damaged stream is no reason to leave the job alone
            logger.warning("its stream cannot be read: %s", error)
            return job
        return (self._store.apply(job, changes, events) or job) if changes else job

    def _purge(self, job: JobRow) -> None:
        """Delete the objects of a job whose tombstone stands, once nobody downloads them any more."""
        if self._store.pinned(job.id, now()):
            return
        try:
            layout = JobLayout(job.project, job.id)
            self._bucket.delete([layout.job])  # first: without it no rebuild brings back a half of the job
            self._bucket.delete([item.key for item in self._bucket.objects(layout.prefix)])
        except StorageError as error:
            logger.warning("its objects cannot be deleted now: %s", error)
            return
        self._store.apply(job, {"purged_at": now()})


def view(job: JobRow) -> JobView:
    """Return what `decide` needs of a row."""
    spec = job.known_spec
    deadline: datetime | None = None
    if spec.deadline is not None:
        deadline = job.created_at + timedelta(seconds=spec.deadline)
    return JobView(
        id=job.id,
        state=JobState(job.state),
        attempt=job.attempt,
        faults=job.faults,
        retries=spec.retries,
        setbacks=job.setbacks,
        ray_session=job.ray_session,
        cancel_requested=bool(job.cancel_requested),
        keep_checkpoint=bool(job.keep_checkpoint),
        pause_requested=bool(job.pause_requested),
        stop_reason=Reason(job.stop_reason) if job.stop_reason else None,
        state_since=job.state_since,
        not_before=job.not_before,
        deadline=deadline,
    )


def lease_of(job: JobRow) -> str:
    """Return the lease that it takes to act on a job: its own, or that of the line that it waits in."""
    return LINE if JobState(job.state) in IDLE else job.id


def final_document(job: JobRow) -> FinalDocument:
    """Return what the bucket keeps of the end of a job that has ended."""
    assert job.ended_at is not None
    assert job.reason is not None
    end = CheckpointRef.model_validate(job.history_end) if job.history_end is not None else None
    return FinalDocument(
        state=JobState(job.state), reason=Reason(job.reason), message=job.message, end=end, created_at=job.ended_at
    )


def job_document(job: JobRow, spec: TrainSpec | PrepareSpec) -> JobDocument:
    return JobDocument(
        id=job.id,
        project=job.project,
        owner=job.owner,
        spec=spec,
        dataset_version=job.dataset_version,
        init=CheckpointRef.model_validate(job.init) if job.init is not None else None,
        total_steps=job.progress.get("total_steps"),
        warnings=job.warnings,
        created_at=job.created_at,
    )
