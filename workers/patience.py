"""A bucket that waits for a store that is away, so that a run outlives an outage instead of dying of it."""

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from api.errors import LockstepError, ObjectMissing, StorageDenied, StorageError, StorageUnavailable
from api.storage import Bucket, Timeouts
from workers.settings import WorkerSettings

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

logger = logging.getLogger("lockstep.workers")
T = TypeVar("T")

#: An error is noticed within seconds, silence within 15: what comes after that is waiting.
QUICK = Timeouts(connect=5.0, read=15.0, attempts=6, total=10.0)
_PROBE = Timeouts(connect=3.0, read=3.0, attempts=1)
_SHORTEST_WAIT, _LONGEST_WAIT = 0.5, 5.0


@dataclass
class Failure:
    """How long a request has been failing. All times are of one monotonic clock."""

    since: float
    denied_since: float | None = None

    def note(self, error: StorageError, began: float) -> None:
        """Take a try into account that began at this time."""
        if not isinstance(error, StorageDenied):
            self.denied_since = None
        elif self.denied_since is None:
            self.denied_since = began

    def left(self, now: float, patience: float, denied_patience: float) -> float:
        """Return for how many seconds it may go on."""
        left = self.since + patience - now
        return left if self.denied_since is None else min(left, self.denied_since + denied_patience - now)


class PatientBucket(Bucket):
    """A bucket whose every request, after StorageUnavailable or StorageDenied, waits and tries again.

    It raises the last error after `patience` seconds of nothing but these, or `denied_patience` of refusals:
    credentials that do not come back soon need a person. ObjectMissing and InvalidData are answers, and raised at once.
    """

    def __init__(
        self,
        url: str,
        patience: float = 3600.0,
        denied_patience: float = 300.0,
        timeouts: Timeouts = QUICK,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        super().__init__(url, timeouts)
        self._patience, self._denied_patience, self._clock = patience, denied_patience, clock
        self._impatient = threading.Event()
        self._sleep = sleep or self._impatient.wait
        self._probe = Bucket(url, _PROBE)
        self._lock = threading.Lock()
        self._announced: float | None = None  # when the waiting began of which the log tells
        self.away_since: float | None = None
        """Since when a request has been failing and none has succeeded, by the clock; None while the store answers."""

    def answers(self) -> bool:
        """Ask the store something cheap, once; return whether it answers as it should, within a few seconds.

        It says nothing about `away_since`: a store may answer this and still take no object.
        """
        try:
            self._probe.size("answers")
        except StorageError as error:
            return isinstance(error, ObjectMissing)
        return True

    def give_up(self) -> None:
        """Wait no longer: whoever waits, or would wait, raises. For the end of a process, which joins its threads."""
        self._impatient.set()

    def _request(self, key: str, action: "Callable[[S3Client], T]") -> T:
        failure, wait = None, _SHORTEST_WAIT
        while True:
            began = self._clock()
            try:
                answer = super()._request(key, action)
            except (StorageUnavailable, StorageDenied) as error:
                is_first, failure = failure is None, failure or Failure(began)
                failure.note(error, began)
                left = failure.left(self._clock(), self._patience, self._denied_patience)
                waits = left > 0 and not self._impatient.is_set()
                self._note_failure(error, began, announces=is_first and waits)
                if not waits:
                    raise
            except LockstepError:
                self._note_answer()
                raise
            else:
                self._note_answer()
                return answer
            self._sleep(min(left, wait * random.uniform(0.5, 1.0)))  # spreads retries, hides nothing  # nosec B311
            wait = min(2 * wait, _LONGEST_WAIT)

    def _note_failure(self, error: StorageError, began: float, announces: bool) -> None:
        with self._lock:
            if self.away_since is None:
                self.away_since = began
            announces = announces and self._announced is None
            if announces:
                self._announced = began
        if announces:
            logger.warning("waiting for the store: %s", error)

    def _note_answer(self) -> None:
        with self._lock:
            began, self._announced, self.away_since = self._announced, None, None
        if began is not None:
            logger.info("the store answers again, after %.0f s", self._clock() - began)


def patient_bucket(
    settings: WorkerSettings,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] | None = None,
) -> PatientBucket:
    """Return the bucket of the settings, as patient as they say."""
    return PatientBucket(
        settings.storage, settings.storage_patience, settings.denied_patience, clock=clock, sleep=sleep
    )
