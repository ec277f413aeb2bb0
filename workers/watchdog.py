"""A thread in each rank that ends the process when nothing moves any more, so that Ray starts the group again.

Ray takes 10 to 30 minutes to notice a rank that hangs. The decision is `verdict`, a pure function; the thread only
looks, asks the store, and acts. It needs the interpreter's lock: a call that hangs and never gives it back is left to
Ray's own health check.
"""

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from traceback import walk_stack
from typing import Literal

from api.documents import FaultDocument, now
from api.errors import ObjectMissing, StorageError
from api.jobs import Reason
from api.storage import Bucket
from workers.segment import Segment

logger = logging.getLogger("lockstep.workers")

EXIT_HUNG = 70
"""Exit code of a rank that its watchdog ended."""

Phase = Literal["start", "compile", "step", "evaluation", "upload", "sample"]
Verdict = Literal["moving", "quiet", "hung"]

_LONG_PHASES: frozenset[Phase] = frozenset({"start", "compile", "sample"})
"""These show no sign of life between their beginning and their end."""
_MISSED_TICKS = 5
_RECENT_STEPS = 31


@dataclass(frozen=True)
class Limits:
    """All in seconds, except `steps`."""

    first: float = 600.0
    """The longest standstill before the first step of a segment, and in phases that show no sign of life."""
    least: float = 60.0
    """The longest standstill afterwards, unless `steps` times the usual step is longer."""
    steps: float = 10.0
    report: float = 10.0
    """The longest time that the report of a hang may hold up the end of the process."""
    ask: float = 15.0
    """Longer than the store can take to answer, or not to answer, whether it is there."""
    tick: float = 1.0
    """Time between two looks."""


@dataclass(frozen=True)
class Hang:
    """Nothing moved for longer than it may."""

    phase: Phase
    seconds: float
    limit: float

    def __str__(self) -> str:
        return f"nothing has moved for {self.seconds:.0f} s in phase `{self.phase}`; the limit is {self.limit:.0f} s"


@dataclass(frozen=True)
class Pulse:
    """What others may know of the watched run."""

    beats: int
    phase: Phase
    limit: float
    """Seconds of standstill after which the watchdog acts."""


def limit_of(phase: Phase, usual: float | None, limits: Limits) -> float:
    """Return the longest standstill (seconds) in a phase; `usual` is the time of a step, None before the first one."""
    if usual is None or phase in _LONG_PHASES:
        return limits.first
    return max(limits.least, limits.steps * usual)


def verdict(now: float, last_beat: float, phase: Phase, usual: float | None, limits: Limits) -> Verdict:
    """Say what a standstill means: `quiet` from half of its limit on, `hung` from the limit on. Times in seconds."""
    standstill, limit = now - last_beat, limit_of(phase, usual, limits)
    if standstill >= limit:
        return "hung"
    return "quiet" if standstill >= limit / 2 else "moving"


