"""Rank 0's sign of life for the control plane, which steps in when the ranks' own watchdogs fail."""

import logging
import time
from collections.abc import Callable

from api.documents import HeartbeatDocument
from api.errors import StorageError
from workers.segment import Segment
from workers.watchdog import Watchdog

logger = logging.getLogger("lockstep.workers")


class Heartbeat:
    """`heartbeat.json` of a segment: rewritten while something moves, at most once in `interval` seconds."""

    def __init__(
        self, segment: Segment, watchdog: Watchdog, interval: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._segment, self._watchdog, self._interval, self._clock = segment, watchdog, interval, clock
        self._written_at: float | None = None
        self._count = -1

    def write(self) -> None:
        """Write it if it is due and has news."""
        pulse, now = self._watchdog.pulse(), self._clock()
        if pulse.beats == self._count or (self._written_at is not None and now < self._written_at + self._interval):
            return
        document = HeartbeatDocument(count=pulse.beats, phase=pulse.phase, step=self._segment.step, limit=pulse.limit)
        try:
            self._segment.bucket.put_document(self._segment.layout.heartbeat, document)
        except StorageError as error:
            logger.warning("the heartbeat was not written: %s", error)
            return
        self._written_at, self._count = now, pulse.beats
