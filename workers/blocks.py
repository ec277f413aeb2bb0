"""Verified blocks of token shards: ranged GETs of whole 4 MiB blocks, checked against their sha256, cached on disk.

The block is the unit of reading, caching and checking.
"""

import hashlib
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from api.datasets import parse_header
from api.documents import ShardDocument
from api.errors import InvalidData
from api.storage import Bucket
from workers.cache import Block, CacheFolder
from workers.order import BLOCK_BYTES, HEADER_BYTES, WINDOW_BLOCKS
from workers.records import BlockRecords

_FETCH_THREADS = 8
_READINGS = 4
"""Attempts to read a block that nobody has read before twice in the same way."""
_MOST_OPEN = 3 * WINDOW_BLOCKS
"""Blocks that one split keeps open: the window in use, the next one, and for each block in use the one after it, into
which its last sample may reach. That is at most 192 MiB for each split and rank. As a rule it is page cache, which
ranks of one machine share and the kernel can take back; but what finds no room in a cache folder smaller than the
windows of all ranks together is held in each rank's own memory, and fetched again in the next epoch."""


@dataclass(frozen=True)
class Shard:
    """A token shard in the bucket: its key and description, and where its blocks are recorded if it is a bare one."""

    key: str
    document: ShardDocument
    dtype: np.dtype[np.uint16] | np.dtype[np.uint32]
    records: str = ""


def check_header(shard: Shard, block: bytes) -> None:
    """Compare a shard's own header with its description."""
    dtype, tokens = parse_header(block, shard.key)
    if np.dtype(dtype) != shard.dtype or tokens != shard.document.tokens:
        raise InvalidData(
            f"{shard.key} has a header of {tokens} tokens of {dtype}; its dataset was described with "
            f"{shard.document.tokens} tokens of {shard.dtype}. Prepare the dataset again, or submit a new job"
        )


class BlockCache:
    """Blocks by (shard, index), fetched by a few threads and kept in a folder."""

    def __init__(self, bucket: Bucket, shards: list[Shard], folder: CacheFolder) -> None:
        self._bucket, self._shards, self._folder = bucket, shards, folder
        self._records = BlockRecords(bucket)
        self._pool = ThreadPoolExecutor(_FETCH_THREADS, thread_name_prefix="blocks")
        self._open: OrderedDict[tuple[int, int], Future[Block]] = OrderedDict()
        """The one requested least recently comes first."""
        self._lock = threading.Lock()

    def request(self, shard: int, block: int) -> Future[Block]:
        """Return a future of the block's bytes; the fetch begins now unless it has already."""
        with self._lock:
            future = self._open.get((shard, block))
            if future is None or (future.done() and future.exception() is not None):
                future = self._pool.submit(self._load, self._shards[shard], block)
                self._open[shard, block] = future
            self._open.move_to_end((shard, block))
            if len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)
            return future

    def retain(self, wanted: set[tuple[int, int]]) -> None:
        """Let go of the open blocks that are not wanted; their files stay, as long as there is room for them."""
        with self._lock:
            for name in self._open.keys() - wanted:
                del self._open[name]

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

    def _load(self, shard: Shard, block: int) -> Block:
        digest = self._digest_of(shard, block)
        data = self._folder.open(digest) if digest is not None else None
        if data is None:
            data = self._fetch(shard, block, digest)
        if block == 0:
            check_header(shard, data[:12].tobytes())
        return data

    def _digest_of(self, shard: Shard, block: int) -> str | None:
        """Return the sha256 that the block must have; None if nobody has read it yet."""
        if shard.document.blocks is not None:
            return shard.document.blocks[block]
        return self._records.find(shard.records, shard.key, block)

    def _fetch(self, shard: Shard, block: int, digest: str | None) -> Block:
        body, found = self._get(shard, block)
        if digest is None:
            body, found = self._confirmed(shard, block, found)
            self._records.add(shard.records, shard.key, block, found)
        elif found != digest:
            # Once more: the wire can flip a bit too. A second difference is the object's own.
            body, found = self._get(shard, block)
            if found != digest:
                raise InvalidData(_difference(shard, block, found, digest))
        return self._folder.add(found, body)

    def _confirmed(self, shard: Shard, block: int, before: str) -> tuple[bytes, str]:
        """Read until two readings in a row agree: a bit that the wire flipped must not become the record."""
        for _ in range(_READINGS):
            body, found = self._get(shard, block)
            if found == before:
                return body, found
            before = found
        raise InvalidData(
            f"block {block} of {shard.key} reads differently each time; check the store and the network to it"
        )

    def _get(self, shard: Shard, block: int) -> tuple[bytes, str]:
        """Read a block from the store; return it and its sha256."""
        start = block * BLOCK_BYTES
        body = self._bucket.get_range(shard.key, start, min(BLOCK_BYTES, shard.document.size - start))
        return body, hashlib.sha256(body).hexdigest()


def _difference(shard: Shard, block: int, found: str, digest: str) -> str:
    if shard.document.blocks is not None:
        said, cure = "dataset.json says", "prepare the dataset again"
    else:
        said = "it was when it was first read"
        cure = "put the old file back, or put the new shards into a folder of another name"
    return (
        f"block {block} of {shard.key} is not what {said}: sha256 {found} instead of {digest}. "
        f"The object was changed or damaged; {cure}"
    )
