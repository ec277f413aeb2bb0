"""A store whose control plane can die before and after each commit."""

from collections.abc import Sequence
from typing import Any

from service.audit import Change
from service.rows import JobRow, NewEvent
from service.store import Store
from tests.fakes import Hook, no_hook


class Mortal(Store):
    """The store, with a side effect's hook before and after each commit."""

    hook: Hook = staticmethod(no_hook)

    def apply(
        self,
        job: JobRow,
        changes: dict[str, Any],
        new_events: Sequence[NewEvent] = (),
        change: Change | None = None,
    ) -> JobRow | None:
        self.hook("before apply")
        applied = super().apply(job, changes, new_events, change)
        self.hook("after apply")
        return applied
