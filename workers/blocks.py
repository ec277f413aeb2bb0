"""Verified blocks of token shards: ranged GETs of whole 4 MiB blocks, checked against their sha256, cached on disk.

The block is the unit of reading, caching and checking. Ranks of one machine share the cache folder: a block is
written under a temporary name and renamed, so a reader sees all of it or nothing.
"""

import hashlib
import os
import tempfile
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from api.documents import ShardDocument
from api.errors import InvalidData
from api.storage import Bucket
from workers.order import BLOCK_BYTES, HEADER_BYTES

_FETCH_THREADS = 8


@dataclass(frozen=True)
class Shard:
    """A token shard in the bucket: its key and description."""

    key: str
    document: ShardDocument
    dtype: np.dtype[np.uint16] | np.dtype[np.uint32]


def check_header(shard: Shard, block: bytes) -> None:
    """Compare a shard's own header (llm.c: 256 int32; magic, version, token count) with its description."""
    magic, version, tokens = np.frombuffer(block[:12], "<i4")
    known = {(20240520, 1): 2, (20240801, 7): 4}
    if known.get((int(magic), int(version))) != shard.dtype.itemsize or int(tokens) != shard.document.tokens:
        raise InvalidData(
            f"{shard.key} has a header of magic {magic}, version {version}, {tokens} tokens; its dataset.json says "
            f"{shard.document.tokens} tokens of {shard.dtype}. Prepare the dataset again"
        )


class BlockCache:
    """Blocks by (shard, index), fetched by a few threads and kept in a folder."""

    def __init__(self, bucket: Bucket, shards: list[Shard], folder: Path) -> None:
        self._bucket, self._shards, self._folder = bucket, shards, folder
        self._pool = ThreadPoolExecutor(_FETCH_THREADS, thread_name_prefix="blocks")
        self._open: dict[tuple[int, int], Future[NDArray[np.uint8]]] = {}
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def request(self, shard: int, block: int) -> Future[NDArray[np.uint8]]:
        """Return a future of the block's bytes; the fetch begins now unless it has already."""
        with self._lock:
            future = self._open.get((shard, block))
            if future is None or (future.done() and future.exception() is not None):
                future = self._pool.submit(self._load, self._shards[shard], block)
                self._open[shard, block] = future
            return future

    def retain(self, wanted: set[tuple[int, int]]) -> None:
        """Let go of the open blocks that are not wanted; their files stay."""
        with self._lock:
            self._open = {name: future for name, future in self._open.items() if name in wanted}

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def tokens(self, shard: int, start: int, count: int) -> NDArray[np.int64]:
        """Return `count` tokens of a shard from token `start`, which may cross into the next block."""
        dtype = self._shards[shard].dtype
        first = HEADER_BYTES + start * dtype.itemsize
        last = first + count * dtype.itemsize
        pieces = []
        for block in range(first // BLOCK_BYTES, (last - 1) // BLOCK_BYTES + 1):
            data = self.request(shard, block).result()
            base = block * BLOCK_BYTES
            pieces.append(data[max(first - base, 0) : last - base])
        joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return np.frombuffer(joined.tobytes(), dtype).astype(np.int64)

    def _load(self, shard: Shard, block: int) -> NDArray[np.uint8]:
        digest = shard.document.blocks[block]
        path = self._folder / digest
        if not (path.exists() and _digest(path.read_bytes()) == digest):
            self._fetch(shard, block, path)
        data = np.memmap(path, mode="r")
        if block == 0:
            check_header(shard, data[:12].tobytes())
        return data

    def _fetch(self, shard: Shard, block: int, path: Path) -> None:
        start = block * BLOCK_BYTES
        body = self._bucket.get_range(shard.key, start, min(BLOCK_BYTES, shard.document.size - start))
        if _digest(body) != path.name:
            # Once more: the wire can flip a bit too. A second difference is the object's own.
            body = self._bucket.get_range(shard.key, start, len(body))
        if _digest(body) != path.name:
            raise InvalidData(
                f"block {block} of {shard.key} is not what dataset.json says: sha256 {_digest(body)} instead of "
                f"{path.name}. The object was changed or damaged; prepare the dataset again"
            )
        with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
            try:
                file.write(body)
                file.flush()
                os.replace(file.name, path)
            except OSError:
                os.unlink(file.name)
                raise


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
