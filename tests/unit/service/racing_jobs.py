"""Jobs as the world outside of the control plane has them: what their worker groups wrote, and what must stay of it."""

import hashlib
import json
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from math import prod
from typing import Any

from api.documents import CheckpointRef, Receipt
from api.jobs import JobState
from api.layout import JobLayout
from api.spec import TrainSpec
from service.architectures import model_tensors
from service.auth import Principal
from service.retention import Policy
from tests.fakes import train_spec
from tests.stepping import Work

WHO = Principal("key-1", "default")
MODEL = {"layers": 1, "width": 8, "heads": 1, "ffn_width": 8}
VOCAB, LENGTH = 16, 8
START = timedelta(seconds=600)
"""Longest start of an attempt, and of a worker group within one: after that it is ended."""
GRACE = timedelta(seconds=900)
LIVE = (JobState.STARTING, JobState.RUNNING)
POLICIES: list[dict[str, int]] = [{"keep_last": 1}, {"keep_last": 2}, {"keep_best": 1}, {}]
MARKS = "SELECT job_id, segment, step, doomed FROM marks"
Place = tuple[str, str, int]
"""A checkpoint: job, segment, step."""


def spec_of(policy: dict[str, int], **fields: Any) -> TrainSpec:
    data = {"dataset": "words", "sequence_length": LENGTH}
    checkpoint = {"every": 4, **policy}
    return train_spec(model=MODEL, data=data, steps=100_000, evaluate={"every": 4}, checkpoint=checkpoint, **fields)


@cache
def parts_of(step: int) -> tuple[tuple[Receipt, bytes], ...]:
    """Return the two parts of a checkpoint of this step, as two ranks write them: safetensors, all of one byte."""
    shapes = sorted(model_tensors(spec_of({}).model, VOCAB, LENGTH).items())
    return tuple(_part(rank, dict(shapes[rank::2]), step) for rank in range(2))


def _part(rank: int, shapes: dict[str, tuple[int, ...]], step: int) -> tuple[Receipt, bytes]:
    header, hashes, data = {}, {}, b""
    for name, shape in shapes.items():
        body = bytes([step % 64]) * (4 * prod(shape))
        offsets = [len(data), len(data) + len(body)]
        header[f"model.{name}"] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        hashes[f"model.{name}"] = hashlib.sha256(body).hexdigest()
        data += body
    text = json.dumps(header).encode()
    whole = len(text).to_bytes(8, "little") + text + data
    name = f"part-{rank:05d}-of-00002.safetensors"
    digest = hashlib.sha256(whole).hexdigest()
    return Receipt(rank=rank, name=name, size=len(whole), sha256=digest, tensors=hashes), whole


@dataclass(eq=False)
class Group:
    """A worker group: where it began and what it has written."""

    attempt: int
    restart: int
    since: Any
    origin: CheckpointRef | None = None
    promised: bool = True
    """Whether what it chose must stay: always, but for a group that Ray replaced and that passed a damaged one over
    for one that the policy did not keep anyway."""
    begun: bool = False
    dead: bool = False
    ready: bool = False
    """Every rank has read what it began at."""
    commits: list[tuple[int, float | None]] = field(default_factory=list)
    writing: int | None = None
    start: Work | None = None

    @property
    def name(self) -> str:
        return f"{self.attempt}-{self.restart}-x"

    @property
    def step(self) -> int:
        return max([self.origin.step if self.origin else 0, *(step for step, _ in self.commits)])


@dataclass(eq=False)
class Run:
    """A job, as the world outside of the control plane has it."""

    id: str
    policy: Policy
    init: CheckpointRef | None
    groups: list[Group] = field(default_factory=list)
    """The last one is the present one; others may still be alive somewhere, and write."""
    state: JobState = JobState.QUEUED
    end: tuple[Group, int] | None = None
    deleted: bool = False

    @property
    def ended(self) -> bool:
        return self.state.ended

    @property
    def layout(self) -> JobLayout:
        return JobLayout("default", self.id)

    @property
    def group(self) -> Group:
        return self.groups[-1]

    def path(self) -> list[tuple[Place, float | None]]:
        """The checkpoints of the job's history with their eval loss, oldest first."""
        begun = [group for group in self.groups if group.begun]
        if self.ended:
            return self._line(*self.end) if self.end is not None else []
        return self._line(max(begun, key=lambda g: (g.attempt, g.restart)), None) if begun else []

    def _line(self, group: Group, upto: int | None) -> list[tuple[Place, float | None]]:
        own = [((self.id, group.name, step), loss) for step, loss in group.commits if upto is None or step <= upto]
        return self._before(group) + own

    def _before(self, group: Group) -> list[tuple[Place, float | None]]:
        if group.origin is None or group.origin.job_id is not None:
            return []
        return self._line(next(g for g in self.groups if g.name == group.origin.segment), group.origin.step)

    def kept(self, gone: set[Place]) -> set[Place]:
        """What the policy keeps of what is not gone."""
        there = [(at, loss) for at, loss in self.path() if at not in gone]
        if not self.policy:
            return {at for at, _ in there}
        best = sorted((loss, -at[2], at) for at, loss in there if loss is not None)[: self.policy.keep_best or 0]
        return {at for at, _ in there[-(self.policy.keep_last or 1) :]} | {at for _, _, at in best}
