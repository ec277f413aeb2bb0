"""A function that is called again and again, in a thread of its own."""

import logging
import threading
from collections.abc import Callable
from time import perf_counter

from sqlalchemy.exc import SQLAlchemyError

logger = logging.getLogger("lockstep.service")

NotePass = Callable[[float], None]
"""Hears of a pass how many seconds it took."""


def nobody(_: float) -> None:
    """Where nobody counts passes."""


class Periodic:
    """Calls a function, waits so many seconds, and calls it again, whatever became of the call before."""

    def __init__(self, name: str, call: Callable[[], None], seconds: float, note_pass: NotePass = nobody) -> None:
        """`note_pass` hears of each call that came to its end how long it took."""
        self._name, self._call, self._seconds, self._note_pass = name, call, seconds, note_pass
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name=name)

    @property
    def stopping(self) -> bool:
        """For the function to look at between the parts of a long call."""
        return self._stop.is_set()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End after the present call."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def run_once(self) -> None:
        """Call it. What an error ends, or a stop cuts short, is no complete pass."""
        began = perf_counter()
        self._call()
        if not self.stopping:
            self._note_pass(perf_counter() - began)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.run_once()
            except SQLAlchemyError as error:
                logger.warning("%s: the database does not answer, nothing is decided: %s", self._name, error)
            except Exception:
                logger.exception("%s: a bug ended this pass; the next one begins anew", self._name)
            self._stop.wait(self._seconds)
