"""Reading a checkpoint in pieces: the same tensors however the pieces are cut, and never more than one in memory."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from api.documents import Receipt
from api.errors import InvalidData, ObjectMissing
from tests.fakes import MemoryBucket
from workers import restore
from workers.restore import pieces, read_part
from workers.snapshot import State

KEY = "part.safetensors"
STATE: State = {
    "model.a": torch.arange(15.0).view(3, 5),
    "model.b": torch.arange(7.0),
    "optimizer.a.step": torch.ones(()),
    "loop.loss_sum": torch.ones(1, dtype=torch.float64),
    "nothing": torch.ones(0),
}
BODY = save(STATE)


class Counted(MemoryBucket):
    """Notes how many bytes each reading gave."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[int] = []

    def get_range(self, key: str, start: int, length: int) -> bytes:
        self.read.append(length)
        return super().get_range(key, start, length)


def stored(body: bytes, said: bytes | None = None) -> tuple[Counted, Receipt]:
    """An object, and what the manifest says of it."""
    said = body if said is None else said
    bucket = Counted()
    bucket.put(KEY, body)
    return bucket, Receipt(rank=0, name=KEY, size=len(said), sha256=hashlib.sha256(said).hexdigest())


@given(st.integers(1, 200))
def test_the_tensors_are_the_same_however_the_part_is_cut_into_pieces(piece: int) -> None:
    bucket, part = stored(BODY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restore, "PIECE", piece)
        state = read_part(bucket, KEY, part)
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)
    assert max(bucket.read[2:]) <= piece  # the first two are the header


@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 50))
def test_pieces_are_the_bytes_between_two_places(start: int, end: int, piece: int) -> None:
    bucket, _ = stored(bytes(range(100)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restore, "PIECE", piece)
        assert b"".join(pieces(bucket, KEY, start, end)) == bytes(range(start, end))


def test_every_changed_byte_of_a_part_is_noticed() -> None:
    """Those of the header as well, whatever sense it makes then."""
    for place in range(len(BODY)):
        for bit in (0x01, 0x80):
            damaged = BODY[:place] + bytes([BODY[place] ^ bit]) + BODY[place + 1 :]
            bucket, part = stored(damaged, said=BODY)
            with pytest.raises(InvalidData, match=r"part\.safetensors"):
                read_part(bucket, KEY, part)


@pytest.mark.parametrize("body", [BODY[:-1], BODY[:5], b"", BODY + b"\0"], ids=["cut", "stump", "empty", "longer"])
def test_a_part_of_another_size_than_its_manifest_says_is_refused(body: bytes) -> None:
    bucket, part = stored(body, said=BODY)
    with pytest.raises(InvalidData, match=f"has {len(body)} bytes, and its manifest says {len(BODY)}"):
        read_part(bucket, KEY, part)
    assert bucket.read == []


@pytest.mark.parametrize("length", [0, len(BODY) - 7, 2**32, 2**64 - 1])
def test_a_header_that_cannot_be_is_not_even_read(length: int) -> None:
    body = length.to_bytes(8, "little") + BODY[8:]
    bucket, part = stored(body)
    with pytest.raises(InvalidData, match="does not begin as a safetensors file"):
        read_part(bucket, KEY, part)
    assert bucket.read == [8]


def test_a_part_that_is_gone_is_missing() -> None:
    _, part = stored(BODY)
    with pytest.raises(ObjectMissing):
        read_part(MemoryBucket(), KEY, part)
