"""The JSON objects in the bucket, each with a schema version. Written strictly, read leniently.

The control plane writes job, attempt, control and final; the workers write all the others. A reader ignores
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


class JobDocument(Document):
    """`job.json`: the job as accepted, dataset pinned. Written before the first attempt."""

    id: str
    project: str
    owner: str
    spec: JobSpec
    dataset_version: str | None
    created_at: datetime


class AttemptDocument(Document):
    """`attempt.json`: written before the submission, naming the Ray session that it is meant for."""

    job_id: str
    attempt: int
    submission_id: str
    ray_session: str
    created_at: datetime


Wish = Literal["run", "cancel", "superseded"]


class ControlDocument(Document):
    """`control.json`: what the control plane wants of an attempt. Never goes back from a stop to `run`."""

    wish: Wish = "run"


class CheckpointRef(Document):
    segment: str
    step: int


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
    created_at: datetime

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)


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
    event: str = ""
    """For events: `evaluation`, `checkpoint`, `fallback`, `fingerprint`, `progress`."""
    message: str = ""
    values: dict[str, Any] = Field(default_factory=dict)
