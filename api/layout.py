"""Where every object of a project lies in the bucket: pure strings, shared by control plane and workers.

Keys are relative to the storage root (`LOCKSTEP_STORAGE`). No key is also a prefix of another.
"""

from dataclasses import dataclass

PROJECT = "default"
"""The project that is there from the beginning."""

BARE = "bare-"
"""How the version of a folder of bare token shards begins. Prepared versions are job ids, so none of them does."""


@dataclass(frozen=True, order=True)
class SegmentId:
    """One start of a worker group. Orders by attempt, then restart, as integers."""

    attempt: int
    restart: int
    nonce: str

    def __str__(self) -> str:
        return f"{self.attempt}-{self.restart}-{self.nonce}"

    @classmethod
    def parse(cls, text: str) -> "SegmentId":
        """Read `attempt-restart-nonce`; ValueError if it is not one."""
        attempt, restart, nonce = text.split("-")
        return cls(int(attempt), int(restart), nonce)


def upload_prefix(project: str, folder: str) -> str:
    return f"{project}/uploads/{folder}/"


@dataclass(frozen=True)
class DatasetLayout:
    """Objects of one version of a dataset; `dataset.json` is written last, so without it there is no dataset.

    A version whose name begins with `bare-` is a folder of token shards that somebody put there: the shards lie
    directly below the dataset's name, and the version's own prefix holds nothing but the records of their blocks.
    """

    project: str
    name: str
    version: str

    @property
    def prefix(self) -> str:
        return f"{self.project}/datasets/{self.name}/{self.version}/"

    @property
    def document(self) -> str:
        return f"{self.prefix}dataset.json"

    @property
    def tokenizer(self) -> str:
        return f"{self.prefix}tokenizer.json"

    @property
    def is_bare(self) -> bool:
        return self.version.startswith(BARE)

    def shard(self, split: str, index: int) -> str:
        return f"{self.prefix}{split}/shard-{index:05d}.bin"

    def shard_file(self, split: str, file: str) -> str:
        """The key of a shard by its file name."""
        return (
            f"{dataset_versions_prefix(self.project, self.name)}{file}"
            if self.is_bare
            else f"{self.prefix}{split}/{file}"
        )

    def block_records(self, file: str) -> str:
        """The prefix of the records of a bare shard's blocks, each at `<index>/<sha256>.json` below it."""
        return f"{self.prefix}blocks/{file}/"


def dataset_versions_prefix(project: str, name: str) -> str:
    return f"{project}/datasets/{name}/"


@dataclass(frozen=True)
class JobLayout:
    """Objects of one job."""

    project: str
    job_id: str

    @property
    def prefix(self) -> str:
        return f"{self.project}/jobs/{self.job_id}/"

    @property
    def job(self) -> str:
        return f"{self.prefix}job.json"

    @property
    def final(self) -> str:
        return f"{self.prefix}final.json"

    @property
    def hold(self) -> str:
        return f"{self.prefix}hold.json"

    @property
    def attempts(self) -> str:
        return f"{self.prefix}attempts/"

    def attempt(self, attempt: int) -> str:
        return f"{self.prefix}attempts/{attempt}/attempt.json"

    def control(self, attempt: int) -> str:
        return f"{self.prefix}attempts/{attempt}/control.json"

    def notice(self, attempt: int) -> str:
        return f"{self.prefix}attempts/{attempt}/notice.json"

    def fault(self, attempt: int) -> str:
        """What ended the driver of an attempt, if it could still say so."""
        return f"{self.prefix}attempts/{attempt}/fault.json"

    @property
    def segments(self) -> str:
        return f"{self.prefix}segments/"

    def segment(self, segment: SegmentId | str) -> "SegmentLayout":
        return SegmentLayout(f"{self.segments}{segment}/")


@dataclass(frozen=True)
class SegmentLayout:
    """Objects of one segment of a job; only the worker group that made it writes under it."""

    prefix: str

    @property
    def document(self) -> str:
        return f"{self.prefix}segment.json"

    @property
    def result(self) -> str:
        return f"{self.prefix}result.json"

    @property
    def heartbeat(self) -> str:
        return f"{self.prefix}heartbeat.json"

    @property
    def faults(self) -> str:
        return f"{self.prefix}faults/"

    def fault(self, rank: int) -> str:
        return f"{self.faults}{rank}.json"

    @property
    def stream(self) -> str:
        return f"{self.prefix}metrics/"

    def logs(self, rank: int | None = None) -> str:
        """The prefix of the log chunks of one rank, or of all."""
        return f"{self.prefix}logs/" if rank is None else f"{self.prefix}logs/{rank}/"

    def checkpoint(self, step: int) -> "CheckpointLayout":
        return CheckpointLayout(f"{self.prefix}step-{step:08d}/")


@dataclass(frozen=True)
class CheckpointLayout:
    """Objects of one checkpoint. Without `manifest.json`, written last, the rest is garbage."""

    prefix: str

    @property
    def manifest(self) -> str:
        return f"{self.prefix}manifest.json"

    def part(self, rank: int, world_size: int) -> str:
        return f"{self.prefix}part-{rank:05d}-of-{world_size:05d}.safetensors"

    def receipt(self, rank: int, world_size: int) -> str:
        return f"{self.prefix}part-{rank:05d}-of-{world_size:05d}.receipt.json"


def chunk(prefix: str, index: int, suffix: str) -> str:
    """The key of one chunk of a stream: chunks are rewritten until they are full, then the next begins."""
    return f"{prefix}{index:06d}.{suffix}"
