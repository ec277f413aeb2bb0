"""Checkpoints as files that other libraries load, made while they are sent: one piece in memory, nothing stored.

A checkpoint's parts are safetensors files in which the model's tensors lie among the optimizer's, spread over the
ranks. From their headers follows one header for the model alone (architectures.py says under which names), and after
it the tensors' bytes go out as they are read. Each tensor is compared with its sha256 of the manifest before its last
piece is sent: where it differs, the answer breaks off short of its Content-Length, so nobody gets wrong weights.

The format: 8 bytes with the length of the header (little-endian), the header as JSON, then the tensors without a gap
(https://github.com/huggingface/safetensors).
"""

import hashlib
import json
import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter
from sqlalchemy.exc import SQLAlchemyError

from api.documents import CheckpointRef, DatasetDocument, Manifest, now
from api.errors import Conflict, InvalidData, LockstepError, NotFound, ObjectMissing
from api.jobs import ModelFile
from api.layout import CheckpointLayout, DatasetLayout, JobLayout
from api.manifest import read_manifest
from api.names import END_OF_TEXT
from api.spec import TrainSpec
from api.storage import Bucket
from service.architectures import ITEM_BYTES, ExportTensor, export_config, export_tensors, model_tensors
from service.rows import JobRow
from service.run_reader import read_history
from service.store import Store

logger = logging.getLogger("lockstep.service")
T = TypeVar("T")

PIECE = 8 * 2**20
"""Bytes that are read and sent at once."""
PIN = timedelta(minutes=10)
"""How long a pin lasts if nobody renews it, because the process died."""
_HEADER_LIMIT = 100 * 10**6
"""Longest header that the format allows, in bytes."""
_MODEL = "model."


class _Entry(BaseModel):
    """A tensor in the header of a safetensors file; offsets count from the header's end."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


_HEADER = TypeAdapter(dict[str, _Entry])


@dataclass(frozen=True)
class File:
    """A file to be sent: its size in bytes, and what gives its content, in order."""

    size: int
    pieces: Generator[bytes, None, None]
    release: Callable[[], None] = lambda: None
    """Lets go of what keeps the content; to be called at the end, also if no piece was ever taken."""


@dataclass(frozen=True)
class _Stored:
    """A tensor of the model as it lies in the bucket."""

    key: str
    start: int
    size: int
    shape: tuple[int, ...]
    sha256: str


def find_checkpoint(bucket: Bucket, job: JobRow, step: int) -> CheckpointRef | None:
    """Return where the job's history has a step; whether a checkpoint is there is not looked at."""
    end = CheckpointRef.model_validate(job.history_end) if job.history_end else None
    spans = read_history(bucket, JobLayout(job.project, job.id), end)
    return next((CheckpointRef(segment=s.segment, step=step) for s in spans if s.contains(step)), None)


def open_file(bucket: Bucket, job: JobRow, at: CheckpointRef, name: ModelFile) -> File:
    """Return a file of a complete checkpoint.

    Raises NotFound if there is no such checkpoint or file, Conflict if the checkpoint is of before single tensors had
    hashes, InvalidData if it is damaged. The pieces raise InvalidData when a tensor is not what its hash says.
    """
    spec = job.parsed_spec
    checkpoint = JobLayout(job.project, job.id).segment(at.segment).checkpoint(at.step)
    if not isinstance(spec, TrainSpec):
        raise no_checkpoint(job.id, at.step)
    try:
        manifest = read_manifest(bucket, checkpoint.manifest)
    except ObjectMissing:
        raise no_checkpoint(job.id, at.step) from None
    match name:
        case "model.safetensors":
            return _model(bucket, spec, checkpoint, manifest)
        case "config.json":
            vocab_size = _vocab_size(_fitting(bucket, spec, checkpoint, manifest), spec)
            tokenizer = _tokenizer(bucket, job, spec)
            end = _end_of_text(tokenizer) if tokenizer is not None else None
            return _whole(_json(export_config(spec.model, vocab_size, spec.data.sequence_length, end)))
        case "tokenizer.json" | "tokenizer_config.json":
            tokenizer = _tokenizer(bucket, job, spec)
            if tokenizer is None:
                raise NotFound(f"the dataset {spec.data.dataset} is a folder of token shards and has no tokenizer")
            return _whole(tokenizer if name == "tokenizer.json" else _json(_tokenizer_config(tokenizer, spec)))


def no_checkpoint(job_id: str, step: int) -> NotFound:
    return NotFound(f"job {job_id} has no checkpoint at step {step}")


def _whole(body: bytes) -> File:
    return File(len(body), (piece for piece in [body]))


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def _model(bucket: Bucket, spec: TrainSpec, checkpoint: CheckpointLayout, manifest: Manifest) -> File:
    stored = _fitting(bucket, spec, checkpoint, manifest)
    tensors = export_tensors(spec.model, _vocab_size(stored, spec), spec.data.sequence_length)
    header = _header(tensors)
    return File(len(header) + sum(tensor.size for tensor in tensors), _pieces(bucket, header, tensors, stored))


