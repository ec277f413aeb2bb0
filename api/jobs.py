"""The vocabulary of a job's life and the answers of the API about it.

Which state may follow which is decided in the control plane alone (`service/lifecycle.py`); here are only the
words, so that client and workers can use them too.
"""

from datetime import datetime
from enum import StrEnum
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from .spec import JobSpec

T = TypeVar("T")


class JobState(StrEnum):
    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    RECOVERING = "recovering"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in ENDED


ENDED = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})


class Reason(StrEnum):
    """Why a job ended, or why an attempt did. What each means for the job stands in the control plane's table."""

    COMPLETED = "completed"
    USER_CANCELLED = "user_cancelled"
    USER_PAUSED = "user_paused"
    PREEMPTED = "preempted"
    """A job of higher priority needs the room."""
    RESIZED = "resized"
    """More workers have room now."""
    DRAINED = "drained"
    """Notice that the machine or the driver is about to go."""
    REWOUND = "rewound"
    """Back to a checkpoint, to leave out a batch whose loss is not finite."""
    DEADLINE = "deadline"
    INVALID_DATA = "invalid_data"
    NON_FINITE_LOSS = "non_finite_loss"
    OUT_OF_MEMORY = "out_of_memory"
    UNSUPPORTED = "unsupported"
    STORAGE_UNAVAILABLE = "storage_unavailable"
    WORKER_LOST = "worker_lost"
    """A process of the job, or the machine below it, was killed."""
    WORKER_ERROR = "worker_error"
    """A process of the job failed by itself."""
    CRASH_LOOP = "crash_loop"
    HUNG = "hung"
    RAY_LOST = "ray_lost"
    START_TIMEOUT = "start_timeout"
    SUPERSEDED = "superseded"


class Answer(BaseModel):
    """A body that the API returns. Clients ignore fields that they do not know."""

    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)


class Condition(Answer):
    """Something about a live job that a user should know while it lasts."""

    type: str
    """`waiting`, `ray_unreachable`, `storage_unreachable`."""
    message: str
    since: datetime


class Progress(Answer):
    """How far a run is; figures are those of the newest metric line."""

    step: int = 0
    total_steps: int | None = None
    values: dict[str, float] = Field(default_factory=dict)
    """loss, learning_rate, tokens_per_second, …"""
    eta_seconds: float | None = None
    at: datetime | None = None
    """When the newest line was written."""


class Origin(Answer):
    """A checkpoint of another job."""

    job_id: str
    step: int


class Links(Answer):
    """Pages about a job that show every tenant's: for operators."""

    ray: str | None = None
    """Of the present attempt, on Ray's dashboard."""
    grafana: str | None = None
    """The job's own dashboard."""


class Job(Answer):
    id: str
    name: str
    project: str
    owner: str
    labels: dict[str, str]
    state: JobState
    reason: Reason | None
    message: str
    """One sentence on the present state, or on how the job ended."""
    attempt: int
    """Attempts begun so far."""
    workers: int | None = None
    """World size of the present attempt."""
    conditions: list[Condition]
    progress: Progress
    result: dict[str, Any]
    """What the job made; empty until it has succeeded."""
    spec: JobSpec
    dataset_version: str | None
    init: Origin | None = None
    """The checkpoint of another job that this one begins at."""
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    warnings: list[str] = Field(default_factory=list)
    """What the plan found worth saying at submission."""
    links: Links | None = None
    """Only for keys with the operator mark, where it is configured where these pages are."""


