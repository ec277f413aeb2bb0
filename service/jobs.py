"""The use cases behind the routes: plan, submit, look, cancel, delete. No HTTP here."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from api.arithmetic import PREPARE_STEPS, samples, total_steps
from api.datasets import find_dataset
from api.documents import CheckpointRef, DatasetDocument, Manifest, now
from api.errors import (
    Conflict,
    Fault,
    InvalidData,
    InvalidSpec,
    NotFound,
    ObjectMissing,
)
from api.jobs import (
    Checkpoint,
    Event,
    Job,
    JobState,
    LogLine,
    MetricPoint,
    ModelFile,
    Page,
    Plan,
    Progress,
    QueueEntry,
    TrainPlan,
)
from api.layout import JobLayout
from api.names import new_job_id
from api.prepare_spec import PrepareSpec
from api.spec import TrainSpec
from api.storage import Bucket
from api.tenants import Quotas
from service.admission import Node, with_addable
from service.answers import answer
from service.auth import Principal
from service.export import PIN, File, find_checkpoint, held, no_checkpoint, open_file
from service.forks import find_origin, fork_faults, retry_spec
from service.line import WAITING, line_order, queue_entry
from service.links import links
from service.live import EventFeed, Feed, LogFeed, MetricFeed
from service.plan import plan_prepare, plan_train
from service.quotas import spec_faults
from service.ray_backend import RayBackend, RayUnreachable
from service.render import submission
from service.replays import record_of, replayed
from service.resize import why_not_with
from service.retention import gone, remove
from service.rows import IdempotencyRecord, JobFilter, JobRow, NewEvent
from service.run_reader import (
    LogReader,
    read_checkpoints,
    read_logs,
    read_metrics,
    thinned,
)
from service.settings import Settings
from service.store import Store, being_deleted
from service.verification import find_written, verification


class Jobs:
    """What a principal can do with the jobs of its project."""

    def __init__(self, store: Store, bucket: Bucket, ray: RayBackend, settings: Settings) -> None:
        self._store, self._bucket, self._ray, self._settings = store, bucket, ray, settings

    def plan(self, who: Principal, spec: TrainSpec | PrepareSpec) -> Plan:
        """Return what a job would need and do; InvalidSpec if it cannot work. Stores nothing."""
        return self._plan(who, spec, "job-dry-run", self._origin(who, spec))[0]

    def submit(
        self, who: Principal, spec: TrainSpec | PrepareSpec, body: Any, idempotency_key: str | None
    ) -> tuple[Job, bool]:
        """Accept a job; return it, and whether it is new. Once this returns, the job is never lost.

        `body` is the request as parsed, before defaults: the same idempotency key with another body is refused.
        """
        record = record_of(who, body, idempotency_key)
        if (job := self._replay(who, record)) is not None:
            return job, False
        return self._accept(who, spec, record, "job.submit")

    def get(self, who: Principal, job_id: str) -> Job:
        return self._answer(who, self._row(who, job_id))

    def page(self, who: Principal, only: JobFilter, limit: int, cursor: str | None) -> Page[Job]:
        """Return jobs, newest first; the cursor is the last id of the page, so new jobs do not move it."""
        rows = self._store.page(who.project, only, limit=limit + 1, before=cursor)
        more = rows[limit - 1].id if len(rows) > limit else None
        return Page(items=[self._answer(who, row) for row in rows[:limit]], next_cursor=more)

    def cancel(self, who: Principal, job_id: str, keep_checkpoint: bool = False) -> Job:
        """Ask a job to stop; asking again is harmless. Conflict if it has ended otherwise."""
        self._row(who, job_id)
        change = who.change("job.cancel", job_id, keep_checkpoint=keep_checkpoint)
        asked, row = self._store.request_cancel(job_id, keep_checkpoint, change), self._row(who, job_id)
        if not asked and row.state != JobState.CANCELLED:
            raise Conflict(f"job {job_id} has already {row.state}; it cannot be cancelled")
        return self._answer(who, row)

    def pause(self, who: Principal, job_id: str) -> Job:
        """Ask a training to write a checkpoint and let go of its workers; asking again is harmless."""
        row = self._row(who, job_id)
        if isinstance(row.parsed_spec, PrepareSpec):
            raise Conflict(f"job {job_id} is a preparation, which has no checkpoints; cancel it and submit it again")
        if not self._store.request_pause(job_id, who.change("job.pause", job_id)):
            raise Conflict(f"job {job_id} {_condition(self._row(who, job_id))}; it cannot be paused")
        return self.get(who, job_id)

    def resume(self, who: Principal, job_id: str, workers: int | None) -> Job:
        """Put a paused job back into the line; Conflict if it is not paused, InvalidSpec if it cannot run so."""
        row = self._row(who, job_id)
        if workers is not None:
            why = why_not_with(row.parsed_spec, workers, self._nodes(), who.project, self._quotas(who))
            if why is not None:
                raise InvalidSpec(why, errors=[Fault(path="$.workers", message=why)])
        change = who.change("job.resume", job_id, workers=workers)
        if not self._store.request_resume(job_id, workers, now(), change):
            raise Conflict(f"job {job_id} {_condition(self._row(who, job_id))}; there is no pause to end")
        return self.get(who, job_id)

    def retry(self, who: Principal, job_id: str, idempotency_key: str | None) -> tuple[Job, bool]:
        """Accept a new job that goes on from an ended job's newest checkpoint; a terminal state is never left.

        One that was accepted before is answered whatever has become of the ended job since, and of the bucket.
        """
        record = record_of(who, {"retry": job_id}, idempotency_key)
        if (job := self._replay(who, record)) is not None:
            return job, False
        row = self._row(who, job_id)
        if row.state not in (JobState.FAILED, JobState.CANCELLED):
            raise Conflict(f"job {job_id} is {row.state}; only one that failed or was cancelled can be retried")
        return self._accept(who, self._once_more(who, row), record, "job.retry", retry_of=job_id)

    def _once_more(self, who: Principal, row: JobRow) -> TrainSpec | PrepareSpec:
        if isinstance(row.parsed_spec, PrepareSpec):
            return row.parsed_spec
        written = self.checkpoints(who, row.id).items
        newest = CheckpointRef(segment=written[-1].segment, step=written[-1].step) if written else None
        return retry_spec(row, newest)

    def queue(self, who: Principal) -> Page[QueueEntry]:
        """Return the line of waiting jobs, who is next first."""
        waiting = [row for row in self._store.live(who.project) if row.state in WAITING]
        return Page(items=[queue_entry(row, i) for i, row in enumerate(sorted(waiting, key=line_order), 1)])

    def delete(self, who: Principal, job_id: str) -> None:
        """Bury an ended job: it is gone at once; its objects follow."""
        row = self._ended(who, job_id, "an ended job")
        if self._store.apply(row, {"deleted_at": now()}, change=who.change("job.delete", job_id)) is None:
            raise Conflict(f"job {job_id} was changed at the same time; try again")

    def delete_checkpoint(self, who: Principal, job_id: str, step: int) -> None:
        """Delete one checkpoint of an ended job. Conflict while it is being downloaded."""
        row = self._ended(who, job_id, "a checkpoint of an ended job")
        found = next((c for c in self.checkpoints(who, job_id).items if c.step == step), None)
        if found is None:
            raise no_checkpoint(job_id, step)
        at = CheckpointRef(segment=found.segment, step=step)
        change = who.change("checkpoint.delete", job_id, step=step, segment=at.segment)
        if not self._store.doom(row, at, now(), gone(at, "on request"), change):
            raise Conflict(
                f"the checkpoint of step {step} is being downloaded, or a live job began at it, or this job was "
                "changed; try again"
            )
        remove(self._bucket, JobLayout(row.project, row.id), at)
        self._store.unmark(job_id, [at])

    def download(self, who: Principal, job_id: str, step: int, name: ModelFile) -> File:
        """Return a file of a checkpoint, which stays until the last piece is taken or the iterator closed."""
        row = self._row(who, job_id)
        at = find_checkpoint(self._bucket, row, step)
        pin = self._store.pin(job_id, at, "download", now(), now() + PIN) if at is not None else None
        if at is None or pin is None:
            raise no_checkpoint(job_id, step)
        try:
            file = open_file(self._bucket, row, at, name)
        except BaseException:
            self._store.unpin(pin)
            raise
        pieces = held(file.pieces, self._store, pin, f"job {job_id}: {name} of step {step}")
        return File(file.size, pieces, lambda: self._store.unpin(pin))

    def verify(self, who: Principal, job_id: str, step: int | None) -> Generator[bytes, None, None]:
        """Return the lines of a verification of all checkpoints, or of one step's; NotFound if there is none."""
        row = self._row(who, job_id)
        found = find_written(self._bucket, self._store, row, step)
        if step is not None and not found:
            raise no_checkpoint(job_id, step)
        return verification(self._bucket, self._store, row, found)

    def events(self, who: Principal, job_id: str, after: int, limit: int) -> Page[Event]:
        self._row(who, job_id)
        items = self._store.events(job_id, after=after, limit=limit)
        return Page(items=items, next_cursor=str(items[-1].seq) if items else None)

    def metrics(
        self, who: Principal, job_id: str, keys: Sequence[str] | None, from_step: int, max_points: int | None
    ) -> Page[MetricPoint]:
        """Return the metric lines of the job's history that have one of `keys`."""
        layout, end = self._history(who, job_id)
        points = (_chosen(point, keys, from_step) for point in read_metrics(self._bucket, layout, end))
        return Page(items=thinned([point for point in points if point is not None], max_points))

    def checkpoints(self, who: Principal, job_id: str) -> Page[Checkpoint]:
        layout, end = self._history(who, job_id)
        return Page(items=read_checkpoints(self._bucket, layout, end))

    def logs(self, who: Principal, job_id: str, rank: int | None, cursor: str | None) -> Page[LogLine]:
        layout, _ = self._history(who, job_id)
        lines, following = read_logs(self._bucket, layout, rank, cursor)
        return Page(items=lines, next_cursor=following)

    def follow_events(self, who: Principal, job_id: str, after: int) -> Feed:
        """Return the events with a number above `after`, those to come included. NotFound as for the list."""
        self._row(who, job_id)
        return EventFeed(partial(self._row, who, job_id), self._store, after)

    def follow_metrics(
        self, who: Principal, job_id: str, keys: Sequence[str] | None, from_step: int, last_id: str | None
    ) -> Feed:
        """Return the metric lines that come after the point `last_id`, or all."""
        layout, _ = self._history(who, job_id)
        choose = partial(_chosen, keys=keys, from_step=from_step)
        return MetricFeed(partial(self._row, who, job_id), self._bucket, layout, last_id, choose)

    def follow_logs(self, who: Principal, job_id: str, rank: int | None, cursor: str | None) -> Feed:
        """Return the log lines after a cursor; InvalidSpec if it is not one of ours."""
        layout, _ = self._history(who, job_id)
        return LogFeed(partial(self._row, who, job_id), LogReader(self._bucket, layout, rank, cursor))

    def _answer(self, who: Principal, row: JobRow) -> Job:
        return answer(row).model_copy(update={"links": links(who, row, self._settings)})

    def _row(self, who: Principal, job_id: str) -> JobRow:
        row = self._store.get(job_id, who.project)
        if row is None:
            raise NotFound(f"there is no job {job_id}")
        return row

    def _ended(self, who: Principal, job_id: str, what: str) -> JobRow:
        """Return a job if it has ended; Conflict otherwise. `what` is to be deleted."""
        row = self._row(who, job_id)
        if not JobState(row.state).ended:
            raise Conflict(f"job {job_id} is {row.state}; only {what} can be deleted. Cancel it first")
        return row

    def _history(self, who: Principal, job_id: str) -> tuple[JobLayout, CheckpointRef | None]:
        row = self._row(who, job_id)
        end = CheckpointRef.model_validate(row.history_end) if row.history_end else None
        return JobLayout(row.project, row.id), end

    def _replay(self, who: Principal, record: IdempotencyRecord | None) -> Job | None:
        """Return the job that the same request made before, from the database alone."""
        found = self._store.replay(record.principal, record.key) if record is not None else None
        return None if record is None or found is None else self._answer(who, replayed(found, record))

    def _accept(
        self,
        who: Principal,
        spec: TrainSpec | PrepareSpec,
        record: IdempotencyRecord | None,
        action: str,
        **details: Any,
    ) -> tuple[Job, bool]:
        with self._holding_origin(who, spec) as origin:
            job = self._new_row(who, spec, origin)
            change = who.change(action, job.id, name=job.name, kind=spec.kind, **details)
            first = self._store.insert(job, NewEvent("state", "accepted", JobState.QUEUED), record, change)
        if first is not None:
            assert record is not None
            return self._answer(who, replayed(first, record)), False
        return self._answer(who, job), True

    def _new_row(self, who: Principal, spec: TrainSpec | PrepareSpec, origin: CheckpointRef | None) -> JobRow:
        job_id, created = new_job_id(), now()
        plan, dataset = self._plan(who, spec, job_id, origin)
        steps = PREPARE_STEPS
        if isinstance(spec, TrainSpec) and dataset is not None:
            steps = total_steps(spec, samples(dataset, "train", spec.data.sequence_length))
        return JobRow(
            id=job_id,
            project=who.project,
            owner=who.key_id,
            name=spec.name,
            labels=dict(spec.labels),
            spec=spec.model_dump(mode="json"),
            dataset_version=dataset.version if dataset is not None else None,
            warnings=plan.warnings,
            state=JobState.QUEUED.value,
            state_since=created,
            created_at=created,
            queued_at=created,
            init=origin.model_dump() if origin is not None else None,
            message="accepted",
            progress=Progress(total_steps=steps).model_dump(),
            retention="active" if isinstance(spec, TrainSpec) else None,
        )

    def _origin(self, who: Principal, spec: TrainSpec | PrepareSpec) -> CheckpointRef | None:
        """Return the checkpoint of another job that a spec begins at."""
        if isinstance(spec, PrepareSpec) or spec.init is None:
            return None
        return find_origin(self._bucket, self._store.get(spec.init.from_job, who.project), spec.init)

    @contextmanager
    def _holding_origin(self, who: Principal, spec: TrainSpec | PrepareSpec) -> Iterator[CheckpointRef | None]:
        """Give the checkpoint that a spec begins at, and keep it until the job that is made meanwhile keeps it itself.

        It is looked at again once it is pinned: since it was found, it may have been deleted from end to end.
        """
        origin = self._origin(who, spec)
        if origin is None or origin.job_id is None:
            yield origin
            return
        pin = self._store.pin(origin.job_id, origin, "fork", now(), now() + PIN)
        if pin is None:
            raise being_deleted(origin)
        try:
            checkpoint = JobLayout(who.project, origin.job_id).segment(origin.segment).checkpoint(origin.step)
            if self._bucket.find_document(checkpoint.manifest, Manifest) is None:
                raise being_deleted(origin)
            yield origin
        finally:
            with suppress(SQLAlchemyError):  # it ends by itself, and an accepted job must not seem refused
                self._store.unpin(pin)

    def _plan(
        self, who: Principal, spec: TrainSpec | PrepareSpec, job_id: str, origin: CheckpointRef | None
    ) -> tuple[Plan, DatasetDocument | None]:
        faults = spec_faults(spec, who.project, self._quotas(who))
        if faults:
            raise InvalidSpec(faults[0].message, errors=faults)
        nodes = self._nodes()
        posted = submission(spec, who.project, job_id, 1, self._settings)
        if isinstance(spec, PrepareSpec):
            return plan_prepare(spec, nodes, posted), None
        try:
            dataset = find_dataset(self._bucket, who.project, spec.data.dataset, spec.model.vocab_size)
        except (ObjectMissing, InvalidData) as error:
            raise InvalidSpec(str(error), errors=[Fault(path="$.data.dataset", message=str(error))]) from error
        plan = plan_train(spec, dataset, nodes, posted)
        if origin is not None:
            plan.begins_at = origin.step
            self._refuse_fork(who, spec, plan, dataset, origin)
        return plan, dataset

    def _refuse_fork(
        self, who: Principal, spec: TrainSpec, plan: TrainPlan, dataset: DatasetDocument, origin: CheckpointRef
    ) -> None:
        """InvalidSpec if the checkpoint does not fit the job."""
        assert origin.job_id is not None
        source = self._row(who, origin.job_id)
        theirs = source.parsed_spec
        assert isinstance(theirs, TrainSpec)
        reference = f"{theirs.data.dataset.partition('@')[0]}@{source.dataset_version}"
        try:
            vocab_size = find_dataset(self._bucket, who.project, reference, theirs.model.vocab_size).vocab_size
        except (ObjectMissing, InvalidData) as error:
            words = f"the vocabulary of job {source.id} is not known any more: {error}"
            raise InvalidSpec(words, errors=[Fault(path="$.init.from_job", message=words)]) from error
        faults = fork_faults(spec, theirs, (dataset.vocab_size, vocab_size), origin.step, plan.steps)
        if faults:
            raise InvalidSpec(faults[0].message, errors=faults)

    def _quotas(self, who: Principal) -> Quotas:
        return self._store.quotas(who.project).get(who.project, Quotas())

    def _nodes(self) -> list[Node] | None:
        """Return the nodes that are there or may be added; None while Ray does not answer."""
        try:
            return with_addable(self._ray.nodes(), self._settings.addable_nodes)
        except RayUnreachable:
            return None


def _condition(row: JobRow) -> str:
    """Say where a job is, whatever has become of the wish to cancel it."""
    ended = JobState(row.state).ended
    return "is being cancelled" if row.cancel_requested and not ended else f"is {row.state}"


def _chosen(point: MetricPoint, keys: Sequence[str] | None, from_step: int) -> MetricPoint | None:
    """Return a point with those of its values that are wanted, None if there is none."""
    values = {k: v for k, v in point.values.items() if keys is None or k in keys}
    return point.model_copy(update={"values": values}) if values and point.step >= from_step else None
