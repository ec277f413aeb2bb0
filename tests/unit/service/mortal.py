"""A control plane that can die before and after each of its commits, and what its event log must tell then."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from api.jobs import ENDED, JobState
from service.rows import JobRow, NewEvent
from service.store import Store
from tests.fakes import Hook, no_hook

FOLLOWS = {
    JobState.QUEUED: {JobState.STARTING, JobState.PAUSED, JobState.CANCELLED},
    JobState.STARTING: {JobState.RUNNING, JobState.RECOVERING, JobState.PAUSING, JobState.CANCELLING, *ENDED},
    JobState.RUNNING: {JobState.RECOVERING, JobState.PAUSING, JobState.CANCELLING, *ENDED},
    JobState.RECOVERING: {JobState.STARTING, JobState.PAUSED, JobState.CANCELLED},
    JobState.PAUSING: {JobState.PAUSED, JobState.QUEUED, JobState.RECOVERING, JobState.CANCELLING, *ENDED},
    JobState.PAUSED: {JobState.QUEUED, JobState.CANCELLED},
    JobState.CANCELLING: ENDED,
}


class Mortal(Store):
    """The store, with a side effect's hook before and after each commit."""

    hook: Hook = staticmethod(no_hook)

    def apply(self, job: JobRow, changes: dict[str, Any], new_events: Sequence[NewEvent] = ()) -> JobRow | None:
        self.hook("before apply")
        applied = super().apply(job, changes, new_events)
        self.hook("after apply")
        return applied


def replayed(store: Store, job: JobRow) -> tuple[JobState, int]:
    """Return state and attempt as the event log alone tells them; every step must be a legal one."""
    events = store.events(job.id, after=0, limit=10_000)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    states = [(event.state, event.data) for event in events if event.state is not None]
    assert states[0][0] is JobState.QUEUED
    for (before, _), (after, _) in pairwise(states):
        assert after in FOLLOWS[before]
    return states[-1][0], max([data.get("attempt", 0) for _, data in states])


def ran(store: Store, job: JobRow) -> set[str]:
    """Return the submissions of which the event log says that they ran."""
    attempt, found = 0, set()
    for event in store.events(job.id, after=0, limit=10_000):
        attempt = event.data.get("attempt", attempt)
        if event.state is JobState.RUNNING:
            found.add(f"{job.id}-{attempt}")
    return found
