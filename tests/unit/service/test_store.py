"""The store on SQLite: nothing accepted twice, nothing stale written, no end ever left, events without gaps."""

import dataclasses
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.jobs import ENDED, JobState
from api.tenants import KeyRequest
from service.auth import authenticate, create_key
from service.database import make_engine
from service.rows import IdempotencyRecord, JobFilter, NewEvent
from service.store import Store
from service.tables import metadata, projects
from service.tenants import Tenants
from tests.databases import make_database
from tests.fakes import ACCEPTED, T0, job_id, new_store, row

pytestmark = pytest.mark.database

RECORD = IdempotencyRecord("key-1", "once", "a" * 64)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = new_store(tmp_path)
    yield made
    made._engine.dispose()


@pytest.fixture(scope="module")
def shared_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sa.Engine]:
    """One database for the property tests, which empty it themselves."""
    engine = make_engine(make_database(tmp_path_factory.mktemp("db")))
    yield engine
    engine.dispose()


def emptied(engine: sa.Engine) -> Store:
    with engine.begin() as connection:
        for table in reversed(metadata.sorted_tables):
            if table is not projects:
                connection.execute(table.delete())
    return Store(engine)


def seqs(store: Store, job: str) -> list[int]:
    return [event.seq for event in store.events(job, after=0, limit=10_000)]


def test_a_job_comes_back_as_it_was_inserted(store: Store) -> None:
    job = row(1, labels={"a": "b"}, warnings=["careful"], deleted_at=None, started_at=T0 + timedelta(microseconds=7))
    assert store.insert(job, ACCEPTED, None) is None
    assert store.get(job.id, "default") == job
    assert store.get(job.id, "another") is None
    assert store.get(job_id(2), "default") is None
    [event] = store.events(job.id, after=0, limit=10)
    assert (event.seq, event.type, event.message, event.state) == (1, "state", "accepted", JobState.QUEUED)


def test_the_same_key_gives_the_job_that_was_first(store: Store) -> None:
    assert store.insert(row(1), ACCEPTED, RECORD) is None
    replay = store.insert(row(2), ACCEPTED, dataclasses.replace(RECORD, body_sha256="b" * 64))
    assert replay is not None
    assert (replay.job.id, replay.body_sha256) == (job_id(1), "a" * 64)
    assert [job.id for job in store.live()] == [job_id(1)]
    assert seqs(store, job_id(2)) == []
    assert store.insert(row(3), ACCEPTED, dataclasses.replace(RECORD, principal="key-2")) is None
    assert store.replay("key-1", "another") is None


def test_a_duplicate_id_without_a_key_is_an_error(store: Store) -> None:
    store.insert(row(1), ACCEPTED, None)
    with pytest.raises(sa.exc.IntegrityError):
        store.insert(row(1), ACCEPTED, None)
    with pytest.raises(sa.exc.IntegrityError):
        store.insert(row(1), ACCEPTED, RECORD)
    assert seqs(store, job_id(1)) == [1]


def test_of_many_inserts_with_one_key_at_once_one_makes_a_job(store: Store) -> None:
    barrier = threading.Barrier(8)

    def insert(number: int) -> str | None:
        barrier.wait()
        replay = store.insert(row(number), ACCEPTED, RECORD)
        return replay.job.id if replay else None

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(insert, range(8)))
    [job] = store.live()
    assert answers.count(None) == 1
    assert set(answers) == {None, job.id}
    assert job.id == job_id(answers.index(None))


def test_a_stale_decision_changes_nothing(store: Store) -> None:
    store.insert(row(1), ACCEPTED, None)
    [stale] = store.live()
    fresh = store.apply(stale, {"message": "first"}, [NewEvent("note", "first")])
    assert fresh is not None
    assert (fresh.version, fresh.message) == (2, "first")
    assert store.apply(stale, {"message": "second"}, [NewEvent("note", "second")]) is None
    assert store.get(stale.id, "default") == fresh
    assert seqs(store, stale.id) == [1, 2]
    assert store.request_cancel(stale.id)
    assert store.apply(fresh, {"state": "running"}) is None


@pytest.mark.parametrize("ended", sorted(ENDED))
@pytest.mark.parametrize("target", ["running", "failed", "succeeded", "queued"])
def test_an_end_is_never_left_even_with_the_right_version(store: Store, ended: JobState, target: str) -> None:
    store.insert(row(1, state=ended.value), ACCEPTED, None)
    job = store.get(job_id(1), "default")
    assert job is not None
    assert store.apply(job, {"state": target}, [NewEvent("state", "no")]) is None
    assert not store.request_cancel(job.id)
    assert store.get(job.id, "default") == job
    assert seqs(store, job.id) == [1]
    assert store.apply(job, {"deleted_at": T0}) is not None


