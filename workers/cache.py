"""The cache of blocks on a machine's disk: a folder shared by all ranks and jobs there, with a limit in bytes.

A block is a file named by its sha256, written under a temporary name and renamed, so a reader sees all of it or none.
Who adds a block holds the folder's lock (`flock`, which the kernel drops when the holder dies) while it makes room,
writes and renames; so the folder never exceeds the limit, temporary files included, and a temporary file that somebody
finds under the lock was left by a process that was killed. Reading takes no lock on the folder: whoever maps a block
holds a shared lock on its file instead, and what is locked is not evicted. The folder must lie on a local disk: network
file systems make something else of `flock`.
"""

import fcntl
import hashlib
import logging
import mmap
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger("lockstep.workers")

DEFAULT_CACHE_BYTES = 20 * 2**30
Block = NDArray[np.uint8]

_BLOCK = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = re.compile(r"\.[0-9a-f]{64}\.partial")
_LOCK = ".lock"
_LOCK_SECONDS = 10.0
"""Far longer than adding a block takes: whoever holds the lock for that long is stopped, or its disk is."""


@dataclass(frozen=True)
class CachedFile:
    """A block's file in the folder."""

    name: str
    size: int
    used_at: int
    """Nanoseconds: when it was last opened, by any process."""


class CacheFolder:
    """Blocks by sha256, at most `limit` bytes of them; files that are not ours are neither counted nor touched."""

    def __init__(self, folder: Path, limit: int = DEFAULT_CACHE_BYTES) -> None:
        self._folder, self._limit, self._warned = folder, limit, False

    def open(self, digest: str) -> Block | None:
        """Return a block, read-only and checked; None if it is not there, or its file is damaged."""
        found = self._map(digest)
        return found if found is not None and hashlib.sha256(found.data).hexdigest() == digest else None

    def add(self, digest: str, body: bytes) -> Block:
        """Keep a block, and return it: mapped from its file, or from memory if it found no room."""
        found = None
        if len(body) <= self._limit:
            try:
                self._folder.mkdir(0o700, parents=True, exist_ok=True)  # whoever cleans up disks may do so while we run
                with self._locked():
                    found = self._replace(digest, body)
            except OSError as error:  # full, read-only, forbidden, too slow: a run can do without
                self._warn(error)
        return np.frombuffer(body, np.uint8) if found is None else found

    def _warn(self, error: OSError) -> None:
        """Say once that the cache takes nothing; a line for every block would fill the log."""
        if not self._warned:
            logger.warning("blocks that are not in %s are kept in memory: %s", self._folder, error)
        self._warned = True

    def _replace(self, digest: str, body: bytes) -> Block | None:
        """Write a block that is not there, or is damaged; None if there is no room."""
        if (found := self.open(digest)) is not None:
            return found  # another rank was quicker
        # Whoever has the damaged file mapped keeps it, and its disk space, until it lets go.
        (self._folder / digest).unlink(missing_ok=True)
        if not self._make_room(len(body)):
            return None
        temporary = self._folder / f".{digest}.partial"
        try:
            temporary.write_bytes(body)
            temporary.rename(self._folder / digest)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        return self._map(digest)

    def _map(self, digest: str) -> Block | None:
        """Map a file and mark it as used; None if there is none to be read, or it is being evicted now."""
        with suppress(OSError), open(self._folder / digest, "rb") as file:
            # The lock belongs to the open file description, which the mapping keeps when `file` is closed: it ends
            # with the last use of the array, or with the process.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            state = os.fstat(file.fileno())
            # Evicted between open and lock: its bytes are good, but on a disk where nobody counts them.
            if state.st_nlink and state.st_size:
                os.utime(file.fileno(), ns=(time.time_ns(),) * 2)
                return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        return None

    def _make_room(self, size: int) -> bool:
        """Evict what was used least recently until `size` more bytes fit; False, and nothing evicted, if in vain."""
        files = self._files()
        excess = sum(file.size for file in files) + size - self._limit
        with ExitStack() as locks:
            chosen = victims(files, excess, lambda file: self._lock_unused(file, locks))
            for file in chosen or []:
                (self._folder / file.name).unlink(missing_ok=True)
        return chosen is not None

    def _files(self) -> list[CachedFile]:
        """Return the blocks in the folder; on the way, remove temporary files, whose writers are dead."""
        found = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if _TEMPORARY.fullmatch(entry.name):
                    os.unlink(entry.path)
                elif _BLOCK.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):
                        state = entry.stat(follow_symlinks=False)
                        found.append(CachedFile(entry.name, state.st_size, state.st_mtime_ns))
        return found

    def _lock_unused(self, file: CachedFile, locks: ExitStack) -> bool:
        """Lock a file against being mapped until `locks` is closed; False if somebody has it mapped."""
        try:
            handle = os.open(self._folder / file.name, os.O_RDONLY)
        except FileNotFoundError:
            return True  # somebody else has deleted it: its bytes are free already
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        locks.callback(os.close, handle)
        return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the folder's lock; TimeoutError when another process, perhaps one that is stopped, does not let go."""
        deadline = time.monotonic() + _LOCK_SECONDS
        with open(self._folder / _LOCK, "ab") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"its lock was not to be had within {_LOCK_SECONDS:.0f} s") from None
                    time.sleep(0.005)
            yield


def victims(
    files: Iterable[CachedFile], excess: int, is_unused: Callable[[CachedFile], bool]
) -> list[CachedFile] | None:
    """Return the least recently used files that nobody uses and that take `excess` bytes together; None if too few."""
    chosen = []
    for file in sorted(files, key=lambda file: (file.used_at, file.name)):
        if excess <= 0:
            break
        if is_unused(file):
            chosen.append(file)
            excess -= file.size
    return chosen if excess <= 0 else None
