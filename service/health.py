"""/healthz and /readyz: is the process alive, and what does it stand on? The only routes without an API key.

So they tell no details, and many who ask share one look.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Lock
from time import monotonic
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy.exc import SQLAlchemyError

from api.errors import LockstepError
from api.jobs import Check, Readiness

router = APIRouter(tags=["health"])
logger = logging.getLogger("lockstep.service")

_PATIENCE = 2.0
"""Seconds; a probe must not wait for a store that hangs."""
_FRESH = 1.0
"""Seconds for which what was found counts as what is."""
_STUCK = 60.0
"""Seconds after which another look begins though one goes on: a connection may be dead, and the next one not."""
_STUCK_LOOKS = 4
"""Most that go on; looks that hang must take no thread from the routes."""
Clock = Callable[[], float]


@dataclass(frozen=True)
class Seen:
    """What a look at a dependency found."""

    seconds: float
    trouble: str = ""
    """Empty: it answers as it should."""


class Dependency:
    """Something that the control plane stands on. There is one look at it at a time, unless one gets stuck."""

    def __init__(self, name: str, check: Callable[[], object], clock: Clock) -> None:
        self.name, self._check, self._clock = name, check, clock
        self._threads = ThreadPoolExecutor(_STUCK_LOOKS, thread_name_prefix=f"look-{name}")
        self._lock, self._told = Lock(), ""
        self._look: Future[Seen]
        self._next = float("-inf")
        """When another look may begin."""

    def look(self) -> Future[Seen]:
        """Return the look that goes on, or the last one if that has just ended; otherwise begin one."""
        with self._lock:
            if (at := self._clock()) >= self._next:
                self._next = at + _STUCK
                self._look = self._threads.submit(self._take)
            return self._look

    def seen(self, look: Future[Seen]) -> Seen:
        """Return what a look found by now, and have the log tell of it if it is news."""
        found = look.result() if look.done() else Seen(_PATIENCE, f"no answer within {_PATIENCE:g} s")
        with self._lock:
            news, self._told = found.trouble != self._told, found.trouble
        if news and found.trouble:
            logger.warning("%s is degraded: %s", self.name, found.trouble)
        elif news:
            logger.info("%s answers again", self.name)
        return found

    def _take(self) -> Seen:
        began, trouble = self._clock(), ""
        try:
            self._check()
        except (LockstepError, SQLAlchemyError) as error:
            trouble = str(error) or type(error).__name__
        except Exception:
            logger.exception("a bug ended a look at %s", self.name)
            trouble = "a bug"
        ended = self._clock()
        self._next = ended + _FRESH
        return Seen(ended - began, trouble)


class Dependencies:
    """All that the control plane stands on, looked at at once, and waited for no longer than a probe may wait."""

    def __init__(self, checks: Mapping[str, Callable[[], object]], clock: Clock = monotonic) -> None:
        self._all = [Dependency(name, check, clock) for name, check in checks.items()]

    def seen(self) -> dict[str, Seen]:
        looks = [dependency.look() for dependency in self._all]
        wait(looks, timeout=_PATIENCE)
        return self._seen(looks)

    async def seen_soon(self) -> dict[str, Seen]:
        """Do the same without a thread that waits: many may ask while one hangs."""
        looks = [dependency.look() for dependency in self._all]
        await asyncio.wait([asyncio.wrap_future(look) for look in looks], timeout=_PATIENCE)
        return self._seen(looks)

    def _seen(self, looks: list[Future[Seen]]) -> dict[str, Seen]:
        pairs = zip(self._all, looks, strict=True)
        return {dependency.name: dependency.seen(look) for dependency, look in pairs}


def dependencies(request: Request) -> Dependencies:
    found: Dependencies = request.app.state.dependencies
    return found


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz", responses={503: {"model": Readiness, "description": "The database does not answer"}})
async def readyz(response: Response, every: Annotated[Dependencies, Depends(dependencies)]) -> Readiness:
    """Ready when the database answers; bucket and Ray are at worst degraded, for a job can wait for them.

    What is wrong stands in the server's log.
    """
    checks = {
        name: Check(status="degraded" if seen.trouble else "ok") for name, seen in (await every.seen_soon()).items()
    }
    ready = checks["database"].status == "ok"
    if not ready:
        checks["database"] = Check(status="failed")
        response.status_code = 503
    return Readiness(ready=ready, checks=checks)
