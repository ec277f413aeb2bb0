"""The control plane's own figures for Prometheus, on a port of their own.

Each application has a registry of its own. What the database knows (jobs by state) is read from it at each scrape, so
it is true also after a restart; only what happens in this process (requests, passes) is counted here. No label takes a
value that a caller chooses: a path that no route knows counts as none.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.documents import now
from api.errors import LockstepError
from api.jobs import Check, JobState
from service.store import Store

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_UNKNOWN = "unknown"
_PASS_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Measures:
    """What is counted, and what is looked up at each scrape."""

    def __init__(self, store: Store, dependencies: Callable[[], Mapping[str, Check]]) -> None:
        """`dependencies` looks at each now; it must not take long."""
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "lockstep_http_requests", "Requests answered", ("method", "route", "status"), registry=self.registry
        )
        self._request_seconds = Histogram(
            "lockstep_http_request_seconds",
            "Time from a request to the beginning of its answer",
            ("method", "route"),
            registry=self.registry,
        )
        self._pass_seconds = Histogram(
            "lockstep_reconcile_seconds",
            "Time of one pass of the reconciler over all live jobs",
            buckets=_PASS_SECONDS,
            registry=self.registry,
        )
        self._passed_at = Gauge(
            "lockstep_reconcile_timestamp_seconds", "When the newest complete pass ended", registry=self.registry
        )
        self.registry.register(_Lookups(store, dependencies))
        ProcessCollector(registry=self.registry)

    def note_request(self, method: str, route: str, status: int, seconds: float) -> None:
        method = method if method in _METHODS else _UNKNOWN
        self._requests.labels(method, route, str(status)).inc()
        self._request_seconds.labels(method, route).observe(seconds)

    def note_pass(self, seconds: float) -> None:
        """Count a complete pass of the reconciler. One that an error ends is none, so the lag shows it."""
        self._pass_seconds.observe(seconds)
        self._passed_at.set_to_current_time()

    @contextmanager
    def served(self, host: str, port: int) -> Iterator[None]:
        """Answer scrapes at /metrics until the block ends; MetricsPortBusy if the port cannot be had."""
        try:
            server, thread = start_http_server(port, host, self.registry)
        except OSError as error:
            raise MetricsPortBusy(
                f"Metrics cannot be served at {host}:{port}: {error.strerror}; choose another LOCKSTEP_METRICS_PORT."
            ) from error
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class MetricsPortBusy(LockstepError):
    """The port for metrics is taken, or not ours to take."""


class _Lookups(Collector):
    """What each scrape asks the database and the dependencies."""

    def __init__(self, store: Store, dependencies: Callable[[], Mapping[str, Check]]) -> None:
        self._store, self._dependencies = store, dependencies

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield from self._jobs()
        up = GaugeMetricFamily("lockstep_dependency_up", "Whether it answers now", labels=["dependency"])
        seconds = GaugeMetricFamily("lockstep_dependency_seconds", "Time of its answer", labels=["dependency"])
        for name, check in self._dependencies().items():
            up.add_metric([name], float(check.status == "ok"))
            seconds.add_metric([name], check.milliseconds / 1e3)
        yield from (up, seconds)

    def _jobs(self) -> Iterator[GaugeMetricFamily]:
        """Nothing while the database does not answer: no figure is better than an old one."""
        try:
            found = self._store.counts()
        except SQLAlchemyError:
            return
        counts = GaugeMetricFamily("lockstep_jobs", "Jobs that are not deleted", labels=["state"])
        for state in JobState:
            counts.add_metric([state.value], found.get(state, (0, None))[0])
        yield counts
        _, oldest = found.get(JobState.QUEUED, (0, None))
        yield GaugeMetricFamily(
            "lockstep_queue_oldest_seconds",
            "Age of the job that has been queued for longest; 0 if none is",
            value=(now() - oldest).total_seconds() if oldest is not None else 0.0,
        )


class Watched:
    """The layer around the application that notes each request by its route's template, method and status."""

    def __init__(self, app: ASGIApp, measures: Measures) -> None:
        self._app, self._measures = app, measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", _UNKNOWN)
                seconds = time.perf_counter() - began
                self._measures.note_request(scope["method"], route, message["status"], seconds)
            await send(message)

        await self._app(scope, receive, noting)
