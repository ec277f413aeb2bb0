"""A rank's part as the bytes of a safetensors file: what the library itself reads, and what it writes."""

import json
from hashlib import sha256
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from api.errors import InvalidData, SnapshotFailed
from workers.snapshot import Snapshot, State, bytes_of, header_of, lay_out, parse_header

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip
shapes = st.lists(st.integers(0, 4), max_size=3)
parts = st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(st.sampled_from(DTYPES), shapes), max_size=8)


def tensor(dtype: torch.dtype, shape: list[int]) -> Tensor:
    return (torch.randn(shape) * 50).to(dtype)


def made(part: dict[str, tuple[torch.dtype, list[int]]]) -> State:
    return {name: tensor(*what) for name, what in part.items()}


def file_of(part: State) -> bytes:
    snapshot = Snapshot()
    snapshot.take(part)
    return b"".join(snapshot.views())


def same(one: State, other: State) -> bool:
    """Compare to the bit: names, types, shapes, bytes."""
    return one.keys() == other.keys() and all(
        (ours.dtype, ours.shape, bytes(bytes_of(ours))) == (theirs.dtype, theirs.shape, bytes(bytes_of(theirs)))
        for ours, theirs in ((one[name], other[name]) for name in one)
    )


@given(parts)
def test_safetensors_reads_what_we_write_to_the_bit(part: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    state = made(part)
    assert same(load(file_of(state)), state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_of_number_can_be_written(dtype: torch.dtype) -> None:
    state = {"a": tensor(dtype, [3, 5]), "of no dimension": tensor(dtype, []), "b": tensor(torch.int8, [3])}
    assert same(load(file_of(state)), state)


def test_not_a_number_and_minus_zero_keep_their_bits() -> None:
    odd = torch.tensor([0x7FC00001, -0x80000000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert same(load(file_of({"odd": odd})), {"odd": odd})


@given(parts)
def test_we_read_the_headers_that_safetensors_writes(part: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    state = made(part)
    body = save(state, {"format": "pt"})
    start = 8 + int.from_bytes(body[:8], "little")
    data = torch.frombuffer(bytearray(body[start:] + b" "), dtype=torch.uint8)  # of no bytes it makes no tensor
    read = {entry.name: entry.within(data) for entry in parse_header(body[8:start], len(body) - start)}
    assert same(read, state)


@given(parts)
def test_the_tensors_begin_at_a_multiple_of_8_and_each_lies_aligned(
    part: dict[str, tuple[torch.dtype, list[int]]],
) -> None:
    entries = lay_out(made(part))
    assert len(header_of(entries)) % 8 == 0
    assert all(entry.start % entry.dtype.itemsize == 0 for entry in entries)


TWO = {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.float64)}


def fields(**changes: dict[str, Any]) -> bytes:
    """The header of TWO, 28 bytes of tensors, with changes to one of them."""
    found = json.loads(header_of(lay_out(TWO))[8:])
    for name, change in changes.items():
        found[name] |= change
    return json.dumps(found).encode()


@pytest.mark.parametrize(
    ("text", "size", "message"),
    [
        (b"", 28, "not one of safetensors"),
        (b"{" + b" " * 7, 28, "not one of safetensors"),
        (b"[1]", 28, "not one of safetensors"),
        (b"\xff\xfe{}", 28, "not one of safetensors"),
        (b"[" * 100_000, 28, "not one of safetensors"),
        (fields(a={"dtype": "F33"}), 28, "not one of safetensors"),
        (fields(a={"shape": [-3, -1]}), 28, "not one of safetensors"),
        (fields(a={"shape": [4]}), 28, "a in the wrong place"),
        (fields(a={"dtype": "F64"}), 28, "a in the wrong place"),
        (fields(a={"data_offsets": [17, 29]}), 29, "a in the wrong place"),
        (fields(a={"data_offsets": [8, 20]}), 28, "in the wrong place"),
        (fields(), 27, "28 bytes of tensors, but 27 follow"),
        (fields(), 29, "28 bytes of tensors, but 29 follow"),
        (fields(a={"shape": [3 * 2**40], "data_offsets": [16, 16 + 3 * 2**42]}), 28, "but 28 follow"),
    ],
)
def test_a_header_that_does_not_fit_its_bytes_is_refused_before_any_room_is_made(
    text: bytes, size: int, message: str
) -> None:
    with pytest.raises(InvalidData, match=message):
        parse_header(text, size)


def test_a_snapshot_is_a_copy_also_of_what_does_not_lie_in_one_piece() -> None:
    live = torch.arange(6.0).view(2, 3)
    snapshot = Snapshot()
    snapshot.take({"live": live.T})
    live.zero_()
    assert load(b"".join(snapshot.views()))["live"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


def test_the_next_snapshot_takes_the_place_of_the_one_before() -> None:
    snapshot = Snapshot()
    snapshot.take({"a": torch.ones(1000), "b": torch.ones(3)})
    first = snapshot.views()[1]
    snapshot.take({"a": torch.zeros(1000), "b": torch.ones(3)})
    assert first[:4000] == bytes(4000)  # the same memory
    assert load(b"".join(snapshot.views()))["a"].sum() == 0


def test_a_part_of_another_size_gets_memory_of_its_own_size() -> None:
    snapshot = Snapshot()
    for size in (1000, 10, 100):
        snapshot.take({"a": torch.full((size,), float(size))})
        assert snapshot.views()[1].nbytes == 4 * size
        assert load(b"".join(snapshot.views()))["a"].tolist() == [float(size)] * size


def test_the_bytes_of_a_snapshot_are_not_copied_to_be_written() -> None:
    snapshot = Snapshot()
    snapshot.take({"a": torch.ones(10)})
    one, other = snapshot.views()[1], snapshot.views()[1]
    one[:4] = b"\x00\x00\x00\x40"
    assert torch.frombuffer(other, dtype=torch.float32)[0] == 2.0


def test_without_memory_for_it_a_snapshot_fails_by_name_and_the_next_may_succeed() -> None:
    snapshot = Snapshot()
    snapshot.take({"a": torch.ones(10)})
    with pytest.raises(SnapshotFailed, match="no memory for a snapshot of 268435456 MiB"):
        snapshot.take({"a": torch.ones(1).expand(2**46)})
    assert snapshot.views()[1].nbytes == 0
    snapshot.take({"a": torch.ones(10)})
    assert load(b"".join(snapshot.views()))["a"].sum() == 10


def test_the_hash_of_each_tensor_of_the_model_is_that_of_its_bytes() -> None:
    state = {"model.a": torch.ones(3), "model.b": torch.zeros(2), "optimizer.a.step": torch.ones(())}
    snapshot = Snapshot()
    snapshot.take(state)
    assert snapshot.model_hashes() == {
        name: sha256(bytes_of(state[name])).hexdigest() for name in ("model.a", "model.b")
    }
