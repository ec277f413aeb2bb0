"""What a checkpoint holds, which rank writes what of it, and a rank's part as the bytes of a safetensors file.

The format: 8 bytes with the length of the header (little-endian), the header as JSON, padded with spaces to a
multiple of 8, then the tensors without a gap (https://github.com/huggingface/safetensors).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from pydantic import BaseModel, NonNegativeInt, TypeAdapter
from torch import Tensor, nn

from api.errors import InvalidData, SnapshotFailed

State = dict[str, Tensor]


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Return everything that a resume needs, by name: parameters and, for each, what the optimizer keeps.

    The tensors are the live ones; the order of the data and dropout follow from the step alone.
    """
    state: State = {}
    for name, parameter in model.named_parameters():
        state[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            state[f"optimizer.{name}.{key}"] = value
    return state


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Put a saved state into a fresh model and optimizer; InvalidData if a tensor is missing or misshapen.

    Parameters are copied; the moments of an optimizer on CPUs are the saved tensors themselves.
    """
    for name, parameter in model.named_parameters():
        parameter.data.copy_(_fitting(state, f"model.{name}", parameter.shape))
        shapes = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        optimizer.state[parameter] = {
            key: _fitting(state, f"optimizer.{name}.{key}", shape).to(parameter.device) for key, shape in shapes.items()
        }


def _fitting(state: State, name: str, shape: torch.Size) -> Tensor:
    saved = state.get(name)
    if saved is None or saved.shape != shape:
        raise InvalidData(f"the checkpoint does not fit this model: {name} is missing or of another shape")
    return saved


def part_of(sizes: dict[str, int], rank: int, world_size: int) -> list[str]:
    """Return the names of the tensors that `rank` writes: largest first, each to the rank with the fewest bytes."""
    load_of = [0] * world_size
    mine = []
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        lightest = load_of.index(min(load_of))
        load_of[lightest] += sizes[name]
        if lightest == rank:
            mine.append(name)
    return mine


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor in a safetensors file: its bytes are those from `start` to `end`, counted from the header's end."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    def within(self, data: Tensor) -> Tensor:
        """Return the tensor as a view of the bytes of all."""
        return data[self.start : self.end].view(self.dtype).view(self.shape)


def lay_out(part: State) -> list[Entry]:
    """Return where each tensor comes to lie: those of the widest numbers first, so that every one is aligned."""
    entries, end = [], 0
    for name, tensor in sorted(part.items(), key=lambda item: (-item[1].itemsize, item[0])):
        start, end = end, end + tensor.nbytes
        entries.append(Entry(name, tensor.dtype, tuple(tensor.shape), start, end))
    return entries


def header_of(entries: Sequence[Entry]) -> bytes:
    """Return all that comes before the tensors: the header's length and the header."""
    fields = {
        entry.name: {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [entry.start, entry.end]}
        for entry in entries
    }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class _Field(BaseModel):
    """What a header says of a tensor."""

    dtype: str
    shape: list[NonNegativeInt]
    data_offsets: tuple[int, int]


_FIELDS = TypeAdapter(dict[str, _Field])


def parse_header(text: bytes, size: int) -> list[Entry]:
    """Return the tensors of a header (without its length), by place.

    InvalidData unless they fill `size` bytes without a gap; so whoever makes room for them makes no more than that.
    """
    try:
        fields = json.loads(text)
        fields.pop("__metadata__", None)
        entries = [
            Entry(name, _DTYPES[field.dtype], tuple(field.shape), *field.data_offsets)
            for name, field in _FIELDS.validate_python(fields).items()
        ]
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise InvalidData("its header is not one of safetensors") from error
    entries.sort(key=lambda entry: (entry.start, entry.end))
    end = 0
    for entry in entries:
        if entry.start != end or entry.end - entry.start != prod(entry.shape) * entry.dtype.itemsize:
            raise InvalidData(f"its header has {entry.name} in the wrong place")
        end = entry.end
    if end != size:
        raise InvalidData(f"its header describes {end} bytes of tensors, but {size} follow it")
    return entries


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, not copied: what is written to one changes the other."""
    return tensor.flatten().view(torch.uint8).numpy().data


class Snapshot:
    """A copy of a rank's part of the state, laid out as it is written, in memory that is used again each time."""

    def __init__(self) -> None:
        self._data = torch.empty(0, dtype=torch.uint8)
        self._entries: list[Entry] = []

    def take(self, part: State) -> None:
        """Copy the tensors from wherever they are, in place of the copy before.

        SnapshotFailed if there is no memory; then there is no copy, and the next try asks for the memory again.
        """
        entries = lay_out(part)
        size = entries[-1].end if entries else 0
        if size != self._data.numel():
            self._entries, self._data = [], torch.empty(0, dtype=torch.uint8)  # let go first: never both
            self._data = _allocated(size)
        for entry in entries:
            entry.within(self._data).copy_(part[entry.name])
        self._entries = entries

    def views(self) -> list[memoryview]:
        """Return the file's bytes in order, not joined: what comes before the tensors, and the tensors."""
        return [memoryview(header_of(self._entries)), bytes_of(self._data)]

    def model_hashes(self) -> dict[str, str]:
        """Return the sha256 of the bytes of each tensor of the model, by name."""
        data = bytes_of(self._data)
        return {
            entry.name: hashlib.sha256(data[entry.start : entry.end]).hexdigest()
            for entry in self._entries
            if entry.name.startswith("model.")
        }


def _allocated(size: int) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8)
    except (MemoryError, RuntimeError) as error:  # the latter is what torch's allocator raises
        raise SnapshotFailed(f"there is no memory for a snapshot of {size / 2**20:.0f} MiB") from error
