"""Append-only streams of lines in a store that cannot append: chunks, each rewritten until it is full.

A reader sees a prefix of the lines, always whole lines, never a torn one, because a PUT replaces an object at once.
"""

import logging
import threading
from typing import Any

from api.documents import StreamLine, now
from api.errors import StorageError
from api.layout import chunk
from api.storage import Bucket

_CHUNK_BYTES = 256 * 1024
logger = logging.getLogger("lockstep.workers")


class LineStream:
    """Lines under one prefix, written by a thread at most once in `interval` seconds; `flush` writes at once."""

    def __init__(self, bucket: Bucket, prefix: str, suffix: str, interval: float = 2.0) -> None:
        self._bucket, self._prefix, self._suffix, self._interval = bucket, prefix, suffix, interval
        self._index = 0
        self._lines: list[str] = []
        self._dirty = False
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"stream {suffix}")
        self._thread.start()

    def append(self, line: str) -> None:
        """Add one line (without its end); it is durable after the next flush."""
        with self._lock:
            self._lines.append(line)
            self._dirty = True

    def flush(self) -> None:
        """Make every line so far durable; StorageError if the store does not take them."""
        with self._writing:
            with self._lock:
                if not self._dirty:
                    return
                body, count = "".join(f"{line}\n" for line in self._lines).encode(), len(self._lines)
                self._dirty = False
            try:
                self._bucket.put(chunk(self._prefix, self._index, self._suffix), body)
            except StorageError:
                self._dirty = True
                raise
            if len(body) >= _CHUNK_BYTES:
                self._begin_chunk(count)

    def _begin_chunk(self, written: int) -> None:
        with self._lock:
            self._index += 1
            self._lines = self._lines[written:]
            self._dirty = bool(self._lines)

    def close(self) -> None:
        """Flush and end the thread."""
        self._closed.set()
        self._thread.join()
        self.flush()

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            try:
                self.flush()
            except StorageError as error:
                logger.warning("a stream is behind: %s", error)


class Journal:
    """Rank 0's stream of metric lines and events of a segment. On other ranks nothing is written."""

    def __init__(self, stream: LineStream | None) -> None:
        self._stream = stream

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._append(StreamLine(type="metrics", step=step, at=now(), values=values))

    def event(self, step: int, event: str, message: str, **values: Any) -> None:
        logger.info("%s", message)
        self._append(StreamLine(type="event", step=step, at=now(), event=event, message=message, values=values))

    def flush(self) -> None:
        if self._stream is not None:
            self._stream.flush()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def _append(self, line: StreamLine) -> None:
        if self._stream is not None:
            self._stream.append(line.model_dump_json())


class StreamHandler(logging.Handler):
    """Sends log records of this process to a stream."""

    def __init__(self, stream: LineStream) -> None:
        super().__init__(logging.INFO)
        self._stream = stream
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).splitlines():
            self._stream.append(line)