def test_a_failing_event_takes_the_change_back(store: Store) -> None:
    store.insert(row(1), ACCEPTED, None)
    [job] = store.live()
    with pytest.raises((sa.exc.StatementError, TypeError), match="not JSON serializable"):
        store.apply(job, {"message": "half"}, [NewEvent("note", "half", data={"no": object()})])
    assert store.live() == [job]


def test_what_a_database_would_refuse_is_kept_as_far_as_it_goes(store: Store) -> None:
    """The last words of a worker may hold anything; one odd byte or number must not stop the reconciler."""
    store.insert(row(1), ACCEPTED, None)
    [job] = store.live()
    odd = NewEvent("note", "a\x00b", data={"loss": float("nan"), "all": [float("inf"), {"x": 1.5}], "text": "\x00"})
    assert store.apply(job, {"message": "lost\x00"}, [odd]) is not None
    assert store.live()[0].message == "lost\ufffd"
    event = store.events(job.id, after=1, limit=1)[0]
    assert event.message == "a\ufffdb"
    assert event.data == {"loss": None, "all": [None, {"x": 1.5}], "text": "\x00"}


def test_cancel_is_asked_once_and_never_taken_back(store: Store) -> None:
    store.insert(row(1), ACCEPTED, None)
    assert store.request_cancel(job_id(1))
    first = store.live()
    assert store.request_cancel(job_id(1))
    assert store.live() == first
    assert first[0].cancel_requested == 1
    assert [event.type for event in store.events(job_id(1), after=1, limit=9)] == ["cancel"]
    assert store.apply(first[0], {"state": "starting"}) is not None
    assert store.live()[0].cancel_requested == 1


def test_events_have_no_gap_when_many_threads_write_them(store: Store) -> None:
    for number in (1, 2):
        store.insert(row(number), ACCEPTED, None)

    def write(number: int) -> int:
        wins = 0
        for _ in range(6):
            job = store.get(job_id(1 + number % 2), "default")
            assert job is not None
            wins += store.apply(job, {"message": "x"}, [NewEvent("a", "1"), NewEvent("b", "2")]) is not None
        return wins

    with ThreadPoolExecutor(4) as pool:
        wins = sum(pool.map(write, range(4)))
    lengths = [len(seqs(store, job_id(number))) for number in (1, 2)]
    for number, length in zip((1, 2), lengths, strict=True):
        assert seqs(store, job_id(number)) == list(range(1, length + 1))
    assert sum(lengths) == 2 + 2 * wins


def test_events_are_read_from_a_number_on(store: Store) -> None:
    store.insert(row(1), ACCEPTED, None)
    store.apply(store.live()[0], {}, [NewEvent("note", str(i)) for i in range(5)])
    assert [event.seq for event in store.events(job_id(1), after=2, limit=3)] == [3, 4, 5]
    assert store.events(job_id(1), after=6, limit=3) == []


