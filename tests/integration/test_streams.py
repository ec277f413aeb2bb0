"""Live streams over real connections: the control plane goes away in their middle, and nobody loses a line."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest

from api.client import Client
from api.errors import InvalidData, Unauthorized, Unreachable
from api.jobs import Event, LogLine, MetricPoint, Rewind
from api.storage import Bucket
from service.audit import OPERATOR
from service.rows import NewEvent
from service.settings import Settings
from service.store import Store
from tests.fakes import ACCEPTED, job_id, row
from tests.integration.served import serving, until
from tests.servers import free_port
from tests.unit.service.test_run_reader import Writer

KEY = "lk_streams_of_a_test"
JOB = job_id(1)


@pytest.fixture
def settings(storage: str, tmp_path: Path) -> Settings:
    (tmp_path / "key").write_text(KEY)
    return Settings(
        port=free_port(),
        database_url=f"sqlite:///{tmp_path / 'lockstep.db'}",
        storage=storage,
        ray_address=f"http://127.0.0.1:{free_port()}",
        bootstrap_key_path=tmp_path / "key",
        live_interval=0.05,
    )


class Reader(threading.Thread):
    """Reads a stream to its end, as a client does."""

    def __init__(self, items: Iterator[Event | LogLine | MetricPoint | Rewind]) -> None:
        super().__init__(daemon=True)
        self._items = items
        self.had: list[Event | LogLine | MetricPoint] = []
        self.rewinds = 0
        self.start()

    def run(self) -> None:
        for item in self._items:
            if isinstance(item, Rewind):
                self.rewinds += 1
                self.had = [point for point in self.had if isinstance(point, MetricPoint) and point.step <= item.step]
            else:
                self.had.append(item)


def note(store: Store, changes: dict[str, Any], *messages: str) -> None:
    """Change the job's row, whatever the reconciler does to it at the same time."""

    def applied() -> bool:
        job = store.get(JOB, "default")
        return job is not None and store.apply(job, changes, [NewEvent("note", text) for text in messages]) is not None

    until(applied)


def test_streams_outlive_a_restart_of_the_control_plane(settings: Settings, storage: str) -> None:
    bucket = Bucket(storage)
    with Client(f"http://{settings.host}:{settings.port}", KEY) as client:
        with serving(settings) as app:
            app.state.store.insert(row(1, state="running", attempt=1), ACCEPTED, None)
            first = Writer(bucket, "1-0-a")
            for step in range(1, 6):
                first.metrics(step, loss=float(step))
                first.log(step % 2, f"step {step}")
            events, metrics, logs = readers = (
                Reader(client.stream_events(JOB)),
                Reader(client.stream_metrics(JOB)),
                Reader(client.stream_logs(JOB)),
            )
            until(lambda: len(events.had) and len(metrics.had) == len(logs.had) == 5)
        second = Writer(bucket, "1-1-b", ("1-0-a", 3))
        first.log(0, "a last word")
        for step in range(4, 9):
            second.metrics(step, loss=-float(step))
            second.log(0, f"step {step}")
        with serving(settings) as app:
            until(lambda: len(metrics.had) == 8)
            end = {"segment": "1-1-b", "step": 7}
            note(app.state.store, {"state": "succeeded", "reason": "completed", "history_end": end}, "one", "two")
            for reader in readers:
                reader.join(20)
                assert not reader.is_alive()
            assert events.had == client.events(JOB).items
            assert metrics.had == client.metrics(JOB).items
            assert [point.step for point in client.metrics(JOB).items] == list(range(1, 8))
            assert metrics.rewinds == 2
            listed = client.logs(JOB).items
            assert len(logs.had) == len(listed) == 11
            assert {line.model_dump_json() for line in logs.had} == {line.model_dump_json() for line in listed}


def test_a_stream_waits_for_a_store_that_is_away(
    settings: Settings, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(settings) as app, Client(f"http://{settings.host}:{settings.port}", KEY) as client:
        app.state.store.insert(row(1, state="running", attempt=1), ACCEPTED, None)
        writer = Writer(Bucket(storage), "1-0-a")
        writer.log(0, "before")
        logs = Reader(client.stream_logs(JOB))
        until(lambda: len(logs.had) == 1)
        good = app.state.bucket._client
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")
        app.state.bucket._client = Bucket(storage)._client
        writer.log(0, "meanwhile")
        time.sleep(0.3)
        assert len(logs.had) == 1
        app.state.bucket._client = good
        until(lambda: len(logs.had) == 2)
        note(app.state.store, {"state": "cancelled"})
        logs.join(20)
        assert not logs.is_alive()


def test_a_damaged_line_ends_a_stream_instead_of_holding_it_for_ever(settings: Settings, storage: str) -> None:
    bucket = Bucket(storage)
    with serving(settings) as app, Client(f"http://{settings.host}:{settings.port}", KEY) as client:
        app.state.store.insert(row(1, state="failed", attempt=1), ACCEPTED, None)
        writer = Writer(bucket, "1-0-a")
        writer.metrics(1, loss=1.0)
        bucket.put(f"{writer.layout.stream}000000.jsonl", b"{not ours}\n")
        with pytest.raises(InvalidData, match="line 0 of the stream of segment 1-0-a"):
            list(client.stream_metrics(JOB))


def test_a_stream_that_was_left_makes_room_for_another(settings: Settings) -> None:
    one = settings.model_copy(update={"live_streams": 1})
    with serving(one) as app, Client(f"http://{settings.host}:{settings.port}", KEY) as client:
        app.state.store.insert(row(1, state="running", attempt=1), ACCEPTED, None)
        first = client.stream_events(JOB)
        assert next(first).message == "accepted"
        with pytest.raises(Unreachable, match="at once, 1, are open"):
            next(client.stream_events(JOB, patience=0))
        first.close()
        assert next(client.stream_events(JOB, patience=10)).message == "accepted"


def test_a_key_that_is_revoked_ends_the_stream_and_opens_no_other(settings: Settings) -> None:
    with serving(settings) as app, Client(f"http://{settings.host}:{settings.port}", KEY) as client:
        app.state.store.insert(row(1, state="running", attempt=1), ACCEPTED, None)
        stream = client.stream_events(JOB)
        assert next(stream).message == "accepted"
        [(_, key)] = app.state.tenants.keys()
        app.state.tenants.revoke_key(key.id, OPERATOR)
        with pytest.raises(Unauthorized):
            list(stream)


def test_connections_beyond_the_most_are_told_to_come_back(settings: Settings) -> None:
    two = settings.model_copy(update={"connections": 2})
    with serving(two), ExitStack() as held, httpx2.Client(base_url=f"http://{settings.host}:{settings.port}") as third:
        clients = [held.enter_context(Client(str(third.base_url), KEY)) for _ in range(2)]
        assert [client.list().items for client in clients] == [[], []]
        assert third.get("/healthz").status_code == 503
        held.close()
        until(lambda: third.get("/healthz").status_code == 200)
