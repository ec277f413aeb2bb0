"""Finding a dataset: a prepared version, described by its `dataset.json`, or a folder of bare token shards.

A bare folder holds `.bin` files in the format of llm.c directly below the dataset's name. Which split a file belongs to
is in its name, and everything else that a reader must know is in the listing and the headers. The control plane does
this when a job is submitted and the workers when it starts, so that both speak of the same bytes.
"""

import hashlib
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from .documents import DatasetDocument, ShardDocument, SplitDocument, now
from .errors import Fault, InvalidData, InvalidSpec, ObjectMissing
from .layout import BARE, DatasetLayout, dataset_versions_prefix
from .storage import Bucket, ObjectInfo

Dtype = Literal["uint16", "uint32"]

HEADER_BYTES = 1024
"""256 int32, little-endian: magic, version, token count, then zeros. The tokens follow."""
ITEM_BYTES: dict[Dtype, int] = {"uint16": 2, "uint32": 4}
_DTYPES: dict[tuple[int, int], Dtype] = {(20240520, 1): "uint16", (20240801, 7): "uint32"}
"""By magic and version, as llm.c and modded-nanogpt write them."""
_SPLITS = {"train": "train", "eval": "val"}
"""The word in the name of a file that makes it a shard of a split."""
_HEADER_THREADS = 16


def find_dataset(bucket: Bucket, project: str, ref: str, vocab_size: int | None) -> DatasetDocument:
    """Return a dataset by `name` (its newest version) or `name@version`.

    `vocab_size` is what the spec says; only bare shards need it. Raises ObjectMissing if the dataset is not there,
    InvalidData if it is not whole, or no longer what the version says, and InvalidSpec for a missing vocab_size.
    """
    name, _, version = ref.partition("@")
    if version:
        return _pinned(bucket, DatasetLayout(project, name, version), vocab_size)
    prefix = dataset_versions_prefix(project, name)
    versions = [v for v in sorted(bucket.folders(prefix), reverse=True) if not v.startswith(BARE)]
    documents = (_prepared(bucket, DatasetLayout(project, name, v)) for v in versions)
    newest = next((document for document in documents if document is not None), None)
    shards = _shards(bucket, prefix)
    if newest is not None and shards:
        # Either could be meant, and a guess would train on the wrong one for days.
        raise InvalidData(
            f"the folder of dataset {name} holds both prepared versions and .bin files of its own; pin a version "
            f"({name}@{newest.version} is the newest), or move the .bin files to a folder of another name"
        )
    if newest is not None:
        return newest
    if shards:
        return describe_bare(bucket, project, name, vocab_size)
    if versions:
        raise _unfinished(ref)
    raise ObjectMissing(f"there is no dataset {ref}; prepare one first, or check the name")


def describe_bare(bucket: Bucket, project: str, name: str, vocab_size: int | None) -> DatasetDocument:
    """Return the description of a folder of bare shards, from its listing and the shards' headers.

    The version follows from the shards' names, sizes, dtype and token counts: another listing is another version.
    """
    prefix = dataset_versions_prefix(project, name)
    shards = _shards(bucket, prefix)
    if not shards:
        raise ObjectMissing(f"there are no token shards in {prefix}: no .bin file lies directly below it")
    files = _by_split(shards, prefix)
    if vocab_size is None:
        message = (
            f"the dataset {name} is a folder of token shards, which do not say how many tokens their vocabulary has; "
            "give the vocab_size of the tokenizer that made them"
        )
        raise InvalidSpec(message, errors=[Fault(path="$.model.vocab_size", message=message)])
    every = [file for part in files.values() for file in part]
    with ThreadPoolExecutor(_HEADER_THREADS, thread_name_prefix="headers") as pool:
        headers = dict(zip(every, pool.map(lambda file: read_header(bucket, file), every), strict=True))
    dtypes = {dtype: file.key for file, (dtype, _) in reversed(headers.items())}
    if len(dtypes) > 1:
        raise InvalidData(
            f"the shards of dataset {name} are of two kinds: {dtypes['uint16']} is uint16 and {dtypes['uint32']} is "
            "uint32; put them into folders of their own"
        )
    splits = {
        split: _split([(file.key.removeprefix(prefix), file.size, headers[file][1]) for file in part])
        for split, part in files.items()
    }
    [dtype] = dtypes
    return DatasetDocument(
        name=name,
        version=_version(splits, dtype),
        tokenizer="none",
        vocab_size=vocab_size,
        dtype=dtype,
        splits=splits,
        unigram_loss=None,
        created_at=now(),
    )