def _header(tensors: list[ExportTensor]) -> bytes:
    """Return length and header of a safetensors file; padded, so that the tensors begin at a multiple of 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size
        entries[tensor.name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(
    bucket: Bucket, header: bytes, tensors: list[ExportTensor], stored: dict[str, _Stored]
) -> Generator[bytes, None, None]:
    yield header
    for tensor in tensors:
        zeros = tensor.zeros * ITEM_BYTES
        for start in range(0, zeros, PIECE):
            yield bytes(min(PIECE, zeros - start))
        if tensor.source is not None:
            yield from _verified(bucket, stored[tensor.source])


def _verified(bucket: Bucket, tensor: _Stored) -> Iterator[bytes]:
    """Yield a tensor's bytes; the last piece only once the hash of all is right."""
    digest = hashlib.sha256()
    for start in range(0, tensor.size, PIECE):
        piece = bucket.get_range(tensor.key, tensor.start + start, min(PIECE, tensor.size - start))
        digest.update(piece)
        if start + len(piece) == tensor.size and digest.hexdigest() != tensor.sha256:
            raise InvalidData(f"{tensor.key} holds {tensor.size} bytes at {tensor.start} that are not what they were")
        yield piece


def _fitting(bucket: Bucket, spec: TrainSpec, checkpoint: CheckpointLayout, manifest: Manifest) -> dict[str, _Stored]:
    """Return the model's tensors by our names; InvalidData if they are not those of the job's spec.

    A part's header has no hash of its own, so what it says of each tensor must be what the spec says.
    """
    stored = _stored(bucket, checkpoint, manifest)
    shapes = model_tensors(spec.model, _vocab_size(stored, spec), spec.data.sequence_length)
    for name, shape in shapes.items():
        found = stored.get(name)
        if found is None or (found.shape, found.size) != (shape, prod(shape) * ITEM_BYTES):
            raise InvalidData(f"{checkpoint.prefix} does not fit the job's spec: {name} is missing or of another shape")
    return stored


def _stored(bucket: Bucket, checkpoint: CheckpointLayout, manifest: Manifest) -> dict[str, _Stored]:
    """Return the model's tensors by our names, from the headers of the parts."""
    found = {}
    for part in manifest.parts:
        key = checkpoint.prefix + part.name
        data, entries = read_header(bucket, key, part.size)
        for name, entry in entries.items():
            if not name.startswith(_MODEL):
                continue
            if part.tensors and name not in part.tensors:
                raise InvalidData(f"{key} holds {name}, of which its receipt says nothing")
            if name not in part.tensors:
                raise Conflict(
                    f"the checkpoint of step {manifest.step} was written before Lockstep kept a hash of each tensor, "
                    "so what would be sent cannot be verified; download a newer one"
                )
            if entry.dtype != "F32":
                raise InvalidData(f"{key} holds {name} as {entry.dtype}; weights are F32")
            start, end = entry.data_offsets
            sha256 = part.tensors[name]
            found[name.removeprefix(_MODEL)] = _Stored(key, data + start, end - start, tuple(entry.shape), sha256)
    return found


def read_header(bucket: Bucket, key: str, size: int) -> tuple[int, dict[str, _Entry]]:
    """Return where the tensors of a safetensors file begin, and its tensors; InvalidData if the bytes are no header."""
    length = int.from_bytes(bucket.get_range(key, 0, 8), "little")
    if length > min(_HEADER_LIMIT, size - 8):
        raise InvalidData(f"{key} does not begin with a header of safetensors")
    try:
        entries = json.loads(bucket.get_range(key, 8, length))
        entries.pop("__metadata__", None)
        return 8 + length, _HEADER.validate_python(entries)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidData(f"{key} has a header that is not one of safetensors") from error


def _vocab_size(stored: dict[str, _Stored], spec: TrainSpec) -> int:
    """Return the rows of the embedding: its hash is that of all its bytes, so their number is certain."""
    embedding = stored.get("embedding.weight")
    return embedding.size // (spec.model.width * ITEM_BYTES) if embedding is not None else 0


def _tokenizer(bucket: Bucket, job: JobRow, spec: TrainSpec) -> bytes | None:
    """Return the `tokenizer.json` of the job's dataset, verified; None if it has none."""
    layout = DatasetLayout(job.project, spec.data.dataset.partition("@")[0], job.dataset_version or "")
    if layout.is_bare:
        return None
    dataset = bucket.get_document(layout.document, DatasetDocument)
    body = bucket.get(layout.tokenizer)
    if dataset.tokenizer_sha256 not in (None, hashlib.sha256(body).hexdigest()):
        raise InvalidData(f"{layout.tokenizer} is not what dataset.json says")
    return body


def _end_of_text(tokenizer: bytes) -> int | None:
    """Return the id of the end-of-text token that our tokenizers have, if this one does."""
    try:
        added = json.loads(tokenizer)["added_tokens"]
        return next((int(token["id"]) for token in added if token["content"] == END_OF_TEXT), None)
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidData("tokenizer.json is not one of the tokenizers library") from error


def _tokenizer_config(tokenizer: bytes, spec: TrainSpec) -> dict[str, Any]:
    """Return what makes transformers take `tokenizer.json` as it is, and not as the architecture's usual one."""
    end = {} if _end_of_text(tokenizer) is None else {"eos_token": END_OF_TEXT}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": spec.data.sequence_length,
        "clean_up_tokenization_spaces": False,
        **end,
    }


def held(pieces: Iterator[T], store: Store, pin: str, what: str) -> Generator[T, None, None]:
    """Yield the pieces, and renew the pin on their checkpoint meanwhile. `what` is for the log."""
    until = now() + PIN
    try:
        for piece in pieces:
            if now() > until - PIN / 2:
                until = now() + PIN
                with suppress(SQLAlchemyError):  # at worst the checkpoint goes, and the answer breaks off
                    store.hold(pin, until)
            yield piece
    except LockstepError as error:
        logger.error("%s breaks off: %s", what, error)
        raise
