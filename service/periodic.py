"""A function that is called again and again, in a thread of its own."""

import logging
import threading
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

logger = logging.getLogger("lockstep.service")


class Periodic:
    """Calls a function, waits so many seconds, and calls it again, whatever became of the call before."""

    def __init__(self, name: str, call: Callable[[], None], seconds: float) -> None:
        self._name, self._call, self._seconds = name, call, seconds
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

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._call()
            except SQLAlchemyError as error:
                logger.warning("%s: the database does not answer, nothing is decided: %s", self._name, error)
            except Exception:
                logger.exception("%s: a bug ended this pass; the next one begins anew", self._name)
            self._stop.wait(self._seconds)
