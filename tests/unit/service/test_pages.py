"""Pages of jobs and events while both change: nothing is seen twice, and nothing that was always there is missed."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects import postgresql

from api.documents import now
from api.jobs import ENDED, JobState
from service.auth import Principal
from service.database import make_engine
from service.jobs import Jobs
from service.rows import JobFilter, JobRow, NewEvent
from service.store import Store, _conditions
from service.tables import metadata, projects
from tests.fakes import ACCEPTED, T0, FakeRay, MemoryBucket, job_id, row, settings_for, train_spec

WHO = Principal("key-1", "default")
ENTIRE_RUN = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = ("one", "two")
KEYS = ("a", "a.b", "a/b", "a-b", "0")
VALUES = ("", "x", "7", "null")


@pytest.fixture(scope="module")
def engine() -> Iterator[sa.Engine]:
    """A database in memory, which each example empties."""
    made = make_engine("sqlite://")
    metadata.create_all(made)
    with made.begin() as connection:
        connection.execute(projects.insert().values(name="default", created_at=T0))
    yield made
    made.dispose()


class World:
    """The use cases on an empty database, and what a reader should find there."""

    def __init__(self, engine: sa.Engine) -> None:
        with engine.begin() as connection:
            for table in reversed(metadata.sorted_tables):
                if table is not projects:
                    connection.execute(table.delete())
        self.store = Store(engine)
        self.use = Jobs(self.store, MemoryBucket(), FakeRay().backend(), settings_for(Path("nowhere")))
        self.there: dict[str, JobRow] = {}
        self.gone: set[str] = set()

    def insert(self, number: int, name: str, labels: dict[str, str], state: JobState) -> None:
        job = row(number, train_spec(name=name), labels=labels, state=state.value)
        if job.id not in self.there and job.id not in self.gone:
            self.store.insert(job, ACCEPTED, None)
            self.there[job.id] = job

    def change(self, index: int, state: JobState) -> None:
        """Give one of the live jobs another state."""
        live = [job for job in self.there.values() if JobState(job.state) not in ENDED]
        if live:
            changed = self.store.apply(live[index % len(live)], {"state": state.value})
            assert changed is not None
            self.there[changed.id] = changed

    def delete(self, index: int) -> None:
        if self.there:
            job = self.there.pop(list(self.there)[index % len(self.there)])
            self.gone.add(job.id)
            assert self.store.apply(job, {"deleted_at": now()}) is not None

    def matching(self, only: JobFilter) -> set[str]:
        return {job.id for job in self.there.values() if matches(job, only)}


def matches(job: JobRow, only: JobFilter) -> bool:
    return (
        (not only.states or job.state in only.states)
        and only.name in (None, job.name)
        and all(key in job.labels and value in (None, job.labels[key]) for key, value in only.labels)
    )


@dataclass
class Walk:
    """Somebody who turns page after page, and the jobs that were there for all of it."""

    only: JobFilter
    limit: int
    throughout: set[str] | None = None
    cursor: str | None = None
    done: bool = False
    seen: list[str] = field(default_factory=list)

    def turn(self, world: World) -> None:
        if self.done:
            return
        self.notice(world, begin=True)
        page = world.use.page(WHO, self.only, self.limit, self.cursor)
        ids = [job.id for job in page.items]
        assert len(ids) == self.limit or page.next_cursor is None
        assert len(ids) <= self.limit
        assert set(ids) <= world.matching(self.only)
        self.seen += ids
        self.cursor, self.done = page.next_cursor, page.next_cursor is None

    def notice(self, world: World, begin: bool = False) -> None:
        """Forget the jobs that do not match any more."""
        if begin and self.throughout is None:
            self.throughout = world.matching(self.only)
        elif self.throughout is not None and not self.done:
            self.throughout &= world.matching(self.only)


labels = st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES), max_size=3)
states = st.sampled_from(sorted(JobState))
filters = st.builds(
    JobFilter,
    states=st.lists(states, max_size=4),
    name=st.none() | st.sampled_from(NAMES),
    labels=st.lists(st.tuples(st.sampled_from(KEYS), st.none() | st.sampled_from(VALUES)), max_size=2),
)
walks = st.lists(st.builds(Walk, only=st.just(JobFilter()) | filters, limit=st.integers(1, 4)), min_size=1, max_size=3)
# Any id may come at any time: two jobs of one millisecond have random tails, and clocks step back.
inserts = st.tuples(st.just("insert"), st.integers(0, 40), st.sampled_from(NAMES), labels, states)
steps = st.lists(
    st.one_of(
        inserts,
        st.tuples(st.just("change"), st.integers(0, 40), states),
        st.tuples(st.just("delete"), st.integers(0, 40)),
        st.tuples(st.just("turn"), st.integers(0, 2)),
        st.tuples(st.just("turn"), st.integers(0, 2)),
    ),
    max_size=40,
)


@given(first=st.lists(inserts, max_size=12), steps=steps, walks=walks)
@ENTIRE_RUN
def test_a_walk_sees_what_was_there_throughout_exactly_once_and_newest_first(
    engine: sa.Engine,
    first: list[tuple[Any, ...]],
    steps: list[tuple[Any, ...]],
    walks: list[Walk],
) -> None:
    world = World(engine)
    for what, *arguments in [*first, *steps]:
        if what == "turn":
            walks[arguments[0] % len(walks)].turn(world)
        else:
            getattr(world, what)(*arguments)
        for walk in walks:
            walk.notice(world)
    for walk in walks:
        while not walk.done:
            walk.turn(world)
        assert walk.seen == sorted(set(walk.seen), reverse=True)
        assert walk.throughout is not None
        assert walk.throughout <= set(walk.seen)


@given(added=st.lists(st.integers(0, 4), max_size=20), limits=st.lists(st.integers(1, 5), min_size=1, max_size=3))
@ENTIRE_RUN
def test_pages_of_events_have_each_event_once_in_order_while_more_are_added(
    engine: sa.Engine, added: list[int], limits: list[int]
) -> None:
    world = World(engine)
    world.insert(1, "one", {}, JobState.RUNNING)
    job, after, written = world.there[job_id(1)], [0 for _ in limits], ["accepted"]
    seen: list[list[str]] = [[] for _ in limits]

    def read(reader: int) -> bool:
        page = world.use.events(WHO, job.id, after[reader], limits[reader])
        assert [event.seq for event in page.items] == [after[reader] + 1 + i for i in range(len(page.items))]
        seen[reader] += [event.message for event in page.items]
        after[reader] = int(page.next_cursor or after[reader])
        return bool(page.items)

    for round, count in enumerate(added):
        new = [NewEvent("note", f"{round}-{i}") for i in range(count)]
        changed = world.store.apply(job, {"message": "m"}, new)
        assert changed is not None
        job, written = changed, [*written, *(event.message for event in new)]
        read(round % len(limits))
    for reader in range(len(limits)):
        while read(reader):
            pass
        assert seen[reader] == written


@pytest.mark.parametrize("key", [*KEYS, "example.com/team-1", "x" * 63, "true", "a.b.c/d_e-f"])
def test_a_label_is_found_by_its_whole_key_and_value_and_nothing_like_it(engine: sa.Engine, key: str) -> None:
    world = World(engine)
    others = {"b": "x", "team": "x", f"{key}0"[-63:]: "x", key.replace(".", "-"): "y"}
    world.insert(1, "one", {key: "x"}, JobState.QUEUED)
    world.insert(2, "one", {key: ""}, JobState.QUEUED)
    world.insert(3, "one", {k: v for k, v in others.items() if k != key}, JobState.QUEUED)
    world.insert(4, "one", {}, JobState.QUEUED)

    def found(*wanted: tuple[str, str | None]) -> list[str]:
        return [job.id for job in world.use.page(WHO, JobFilter(labels=wanted), 9, None).items]

    assert found((key, "x")) == [job_id(1)]
    assert found((key, "")) == [job_id(2)]
    assert found((key, None)) == [job_id(2), job_id(1)]
    assert found((key, None), (key, "x")) == [job_id(1)]
    assert found((key, "x"), (key, "")) == []
    assert found((key, "X")) == []


def test_labels_are_bound_values_in_postgresql_too() -> None:
    """There is no PostgreSQL here: the SQL that it would get is looked at."""
    [present, equal] = _conditions(JobFilter(labels=[("a.b/c-d", None), ("e", "f")]))
    compiled = present.compile(dialect=postgresql.dialect())  # type: ignore[no-untyped-call]
    assert "jobs.labels ->> %(labels_1)s" in str(compiled)
    assert str(compiled).endswith("IS NOT NULL")
    assert compiled.params == {"labels_1": "a.b/c-d"}
    assert set(equal.compile(dialect=postgresql.dialect()).params.values()) == {"e", "f"}  # type: ignore[no-untyped-call]
