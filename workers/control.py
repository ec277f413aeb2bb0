"""What the control plane wants of this attempt, and how the ranks agree to obey at the same step."""

import logging
import threading
from dataclasses import dataclass
from typing import Literal

from api.documents import ControlDocument, Wish
from api.errors import LockstepError
from api.jobs import Reason
from api.storage import Bucket
from workers.session import Session

logger = logging.getLogger("lockstep.workers")

_CODES: dict[Wish, int] = {"run": 0, "cancel": 1, "superseded": 2}
_FAULT = 3
_STOPS = {
    1: (Reason.USER_CANCELLED, "stopped on request"),
    2: (Reason.SUPERSEDED, "a newer attempt took over"),
}


@dataclass
class Halt(Exception):
    """The end of the run, raised by all ranks together: a stop request, or a fault that a retry cannot mend."""

    outcome: Literal["failed", "stopped"]
    reason: Reason
    message: str


class Control:
    """Rank 0 reads `control.json` in a thread; the answer reaches all ranks with the per-step reduction."""

    def __init__(self, bucket: Bucket, key: str, session: Session, interval: float) -> None:
        self._bucket, self._key, self._session, self._interval = bucket, key, session, interval
        self._wish: Wish = "run"
        self._closed = threading.Event()
        if session.leads:
            self._look()
            self._thread = threading.Thread(target=self._run, daemon=True, name="control")
            self._thread.start()

    def close(self) -> None:
        self._closed.set()

    def check(self, fault: LockstepError | None = None, reason: Reason = Reason.INVALID_DATA) -> None:
        """Meet with all ranks; raise Halt on every one of them if a stop is wanted or any rank has a fault.

        `reason` is what a fault at this place means, the same on every rank.
        """
        mine = _FAULT if fault is not None else _CODES[self._wish]
        (code,) = self._session.maximum(mine)
        if code in _STOPS:
            raise Halt("stopped", *_STOPS[code])
        if code == _FAULT:
            messages = self._session.gather(str(fault) if fault is not None else "")
            raise Halt("failed", reason, next(message for message in messages if message))

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            self._look()

    def _look(self) -> None:
        try:
            document = self._bucket.find_document(self._key, ControlDocument)
        except LockstepError as error:
            logger.warning("the control object cannot be read now: %s", error)
            return
        # A stop is never taken back.
        if document is not None and self._wish == "run":
            self._wish = document.wish
