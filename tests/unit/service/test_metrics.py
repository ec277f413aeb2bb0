"""What Prometheus gets from the control plane: true of the database, and bounded whatever callers send."""

import asyncio
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.exc import OperationalError

from api.documents import now
from api.jobs import JobState
from api.tenants import KeyRequest, Role
from service import app as app_module
from service.auth import create_key
from service.metrics import Measures, MetricsPortBusy, Passes
from service.processes import is_free
from service.reconciler import Reconciler
from service.retention import Retention
from service.server import Server
from service.sse import Streams
from service.store import Store
from service.tenants import Tenants
from tests.databases import on_postgres
from tests.fakes import ACCEPTED, FakeRay, MemoryBucket, job_id, new_store, row, settings_for
from tests.servers import free_port

pytestmark = pytest.mark.database

AUTH = {"Authorization": "Bearer lk_test"}


class Service:
    """The application on a bucket and a Ray in memory, and its figures."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.bucket, self.ray = MemoryBucket(), FakeRay()
        patch.setattr(app_module, "Bucket", lambda *_: self.bucket)
        patch.setattr(app_module, "RayBackend", lambda *_: self.ray.backend())
        patch.setattr(app_module, "Reconciler", self._reconciler)
        patch.setattr(app_module, "Retention", self._retention)
        new_store(folder)._engine.dispose()
        self.app: FastAPI = app_module.create_app(settings_for(folder))
        self.store: Store = self.app.state.store
        create_key(Tenants(self.store._engine), KeyRequest(name="test", role=Role.ADMIN), key="lk_test")
        self.client = TestClient(self.app, headers=AUTH, raise_server_exceptions=False)

    def _reconciler(self, *arguments: Any) -> Reconciler:
        self.reconciler = Reconciler(*arguments)
        return self.reconciler

    def _retention(self, *arguments: Any) -> Retention:
        self.retention = Retention(*arguments)
        return self.retention

    @property
    def measures(self) -> Measures:
        measures: Measures = self.app.state.measures
        return measures

    def figures(self, name: str) -> dict[tuple[str, ...], float]:
        """Scrape; return the samples of a series by the values of their labels, in the order of the labels' names."""
        families = text_string_to_metric_families(generate_latest(self.measures.registry).decode())
        return {
            tuple(value for _, value in sorted(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
            if sample.name == name
        }

    def figure(self, name: str, *labels: str) -> float:
        return self.figures(name)[labels]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Service]]:
    made: list[Service] = []

    def service(name: str) -> Service:
        (tmp_path / name).mkdir()
        made.append(Service(tmp_path / name, monkeypatch))
        return made[-1]

    yield service
    for one in made:
        one.store._engine.dispose()


@pytest.fixture
def service(make: Callable[[str], Service]) -> Service:
    return make("one")


def test_jobs_by_state_are_those_of_the_database_at_each_scrape(service: Service) -> None:
    assert service.figures("lockstep_jobs") == {(state.value,): 0 for state in JobState}
    for number, state in enumerate(["queued", "running", "running", "failed"]):
        service.store.insert(row(number, state=state), ACCEPTED, None)
    counts = service.figures("lockstep_jobs")
    assert {state: count for (state,), count in counts.items() if count} == {"queued": 1, "running": 2, "failed": 1}

    job = service.store.get(job_id(1), "default")
    assert job is not None
    service.store.apply(job, {"state": "succeeded"})
    service.client.delete(f"/v1/jobs/{job_id(3)}").raise_for_status()
    counts = service.figures("lockstep_jobs")
    assert {state: count for (state,), count in counts.items() if count} == {"queued": 1, "running": 1, "succeeded": 1}


def test_the_age_of_the_queue_is_that_of_its_oldest_job(service: Service) -> None:
    assert service.figure("lockstep_queue_oldest_seconds") == 0
    for number, minutes, state in ((1, 90, "running"), (2, 3, "queued"), (3, 10, "queued")):
        created = now() - timedelta(minutes=minutes)
        service.store.insert(row(number, state=state, created_at=created), ACCEPTED, None)
    assert 600 <= service.figure("lockstep_queue_oldest_seconds") < 660
    resumed = now() - timedelta(minutes=1)
    service.store.insert(row(4, created_at=now() - timedelta(days=1), queued_at=resumed), ACCEPTED, None)
    assert 600 <= service.figure("lockstep_queue_oldest_seconds") < 660, "who was resumed is at the end of the line"


def test_a_request_is_counted_by_the_template_of_its_route_with_its_time(service: Service) -> None:
    service.store.insert(row(1), ACCEPTED, None)
    for number in (1, 1, 2):
        service.client.get(f"/v1/jobs/{job_id(number)}")
    service.client.post("/v1/jobs", content=b"{")
    assert service.figures("lockstep_http_requests_total") == {
        ("GET", "/v1/jobs/{job_id}", "200"): 2,
        ("GET", "/v1/jobs/{job_id}", "404"): 1,
        ("POST", "/v1/jobs", "400"): 1,
    }
    assert service.figure("lockstep_http_request_seconds_count", "GET", "/v1/jobs/{job_id}") == 3
    assert 0 < service.figure("lockstep_http_request_seconds_sum", "GET", "/v1/jobs/{job_id}") < 10


