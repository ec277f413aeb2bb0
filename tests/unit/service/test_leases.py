"""Shares of the work: everybody has about as much, nothing is left over, and what one holds nobody else takes."""

from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.leases import Leases, share_of
from service.tables import leases
from tests.databases import on_postgres
from tests.fakes import T0, leases_of, new_store

NAMES = st.sets(st.integers(0, 40).map(lambda number: f"job-{number:02}"))
HOLDERS = st.sampled_from("abc")


@given(NAMES, st.dictionaries(st.integers(0, 40).map(lambda number: f"job-{number:02}"), HOLDERS))
def test_a_share_is_fair_and_takes_nothing_from_others(wanted: set[str], held: dict[str, str]) -> None:
    ours = share_of(sorted(wanted), held, "a", replicas=3)
    assert set(ours) <= wanted
    assert ours == sorted(set(ours))
    assert all(held.get(name) in (None, "a") for name in ours)
    assert len(ours) <= -(-len(wanted) // 3)


@given(NAMES, st.integers(1, 3), st.randoms())
def test_in_a_few_turns_everything_is_somebodys(wanted: set[str], replicas: int, chance: object) -> None:
    held: dict[str, str] = {name: "abc"[hash(name) % replicas] for name in wanted if chance.random() < 0.5}  # type: ignore[attr-defined]
    for _ in range(2):  # what is let go in one turn is taken in the next
        for holder in "abc"[:replicas]:
            ours = share_of(sorted(wanted), held, holder, replicas)
            held = {name: who for name, who in held.items() if who != holder} | dict.fromkeys(ours, holder)
    assert held.keys() == wanted
    most = -(-len(wanted) // replicas)
    assert all(list(held.values()).count(holder) <= most for holder in "abc")


@pytest.mark.database
def test_one_control_plane_has_everything(tmp_path: Path) -> None:
    ours = leases_of(new_store(tmp_path))
    assert ours.share(["job-1", "job-2"]) == {"job-1", "job-2"}
    assert ours.share(["job-2"]) == {"job-2"}
    assert ours.hold("retention")
    ours.release()


@pytest.mark.database
@pytest.mark.skipif(not on_postgres(), reason="an embedded database has no leases")
@pytest.mark.parametrize("holder", ["another", "ours"])
def test_nobody_waits_for_a_lease_that_another_one_is_just_taking(tmp_path: Path, holder: str) -> None:
    """Two that wait for each other are what the database ends by an error, and with it a pass of each."""
    engine = new_store(tmp_path)._engine
    ours = Leases(engine, 60)
    name = {"another": "another", "ours": ours.holder}[holder]
    row = {"name": "job-1", "holder": name, "expires_at": T0 - timedelta(days=999)}
    with engine.begin() as connection:
        connection.execute(leases.insert().values(row))
    with engine.begin() as taking:
        taking.execute(leases.update().values(holder="a third"))
        assert ours.share(["job-2"]) == {"job-2"}
        assert set(ours.renewed(["job-2"])) == {"job-2"}
        ours.release()
