"""A cache smaller than the dataset: the same bits as without a limit, and never a byte above it."""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import workers.order
from api.datasets import find_dataset
from api.documents import JobDocument
from api.layout import DatasetLayout
from api.storage import Bucket
from tests.integration.test_bare_dataset import llm_c_shard
from tests.training import PROJECT, history_lines, make_dataset, run_ranks, settings_for, train_job
from workers.data import TokenSplit, TrainBatches
from workers.order import BLOCK_BYTES
from workers.session import Session
from workers.train import train

LENGTH = 65_536
SHARDS, BLOCKS = 3, 8
"""Each shard fills two blocks and a half: nine files in the cache, of which three are half as long as the others."""
OURS = re.compile(r"[0-9a-f]{64}|\.[0-9a-f]{64}\.partial")


def measured(folder: Path) -> int:
    """Bytes of blocks and temporary files; names are listed twice, until nothing came or went while we counted."""
    while True:
        before = names(folder)
        sizes = [path.stat().st_size for path in map(folder.joinpath, before) if path.exists()]
        if len(sizes) == len(before) and names(folder) == before:
            return sum(sizes)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if OURS.fullmatch(path.name))


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """Measure the folder over and over while the block runs."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes, stop = [0], threading.Event()

    def measure() -> None:
        while not stop.wait(0.001):
            try:
                sizes.append(measured(folder))
            except FileNotFoundError:
                continue  # a file went between two looks at it

    thread = threading.Thread(target=measure)
    thread.start()
    try:
        yield sizes
    finally:
        stop.set()
        thread.join()


def read_twice(session: Session, storage: str, cache: Path, limit: int) -> list[str]:
    """Read two epochs of this rank's batches, in windows of two blocks; return a digest of each step's tokens."""
    with pytest.MonkeyPatch.context() as patch:
        # Two blocks in use and two ahead, instead of sixteen each: then eight blocks are many.
        patch.setattr(workers.order, "WINDOW_BLOCKS", 2)
        bucket = Bucket(storage)
        dataset = find_dataset(bucket, PROJECT, "web", 50_000)
        split = TokenSplit(bucket, DatasetLayout(PROJECT, "web", dataset.version), dataset, "train", cache, limit)
        micros = 4 // session.world_size
        batches = TrainBatches(
            split, sequence_length=LENGTH, seed=3, global_size=4, micro_size=1,
            micro_range=range(session.rank * micros, (session.rank + 1) * micros), first_batch=1,
        )  # fmt: skip
        samples = sum((shape.tokens - 1) // LENGTH for shape in split.shapes)
        digests = []
        for _ in range(2 * samples // 4):
            digest = hashlib.sha256()
            for tokens_BT, targets_BT in batches.next().micro_batches:
                digest.update(tokens_BT.numpy().tobytes() + targets_BT.numpy().tobytes())
            digests.append(digest.hexdigest())
        batches.close()
    return digests


def test_two_ranks_read_the_same_tokens_with_half_the_room_and_stay_within_it(
    storage: str, bucket: Bucket, tmp_path: Path
) -> None:
    chance = np.random.default_rng(1)
    tokens = BLOCK_BYTES * 5 // 2 // 2 - 512
    for index in range(SHARDS):
        bucket.put(f"{PROJECT}/datasets/web/web_train_{index}.bin", llm_c_shard(chance.integers(0, 50_000, tokens)))
    bucket.put(f"{PROJECT}/datasets/web/web_val_0.bin", llm_c_shard(chance.integers(0, 50_000, 100)))
    whole = SHARDS * (1024 + 2 * tokens)
    limit = whole // 2

    small = tmp_path / "small"
    with watched(small) as sizes:
        for expected, limited in run_ranks(2, tmp_path / "two", read_both_ways, storage, str(tmp_path), limit):
            assert limited == expected
    assert measured(tmp_path / "unlimited") == whole
    assert len(set(sizes)) > 4
    assert limit - BLOCK_BYTES < max(sizes) <= limit


def read_both_ways(session: Session, storage: str, folder: str, limit: int) -> list[list[str]]:
    return [
        read_twice(session, storage, Path(folder, "unlimited"), 2**40),
        read_twice(session, storage, Path(folder, "small"), limit),
    ]


def train_thrice(session: Session, storage: str, folder: str, half: int, one: int) -> None:
    for job_id, limit in (("unlimited", 2**40), ("half", half), ("one", one)):
        settings = replace(settings_for(storage, Path(folder, job_id)), cache_bytes=limit)
        train(small_job(job_id), session, Bucket(storage), settings)


def small_job(job_id: str) -> JobDocument:
    """Somewhat more than an epoch."""
    return train_job(
        job_id, steps=30, log_every=1, evaluate={"every": 15, "sequences": 10}, checkpoint={"every": 30},
        data={"dataset": "words", "sequence_length": 64}, sample=None, resources={"workers": 2},
        model={"layers": 1, "width": 16, "heads": 2}, batch={"global_size": 32, "micro_size": 16},
    )  # fmt: skip


def test_a_training_of_two_ranks_ends_with_the_same_bits_whatever_the_room(
    storage: str, bucket: Bucket, tmp_path: Path
) -> None:
    """Over fifty blocks, short ones: without a limit, with room for half of them, and for one."""
    dataset = make_dataset(bucket, settings_for(storage, tmp_path / "prepare"), shard_tokens=1024)
    sizes = [shard.size for split in dataset.splits.values() for shard in split.shards]
    assert len(sizes) > 3 * 16
    half, one = sum(sizes) // 2, max(sizes)
    with watched(tmp_path / "half") as with_half, watched(tmp_path / "one") as with_one:
        run_ranks(2, tmp_path / "two", train_thrice, storage, str(tmp_path), half, one)
    expected = history_lines(bucket, small_job("unlimited"))
    assert len(expected) > 30
    assert history_lines(bucket, small_job("half")) == expected
    assert history_lines(bucket, small_job("one")) == expected
    assert half - one < max(with_half) <= half
    assert 0 < max(with_one) <= one