def test_deleted_jobs_are_seen_only_by_the_purge(store: Store) -> None:
    store.insert(row(1, state="failed"), ACCEPTED, None)
    job = store.get(job_id(1), "default")
    assert job is not None
    buried = store.apply(job, {"deleted_at": T0})
    assert buried is not None
    assert store.get(job.id, "default") is None
    assert store.page("default", JobFilter(), limit=9) == []
    assert store.to_purge() == [buried]
    assert store.apply(buried, {"purged_at": T0}) is not None
    assert store.to_purge() == []


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(numbers=st.lists(st.integers(0, 50), unique=True, max_size=12), limit=st.integers(1, 5), data=st.data())
def test_pages_show_every_job_once_while_newer_ones_arrive(
    shared_engine: sa.Engine, numbers: list[int], limit: int, data: st.DataObject
) -> None:
    store = emptied(shared_engine)
    for number in numbers:
        store.insert(row(number), ACCEPTED, None)
    seen: list[str] = []
    newest = 100
    while len(seen) <= len(numbers):
        page = store.page("default", JobFilter(), limit=limit, before=seen[-1] if seen else None)
        assert len(page) <= limit
        seen += [job.id for job in page]
        if len(page) < limit:
            break
        for _ in range(data.draw(st.integers(0, 2))):
            newest += 1
            store.insert(row(newest), ACCEPTED, None)
    assert seen == [job_id(number) for number in sorted(numbers, reverse=True)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(jobs=st.lists(st.tuples(st.integers(0, 99), st.sampled_from(list(JobState))), unique_by=lambda j: j[0]))
def test_live_jobs_come_oldest_first(shared_engine: sa.Engine, jobs: list[tuple[int, JobState]]) -> None:
    store = emptied(shared_engine)
    for number, state in jobs:
        store.insert(row(number, state=state.value), ACCEPTED, None)
    assert [job.id for job in store.live()] == [job_id(n) for n, state in sorted(jobs) if not state.ended]


def test_a_page_holds_only_what_was_asked_for(store: Store) -> None:
    store.insert(row(1, state="failed"), ACCEPTED, None)
    store.insert(row(2, name="other"), ACCEPTED, None)
    store.insert(row(3, project="another"), ACCEPTED, None)
    assert [job.id for job in store.page("default", JobFilter([JobState.FAILED]), limit=9)] == [job_id(1)]
    assert [job.id for job in store.page("default", JobFilter(name="other"), limit=9)] == [job_id(2)]
    assert [job.id for job in store.page("another", JobFilter(), limit=9)] == [job_id(3)]


@pytest.mark.parametrize("zone", [UTC, timezone(timedelta(hours=5, minutes=30)), timezone(timedelta(hours=-9))])
def test_times_come_back_as_the_same_instant_in_utc(store: Store, zone: timezone) -> None:
    at = datetime(2026, 3, 29, 2, 30, 0, 123456, tzinfo=zone)
    store.insert(row(1, state_since=at), NewEvent("state", "x", at=at), None)
    [job] = store.live()
    assert job.state_since == at
    assert job.state_since.tzinfo is UTC
    assert store.events(job.id, after=0, limit=1)[0].at == at


def test_a_key_is_stored_as_a_hash_alone(tmp_path: Path, store: Store) -> None:
    tenants = Tenants(store._engine)
    made = create_key(tenants, KeyRequest(name="laptop"))
    key_id, key = made.id, made.key
    assert len(key) >= 43
    assert authenticate(tenants, f"Bearer {key}").key_id == key_id
    assert authenticate(tenants, f"bearer  {key} ").project == "default"
    for file in tmp_path.iterdir():
        assert key.encode() not in file.read_bytes()
        assert key.split("_", 2)[2].encode() not in file.read_bytes()
    every = tenants.keys()
    assert key not in str(every)
    assert [(project, entry.id) for project, entry in every] == [("default", key_id)]
    assert tenants.find_key("0" * 64) is None


def test_whatever_users_ask_makes_a_decision_of_before_stale(store: Store) -> None:
    store.insert(row(1, state="running"), ACCEPTED, None)
    asks: list[Callable[[], bool]] = [
        lambda: store.request_pause(job_id(1)),
        lambda: store.request_resume(job_id(1), 2, T0),
        lambda: store.request_cancel(job_id(1), keep_checkpoint=True),
    ]
    for ask in asks:
        [stale] = store.live()
        assert ask()
        assert store.apply(stale, {"state": "failed"}, [NewEvent("state", "no")]) is None
    [job] = store.live()
    assert (job.state, job.pause_requested, job.workers_wanted, job.cancel_requested) == ("running", 0, 2, 1)
    assert (job.keep_checkpoint, job.queued_at) == (1, T0)
    kinds = [event.type for event in store.events(job_id(1), after=1, limit=9)]
    assert kinds == ["pause", "resume", "cancel"]
    assert not store.request_pause(job_id(1))
    assert not store.request_resume(job_id(1), None, T0)
    assert store.live() == [job]


@pytest.mark.parametrize(("more", "seconds"), [("", 5), ("?connect_timeout=60&options=-cwork_mem%3D8MB", 60)])
def test_a_postgresql_whose_machine_is_gone_is_noticed_within_half_a_minute(more: str, seconds: int) -> None:
    """By the system's defaults it takes a quarter of an hour for who asks, and two hours for who waits."""
    asked: dict[str, Any] = {}

    def connect(_: object, __: object, ___: object, parameters: dict[str, Any]) -> None:
        asked.update(parameters)
        raise sqlite3.OperationalError("enough is known")

    engine = make_engine(f"postgresql://lockstep@host/name{more}")
    sa.event.listen(engine, "do_connect", connect)
    with pytest.raises(sqlite3.OperationalError):
        engine.connect()
    assert int(asked["connect_timeout"]) == seconds
    assert asked["keepalives_idle"] + asked["keepalives_interval"] * asked["keepalives_count"] <= 30
    assert asked["tcp_user_timeout"] <= 30_000
    assert "statement_timeout=30s" in asked["options"]
    assert ("work_mem=8MB" in asked["options"]) == bool(more)
