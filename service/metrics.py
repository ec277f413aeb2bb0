"""The control plane's own figures for Prometheus, on a port of their own.

Each application has a registry of its own. What the database knows is looked up at each scrape (service/lookups.py);
only what happens in this process (requests, passes, streams) is counted here, so of several replicas these are to be
added up. No label takes a value that a caller chooses: a path that no route knows counts as none.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

from api.errors import LockstepError
from api.jobs import Reason
from service.health import Seen
from service.lookups import Lookups
from service.reasons import REASONS
from service.sse import Streams
from service.store import Store

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
UNKNOWN = "unknown"
Clock = Callable[[], float]
_PASS_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Measures:
    """What is counted, and what is looked up at each scrape."""

    def __init__(self, store: Store, dependencies: Callable[[], Mapping[str, Seen]]) -> None:
        """`dependencies` looks at each; it must not take long."""
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
        self._lost = Counter("lockstep_attempts_lost", "Attempts given up", ("reason",), registry=self.registry)
        for reason, meaning in REASONS.items():
            if meaning.retryable:
                self._lost.labels(reason.value)  # from the first scrape on: a rate needs a beginning
        self.reconciled = Passes("reconcile", "of the reconciler over all live jobs", self.registry)
        self.retained = Passes("retention", "of retention over all jobs whose checkpoints it looks at", self.registry)
        self.registry.register(Lookups(store, dependencies))
        ProcessCollector(registry=self.registry)

    def note_request(self, method: str, route: str, status: int, seconds: float) -> None:
        method = method if method in METHODS else UNKNOWN
        self._requests.labels(method, route, str(status)).inc()
        self._request_seconds.labels(method, route).observe(seconds)

    def note_lost(self, reason: Reason) -> None:
        """Count an attempt that is given up; another one follows."""
        self._lost.labels(reason.value).inc()

    def watch_streams(self, streams: Streams) -> None:
        """Tell at each scrape how many live streams are open."""
        Gauge("lockstep_streams_open", "Live streams", registry=self.registry).set_function(lambda: streams.open)
        Gauge("lockstep_streams_limit", "Most of them at once", registry=self.registry).set(streams.limit)

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


class Passes:
    """The passes of a loop that goes on for ever: how long they take, and when one was last complete."""

    def __init__(self, name: str, what: str, registry: CollectorRegistry, clock: Clock = time.monotonic) -> None:
        self._clock, self._ended = clock, clock()
        self._seconds = Histogram(
            f"lockstep_{name}_seconds", f"Time of one pass {what}", buckets=_PASS_SECONDS, registry=registry
        )
        lag = Gauge(f"lockstep_{name}_lag_seconds", f"Since the end of the newest pass {what}", registry=registry)
        lag.set_function(lambda: clock() - self._ended)

    def note(self, seconds: float) -> None:
        """Count a complete pass. One that an error ends is none, so the lag shows it."""
        self._seconds.observe(seconds)
        self._ended = self._clock()


class MetricsPortBusy(LockstepError):
    """The port for metrics is taken, or not ours to take."""