def test_nothing_that_a_caller_chooses_becomes_a_label(service: Service) -> None:
    for word in ("a", "b", "c"):
        service.client.get(f"/{word}")
        service.client.get(f"/v1/jobs/{word}/{word}")
        service.client.request(f"X{word}", "/v1/jobs")
    labels = {value for labels in service.figures("lockstep_http_requests_total") for value in labels}
    assert labels == {"GET", "unknown", "/v1/jobs", "404", "405"}
    assert service.figure("lockstep_http_requests_total", "GET", "unknown", "404") == 6


def test_a_bug_counts_as_the_500_that_the_caller_gets(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.store, "page", lambda *_, **__: 1 / 0)
    assert service.client.get("/v1/jobs").status_code == 500
    assert service.figure("lockstep_http_requests_total", "GET", "/v1/jobs", "500") == 1


def test_what_does_not_answer_is_told_and_hides_nothing_else(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.health._FRESH", 0.0)
    assert service.figures("lockstep_dependency_up") == {("bucket",): 1, ("database",): 1, ("ray",): 1}
    service.bucket.reachable = False
    assert service.figures("lockstep_dependency_up") == {("bucket",): 0, ("database",): 1, ("ray",): 1}
    assert service.figure("lockstep_jobs", "queued") == 0


def test_without_the_database_there_is_no_count_of_jobs_rather_than_a_wrong_one(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OperationalError("select", {}, Exception("gone"))

    monkeypatch.setattr(service.store, "ping", fail)
    monkeypatch.setattr(service.store._engine, "begin", fail)
    assert service.figures("lockstep_jobs") == {}
    assert service.figure("lockstep_dependency_up", "database") == 0


def test_a_pass_of_the_reconciler_is_counted_when_it_is_complete(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_once(then: Callable[[], object]) -> float:
        """Let the reconciler make one pass; return how many have been counted."""
        monkeypatch.setattr(service.reconciler.loop, "_call", then)
        with suppress(OperationalError):
            service.reconciler.loop.run_once()
        return service.figure("lockstep_reconcile_seconds_count")

    def fail() -> None:
        raise OperationalError("select", {}, Exception("gone"))

    assert run_once(fail) == 0
    assert run_once(lambda: None) == 1
    assert run_once(fail) == 1
    assert run_once(service.reconciler.loop.stop) == 1  # what a stop has cut short is not complete


def test_the_lag_of_a_loop_rises_until_a_pass_ends() -> None:
    time, registry = [100.0], CollectorRegistry()
    passes = Passes("looking", "over all", registry, clock=lambda: time[0])

    def lag(later: float) -> float | None:
        time[0] += later
        return registry.get_sample_value("lockstep_looking_lag_seconds")

    assert lag(7) == 7, "since the process began"
    passes.note(0.5)
    assert (lag(0), lag(3), lag(60)) == (0, 3, 63)


def test_the_passes_of_both_loops_are_counted(service: Service) -> None:
    for name in ("reconcile", "retention"):
        assert service.figure(f"lockstep_{name}_seconds_count") == 0
        assert 0 <= service.figure(f"lockstep_{name}_lag_seconds") < 60
    service.retention.loop.run_once()
    assert service.figure("lockstep_retention_seconds_count") == 1
    assert service.figure("lockstep_reconcile_seconds_count") == 0


def test_ended_jobs_are_counted_by_state_and_reason_and_stay_counted_when_they_are_deleted(service: Service) -> None:
    ends = service.figures("lockstep_jobs_ended_total")
    assert set(ends.values()) == {0}
    assert {("completed", "succeeded"), ("user_cancelled", "cancelled"), ("out_of_memory", "failed")} <= ends.keys()
    assert not any("hung" in pair or "user_paused" in pair for pair in ends), "what ends no job"
    fates = (("failed", "out_of_memory"), ("failed", "out_of_memory"), ("succeeded", "completed"), ("running", None))
    for number, (state, reason) in enumerate(fates):
        service.store.insert(row(number, state=state, reason=reason), ACCEPTED, None)
    service.client.delete(f"/v1/jobs/{job_id(0)}").raise_for_status()
    ends = service.figures("lockstep_jobs_ended_total")
    assert {pair: count for pair, count in ends.items() if count} == {
        ("out_of_memory", "failed"): 2,
        ("completed", "succeeded"): 1,
    }


def test_attempts_and_the_time_that_restarts_cost_are_those_of_all_jobs_ever(service: Service) -> None:
    assert service.figure("lockstep_attempts_total") == service.figure("lockstep_restart_lost_seconds_total") == 0
    for number, (state, attempt, lost) in enumerate((("running", 3, 1.5), ("failed", 2, 40.0), ("queued", 0, 0.0))):
        service.store.insert(row(number, state=state, attempt=attempt, lost_seconds=lost), ACCEPTED, None)
    service.client.delete(f"/v1/jobs/{job_id(1)}").raise_for_status()
    assert service.figure("lockstep_attempts_total") == 5
    assert service.figure("lockstep_restart_lost_seconds_total") == 41.5


def test_what_is_the_same_on_every_replica_says_so(service: Service) -> None:
    families = text_string_to_metric_families(generate_latest(service.measures.registry).decode())
    shared = {family.name for family in families if "take max(), not sum()" in family.documentation}
    assert shared == {
        "lockstep_jobs",
        "lockstep_jobs_ended",
        "lockstep_queue_oldest_seconds",
        "lockstep_attempts",
        "lockstep_restart_lost_seconds",
    }


@pytest.mark.skipif(on_postgres(), reason="the words are SQLite's")
def test_a_scrape_reads_an_index_and_not_the_jobs(service: Service) -> None:
    asked: list[tuple[str, Any]] = []

    def note(*call: Any) -> None:
        asked.append((call[2], call[3]))

    engine = service.store._engine
    sa.event.listen(engine, "before_cursor_execute", note)
    service.store.tallies()
    sa.event.remove(engine, "before_cursor_execute", note)
    statement, parameters = asked[-1]  # after its BEGIN
    with engine.begin() as connection:
        plan = str(connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all())
    assert "USING COVERING INDEX jobs_in_figures" in plan


def test_the_page_names_every_metric(service: Service) -> None:
    page = (Path(__file__).parents[3] / "docs/monitoring.md").read_text()
    families = text_string_to_metric_families(generate_latest(service.measures.registry).decode())
    names = {f"{f.name}_total" if f.type == "counter" else f.name for f in families if not f.name.endswith("_created")}
    assert len(names) > 15
    assert [name for name in names if not name.startswith("process_") and f"`{name}`" not in page] == []


def test_attempts_that_are_given_up_are_counted_by_reason(service: Service) -> None:
    lost = service.figures("lockstep_attempts_lost_total")
    assert ("worker_lost",) in lost
    assert ("completed",) not in lost
    assert set(lost.values()) == {0}
    service.store.insert(row(1, state="running", attempt=1, ray_session="gone"), ACCEPTED, None)
    service.reconciler.reconcile_all()
    assert service.store.live()[0].state == "recovering"
    assert service.figure("lockstep_attempts_lost_total", "ray_lost") == 1


def test_open_streams_are_counted_while_they_are_open(service: Service) -> None:
    streams: Streams = service.app.state.streams

    async def hold() -> float:
        with streams._place("key-1", "default"):
            return service.figure("lockstep_streams_open")

    assert asyncio.run(hold()) == 1
    assert service.figure("lockstep_streams_open") == 0
    assert service.figure("lockstep_streams_limit") == streams.limit


def test_each_application_counts_for_itself(make: Callable[[str], Service]) -> None:
    one, other = make("one"), make("other")
    one.client.get("/v1/jobs")
    assert one.figure("lockstep_http_requests_total", "GET", "/v1/jobs", "200") == 1
    assert other.figures("lockstep_http_requests_total") == {}


def test_the_figures_have_a_port_of_their_own_and_are_not_on_the_api(service: Service) -> None:
    port = free_port()
    with service.measures.served("127.0.0.1", port):
        assert b"lockstep_jobs{" in scrape(port)
    with pytest.raises(OSError, match="refused"):
        scrape(port)
    assert service.client.get("/metrics").status_code == 404


def test_the_port_opens_with_the_server_and_closes_before_what_a_scrape_looks_at(
    service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    port = free_port()
    ray, closed = service.app.state.ray, []
    monkeypatch.setattr(ray, "close", lambda: closed.append(is_free(port)))
    server = Server(service.app, settings_for(tmp_path, port=free_port(), metrics_port=port), log_level="error")
    found: list[bytes] = []

    async def look_and_leave() -> None:
        found.append(await asyncio.to_thread(scrape, port))
        server.should_exit = True

    server.main_loop = look_and_leave  # type: ignore[method-assign]
    server.run()
    assert b"lockstep_reconcile_seconds_count" in found[0]
    assert closed == [True]


def test_a_busy_port_is_an_error_that_names_it_and_the_setting(service: Service) -> None:
    port = free_port()
    with (
        service.measures.served("127.0.0.1", port),
        pytest.raises(MetricsPortBusy, match=rf"127\.0\.0\.1:{port}: .*LOCKSTEP_METRICS_PORT"),
        service.measures.served("127.0.0.1", port),
    ):
        pass


def scrape(port: int) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    body: bytes = opener.open(f"http://127.0.0.1:{port}/metrics", timeout=5).read()
    return body
