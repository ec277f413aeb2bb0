"""Looks at Ray and the bucket for the reconciler. What cannot be seen is reported as such, never guessed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from api.errors import InvalidData, StorageError
from api.layout import JobLayout
from api.names import submission_id
from api.storage import Bucket
from service.admission import Node
from service.lifecycle import Observation, RayStatus
from service.ray_backend import RayBackend, RayUnreachable
from service.run_reader import AttemptTraces, read_attempt
from service.store import JobRow


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


def observe(job: JobRow, cluster: ClusterView, ray: RayBackend, bucket: Bucket, admission: str | None) -> Observation:
    """Return what is to be seen of a job's present attempt."""
    status, message = _ray_status(job, cluster, ray)
    blank = Observation(
        ray=status,
        ray_session=cluster.session,
        ray_message=message,
        bucket_reachable=True,
        bucket_message="",
        began=False,
        control=None,
        result=None,
        admission=admission,
    )
    try:
        traces = _traces(job, bucket)
    except (StorageError, InvalidData) as error:
        return replace(blank, bucket_reachable=False, bucket_message=str(error))
    return replace(blank, began=traces.segment is not None, control=traces.control, result=traces.result)


def _ray_status(job: JobRow, cluster: ClusterView, ray: RayBackend) -> tuple[RayStatus, str]:
    if cluster.session is None:
        return RayStatus.UNREACHABLE, cluster.message
    if job.attempt == 0:
        return RayStatus.ABSENT, ""
    try:
        return ray.status(submission_id(job.id, job.attempt))
    except RayUnreachable as error:
        return RayStatus.UNREACHABLE, str(error)


def _traces(job: JobRow, bucket: Bucket) -> AttemptTraces:
    layout = JobLayout(job.project, job.id)
    if job.attempt == 0:
        bucket.objects(layout.prefix)  # a new job needs no trace, but a bucket that answers
        return AttemptTraces(None, None, None)
    return read_attempt(bucket, layout, job.attempt)
