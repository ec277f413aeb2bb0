"""Sixty kinds of damage to the newest checkpoint: a wrong weight never comes back, and what is lost is said.

What becomes of the newest checkpoint, by what was damaged and how:

    a part       changed, cut or gone    the one before, with a warning
    the manifest changed or cut          the one before, with a warning
    the manifest gone                    the one before, in silence: a run that died while writing it leaves the same
    a receipt    changed, cut or gone    nothing: the manifest holds what the receipts said; nobody reads them again
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import uuid4

import pytest
import torch

from api.documents import CheckpointRef
from api.layout import CheckpointLayout, JobLayout
from api.storage import Bucket
from tests.checkpoints import segment, write_checkpoint
from tests.servers import BUCKET, S3, use_store
from workers.restore import newest_valid, read_segments
from workers.snapshot import State

SEGMENT = "1-0-a"
WORLDS = (1, 3)
STEPS = (4, 8)
DAMAGES = ("changed", "cut", "gone")
SAMPLES = 2


@dataclass(frozen=True)
class Case:
    """One object of the newest checkpoint, and what becomes of it, at a place of its own."""

    world_size: int
    what: str
    rank: int
    damage: str
    seed: int

    def __str__(self) -> str:
        return f"{self.world_size} ranks, {self.what} {self.rank} {self.damage}, {self.seed}"

    def key(self, checkpoint: CheckpointLayout) -> str:
        match self.what:
            case "part":
                return checkpoint.part(self.rank, self.world_size)
            case "receipt":
                return checkpoint.receipt(self.rank, self.world_size)
            case _:
                return checkpoint.manifest

    def damaged(self, body: bytes) -> bytes | None:
        chance = random.Random(self.seed)
        place = chance.randrange(len(body))
        match self.damage:
            case "changed":
                return body[:place] + bytes([body[place] ^ chance.randrange(1, 256)]) + body[place + 1 :]
            case "cut":
                return body[:place]
            case _:
                return None

    @property
    def step(self) -> int:
        """Where a run then begins."""
        return STEPS[1] if self.what == "receipt" else STEPS[0]

    @property
    def warns(self) -> bool:
        return self.what == "part" or (self.what == "manifest" and self.damage != "gone")


def objects(world_size: int) -> list[tuple[str, int]]:
    return [("manifest", 0)] + [(what, rank) for what in ("part", "receipt") for rank in range(world_size)]


CASES = [
    Case(world_size, what, rank, damage, seed)
    for world_size in WORLDS
    for what, rank in objects(world_size)
    for damage in DAMAGES
    for seed in range(SAMPLES)
]


def layout_of(world_size: int) -> JobLayout:
    return JobLayout("default", f"of-{world_size}")


def state_at(step: int) -> State:
    torch.manual_seed(step)
    weights = {f"model.{i}.weight": torch.randn(20 + i, 16) for i in range(4)}
    moments = {f"optimizer.{name}.{key}": torch.randn(3) for name in weights for key in ("exp_avg", "exp_avg_sq")}
    return {**weights, **moments, "loop.loss_sum": torch.randn(1, dtype=torch.float64)}


@pytest.fixture(scope="module")
def bucket(s3_server: S3) -> Iterator[Bucket]:
    """For each world size a job with checkpoints after steps 4 and 8; every test leaves them as they were."""
    with pytest.MonkeyPatch.context() as patch:
        use_store(s3_server, patch)
        bucket = Bucket(f"s3://{BUCKET}/{uuid4().hex}")
        for world_size in WORLDS:
            layout = layout_of(world_size)
            bucket.put_document(layout.segment(SEGMENT).document, segment(SEGMENT))
            for step in STEPS:
                at = CheckpointRef(segment=SEGMENT, step=step)
                write_checkpoint(bucket, layout, at, state_at(step), world_size)
        yield bucket


def test_there_are_sixty_cases() -> None:
    assert len(set(CASES)) == 60


@pytest.mark.parametrize("world_size", WORLDS)
def test_without_damage_the_newest_is_read_to_the_bit(bucket: Bucket, world_size: int) -> None:
    layout = layout_of(world_size)
    restored, passed_over = newest_valid(bucket, layout, read_segments(bucket, layout))
    assert (restored.step, restored.metrics, passed_over) == (8, {"eval_loss": 8 / 7}, [])
    assert_same_bits(restored.state, state_at(8))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_damage_is_noticed_and_never_becomes_a_wrong_weight(bucket: Bucket, case: Case) -> None:
    layout = layout_of(case.world_size)
    newest = layout.segment(SEGMENT).checkpoint(STEPS[1])
    key = case.key(newest)
    sound = bucket.get(key)
    damaged = case.damaged(sound)
    if damaged is None:
        bucket.delete([key])
    else:
        bucket.put(key, damaged)
    try:
        restored, passed_over = newest_valid(bucket, layout, read_segments(bucket, layout))
    finally:
        bucket.put(key, sound)
    assert restored.step == case.step
    assert_same_bits(restored.state, state_at(case.step))
    assert [newest.prefix in why for why in passed_over] == [True] * case.warns


def assert_same_bits(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