class ResumeRequest(BaseModel):
    """How a paused job shall go on."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)
    workers: int | None = Field(default=None, ge=1, le=4096)
    """With this many workers from now on; null: as the spec says."""


class CancelRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)
    keep_checkpoint: bool = False
    """Write a checkpoint before stopping, so that another job can begin there."""


class QueueEntry(Answer):
    """A job that waits for its turn."""

    position: int
    """From 1."""
    job_id: str
    name: str
    priority: int
    state: JobState
    needs: str
    """What it wants of the cluster: workers × resources of each."""
    message: str
    """Why it waits, in numbers."""
    since: datetime
    """When it entered the line."""


class Event(Answer):
    seq: int
    """Counts from 1 in each job, without gaps."""
    at: datetime
    type: str
    """`state`, `attempt`, `condition`, `evaluation`, `checkpoint`, …"""
    message: str
    state: JobState | None = None
    """For events that change the state: the new one."""
    data: dict[str, Any] = Field(default_factory=dict)


class MetricPoint(Answer):
    segment: str
    line: int
    """Number of the line within its segment; (segment, line) identifies the point for ever."""
    step: int
    at: datetime
    values: dict[str, float]
    """loss and eval_loss in nats per token; tokens_per_second and model_flops_per_second over all workers, utilisation
    as their fraction of the peak measured at the start; data_wait and checkpoint_stall as fractions of the time since
    the line before; memory_bytes, the most that rank 0 has had so far."""


class Rewind(Answer):
    """In a live stream of metrics: the run went back to a checkpoint."""

    step: int
    """Forget the points beyond this step: others follow in their place."""
    segment: str | None
    """The segment that goes on from there; null if none does."""


class StreamEnd(Answer):
    """The last message of a live stream: how the job ended."""

    state: JobState
    reason: Reason | None
    message: str


class StreamError(Answer):
    """The last message of a live stream that cannot go on, since what is stored cannot be read."""

    detail: str


class Checkpoint(Answer):
    step: int
    segment: str
    prefix: str
    """Where its objects lie, below the storage root."""
    size: int
    """Bytes."""
    parts: int
    metrics: dict[str, float]
    created_at: datetime


ModelFile = Literal["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
"""A file that a checkpoint can be downloaded as; together they are a folder that other libraries load."""


class LogLine(Answer):
    segment: str
    rank: int
    line: int
    text: str


class Page(Answer, Generic[T]):
    items: list[T]
    next_cursor: str | None = None
    """What to pass for the next page: as `cursor` for jobs and logs, as `after` for events. Null when there is none."""


class MemoryPlan(Answer):
    """Bytes on one worker."""

    weights: int
    gradients: int
    optimizer: int
    ddp_buckets: int
    """What data parallelism holds beside the gradients."""
    partial_sums: int = 0
    """Sums of gradients that `determinism: elastic` keeps."""
    activations: int = 0
    """What one micro-batch adds at its peak; an estimate."""
    data: int = 0
    """Batches read ahead."""
    snapshot: int
    """The copy of weights and moments from which a worker writes its part of a checkpoint, and the piece of it that is
    read back at a time. The copy is kept from one checkpoint to the next."""

    @property
    def certain(self) -> int:
        """What no setting can avoid: weights, gradients and optimizer state."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """What is expected at the peak, beside what Python and its libraries take."""
        parts = self.ddp_buckets + self.partial_sums + self.activations + self.data + self.snapshot
        return self.certain + parts


class TrainPlan(Answer):
    """What a training job will need and do, before it is run."""

    kind: Literal["train"] = "train"
    spec: JobSpec
    """With every default filled in."""
    dataset_version: str
    begins_at: int = 0
    """The step that the run goes on from; 0 unless it begins at another job's checkpoint."""
    parameters: int
    steps: int
    tokens_per_step: int
    tokens: int
    """In the whole run."""
    epochs: float
    memory_per_worker: MemoryPlan
    checkpoint_size: int
    """Bytes of one checkpoint: weights and optimizer state."""
    submission: dict[str, Any]
    """What would be posted to Ray."""
    warnings: list[str]


class PreparePlan(Answer):
    kind: Literal["prepare"] = "prepare"
    spec: JobSpec
    submission: dict[str, Any]
    warnings: list[str]


Plan = TrainPlan | PreparePlan


class Check(Answer):
    """One dependency as `/readyz` saw it. What is wrong with it is in the server's log: `/readyz` answers strangers."""

    status: Literal["ok", "degraded", "failed"]


class Readiness(Answer):
    ready: bool
    """False when the database does not answer; bucket and Ray only degrade, since a job can wait for them."""
    checks: dict[str, Check]
