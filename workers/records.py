"""The sha256 of each block of a bare shard, recorded in the bucket by whoever reads the block first.

The store has no conditional write, so two ranks that read a block for the first time at once both write a record. Each
record's key holds the sha256 itself, so they cannot overwrite each other's:

- Both read the same bytes: both write the same key with the same meaning, in whatever order. Harmless.
- They read different bytes, because the object was replaced in between: there are two keys. Each lists the block's
  records after its own write has returned, so the later of the two writers sees both, as does everybody after it; and
  two records are InvalidData. The earlier writer may go on for a while, with bytes that nobody else will accept.

With one key for a block the later record would silently replace the earlier one, and a resumed run could go on with
other bytes than those that it began with.
"""

import re
import threading

from api.documents import BlockDocument, now
from api.errors import InvalidData
from api.storage import Bucket

_RECORD = re.compile(r"([0-9a-f]{64})\.json")


class BlockRecords:
    """The records of bare shards' blocks; what was read once is remembered. `prefix` is a shard's block_records."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._known: dict[tuple[str, int], str] = {}
        self._lock = threading.Lock()

    def find(self, prefix: str, shard: str, block: int) -> str | None:
        """Return a block's recorded sha256, None if nobody has read it yet; InvalidData if there are two."""
        with self._lock:
            known = self._known.get((shard, block))
        return known or self._read(prefix, shard, block)

    def add(self, prefix: str, shard: str, block: int, digest: str) -> None:
        """Record a block; InvalidData if somebody has read it with other bytes."""
        document = BlockDocument(shard=shard, index=block, sha256=digest, created_at=now())
        self._bucket.put_document(f"{_folder(prefix, block)}{digest}.json", document)
        self._read(prefix, shard, block)

    def _read(self, prefix: str, shard: str, block: int) -> str | None:
        folder = _folder(prefix, block)
        names = (_RECORD.fullmatch(item.key.removeprefix(folder)) for item in self._bucket.objects(folder))
        found = sorted(name[1] for name in names if name is not None)
        if len(found) > 1:
            raise InvalidData(
                f"block {block} of {shard} was read with different bytes: sha256 {' and '.join(found)}. The object was "
                f"changed while it was in use; put the shards into a folder of another name, or delete {folder}"
            )
        if not found:
            return None
        with self._lock:
            self._known[shard, block] = found[0]
        return found[0]


def _folder(prefix: str, block: int) -> str:
    return f"{prefix}{block:06d}/"
