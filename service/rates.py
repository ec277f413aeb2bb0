"""Limits on requests: a bucket of tokens for each key, refilled evenly; on long answers: so many at once.

Each process counts for itself.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from threading import Lock
from time import monotonic

from api.errors import RateLimited

_COME_BACK = 5.0
"""Seconds; when a place will be free, nobody knows."""
_MOST = 10_000
"""Buckets that are remembered, the newest used; a forgotten one is full again."""


@dataclass(frozen=True)
class Rate:
    per_second: float
    burst: int
    """Most requests at once, after a pause."""

    def times(self, count: int) -> "Rate":
        return Rate(self.per_second * count, self.burst * count)


@dataclass(frozen=True)
class Level:
    """What was in a bucket at a time, in monotonic seconds."""

    tokens: float
    at: float


@dataclass(frozen=True)
class Verdict:
    allowed: bool
    remaining: int
    """Requests that could follow at once."""
    reset: int
    """Seconds until the bucket is full again."""
    wait: int
    """Seconds until the next request is allowed; 0: it is now."""


def take(level: Level | None, rate: Rate, now: float) -> tuple[Level, Verdict]:
    """Take one token from a bucket, if there is one; None is a bucket that was never used. Pure."""
    before = rate.burst if level is None else min(rate.burst, level.tokens + (now - level.at) * rate.per_second)
    allowed = before >= 1
    tokens = before - 1 if allowed else before
    wait = 0 if tokens >= 1 else ceil((1 - tokens) / rate.per_second)
    return Level(tokens, now), Verdict(allowed, int(tokens), ceil((rate.burst - tokens) / rate.per_second), wait)


class Limiter:
    """Buckets by name, of one rate."""

    def __init__(self, rate: Rate, clock: Callable[[], float] = monotonic) -> None:
        self.rate, self._clock, self._lock = rate, clock, Lock()
        self._levels: OrderedDict[str, Level] = OrderedDict()

    def take(self, name: str) -> Verdict:
        with self._lock:
            level, verdict = take(self._levels.get(name), self.rate, self._clock())
            self._levels[name] = level
            self._levels.move_to_end(name)
            if len(self._levels) > _MOST:
                self._levels.popitem(last=False)
        return verdict

    def headers(self, verdict: Verdict) -> dict[str, str]:
        """Return the RateLimit headers that tell a client where it stands."""
        return {
            "RateLimit-Limit": str(self.rate.burst),
            "RateLimit-Remaining": str(verdict.remaining),
            "RateLimit-Reset": str(verdict.reset),
        }


class Places:
    """What each holder, a key or a project, may have open at once. For one event loop."""

    def __init__(self, most: int, complaint: str) -> None:
        """`complaint` says whose is full, with `{most}`, and what to do."""
        self._most, self._complaint = most, complaint
        self._taken: Counter[str] = Counter()

    @contextmanager
    def one(self, holder: str) -> Iterator[None]:
        """Hold a place while the block runs; RateLimited if all of the holder's are taken."""
        if self._taken[holder] >= self._most:
            raise RateLimited(self._complaint.format(most=self._most), retry_after=_COME_BACK)
        self._taken[holder] += 1
        try:
            yield
        finally:
            self._taken -= Counter((holder,))  # forgets who has none left