class Watchdog:
    """Watches for beats of the training thread and the upload thread.

    A standstill counts only while the store answers and this process runs: a rank that waits for the store, and all
    ranks that wait for that rank, look as if they hung. So the store is asked from half of the limit on, each tick,
    and when it answers again after it did not, the time counts from there. The same when this thread itself was not
    run: the process was stopped, or its machine slept.
    """

    def __init__(
        self,
        limits: Limits,
        store_answers: Callable[[], bool],
        on_hang: Callable[[str, Hang], None],
        clock: Callable[[], float] = time.monotonic,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        """`store_answers` must itself give up within seconds; `on_hang` gets the stacks of all threads."""
        self._limits, self._store_answers, self._on_hang = limits, store_answers, on_hang
        self._clock, self._leave = clock, leave
        self._steps: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._usual: float | None = None
        self._beats = 0
        self._counts_from = self._looked = clock()
        self._moved: tuple[float, Phase] = (self._counts_from, "start")
        self._store_is_away = False
        self._closed = threading.Event()

    def start(self) -> None:
        """Begin to look."""
        self._counts_from = self._looked = self._clock()
        threading.Thread(target=self._run, daemon=True, name="watchdog").start()

    def close(self) -> None:
        """Never act again."""
        self._closed.set()

    def beat(self, phase: Phase) -> None:
        """Something moved."""
        self._moved = (self._clock(), phase)
        self._beats += 1

    def step_done(self, seconds: float) -> None:
        """A step is done; it took so long."""
        self._steps.append(seconds)
        self._usual = median(self._steps)
        self.beat("step")

    def pulse(self) -> Pulse:
        """Return how often something moved so far, and how long nothing may."""
        phase = self._moved[1]
        return Pulse(self._beats, phase, limit_of(phase, self._usual, self._limits))

    def look(self) -> None:
        """Look once; what the thread does each tick."""
        now = self._clock()
        if now - self._looked > _MISSED_TICKS * self._limits.tick:
            self._counts_from = now
        if self._verdict(now) == "moving":
            self._store_is_away = False
        elif not self._ask():
            self._store_is_away = True
        elif self._store_is_away:
            self._store_is_away = False
            self._counts_from = self._clock()
        elif self._verdict(now) == "hung":  # judged anew: something may have moved while the store was asked
            self._end(now)
        self._looked = self._clock()

    def _ask(self) -> bool:
        """Ask the store; a question that took longer than one can was asked by a process that did not run."""
        began = self._clock()
        answers = self._store_answers()
        if (ended := self._clock()) - began > self._limits.ask:
            self._counts_from = ended
        return answers

    def _verdict(self, now: float) -> Verdict:
        at, phase = self._moved
        return verdict(now, max(at, self._counts_from), phase, self._usual, self._limits)

    def _run(self) -> None:
        while not self._closed.wait(self._limits.tick):
            self.look()

    def _end(self, now: float) -> None:
        """Report the hang, for a bounded time, and end the process: hard, because its threads may hold any lock."""
        at, phase = self._moved
        hang = Hang(phase, now - max(at, self._counts_from), limit_of(phase, self._usual, self._limits))
        report = threading.Thread(target=self._report, args=(hang,), daemon=True, name="watchdog's report")
        report.start()
        report.join(self._limits.report)
        if not self._closed.is_set():
            self._leave(EXIT_HUNG)

    def _report(self, hang: Hang) -> None:
        stacks = f"{hang}; the stacks of all threads, innermost call last\n{stacks_of_all_threads()}"
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, stacks.encode())  # where Ray keeps it, store or not
        try:
            self._on_hang(stacks, hang)
        except Exception:
            logger.exception("the report of a hang was not written")


def stacks_of_all_threads() -> str:
    """Return a line for each thread, with its name, and one for each of its frames; no source file is read for it."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines: list[str] = []
    for ident, innermost in sys._current_frames().items():
        frames = [
            f"  {frame.f_code.co_filename}:{line} {frame.f_code.co_qualname}" for frame, line in walk_stack(innermost)
        ]
        lines += [f"thread {names.get(ident, 'without a name')} ({ident})", *reversed(frames)]
    return "\n".join(lines) + "\n"


def write_report(segment: Segment, step: int, stacks: str, hang: Hang) -> None:
    """Leave the fault document of this rank, and the stacks in its log, durably; StorageError if the store refuses."""
    rank = segment.session.rank
    fault = FaultDocument(
        rank=rank, step=step, reason=Reason.HUNG, phase=hang.phase, message=f"rank {rank}: {hang}", created_at=now()
    )
    segment.bucket.put_document(segment.layout.fault(rank), fault)
    for line in stacks.splitlines():
        segment.log.append(line)
    segment.log.flush()


def asks(bucket: Bucket, key: str) -> Callable[[], bool]:
    """Return the question whether a store answers: for a small object, whether it is there or not.

    It is read, not only looked for, since reads are what training waits for. Give it a bucket with short timeouts and
    one try.
    """

    def answers() -> bool:
        try:
            bucket.get(key)
        except ObjectMissing:
            return True
        except StorageError:
            return False
        return True

    return answers
