"""Quotas of projects in the schedule: never more than that runs, no other project waits for it, and nobody starves."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.tenants import Quotas
from service.admission import Node
from service.allowance import KINDS, limits_of, taken_by
from service.rooms import Group
from service.schedule import Claim, Schedule, schedule
from tests.fakes import T0
from tests.unit.service.test_schedule_properties import (
    EVEN,
    GRACE,
    LONGEST,
    POLICY,
    Cluster,
    Job,
    Seen,
    situations,
    stands,
    streams,
)

PROJECTS = ("a", "b")
LIMITS = st.builds(
    Quotas,
    running_workers=st.none() | st.integers(1, 6),
    running_cpus=st.none() | st.integers(1, 10),
    running_gpus=st.none() | st.integers(0, 3),
)
Tenanted = tuple[Seen, dict[str, Quotas]]


@st.composite
def tenanted(draw: st.DrawFn) -> Tenanted:
    """A cluster whose jobs are of two projects, at least one of which has quotas. Some may be beyond them already."""
    claims, nodes = draw(situations())
    owned = [replace(claim, project=draw(st.sampled_from(PROJECTS))) for claim in claims]
    return (owned, nodes), {"a": draw(LIMITS), **({"b": draw(LIMITS)} if draw(st.booleans()) else {})}


def within(quotas: Quotas, groups: Iterable[Group]) -> bool:
    total = dict.fromkeys(KINDS, 0.0)
    for group in groups:
        total = {kind: total[kind] + amount for kind, amount in taken_by(group).items()}
    limits = limits_of(quotas)
    return all(total[kind] <= limits[kind] for kind in KINDS)


def at_quota(found: Schedule) -> set[str]:
    return {job for job, waiting in found.waits.items() if "at once and has" in waiting.message
            or "waits for the quota" in waiting.message}  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(tenanted())
def test_nothing_starts_or_grows_beyond_a_quota(made: Tenanted) -> None:
    (claims, nodes), quotas = made
    found = schedule(claims, nodes, T0, POLICY, quotas)
    for project, limit in quotas.items():
        own = [claim for claim in claims if claim.project == project]
        runs = [claim.group(found.resizes.get(claim.job_id, claim.held)) for claim in own if claim.held]
        starts = [claim.group(found.starts[claim.job_id]) for claim in own if claim.job_id in found.starts]
        changed = starts or any(claim.job_id in found.resizes for claim in own)
        for kind in KINDS:  # one kind may be beyond its limit already, where that was lowered
            takes = sum(taken_by(group)[kind] for group in starts)
            takes += sum(taken_by(claim.group(found.resizes[claim.job_id] - claim.held))[kind] for claim in own
                         if claim.job_id in found.resizes)  # fmt: skip
            total = sum(taken_by(group)[kind] for group in [*runs, *starts])
            assert not changed or not takes or total <= limits_of(limit)[kind]


@settings(max_examples=300, deadline=None)
@given(tenanted())
def test_who_waits_for_a_quota_is_to_others_as_if_it_were_not_there(made: Tenanted) -> None:
    (claims, nodes), quotas = made
    found = schedule(claims, nodes, T0, POLICY, quotas)
    stuck = at_quota(found)
    without = schedule([claim for claim in claims if claim.job_id not in stuck], nodes, T0, POLICY, quotas)
    assert (found.starts, found.preempts) == (without.starts, without.preempts)
    assert {job: wait.message for job, wait in found.waits.items() if job not in stuck} == {
        job: wait.message for job, wait in without.waits.items()
    }


@settings(max_examples=200, deadline=None)
@given(tenanted())
def test_a_quota_that_is_not_reached_changes_nothing(made: Tenanted) -> None:
    (claims, nodes), _ = made
    wide = {project: Quotas(running_workers=10**6, running_cpus=10**6, running_gpus=10**6) for project in PROJECTS}
    assert schedule(claims, nodes, T0, POLICY, wide) == schedule(claims, nodes, T0, POLICY)


class Tenancy(Cluster):
    """A cluster that obeys quotas, and says so at each second."""

    def __init__(self, nodes: list[Node], jobs: list[Job], quotas: Mapping[str, Quotas]) -> None:
        super().__init__(nodes, jobs)
        self.quotas = quotas

    def plan(self, claims: list[Claim]) -> Schedule:
        return schedule(claims, self.nodes, self.now, POLICY, self.quotas)

    def step(self) -> Schedule:
        found = super().step()
        for project, limit in self.quotas.items():
            own = [job.claim for job in self.jobs if job.claim.project == project and job.claim.held]
            assert within(limit, [claim.group(claim.held) for claim in own])
        return found


@settings(max_examples=100, deadline=None)
@given(streams(EVEN), st.data())
def test_nobody_starves_within_a_quota(jobs: list[Job], data: st.DataObject) -> None:
    """A job that nobody is ahead of, for whatever reason, starts within the bound that holds without quotas."""
    quotas = {"a": Quotas(running_cpus=data.draw(st.sampled_from([4, 5, 6])))}
    for job in jobs:
        job.claim = replace(job.claim, project=data.draw(st.sampled_from(PROJECTS)))
    nodes = [Node("n", {"CPU": 8.0, "GPU": 0.0})]
    jobs = [job for job in jobs if stands(nodes, [job.claim.least])]
    jobs = [job for job in jobs if job.claim.project == "b" or within(quotas["a"], [job.claim.least])]
    cluster = Tenancy(nodes, jobs, quotas)
    since = {job.claim.job_id: job.arrival + int(POLICY.reservation_age) for job in jobs}
    while cluster.jobs:
        for job_id, waiting in cluster.step().waits.items():
            if waiting.ahead:
                since[job_id] = max(since[job_id], cluster.clock + 1)
            assert cluster.clock + 1 - since[job_id] <= 2 * (LONGEST + GRACE), f"{job_id}: {waiting.message}"


def job(name: str, workers: tuple[int, ...] = (1,), **fields: Any) -> Claim:
    usual: dict[str, Any] = {
        "priority": 0, "queued_at": T0, "bundle": {"CPU": 1.0}, "preemptible": True, "held": 0, "began_at": None,
        "starting": False, "leaving": False, "recovering_since": None, "project": "a",
    }  # fmt: skip
    return Claim(name, sizes=workers, **{**usual, **fields})


def decide(*claims: Claim, cpus: float = 8, **quotas: int) -> Schedule:
    return schedule(claims, [Node("n", {"CPU": cpus})], T0, POLICY, {"a": Quotas(**quotas)})


@pytest.mark.parametrize(
    ("quotas", "says"),
    [
        ({"running_workers": 3}, "project a may have 3 workers at once and has 2"),
        ({"running_cpus": 3}, "project a may have 3 CPU at once and has 2"),
    ],
)
def test_the_condition_says_which_quota_in_numbers(quotas: dict[str, int], says: str) -> None:
    found = decide(job("runs", (2,), held=2), job("waits", (2,)), **quotas)
    assert found.waits["waits"].message == f"needs 2 × 1 CPU; {says}"


def test_a_flexible_job_starts_with_what_the_quota_leaves() -> None:
    assert decide(job("runs", held=1), job("flexible", (1, 2, 3, 4)), running_workers=4).starts == {"flexible": 3}


def test_a_job_grows_up_to_the_quota_and_not_while_another_waits_for_it() -> None:
    grows = job("grows", (1, 2, 4), held=1, began_at=T0 - timedelta(seconds=60))
    assert decide(grows, running_workers=3).resizes == {"grows": 2}
    assert decide(grows, job("waits", (3,)), running_workers=3).resizes == {}


def test_smaller_jobs_of_a_project_pass_one_that_waits_for_the_quota_only_for_so_long() -> None:
    large, small = job("large", (3,)), job("small", queued_at=T0 + timedelta(seconds=1))
    runs = job("runs", (2,), held=2)
    assert decide(runs, large, small, running_workers=4).starts == {"small": 1}
    old = replace(large, queued_at=T0 - timedelta(seconds=POLICY.reservation_age))
    found = decide(runs, old, small, job("other", project="b"), running_workers=4)
    assert found.starts == {"other": 1}
    assert found.waits["small"].message == "needs 1 × 1 CPU; large is ahead and waits for the quota of project a"


@pytest.mark.parametrize(("workers", "cpus"), [(5, 8), (4, 3)], ids=["the quota was lowered", "machines are gone"])
def test_a_job_that_can_never_run_closes_no_project(workers: int, cpus: int) -> None:
    old = job("old", (workers,), queued_at=T0 - timedelta(seconds=60))
    found = decide(job("runs", held=1), old, job("small"), running_workers=4, cpus=cpus)
    assert found.starts == {"small": 1}


def test_what_a_reservation_needs_of_the_quota_is_kept() -> None:
    """Room for it comes with the end of another project's job; its quota must not be gone by then."""
    old = job("old", (4,), queued_at=T0 - timedelta(seconds=60))
    other = job("other", (6,), held=6, project="b", began_at=T0 - timedelta(seconds=90))
    found = decide(other, old, job("small"), running_workers=4)
    assert "holds a reservation" in found.waits["old"].message
    assert found.starts == {}
