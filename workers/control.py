"""What is wanted of this attempt, and how the ranks agree to obey at the same step.

The control plane's wish lies in `control.json`, the driver's notice that the machine is about to go in `notice.json`.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from api.documents import ControlDocument, NoticeDocument
from api.errors import LockstepError
from api.jobs import Reason
from api.layout import JobLayout
from api.storage import Bucket
from workers.session import Session

logger = logging.getLogger("lockstep.workers")


@dataclass
class Halt(Exception):
    """The end of the run, raised by all ranks together: a stop request, or a fault that a retry cannot mend."""

    outcome: Literal["failed", "stopped"]
    reason: Reason
    message: str
    checkpoint: bool = False
    """Whether a checkpoint of the present step shall be written first."""
    values: dict[str, Any] = field(default_factory=dict)


#: What rank 0 tells the others by a number: the higher one wins, if several are wanted.
_STOPS = {
    1: Halt("stopped", Reason.DRAINED, "the machine is about to go", checkpoint=True),
    2: Halt("stopped", Reason.USER_PAUSED, "stopped to go on later", checkpoint=True),
    3: Halt("stopped", Reason.USER_CANCELLED, "stopped on request, after a checkpoint", checkpoint=True),
    4: Halt("stopped", Reason.USER_CANCELLED, "stopped on request"),
    5: Halt("stopped", Reason.SUPERSEDED, "a newer attempt took over"),
}
_RUN, _DRAINED, _FAULT = 0, 1, 6


def _code(control: ControlDocument) -> int:
    match control.wish:
        case "run":
            return _RUN
        case "pause":
            return 2
        case "cancel":
            return 3 if control.keep_checkpoint else 4
        case "superseded":
            return 5


class Control:
    """Rank 0 looks in a thread; the answer reaches all ranks with the per-step reduction."""

    def __init__(
        self,
        bucket: Bucket,
        layout: JobLayout,
        session: Session,
        interval: float,
        on_look: Callable[[], None] = lambda: None,
    ) -> None:
        """`interval`: seconds between two looks; `on_look` is called after each, in the thread that looks."""
        self._bucket, self._layout, self._session, self._interval = bucket, layout, session, interval
        self._on_look = on_look
        self._wanted = _RUN
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
        mine = _FAULT if fault is not None else self._wanted
        (code,) = self._session.maximum(mine)
        if code in _STOPS:
            raise _STOPS[code]
        if code == _FAULT:
            messages = self._session.gather(str(fault) if fault is not None else "")
            raise Halt("failed", reason, next(message for message in messages if message))

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            self._look()
            self._on_look()

    def _look(self) -> None:
        """Note what is wanted now. A stop is never taken back, but a stricter one may follow."""
        try:
            control = self._bucket.find_document(self._layout.control(self._session.attempt), ControlDocument)
            notice = self._bucket.find_document(self._layout.notice(self._session.attempt), NoticeDocument)
        except LockstepError as error:
            logger.warning("the control object cannot be read now: %s", error)
            return
        noticed = _DRAINED if notice is not None else _RUN
        self._wanted = max(self._wanted, noticed, _code(control) if control is not None else _RUN)
