"""What holds of every schedule; and, with a virtual clock, that nobody starves."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cache
from random import Random
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from service.admission import Node, place
from service.rooms import Group, Room
from service.schedule import Claim, Schedule, SchedulePolicy, schedule
from tests.fakes import T0

POLICY = SchedulePolicy(reservation_age=6, resize_interval=4)
"""In the seconds of the virtual clock."""
EVEN = (1, 2, 4)
"""Worker sizes that divide one another, and the nodes: with them first fit finds a place wherever there is one."""
UNEVEN = (1, 2, 3, 5)


def stands(nodes: Sequence[Node], groups: Iterable[Group]) -> bool:
    """Tell by search whether there is any way at all to place the groups."""
    items = [(group.bundle["CPU"], group.bundle.get("GPU", 0.0)) for group in groups for _ in range(group.workers)]
    items.sort(reverse=True)

    @cache
    def rest(index: int, free: tuple[tuple[float, float], ...]) -> bool:
        if index == len(items):
            return True
        cpu, gpu = items[index]
        for at, (cpus, gpus) in enumerate(free):
            if cpus >= cpu and gpus >= gpu:
                left = (*free[:at], (cpus - cpu, gpus - gpu), *free[at + 1 :])
                if rest(index + 1, tuple(sorted(left))):
                    return True
        return False

    return rest(0, tuple(sorted((node.total["CPU"], node.total["GPU"]) for node in nodes)))


def nodes_of(cpus: Sequence[int], gpus: int = 3) -> st.SearchStrategy[list[Node]]:
    one = st.tuples(st.sampled_from(cpus), st.integers(0, gpus))
    return st.lists(one, min_size=1, max_size=2).map(
        lambda found: [Node(str(i), {"CPU": float(cpu), "GPU": float(gpu)}) for i, (cpu, gpu) in enumerate(found)]
    )


NODES = nodes_of((4, 7))
SIZES = st.sampled_from([(1,), (2,), (3,), (1, 2), (2, 3), (1, 2, 4)])
WAITS: dict[str, Any] = {"held": 0, "began_at": None, "starting": False, "leaving": False}


@st.composite
def waiting(draw: st.DrawFn, cpus: Sequence[int], gpus: int = 0) -> Claim:
    bundle = {"CPU": float(draw(st.sampled_from(cpus))), **({"GPU": 1.0} if draw(st.integers(0, gpus)) else {})}
    lost = draw(st.sampled_from([None, None, None, 0, 9]))
    return Claim(
        job_id="",
        priority=draw(st.sampled_from([0, 1, 2])),
        queued_at=T0 - timedelta(seconds=draw(st.integers(0, 20))),
        sizes=draw(SIZES),
        bundle=bundle,
        preemptible=draw(st.integers(0, 3)) < 3,
        recovering_since=None if lost is None else T0 - timedelta(seconds=lost),
        **WAITS,
    )


@st.composite
def running(draw: st.DrawFn, cpus: Sequence[int], gpus: int = 0) -> Claim:
    claim = draw(waiting(cpus, gpus))
    began_at = T0 - timedelta(seconds=draw(st.integers(0, 20)))
    phase, workers = draw(st.integers(0, 7)), draw(st.sampled_from(claim.sizes))
    held = replace(claim, held=workers, began_at=began_at, recovering_since=None)
    return replace(held, starting=phase == 6, leaving=phase == 7)


Seen = tuple[list[Claim], list[Node]]


@st.composite
def situations(draw: st.DrawFn, line: int = 4) -> Seen:
    """A cluster with jobs that run on it (or, rarely, did before it shrank), and a line of others."""
    nodes = draw(NODES)
    shrank = draw(st.integers(0, 9)) == 9
    claims: list[Claim] = []
    for claim in draw(st.lists(running(UNEVEN, gpus=1), min_size=4, max_size=8)):
        if shrank or stands(nodes, held([*claims, claim])):
            claims.append(claim)
    claims += draw(st.lists(waiting(UNEVEN, gpus=1), min_size=line and 1, max_size=line))
    return [replace(claim, job_id=f"job{number}") for number, claim in enumerate(claims)], nodes


def held(claims: Iterable[Claim]) -> list[Group]:
    return [claim.group(claim.held) for claim in claims if claim.held]


def started(claims: Iterable[Claim], found: Schedule) -> list[Group]:
    return [claim.group(found.starts[claim.job_id]) for claim in claims if claim.job_id in found.starts]


@settings(deadline=None)
@given(situations())
def test_a_room_is_what_admission_places(seen: Seen) -> None:
    claims, nodes = seen
    room = Room.of(nodes, {claim.job_id: claim.least for claim in claims})
    assert room.free == place(nodes, [[claim.bundle] * claim.sizes[0] for claim in claims])


@settings(deadline=None)
@given(situations())
def test_a_cluster_is_never_over_admitted(seen: Seen) -> None:
    claims, nodes = seen
    found = schedule(claims, nodes, T0, POLICY)
    assert not found.starts or stands(nodes, held(claims) + started(claims, found))


@settings(deadline=None)
@given(situations())
def test_every_waiting_job_starts_or_waits(seen: Seen) -> None:
    claims, nodes = seen
    found = schedule(claims, nodes, T0, POLICY)
    by_id = {claim.job_id: claim for claim in claims}
    assert sorted([*found.starts, *found.waits]) == sorted(claim.job_id for claim in claims if not claim.held)
    assert all(workers in by_id[job].sizes for job, workers in found.starts.items())


@settings(deadline=None)
@given(situations(), st.randoms())
def test_neither_the_order_of_jobs_nor_that_of_nodes_matters(seen: Seen, dice: Random) -> None:
    claims, nodes = seen
    shuffled = dice.sample(claims, len(claims)), dice.sample(nodes, len(nodes))
    assert schedule(*shuffled, T0, POLICY) == schedule(claims, nodes, T0, POLICY)


@settings(max_examples=200, deadline=None)
@given(situations())
def test_only_lower_trainings_that_run_make_way_for_one_that_waits(seen: Seen) -> None:
    claims, nodes = seen
    by_id = {claim.job_id: claim for claim in claims}
    found = schedule(claims, nodes, T0, POLICY)
    for victim, job in found.preempts.items():
        assert by_id[victim].preemptible
        assert by_id[victim].held
        assert not by_id[victim].leaving
        assert by_id[victim].priority < by_id[job].priority
        assert job in found.waits


@settings(max_examples=200, deadline=None)
@given(situations(line=0), waiting(UNEVEN, gpus=1))
def test_every_victim_is_needed_and_together_they_are_enough(seen: Seen, wanted: Claim) -> None:
    claims, nodes = seen
    high = replace(wanted, job_id="high", priority=3)
    found = schedule([*claims, high], nodes, T0, POLICY)
    machines = Room.of(sorted(nodes, key=lambda n: (n.total["GPU"], n.total["CPU"], n.id)), {}).nodes

    def fits(victims: Iterable[str]) -> bool:
        stay = [claim for claim in claims if not claim.leaving and claim.job_id not in victims]
        return place(machines, [[group.bundle] * group.workers for group in [*held(stay), high.least]]) is not None

    assert not found.preempts or fits(found.preempts)
    assert not any(fits(found.preempts.keys() - {victim}) for victim in found.preempts)


@settings(max_examples=200, deadline=None)
@given(situations())
def test_growth_hurts_nobody(seen: Seen) -> None:
    claims, nodes = seen
    found = schedule(claims, nodes, T0, POLICY)
    by_id = {claim.job_id: claim for claim in claims}
    assert len(found.resizes) <= 1
    for job, workers in found.resizes.items():
        assert not any(stands(nodes, [by_id[other].least]) for other in found.waits)
        assert workers in by_id[job].sizes
        assert workers > by_id[job].held
        grown = [replace(claim, held=workers) if claim.job_id == job else claim for claim in claims]
        assert stands(nodes, held(grown) + started(claims, found))


@dataclass
class Job:
    """A job of the simulation: when it comes, and how many seconds of work it has."""

    claim: Claim
    arrival: int
    work: int
    stops_at: int | None = None


GRACE = 2
"""Seconds that a job takes to checkpoint and stop."""


class Cluster:
    """Runs jobs by the schedule, second by second."""

    def __init__(self, nodes: Sequence[Node], jobs: Sequence[Job]) -> None:
        self.nodes, self.jobs, self.clock = nodes, list(jobs), -1

    @property
    def now(self) -> datetime:
        return T0 + timedelta(seconds=self.clock)

    def step(self) -> Schedule:
        self.clock += 1
        self._work()
        live = [job for job in self.jobs if job.arrival <= self.clock]
        found = self.plan([job.claim for job in live])
        for job in live:
            if workers := found.starts.get(job.claim.job_id):
                job.claim = replace(job.claim, held=workers, began_at=self.now, recovering_since=None)
            if job.claim.job_id in {*found.preempts, *found.resizes}:
                job.claim, job.stops_at = replace(job.claim, leaving=True), self.clock + GRACE
        assert stands(self.nodes, held(job.claim for job in live))
        return found

    def plan(self, claims: list[Claim]) -> Schedule:
        return schedule(claims, self.nodes, self.now, POLICY)

    def _work(self) -> None:
        for job in self.jobs:
            if job.stops_at is not None and job.stops_at <= self.clock:
                job.claim, job.stops_at = replace(job.claim, **WAITS, recovering_since=self.now), None
            elif job.claim.held:
                job.work -= 1
        self.jobs = [job for job in self.jobs if job.work > 0]


LONGEST = 5


def streams(cpus: Sequence[int]) -> st.SearchStrategy[list[Job]]:
    """Many jobs, two in each second, of one priority."""
    drawn = st.lists(st.tuples(waiting(cpus), st.integers(1, LONGEST)), min_size=10, max_size=30)
    return drawn.map(lambda found: [_in_a_stream(number, claim, work) for number, (claim, work) in enumerate(found)])


def _in_a_stream(number: int, claim: Claim, work: int) -> Job:
    second = number // 2
    queued_at = T0 + timedelta(seconds=second)
    fresh = replace(claim, job_id=f"job{number:02}", priority=0, queued_at=queued_at, recovering_since=None)
    return Job(fresh, second, work)


def expect_starts_within(bound: int, cluster: Cluster) -> None:
    """Run all jobs that can run; none may wait longer than so once it is entitled, and nobody is ahead of it."""
    since = {job.claim.job_id: job.arrival + int(POLICY.reservation_age) for job in cluster.jobs}
    cluster.jobs = [job for job in cluster.jobs if stands(cluster.nodes, [job.claim.least])]
    while cluster.jobs:
        for job_id, waiting in cluster.step().waits.items():
            if waiting.ahead:
                since[job_id] = max(since[job_id], cluster.clock + 1)
            assert cluster.clock + 1 - since[job_id] <= bound, f"{job_id}: {waiting.message}"


@settings(max_examples=50, deadline=None)
@given(nodes_of((8,), gpus=0), streams(EVEN))
def test_a_job_in_turn_starts_when_those_that_ran_before_have_ended(nodes: list[Node], jobs: list[Job]) -> None:
    expect_starts_within(LONGEST + GRACE, Cluster(nodes, jobs))


@settings(max_examples=50, deadline=None)
@given(nodes_of((3, 4, 7)), streams(UNEVEN))
def test_nobody_starves_even_where_first_fit_errs(nodes: list[Node], jobs: list[Job]) -> None:
    expect_starts_within(2 * (LONGEST + GRACE), Cluster(nodes, jobs))


@settings(max_examples=50, deadline=None)
@given(nodes_of((8,), gpus=0), streams(EVEN), waiting((2, 4)), st.integers(3, 12))
def test_a_job_that_preempts_does_so_once_and_then_starts(
    nodes: list[Node], jobs: list[Job], wanted: Claim, arrival: int
) -> None:
    queued_at = T0 + timedelta(seconds=arrival)
    high = replace(wanted, job_id="high", priority=3, queued_at=queued_at, recovering_since=None)
    assume(stands(nodes, [high.least]))
    cluster = Cluster(nodes, [*jobs, Job(high, arrival, 3)])
    preemptions, latest = 0, arrival + POLICY.reservation_age + LONGEST + GRACE
    while "high" not in (found := cluster.step()).starts:
        if found.preempts:
            preemptions, latest = preemptions + 1, cluster.clock + GRACE
        assert preemptions <= 1
        assert cluster.clock < latest


@given(situations(), st.integers(0, 3))
def test_nobody_is_stranded_where_all_that_hold_workers_can_be_placed(seen: Seen, gone: int) -> None:
    claims, nodes = seen[0], seen[1][gone:]
    stranded = schedule(claims, nodes, T0, POLICY).stranded
    assert set(stranded) <= {claim.job_id for claim in claims if claim.held and claim.starting and not claim.leaving}
    stay = [claim for claim in claims if not claim.leaving]
    assert not stranded or not stands(nodes, held(stay))
