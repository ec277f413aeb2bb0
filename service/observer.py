"""Looks at Ray and the bucket for the reconciler. What cannot be seen is reported as such, never guessed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from api.documents import FaultDocument
from api.errors import InvalidData, StorageError
from api.layout import JobLayout
from api.names import submission_id
from api.storage import Bucket
from service.admission import Node
from service.lifecycle import Observation, RayStatus, Turn
from service.ray_backend import RayBackend, RayUnreachable
from service.rows import JobRow
from service.run_reader import AttemptTraces, read_attempt
from service.standstill import Standstill


@dataclass(frozen=True)
class ClusterView:
    """Ray as a whole, looked at once in each pass. `session` is None while it does not answer."""

    session: str | None
    nodes: Sequence[Node]
    message: str


def observe_cluster(ray: RayBackend) -> ClusterView:
    try:
        return ClusterView(ray.session(), ray.nodes(), "")
    except RayUnreachable as error:
        return ClusterView(None, [], str(error))


def observe(
    job: JobRow,
    cluster: ClusterView,
    ray: RayBackend,
    bucket: Bucket,
    turn: Turn,
    standstill: Standstill,
    at: float,
) -> Observation:
    """Return what is to be seen of a job's present attempt. `at` is in seconds of the clock of `standstill`."""
    status, message = _ray_status(job, cluster, ray)
    traces, fault, trouble = _traces(job, bucket, status)
    hung = standstill.look(job.id, traces.segment, traces.heartbeat, at, partial(_lost_a_rank, job, bucket, traces))
    return Observation(
        ray=status,
        ray_session=cluster.session,
        ray_message=message,
        bucket_reachable=trouble is None,
        bucket_message=trouble or "",
        began=traces.segment is not None,
        control=traces.control,
        result=traces.result,
        fault=fault,
        turn=turn,
        hung=hung,
    )


def _ray_status(job: JobRow, cluster: ClusterView, ray: RayBackend) -> tuple[RayStatus, str]:
    if cluster.session is None:
        return RayStatus.UNREACHABLE, cluster.message
    if job.attempt == 0:
        return RayStatus.ABSENT, ""
    try:
        return ray.status(submission_id(job.id, job.attempt))
    except RayUnreachable as error:
        return RayStatus.UNREACHABLE, str(error)


def _lost_a_rank(job: JobRow, bucket: Bucket, traces: AttemptTraces) -> bool:
    """Whether a rank of the newest segment is known to be gone; also where that cannot be told now."""
    assert traces.segment is not None
    try:
        return bool(bucket.files(JobLayout(job.project, job.id).segment(traces.segment).faults))
    except StorageError:
        return True


def _traces(job: JobRow, bucket: Bucket, status: RayStatus) -> tuple[AttemptTraces, FaultDocument | None, str | None]:
    """Return the attempt's traces, what ended its driver, and why the bucket could not be looked at, if so."""
    layout = JobLayout(job.project, job.id)
    try:
        if job.attempt == 0:
            bucket.objects(layout.prefix)  # a new job needs no trace, but a bucket that answers
            return AttemptTraces(), None, None
        traces = read_attempt(bucket, layout, job.attempt)
        # Only a driver that is gone has said all that it will say.
        fault = bucket.find_document(layout.fault(job.attempt), FaultDocument) if status.over else None
        return traces, fault, None
    except (StorageError, InvalidData) as error:
        return AttemptTraces(), None, str(error)
