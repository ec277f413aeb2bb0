"""Leases on a real PostgreSQL: two control planes share the work, and what one leaves the other takes."""

import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import pytest
import sqlalchemy as sa

from service.database import make_engine, migrate
from service.leases import Leases
from service.tables import leases as table
from tests.faults.waiting import wait_until
from tests.postgres import postgres

JOBS = {f"job-{number}" for number in range(7)}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture
def engine(url: str) -> Iterator[sa.Engine]:
    migrate(url)
    engine = make_engine(url)
    yield engine
    with engine.begin() as connection:
        connection.execute(table.delete())
    engine.dispose()


def test_two_control_planes_share_the_jobs_between_them(engine: sa.Engine) -> None:
    one, other = Leases(engine, 60), Leases(engine, 60)
    assert one.share(JOBS) == JOBS, "alone it has everything"
    assert other.share(JOBS) == set(), "what one holds nobody else takes"
    assert len(one.share(JOBS)) == 4, "what is beyond its share it lets go"
    assert len(other.share(JOBS)) == 3
    assert one.share(JOBS) | other.share(JOBS) == JOBS
    assert not one.share(JOBS) & other.share(JOBS)


def test_jobs_that_have_ended_are_let_go(engine: sa.Engine) -> None:
    one, other = Leases(engine, 60), Leases(engine, 60)
    one.share(JOBS)
    assert one.share({"job-1"}) == {"job-1"}
    assert other.share(JOBS) == JOBS - {"job-1"} - max_of(JOBS - {"job-1"}, 2)


def max_of(names: set[str], count: int) -> set[str]:
    """Return the last of the names: what is beyond the share of four of seven."""
    return set(sorted(names)[-count:])


def test_who_ends_leaves_its_work_at_once_and_who_dies_after_the_term(engine: sa.Engine) -> None:
    one, other, dead = Leases(engine, 60), Leases(engine, 60), Leases(engine, 0.05)
    one.share(JOBS)
    assert one.hold("retention")
    assert not other.hold("retention")
    one.release()
    assert other.hold("retention")
    assert other.share(JOBS) == JOBS
    other.release()
    dead.share(JOBS)
    wait_until(lambda: other.share(JOBS) == JOBS)


def test_a_long_pass_keeps_its_leases(engine: sa.Engine) -> None:
    slow, other = Leases(engine, 0.3), Leases(engine, 60)
    slow.share(JOBS)
    end = time.monotonic() + 0.9
    while time.monotonic() < end:
        assert slow.renewed(JOBS) == JOBS
        assert other.share(JOBS) == set()


def test_who_has_lost_its_leases_learns_of_it(engine: sa.Engine) -> None:
    stalled, other = Leases(engine, 0.05), Leases(engine, 60)
    stalled.share(JOBS)
    wait_until(lambda: other.share(JOBS) == JOBS)
    assert set(stalled.renewed(JOBS)) == set()


def test_a_lease_may_last_longer_than_the_others(engine: sa.Engine) -> None:
    one, other = Leases(engine, 0.05), Leases(engine, 0.05)
    assert one.hold("retention", 60)
    one.share(JOBS)
    wait_until(lambda: other.share(JOBS) == JOBS)
    assert not other.hold("retention", 60)


def test_two_that_reach_for_the_same_at_once_do_not_both_get_it(engine: sa.Engine) -> None:
    planes = [Leases(engine, 60) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            shares = list(pool.map(lambda plane: plane.share(JOBS), planes))
            assert sum(map(len, shares)) == len(set().union(*shares))
        assert sum(pool.map(lambda plane: plane.hold("retention"), planes)) == 1


def test_of_several_that_migrate_an_empty_database_at_once_one_does() -> None:
    with postgres() as url:
        with ProcessPoolExecutor(3, get_context("spawn")) as pool:  # alembic knows one migration at a time
            list(pool.map(migrate, [url] * 3))
        engine = make_engine(url)
        with engine.begin() as connection:
            assert connection.execute(sa.text("SELECT count(*) FROM alembic_version")).scalar_one() == 1
            assert connection.execute(sa.text("SHOW synchronous_commit")).scalar_one() == "on"
        engine.dispose()
