"""The JSON objects in the bucket, each with a schema version. Written strictly, read leniently.

The control plane writes job, attempt, control, hold and final; the workers write all the others. A reader ignores
fields that it does not know, so that a newer writer can add some.
"""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .jobs import Reason
from .spec import JobSpec


def now() -> datetime:
    return datetime.now(UTC)


class Document(BaseModel):
    """A JSON object in the bucket."""

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)
    schema_version: Literal[1] = 1


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ShardDocument(Document):
    name: str
    """File name within the split's folder."""
    size: int
    """Bytes, header included."""
    tokens: int
    blocks: list[Sha256] | None
    """sha256 of each 4 MiB block of the file, in order; the last block may be short. Null for a bare shard, whose
    blocks are recorded when they are first read (BlockDocument)."""


class SplitDocument(Document):
    documents: int | None
    """Null for bare shards, as is `text_bytes`: they are tokens and nothing else."""
    tokens: int
    text_bytes: int | None
    shards: list[ShardDocument]


class DatasetDocument(Document):
    """`dataset.json`: everything that a reader must know about a dataset, and every hash of its bytes.

    A folder of bare shards has no such object; it is described from its listing and headers (api/datasets.py).
    """

    name: str
    version: str
    tokenizer: Literal["bpe", "characters", "none"]
    """`none` for bare shards: who made them knows, the folder does not."""
    tokenizer_sha256: Sha256 | None = None
    """Of `tokenizer.json`. Null where there is none, and in documents of before it was recorded."""
    vocab_size: int
    dtype: Literal["uint16", "uint32"]
    splits: dict[str, SplitDocument]
    unigram_loss: float | None
    """Cross-entropy (nats/token) of the eval split under the train split's smoothed token frequencies; null for bare
    shards, which nobody has counted."""
    created_at: datetime


class BlockDocument(Document):
    """The record of a block of a bare shard, left by whoever read it first; its key holds the sha256 as well."""

    shard: str
    index: int
    sha256: Sha256
    created_at: datetime


class CheckpointRef(Document):
    segment: str
    step: int
    job_id: str | None = None
    """The job that it belongs to, where that is another one than the one that refers to it."""


class JobDocument(Document):
    """`job.json`: the job as accepted, dataset pinned. Written before the first attempt."""

    id: str
    project: str
    owner: str
    spec: JobSpec
    dataset_version: str | None
    init: CheckpointRef | None = None
    """The checkpoint of another job that this one begins at."""
    total_steps: int | None = None
    """Null in documents of before it was recorded, as `warnings` are empty there: as the spec says, if it does."""
    warnings: list[str] = Field(default_factory=list)
    """What the plan found worth saying at submission."""
    created_at: datetime


class AttemptDocument(Document):
    """`attempt.json`: written before the submission, naming the Ray session that it is meant for."""

    job_id: str
    attempt: int
    submission_id: str
    ray_session: str
    workers: int | None = None
    """World size of this attempt; null in documents of before it was recorded: as the spec says."""
    created_at: datetime


Wish = Literal["run", "pause", "cancel", "superseded"]


class ControlDocument(Document):
    """`control.json`: what the control plane wants of an attempt. Never goes back from a stop to `run`."""

    wish: Wish = "run"
    keep_checkpoint: bool = False
    """Whether a run that is cancelled writes a checkpoint first; one that is paused always does."""
    reason: Reason | None = None
    """Why it shall stop or was given up, for a rebuild of the database. Null in documents of before it was recorded."""


class HoldDocument(Document):
    """`hold.json`: whether a user holds the job back between two attempts; for a rebuild of the database.

    Written when a job that has had an attempt is paused, and when it is resumed.
    """

    attempt: int
    """The newest attempt then. Of a later one it says nothing."""
    paused: bool
    workers: int | None = None
    """The number of workers that the user resumed the job with; null: as the spec says."""
    created_at: datetime


class NoticeDocument(Document):
    """`notice.json`: the driver's notice that the attempt must end soon, whoever wants it. Written once."""

    message: str
    created_at: datetime


class Fingerprint(Document):
    """What must be equal for two runs to agree to the bit."""

    torch: str
    device: str
    threads: int
    compile: bool
    precision: str
    world_size: int | None
    """Null for an elastic run, whose bits do not depend on it."""


class SegmentDocument(Document):
    """`segment.json`: written by rank 0 before anything else in the segment."""

    job_id: str
    segment: str
    origin: CheckpointRef | None = Field(validation_alias="from", serialization_alias="from")
    """The checkpoint at which this segment began (`from` in JSON); null at the start of the training."""
    world_size: int
    fingerprint: Fingerprint | None
    """Null for a preparation, whose bytes do not depend on it."""
    skipped: list[int] = Field(default_factory=list)
    """Global batches that this run leaves out, ascending, by their number in the order of the data (from 1)."""
    redoes_evaluation: bool = False
    """Whether it begins with the evaluation of the step that it begins at, which a stop had cut short."""
    created_at: datetime

    model_config = ConfigDict(extra="ignore", frozen=True, validate_by_name=True, serialize_by_alias=True)


class Receipt(Document):
    """Written by a rank beside its part, after it has read the part back."""

    rank: int
    name: str
    size: int
    sha256: Sha256
    tensors: dict[str, Sha256] = Field(default_factory=dict)
    """sha256 of the bytes of each of the part's `model.*` tensors, by name, so that the model can be handed out piece
    by piece and still be verified; empty in receipts of before they were recorded."""


class Manifest(Document):
    """`manifest.json`: written last; names every part with size and sha256."""

    job_id: str
    segment: str
    step: int
    world_size: int
    parts: list[Receipt]
    metrics: dict[str, float]
    """The evaluation of this step, if there was one."""
    skipped: list[int] = Field(default_factory=list)
    """Global batches that were left out on purpose so far; with the step, all that the order of the data needs."""
    created_at: datetime

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)


class FaultDocument(Document):
    """`faults/<rank>.json`: what ended a rank, as far as it, or the driver for it, could still say so."""

    rank: int
    step: int
    reason: Reason
    phase: str
    message: str
    created_at: datetime


class HeartbeatDocument(Document):
    """`heartbeat.json`: a sign of life by rank 0. Written anew while the count grows, and only then."""

    count: int
    phase: str
    step: int
    limit: float
    """Seconds of standstill after which the ranks' own watchdogs act."""


class ResultDocument(Document):
    """`result.json`: the outcome that the worker group itself knows."""

    outcome: Literal["succeeded", "failed", "stopped"]
    reason: Reason
    message: str
    step: int
    values: dict[str, Any] = Field(default_factory=dict)
    """What the job made: eval loss, sample, dataset, … ."""
    created_at: datetime


class FinalDocument(Document):
    """`final.json`: the end as the control plane recorded it."""

    state: str
    reason: Reason | None
    message: str
    end: CheckpointRef | None
    """Where the history ends; readers stop there."""
    created_at: datetime


class StreamLine(Document):
    """One line of a segment's metrics stream: numbers at a step, or an event of the workers."""

    type: Literal["metrics", "event"]
    step: int
    at: datetime
    event: str = Field(default="", max_length=32)
    """For events: `evaluation`, `checkpoint`, `fallback`, `fingerprint`, `progress`."""
    message: str = ""
    values: dict[str, Any] = Field(default_factory=dict)
