"""Blocks are fetched, checked and kept; those of bare shards are recorded when they are first read."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from api.errors import InvalidData, StorageUnavailable
from api.layout import DatasetLayout
from tests.fakes import MemoryBucket
from workers.blocks import BlockCache, Shard
from workers.cache import CacheFolder
from workers.order import BLOCK_BYTES
from workers.tokens import describe_shard, shard_bytes

LAYOUT = DatasetLayout("default", "words", "bare-0123456789ab")
KEY = LAYOUT.shard_file("train", "a_train.bin")
TOKENS = np.arange(3_000_000) % 50_000


def prepared_shard(bucket: MemoryBucket, count: int = 100) -> Shard:
    body = shard_bytes(TOKENS[:count], "uint16")
    bucket.put("shard", body)
    return Shard("shard", describe_shard("shard", body, count), np.dtype("<u2"))


def bare_shard(bucket: MemoryBucket, tokens: NDArray[np.int64] = TOKENS) -> Shard:
    body = shard_bytes(tokens, "uint16")
    bucket.put(KEY, body)
    document = describe_shard("a_train.bin", body, len(tokens)).model_copy(update={"blocks": None})
    return Shard(KEY, document, np.dtype("<u2"), LAYOUT.block_records("a_train.bin"))


def reader(bucket: MemoryBucket, shard: Shard, folder: Path) -> BlockCache:
    """A process of its own, as far as blocks are concerned."""
    return BlockCache(bucket, [shard], CacheFolder(folder))


def records(bucket: MemoryBucket) -> list[str]:
    return [item.key for item in bucket.objects(f"{LAYOUT.prefix}blocks/")]


def flip(bucket: MemoryBucket, at: int) -> None:
    body = bytearray(bucket.content[KEY])
    body[at] ^= 1
    bucket.content[KEY] = bytes(body)


def test_a_fetch_that_failed_ahead_of_time_is_tried_again_when_the_block_is_needed(tmp_path: Path) -> None:
    bucket = MemoryBucket()
    cache = reader(bucket, prepared_shard(bucket), tmp_path)
    bucket.reachable = False
    with pytest.raises(StorageUnavailable):
        cache.request(0, 0).result()
    bucket.reachable = True
    assert cache.tokens(0, 10, 5).tolist() == [10, 11, 12, 13, 14]
    cache.close()


def test_a_prepared_shard_leaves_no_record(tmp_path: Path) -> None:
    bucket = MemoryBucket()
    cache = reader(bucket, prepared_shard(bucket), tmp_path)
    cache.tokens(0, 10, 5)
    assert list(bucket.content) == ["shard"]
    cache.close()


def test_each_block_of_a_bare_shard_is_recorded_when_it_is_first_read(tmp_path: Path) -> None:
    bucket = MemoryBucket()
    shard = bare_shard(bucket)
    cache = reader(bucket, shard, tmp_path)
    assert records(bucket) == []
    assert cache.tokens(0, 2_000_000, 3).tolist() == [0, 1, 2]
    [first] = records(bucket)
    cache.tokens(0, 2_999_999, 1)
    digests = describe_shard("x", bucket.content[KEY], 3_000_000).blocks
    assert digests is not None
    folder = LAYOUT.block_records("a_train.bin")
    assert first == f"{folder}000000/{digests[0]}.json"
    assert records(bucket) == [first, f"{folder}000001/{digests[1]}.json"]
    cache.close()


def test_a_bare_shard_changed_after_the_first_read_is_found_by_block(tmp_path: Path) -> None:
    bucket = MemoryBucket()
    shard = bare_shard(bucket)
    first = reader(bucket, shard, tmp_path / "one")
    first.tokens(0, 2_999_990, 10)
    flip(bucket, BLOCK_BYTES + 7)
    second = reader(bucket, shard, tmp_path / "two")
    with pytest.raises(InvalidData, match=f"^block 1 of {re.escape(KEY)} is not what it was when it was first read"):
        second.tokens(0, 2_999_990, 10)
    assert second.tokens(0, 5, 2).tolist() == [5, 6]
    assert len(records(bucket)) == 2
    for cache in (first, second):
        cache.close()


def test_the_same_reader_finds_a_change_once_its_cached_block_is_gone(tmp_path: Path) -> None:
    bucket = MemoryBucket()
    cache = BlockCache(bucket, [bare_shard(bucket)], CacheFolder(tmp_path, 0))
    cache.tokens(0, 5, 2)
    flip(bucket, 2000)
    assert cache.tokens(0, 5, 2).tolist() == [5, 6]
    cache.retain(set())
    with pytest.raises(InvalidData, match=r"block 0 of .* first read"):
        cache.tokens(0, 5, 2)
    cache.close()


def test_two_readers_that_record_a_block_at_once_agree(tmp_path: Path) -> None:
    bucket = MemoryBucket()
    shard = bare_shard(bucket, TOKENS[:100])
    one, two = (reader(bucket, shard, tmp_path / name) for name in ("one", "two"))
    in_between(bucket, lambda: two.tokens(0, 5, 2))
    assert one.tokens(0, 5, 2).tolist() == [5, 6]
    assert len(records(bucket)) == 1
    for cache in (one, two):
        cache.close()


def test_of_two_readers_that_record_other_bytes_at_once_the_later_one_and_all_after_it_refuse(tmp_path: Path) -> None:
    bucket = MemoryBucket()
    shard = bare_shard(bucket, TOKENS[:100])
    one, two, three = (reader(bucket, shard, tmp_path / name) for name in ("one", "two", "three"))

    def change_and_read() -> None:
        flip(bucket, 1200)
        two.tokens(0, 5, 2)

    in_between(bucket, change_and_read)
    for cache in (one, three):
        with pytest.raises(InvalidData, match=f"block 0 of {re.escape(KEY)} was read with different bytes"):
            cache.tokens(0, 5, 2)
    for cache in (one, two, three):
        cache.close()


class FlippingWire(MemoryBucket):
    """A way to the store on which a bit is flipped at some of the readings, counted from 0; the object is right."""

    flips: Callable[[int], bool]
    readings = 0

    def get_range(self, key: str, start: int, length: int) -> bytes:
        body = super().get_range(key, start, length)
        number, self.readings = self.readings, self.readings + 1
        return bytes([*body[:-1], body[-1] ^ (1 + number)]) if self.flips(number) else body


@pytest.mark.parametrize("flipped", [{0}, {1}, {0, 1}])
def test_a_bit_that_the_wire_flips_at_the_first_reading_is_not_recorded(tmp_path: Path, flipped: set[int]) -> None:
    bucket = FlippingWire()
    bucket.flips = flipped.__contains__
    shard = bare_shard(bucket, TOKENS[:100])
    for name in ("one", "two"):
        cache = reader(bucket, shard, tmp_path / name)
        assert cache.tokens(0, 98, 2).tolist() == [98, 99]
        cache.close()
    assert len(records(bucket)) == 1


def test_a_block_that_reads_differently_each_time_is_refused_and_not_recorded(tmp_path: Path) -> None:
    bucket = FlippingWire()
    bucket.flips = lambda _: True
    cache = reader(bucket, bare_shard(bucket, TOKENS[:100]), tmp_path)
    with pytest.raises(InvalidData, match=f"block 0 of {re.escape(KEY)} reads differently each time"):
        cache.tokens(0, 98, 2)
    assert records(bucket) == []
    cache.close()


def in_between(bucket: MemoryBucket, what: Callable[[], object]) -> None:
    """Call `what` once, when the next record has been decided on and is not yet written."""

    def hook(effect: str) -> None:
        if effect.startswith("before put") and "/blocks/" in effect:
            bucket.hook = lambda _: None
            what()

    bucket.hook = hook


def test_a_shard_whose_header_is_another_than_described_is_refused(tmp_path: Path) -> None:
    bucket = MemoryBucket()
    shard = bare_shard(bucket, TOKENS[:100])
    bucket.content[KEY] = shard_bytes(TOKENS[:99], "uint16") + b"xx"
    cache = reader(bucket, shard, tmp_path)
    with pytest.raises(InvalidData, match=r"has a header of 99 tokens of uint16.* described with 100 tokens of uint16"):
        cache.tokens(0, 5, 2)
    cache.close()


def test_only_so_many_blocks_stay_open_and_the_one_used_last_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.blocks._MOST_OPEN", 2)
    bucket = MemoryBucket()
    shards = [prepared_shard(bucket, count) for count in (10, 20, 30)]
    for shard, name in zip(shards, "abc", strict=True):
        bucket.put(name, shard_bytes(TOKENS[: shard.document.tokens], "uint16"))
    cache = BlockCache(bucket, [Shard(n, s.document, s.dtype) for n, s in zip("abc", shards, strict=True)],
                       CacheFolder(tmp_path, 0))  # fmt: skip
    first, second = cache.request(0, 0), cache.request(1, 0)
    assert cache.request(0, 0) is first
    cache.request(2, 0)
    assert cache.request(0, 0) is first
    assert cache.request(1, 0) is not second
    cache.close()
