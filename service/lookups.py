"""What each scrape asks the database and the dependencies: true also after a restart, and the same on every replica."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from api.documents import now
from api.jobs import ENDED, JobState, Reason
from service.health import Seen
from service.reasons import REASONS
from service.rows import Tally
from service.store import Store

_SHARED = "; looked up in the database, so the same on every replica: take max(), not sum()"
_ENDS = {Reason.COMPLETED: JobState.SUCCEEDED, Reason.USER_CANCELLED: JobState.CANCELLED}
"""The state in which a reason ends a job, where that is not `failed`."""


class Lookups(Collector):
    """Nothing of the database while it does not answer: no figure is better than an old one."""

    def __init__(self, store: Store, dependencies: Callable[[], Mapping[str, Seen]]) -> None:
        self._store, self._dependencies = store, dependencies

    def collect(self) -> Iterator[Metric]:
        try:
            tallies = self._store.tallies()
        except SQLAlchemyError:
            tallies = None
        if tallies is not None:
            yield from (_jobs(tallies), _queue(tallies), _ended(tallies), *_totals(tallies))
        yield from _dependencies(self._dependencies())


def _jobs(tallies: Sequence[Tally]) -> Metric:
    family = GaugeMetricFamily("lockstep_jobs", f"Jobs that are not deleted{_SHARED}", labels=["state"])
    for state in JobState:
        family.add_metric([state.value], sum(t.jobs for t in tallies if t.state is state and not t.deleted))
    return family


def _queue(tallies: Sequence[Tally]) -> Metric:
    since = min((t.oldest for t in tallies if t.state is JobState.QUEUED and not t.deleted), default=None)
    return GaugeMetricFamily(
        "lockstep_queue_oldest_seconds",
        f"Age of the job that has been queued for longest, 0 if none is{_SHARED}",
        value=(now() - since).total_seconds() if since is not None else 0.0,
    )


def _ended(tallies: Sequence[Tally]) -> Metric:
    """Every pair of state and reason that there is from the first scrape on: a rate needs a beginning."""
    ends = (reason for reason, meaning in REASONS.items() if meaning.counts or not meaning.retryable)
    counts = {(_ENDS.get(reason, JobState.FAILED).value, reason.value): 0 for reason in ends}
    for tally in tallies:
        if tally.state in ENDED:
            pair = (tally.state.value, tally.reason or "")
            counts[pair] = counts.get(pair, 0) + tally.jobs
    family = CounterMetricFamily(
        "lockstep_jobs_ended", f"Jobs that have ended, deleted ones included{_SHARED}", labels=["state", "reason"]
    )
    for pair, count in counts.items():
        family.add_metric(pair, count)
    return family


def _totals(tallies: Sequence[Tally]) -> Iterator[Metric]:
    yield CounterMetricFamily(
        "lockstep_attempts", f"Attempts begun, by all jobs{_SHARED}", value=sum(t.attempts for t in tallies)
    )
    yield CounterMetricFamily(
        "lockstep_restart_lost_seconds",
        f"Time that restarts cost the runs: until each had begun again, and for the steps done again{_SHARED}",
        value=sum(t.lost_seconds for t in tallies),
    )


def _dependencies(checks: Mapping[str, Seen]) -> Iterator[Metric]:
    up = GaugeMetricFamily("lockstep_dependency_up", "Whether it answers this replica now", labels=["dependency"])
    seconds = GaugeMetricFamily("lockstep_dependency_seconds", "Time of its answer", labels=["dependency"])
    for name, seen in checks.items():
        up.add_metric([name], float(not seen.trouble))
        seconds.add_metric([name], seen.seconds)
    yield from (up, seconds)
