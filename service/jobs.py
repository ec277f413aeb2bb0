"""The use cases behind the routes: plan, submit, look, cancel, delete. No HTTP here."""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from api.arithmetic import PREPARE_STEPS, samples, total_steps
from api.datasets import find_dataset
from api.documents import CheckpointRef, DatasetDocument, now
from api.errors import (
    Conflict,
    Fault,
    IdempotencyMismatch,
    InvalidData,
    InvalidSpec,
    NotFound,
    ObjectMissing,
)
from api.jobs import (
    Checkpoint,
    Condition,
    Event,
    Job,
    JobState,
    LogLine,
    MetricPoint,
    ModelFile,
    Page,
    Plan,
    Progress,
    Reason,
)
from api.layout import JobLayout
from api.names import new_job_id
from api.spec import PrepareSpec, TrainSpec
from api.storage import Bucket
from service.admission import Node
from service.auth import Principal
from service.export import PIN, File, find_checkpoint, held, no_checkpoint, open_file
from service.live import EventFeed, Feed, LogFeed, MetricFeed
from service.plan import plan_prepare, plan_train
from service.ray_backend import RayBackend, RayUnreachable
from service.render import submission
from service.retention import gone, remove
from service.run_reader import (
    LogReader,
    read_checkpoints,
    read_logs,
    read_metrics,
    thinned,
)
from service.settings import Settings
from service.store import IdempotencyRecord, JobFilter, JobRow, NewEvent, Store


class Jobs:
    """What a principal can do with the jobs of its project."""

    def __init__(self, store: Store, bucket: Bucket, ray: RayBackend, settings: Settings) -> None:
        self._store, self._bucket, self._ray, self._settings = store, bucket, ray, settings

    def plan(self, who: Principal, spec: TrainSpec | PrepareSpec) -> Plan:
        """Return what a job would need and do; InvalidSpec if it cannot work. Stores nothing."""
        return self._plan(who, spec, "job-dry-run")[0]

    def submit(
        self, who: Principal, spec: TrainSpec | PrepareSpec, body: Any, idempotency_key: str | None
    ) -> tuple[Job, bool]:
        """Accept a job; return it, and whether it is new. Once this returns, the job is never lost.

        `body` is the request as parsed, before defaults: the same idempotency key with another body is refused.
        """
        record = None
        if idempotency_key is not None:
            digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
            record = IdempotencyRecord(who.key_id, idempotency_key, digest)
            if (replay := self._store.replay(who.key_id, idempotency_key)) is not None:
                return self._replayed(replay.job, replay.body_sha256, record), False
        job = self._new_row(who, spec)
        if (first := self._store.insert(job, NewEvent("state", "accepted", JobState.QUEUED), record)) is not None:
            assert record is not None
            return self._replayed(first.job, first.body_sha256, record), False
        return answer(job), True

    def get(self, who: Principal, job_id: str) -> Job:
        return answer(self._row(who, job_id))

    def page(self, who: Principal, only: JobFilter, limit: int, cursor: str | None) -> Page[Job]:
        """Return jobs, newest first; the cursor is the last id of the page, so new jobs do not move it."""
        rows = self._store.page(who.project, only, limit=limit + 1, before=cursor)
        more = rows[limit - 1].id if len(rows) > limit else None
        return Page(items=[answer(row) for row in rows[:limit]], next_cursor=more)

    def cancel(self, who: Principal, job_id: str) -> Job:
        """Ask a job to stop; asking again is harmless. Conflict if it has ended otherwise."""
        row = self._row(who, job_id)
        if not self._store.request_cancel(job_id) and row.state != JobState.CANCELLED:
            raise Conflict(f"job {job_id} has already {self._row(who, job_id).state}; it cannot be cancelled")
        return self.get(who, job_id)

    def delete(self, who: Principal, job_id: str) -> None:
        """Bury an ended job: it is gone at once; its objects follow."""
        row = self._ended(who, job_id, "an ended job")
        if self._store.apply(row, {"deleted_at": now()}) is None:
            raise Conflict(f"job {job_id} was changed at the same time; try again")

    def delete_checkpoint(self, who: Principal, job_id: str, step: int) -> None:
        """Delete one checkpoint of an ended job. Conflict while it is being downloaded."""
        row = self._ended(who, job_id, "a checkpoint of an ended job")
        found = next((c for c in self.checkpoints(who, job_id).items if c.step == step), None)
        if found is None:
            raise no_checkpoint(job_id, step)
        at = CheckpointRef(segment=found.segment, step=step)
        if not self._store.doom(row, at, now(), gone(at, "on request")):
            raise Conflict(f"the checkpoint of step {step} is being downloaded, or the job was changed; try again")
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

    def _replayed(self, job: JobRow, body_sha256: str, record: IdempotencyRecord) -> Job:
        if body_sha256 != record.body_sha256:
            raise IdempotencyMismatch(
                f"the idempotency key {record.key!r} was used for another request, which made {job.id}; "
                "use a new key for a new job"
            )
        return answer(job)

    def _new_row(self, who: Principal, spec: TrainSpec | PrepareSpec) -> JobRow:
        job_id, created = new_job_id(), now()
        plan, dataset = self._plan(who, spec, job_id)
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
            message="accepted",
            progress=Progress(total_steps=steps).model_dump(),
            retention="active" if isinstance(spec, TrainSpec) else None,
        )

    def _plan(self, who: Principal, spec: TrainSpec | PrepareSpec, job_id: str) -> tuple[Plan, DatasetDocument | None]:
        nodes = self._nodes()
        posted = submission(spec, who.project, job_id, 1, self._settings)
        if isinstance(spec, PrepareSpec):
            return plan_prepare(spec, nodes, posted), None
        try:
            dataset = find_dataset(self._bucket, who.project, spec.data.dataset, spec.model.vocab_size)
        except (ObjectMissing, InvalidData) as error:
            raise InvalidSpec(str(error), errors=[Fault(path="$.data.dataset", message=str(error))]) from error
        return plan_train(spec, dataset, nodes, posted), dataset

    def _nodes(self) -> list[Node] | None:
        try:
            return self._ray.nodes()
        except RayUnreachable:
            return None


def _chosen(point: MetricPoint, keys: Sequence[str] | None, from_step: int) -> MetricPoint | None:
    """Return a point with those of its values that are wanted, None if there is none."""
    values = {k: v for k, v in point.values.items() if keys is None or k in keys}
    return point.model_copy(update={"values": values}) if values and point.step >= from_step else None


def answer(row: JobRow) -> Job:
    """Return a row as the API shows it."""
    return Job(
        id=row.id,
        name=row.name,
        project=row.project,
        owner=row.owner,
        labels=row.labels,
        state=JobState(row.state),
        reason=Reason(row.reason) if row.reason else None,
        message=row.message,
        attempt=row.attempt,
        conditions=[Condition.model_validate(c) for c in row.conditions],
        progress=Progress.model_validate(row.progress),
        result=row.result,
        spec=row.parsed_spec,
        dataset_version=row.dataset_version,
        created_at=row.created_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
        warnings=row.warnings,
    )
