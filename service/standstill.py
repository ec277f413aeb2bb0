"""Notices that a run has stood still for twice as long as its own watchdogs allow: then they failed, too."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from api.documents import HeartbeatDocument

_PATIENCE = 2.0
"""Times the ranks' own limit."""


@dataclass(frozen=True)
class _Sight:
    segment: str
    count: int
    since: float


class Standstill:
    """Remembers when each run's heartbeat was last seen to change. A look that failed starts the clock anew, and so
    does a restart of the control plane: a store or a control plane that was away says nothing about the run.

    A segment of which a rank is known to be gone does not move either, until Ray has started the group again: that may
    take `start_deadline` seconds, as any start may.
    """

    def __init__(self, start_deadline: float) -> None:
        self._start_deadline = start_deadline
        self._seen: dict[str, _Sight] = {}

    def forget(self, job_id: str) -> None:
        self._seen.pop(job_id, None)

    def keep(self, job_ids: Collection[str]) -> None:
        """Forget all but these jobs: what we do not look at may move."""
        self._seen = {job_id: sight for job_id, sight in self._seen.items() if job_id in job_ids}

    def look(
        self,
        job_id: str,
        segment: str | None,
        beat: HeartbeatDocument | None,
        now: float,
        lost_a_rank: Callable[[], bool],
    ) -> str | None:
        """Return why the run must be taken for hung, if so. `now` is in seconds of a monotonic clock.

        `lost_a_rank` is asked only of a segment that stands still.
        """
        if segment is None or beat is None:
            self.forget(job_id)
            return None
        sight = self._seen.get(job_id)
        if sight is None or (sight.segment, sight.count) != (segment, beat.count):
            sight = self._seen[job_id] = _Sight(segment, beat.count, now)
        still = now - sight.since
        if still < _PATIENCE * beat.limit:
            return None
        if still < self._start_deadline and lost_a_rank():
            return None
        return (
            f"nothing has moved for {still:.0f} s, last in {beat.phase} at step {beat.step}, and nothing came of that"
        )
