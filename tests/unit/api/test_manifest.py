"""The seal of a manifest: whatever one byte of it becomes is noticed, wherever the byte lies."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.documents import Manifest, Receipt
from api.errors import InvalidData, ObjectMissing
from api.manifest import read_manifest, sealed
from tests.fakes import T0, MemoryBucket

KEY = "manifest.json"
PARTS = [
    Receipt(rank=rank, name=f"part-{rank}", size=10, sha256="ab" * 32, tensors={"model.a": "cd" * 32})
    for rank in range(2)
]
MANIFEST = Manifest(
    job_id="job-1", segment="1-0-a", step=4, world_size=2, parts=PARTS, metrics={"eval_loss": 2.5}, created_at=T0
)
STORED = sealed(MANIFEST)


def read(stored: bytes) -> Manifest:
    bucket = MemoryBucket()
    bucket.put(KEY, stored)
    return read_manifest(bucket, KEY)


def test_what_is_written_is_read() -> None:
    assert read(STORED) == MANIFEST


def test_a_reader_that_knows_no_seal_reads_the_same() -> None:
    assert Manifest.model_validate_json(STORED) == MANIFEST


def test_a_manifest_of_before_they_were_sealed_is_read() -> None:
    assert read(MANIFEST.model_dump_json().encode()) == MANIFEST


@given(st.integers(0, len(STORED) - 1), st.integers(1, 255))
def test_one_changed_byte_is_noticed(place: int, change: int) -> None:
    damaged = STORED[:place] + bytes([STORED[place] ^ change]) + STORED[place + 1 :]
    with pytest.raises(InvalidData, match="is not what was written"):
        read(damaged)


@pytest.mark.parametrize("bit", [0x01, 0x20, 0xFF])
def test_no_byte_is_left_out(bit: int) -> None:
    for place in range(len(STORED)):
        with pytest.raises(InvalidData):
            read(STORED[:place] + bytes([STORED[place] ^ bit]) + STORED[place + 1 :])


def test_wherever_it_is_cut_it_is_noticed() -> None:
    for length in range(len(STORED)):
        with pytest.raises(InvalidData):
            read(STORED[:length])


def test_none_is_none() -> None:
    with pytest.raises(ObjectMissing):
        read_manifest(MemoryBucket(), KEY)