def read_header(bucket: Bucket, file: ObjectInfo) -> tuple[Dtype, int]:
    """Return dtype and token count of a shard; InvalidData unless its header is one and fits the object's size."""
    if file.size < HEADER_BYTES:
        raise InvalidData(
            f"{file.key} has {file.size} bytes, fewer than the header of a token shard ({HEADER_BYTES}); "
            "write it again, or give it another name"
        )
    dtype, tokens = parse_header(bucket.get_range(file.key, 0, HEADER_BYTES), file.key)
    there, rest = divmod(file.size - HEADER_BYTES, ITEM_BYTES[dtype])
    if rest or there != tokens:
        raise InvalidData(
            f"{file.key} announces {tokens} tokens of {dtype}, which take {HEADER_BYTES + tokens * ITEM_BYTES[dtype]} "
            f"bytes, but it has {file.size}; it was cut short or is still being written. Upload it again"
        )
    return dtype, tokens


def parse_header(head: bytes, key: str) -> tuple[Dtype, int]:
    """Read dtype and token count from the first bytes of a shard; InvalidData if they are not a shard's."""
    magic, version, tokens = struct.unpack("<3i", head[:12])
    if (dtype := _DTYPES.get((magic, version))) is None:
        known = " or ".join(f"magic {m} version {v} ({name})" for (m, v), name in _DTYPES.items())
        raise InvalidData(
            f"{key} is no token shard: its header begins with magic {magic}, version {version}, and not with {known}"
        )
    return dtype, tokens


def _pinned(bucket: Bucket, layout: DatasetLayout, vocab_size: int | None) -> DatasetDocument:
    ref = f"{layout.name}@{layout.version}"
    if not layout.is_bare:
        document = _prepared(bucket, layout)
        if document is None:
            raise _unfinished(ref)
        return document
    described = describe_bare(bucket, layout.project, layout.name, vocab_size)
    if described.version != layout.version:
        raise InvalidData(
            f"the shards of {ref} have changed: by the names, sizes and token counts of its files, the folder is "
            f"{described.version} now. Put the old files back, or submit a new job for the new ones"
        )
    return described


def _prepared(bucket: Bucket, layout: DatasetLayout) -> DatasetDocument | None:
    return bucket.find_document(layout.document, DatasetDocument)


def _unfinished(ref: str) -> ObjectMissing:
    return ObjectMissing(f"dataset {ref} has no dataset.json: its preparation has not finished, or failed")


def _shards(bucket: Bucket, prefix: str) -> list[ObjectInfo]:
    return sorted((file for file in bucket.files(prefix) if file.key.endswith(".bin")), key=lambda file: file.key)


def _by_split(files: list[ObjectInfo], prefix: str) -> dict[str, list[ObjectInfo]]:
    """Sort shards into splits by their names; InvalidData if one belongs to both, or a split has none."""
    parts: dict[str, list[ObjectInfo]] = {
        split: [file for file in files if word in file.key.removeprefix(prefix)] for split, word in _SPLITS.items()
    }
    if both := [file for file in parts["train"] if file in parts["eval"]]:
        raise InvalidData(
            f"{both[0].key} has both `train` and `val` in its name, so its split is not clear; give it another name"
        )
    for split, part in parts.items():
        if not part:
            raise InvalidData(
                f"{prefix} holds no shard for the {split} split: none of its {len(files)} .bin files has "
                f"`{_SPLITS[split]}` in its name"
            )
    return parts


def _split(shards: list[tuple[str, int, int]]) -> SplitDocument:
    documents = [ShardDocument(name=name, size=size, tokens=tokens, blocks=None) for name, size, tokens in shards]
    return SplitDocument(
        documents=None, tokens=sum(shard.tokens for shard in documents), text_bytes=None, shards=documents
    )


def _version(splits: dict[str, SplitDocument], dtype: Dtype) -> str:
    """Ignored files do not count: putting one there must not end the jobs that run."""
    listing = sorted((shard.name, shard.size, shard.tokens) for part in splits.values() for shard in part.shards)
    digest = hashlib.sha256(repr((dtype, listing)).encode()).hexdigest()
    return f"{BARE}{digest[:12]}"
