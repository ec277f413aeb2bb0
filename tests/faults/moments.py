"""The moments that a kill of a control plane can be aimed at."""

import time
from collections import Counter
from contextlib import suppress
from pathlib import Path


class Moments:
    """What happens around the control plane, counted, so that a kill can be aimed at it."""

    def __init__(self, database: Path | None) -> None:
        """`database` is SQLite's file; without one, no kill can be aimed at a commit."""
        self._log = database.with_name(f"{database.name}-wal") if database is not None else None
        self._seen: Counter[str] = Counter()

    def note(self, name: str) -> None:
        self._seen[name] += 1

    def await_next(self, name: str, deadline: float) -> None:
        before = self._look(name)
        while self._look(name) == before and time.monotonic() < deadline:
            time.sleep(0.0005)

    def _look(self, name: str) -> int:
        """Return a number that changes when it happens; a commit writes to the database's write-ahead log."""
        if name != "commit":
            return self._seen[name]
        assert self._log is not None
        with suppress(FileNotFoundError):  # the last connection to close takes it away
            return self._log.stat().st_mtime_ns
        return 0
