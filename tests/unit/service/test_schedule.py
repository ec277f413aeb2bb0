"""The schedule, rule by rule: who starts, who waits and what for, who makes way, who grows."""

from datetime import timedelta
from typing import Any

import pytest

from service.admission import Node
from service.schedule import Claim, Schedule, SchedulePolicy, schedule
from tests.fakes import T0

GIB = 2.0**30
POLICY = SchedulePolicy(reservation_age=600, resize_interval=900)


def node(cpu: float, gpu: float = 0, gib: float = 64) -> Node:
    return Node(f"{cpu}-{gpu}-{gib}", {"CPU": cpu, "GPU": gpu, "memory": gib * GIB})


def claim(job_id: str, sizes: tuple[int, ...], cpu: int, gpu: int = 0, gib: int = 0, **fields: Any) -> Claim:
    bundle = {"CPU": float(cpu), **({"GPU": float(gpu)} if gpu else {}), **({"memory": gib * GIB} if gib else {})}
    usual: dict[str, Any] = {"priority": 0, "queued_at": T0, "preemptible": True, "held": 0, "began_at": None}
    usual |= {"starting": False, "leaving": False, "recovering_since": None}
    return Claim(job_id=job_id, sizes=sizes, bundle=bundle, **{**usual, **fields})


def waits(job_id: str, workers: int | tuple[int, ...], cpu: int = 1, age: float = 0, **fields: Any) -> Claim:
    """A job that has been in the line for `age` seconds; `lost`: that long ago its attempt was."""
    if "lost" in fields:
        fields["recovering_since"] = T0 - timedelta(seconds=fields.pop("lost"))
    sizes = (workers,) if isinstance(workers, int) else workers
    return claim(job_id, sizes, cpu, queued_at=T0 - timedelta(seconds=age), **fields)


def runs(job_id: str, workers: int, cpu: int = 1, since: float = 9000, **fields: Any) -> Claim:
    """A job whose attempt began `since` seconds ago."""
    began = T0 - timedelta(seconds=since)
    usual: dict[str, Any] = {"sizes": (workers,), "queued_at": began, "held": workers, "began_at": began}
    return claim(job_id, cpu=cpu, **{**usual, **fields})


def starts(job_id: str, workers: int, cpu: int = 1, since: float = 5, **fields: Any) -> Claim:
    """A job whose attempt began a moment ago, and of which nothing has been seen."""
    return runs(job_id, workers, cpu, since, starting=True, **fields)


def plan(nodes: list[Node] | list[int], claims: list[Claim]) -> Schedule:
    machines = [node(one) if isinstance(one, int) else one for one in nodes]
    return schedule(claims, machines, T0, POLICY)


def words(found: Schedule) -> str:
    starts = [f"{job}={workers}" for job, workers in found.starts.items()]
    waiting = [f"{job} waits" for job in found.waits]
    preempts = [f"{victim} for {job}" for victim, job in found.preempts.items()]
    return ", ".join([*starts, *waiting, *preempts, *(f"{job} grows to {n}" for job, n in found.resizes.items())])


Row = tuple[str, list[Node] | list[int], list[Claim], str]


def table(rows: list[Row]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("nodes", "claims", "expected"), [row[1:] for row in rows], ids=[r[0] for r in rows])


@table(
    [
        ("nobody", [4], [], ""),
        ("an idle cluster", [4], [waits("a", 2, 2)], "a=2"),
        ("over two nodes", [3, 3], [waits("a", 4)], "a=4"),
        ("enough in the sum, but on no node", [2, 2, 4], [runs("r", 1, 4), waits("a", 1, 3)], "a waits"),
        ("not both", [4], [waits("a", 1, 3, age=2), waits("b", 1, 3, age=1)], "a=1, b waits"),
        ("memory", [node(8, gib=4)], [runs("r", 1, gib=3), waits("a", 1, gib=2), waits("b", 1)], "b=1, a waits"),
        ("one GPU", [node(8, gpu=1)], [waits("a", 1, gpu=1), waits("b", 1, gpu=1), waits("c", 1)], "a=1, c=1, b waits"),
        ("the GPU node is left alone", [node(8, gpu=1), node(8)], [runs("r", 1, 8), waits("a", 1, gpu=1)], "a=1"),
        ("fewer of the same", [4, 4], [runs("r", 1, 2), waits("a", 2, 3, age=1), waits("b", 1, 3)], "b=1, a waits"),
        ("placed anew", [5, 5], [runs("r", 2, 2), waits("a", 2, 3)], "a=2"),
        ("a cluster that shrank", [2, 2], [runs("r", 3, 2), waits("a", 1)], "a waits"),
        ("no cluster", [], [waits("a", 1)], "a waits"),
        ("what can never run holds up nobody", [4], [waits("x", 1, 8, age=9999), waits("a", 1)], "a=1, x waits"),
    ]
)
def test_a_job_starts_when_its_group_fits(nodes: list[Node], claims: list[Claim], expected: str) -> None:
    assert words(plan(nodes, claims)) == expected


@table(
    [
        ("older first", [1], [waits("a", 1, age=1), waits("b", 1, age=2)], "b=1, a waits"),
        ("then by id", [1], [waits("b", 1), waits("a", 1)], "a=1, b waits"),
        ("recovering first", [1], [waits("a", 1, age=9), waits("b", 1, lost=1)], "b=1, a waits"),
        ("priority above all", [1], [waits("a", 1, priority=1), waits("b", 1, lost=1)], "a=1, b waits"),
    ]
)
def test_the_line_is_by_priority_then_recovering_then_age(
    nodes: list[Node], claims: list[Claim], expected: str
) -> None:
    assert words(plan(nodes, claims)) == expected


@table(
    [
        ("the largest", [9], [waits("a", (1, 2, 4))], "a=4"),
        ("the largest that fits", [9], [runs("r", 6), waits("a", (1, 2, 4))], "a=2"),
        ("none fits", [9], [runs("r", 8), waits("a", (2, 4))], "a waits"),
        ("the larger ones never do", [3], [waits("a", (2, 4))], "a=2"),
        ("as large as a reservation allows", [6], [runs("r", 2), waits("big", 5, age=700), waits("a", (1, 2))],
         "a=1, big waits"),
    ]
)  # fmt: skip
def test_a_job_of_flexible_size_starts_with_the_largest_that_fits(
    nodes: list[Node], claims: list[Claim], expected: str
) -> None:
    assert words(plan(nodes, claims)) == expected


BIG = waits("big", 3, age=700)
"""Its reservation began 100 seconds ago."""
SMALL = [waits("s1", 1, age=20), waits("s2", 1, age=10)]


@table(
    [
        ("young", [4], [runs("r", 3), waits("big", 4, age=599), *SMALL], "s1=1, big waits, s2 waits"),
        ("young, all may pass", [4], [runs("r", 2), waits("big", 3, age=599), *SMALL], "s1=1, s2=1, big waits"),
        ("beside it", [4], [runs("r", 2), BIG, *SMALL], "s1=1, big waits, s2 waits"),
        ("all of the cluster", [4], [runs("r", 2), waits("big", 4, age=600), *SMALL], "big waits, s1 waits, s2 waits"),
        ("passed before", [4], [runs("r", 2), runs("p", 1, since=100), BIG, *SMALL], "big waits, s1 waits, s2 waits"),
        ("ran before", [4], [runs("r", 2), runs("p", 1, since=101), BIG, *SMALL], "s1=1, big waits, s2 waits"),
        ("did not pass, but goes first", [4], [runs("r", 2), runs("p", 1, since=1, priority=1), BIG, *SMALL],
         "s1=1, big waits, s2 waits"),
        ("a size for which there is room", [4], [runs("r", 2), waits("big", (3, 4), age=700), *SMALL],
         "s1=1, big waits, s2 waits"),
        ("its attempt was lost", [4], [runs("r", 2), waits("big", 3, lost=0), *SMALL], "s1=1, big waits, s2 waits"),
        ("since it was lost", [4], [runs("r", 2), runs("p", 1, since=9), waits("big", 3, age=99, lost=8), *SMALL],
         "s1=1, big waits, s2 waits"),
        ("one at a time", [4], [runs("r", 2), BIG, waits("b2", 4, age=650), *SMALL],
         "s1=1, big waits, b2 waits, s2 waits"),
        ("only those behind", [4], [runs("r", 2), waits("a", 2, age=800), BIG], "a=2, big waits"),
        ("nothing left to wait for", [4], [runs("p", 2, since=9), BIG, *SMALL], "big waits, s1 waits, s2 waits"),
    ]
)  # fmt: skip
def test_a_reservation_lets_pass_what_could_stand_beside_it(
    nodes: list[Node], claims: list[Claim], expected: str
) -> None:
    assert words(plan(nodes, claims)) == expected


def high(workers: int | tuple[int, ...], cpu: int = 1, **fields: Any) -> Claim:
    return waits("h", workers, cpu, **{"priority": 5, **fields})


@table(
    [
        ("the lowest", [4], [runs("a", 2, priority=1), runs("b", 2), high(2)], "h waits, b for h"),
        ("the youngest", [4], [runs("a", 2, since=9), runs("b", 2, since=8), high(2)], "h waits, b for h"),
        ("two", [4], [runs("a", 2, priority=1), runs("b", 2), high(3)], "h waits, b for h, a for h"),
        ("none without need", [4], [runs("a", 1, since=9), runs("b", 3), high(3)], "h waits, b for h"),
        ("none if all were not enough", [4], [runs("a", 1), runs("b", 3, priority=5), high(2)], "h waits"),
        ("none of equal priority", [4], [runs("a", 4, priority=5), high(1)], "h waits"),
        ("none that cannot stop", [4], [runs("a", 4, preemptible=False), high(1)], "h waits"),
        ("none for what never fits", [4], [runs("a", 4), high(5)], "h waits"),
        ("none where it fits", [4], [runs("a", 2), high(2)], "h=2"),
        ("where a worker fits", [2, 4], [runs("a", 1, 2, since=9), runs("b", 1, 4), high(1, 3)], "h waits, b for h"),
        ("for the smallest size", [4], [runs("a", 2), runs("b", 2, since=9), high((2, 4))], "h waits, b for h"),
        ("who leaves is enough", [4], [runs("a", 2), runs("b", 2, leaving=True), high(2)], "h waits"),
        ("who leaves is not enough", [5], [runs("a", 2), runs("b", 2), runs("c", 1, leaving=True), high(3)],
         "h waits, a for h"),
        ("each its own", [4], [runs("a", 2), runs("b", 2), high(2), waits("i", 2, priority=4)],
         "h waits, i waits, a for h, b for i"),
        ("not those of the one before", [4], [runs("a", 4), high(4), waits("i", 1, priority=4)],
         "h waits, i waits, a for h"),
        ("what is left of a victim", [4], [runs("a", 4), high(3), waits("i", 1, priority=4)],
         "h waits, i waits, a for h"),
        ("none behind a reservation", [4], [runs("a", 2), runs("b", 2, preemptible=False, since=9),
         waits("r", 4, priority=9, age=700), high(2)], "r waits, h waits"),
        ("beside a reservation", [4], [runs("a", 2, preemptible=False), runs("b", 2, since=9),
         waits("r", 3, priority=9, age=700), high(1)], "r waits, h waits, b for h"),
    ]
)  # fmt: skip
def test_a_higher_priority_makes_lower_trainings_make_way(
    nodes: list[Node], claims: list[Claim], expected: str
) -> None:
    assert words(plan(nodes, claims)) == expected


def test_what_preempted_jobs_leave_goes_to_whom_they_made_way_for() -> None:
    stays, goes = runs("x", 2, priority=9), runs("v2", 2, leaving=True)
    gone = waits("v1", 2, lost=1, age=9999)
    assert words(plan([6], [stays, goes, gone, high(4)])) == "h waits, v1 waits"
    assert words(plan([6], [stays, gone, waits("v2", 2, lost=1), high(4)])) == "h=4, v1 waits, v2 waits"


def flexible(job_id: str, held: int, sizes: tuple[int, ...] = (1, 2, 4), **fields: Any) -> Claim:
    return runs(job_id, held, **{"sizes": sizes, "since": 900, **fields})


@table(
    [
        ("to the largest", [4], [flexible("a", 1)], "a grows to 4"),
        ("to what has room", [5], [flexible("a", 1), runs("r", 2)], "a grows to 2"),
        ("beside what starts", [5], [flexible("a", 1), waits("b", 2)], "b=2, a grows to 2"),
        ("no room", [4], [flexible("a", 2), runs("r", 1)], ""),
        ("over two nodes", [3, 3], [flexible("a", 1, cpu=2), runs("b", 1)], "a grows to 2"),
        ("room in too small pieces", [3, 3], [flexible("a", 1, cpu=2), runs("b", 1, 2)], ""),
        ("at the largest already", [9], [flexible("a", 4)], ""),
        ("of a fixed size", [9], [runs("a", 1)], ""),
        ("too young", [9], [flexible("a", 1, since=899)], ""),
        ("cannot be stopped", [9], [flexible("a", 1, preemptible=False)], ""),
        ("being stopped", [9], [flexible("a", 1, leaving=True)], ""),
        ("another is being stopped", [9], [flexible("a", 1), runs("b", 1, leaving=True)], ""),
        ("another waits", [5], [flexible("a", 1), waits("b", 1, 5)], "b waits"),
        ("one that can never run waits", [5], [flexible("a", 1), waits("b", 1, 6)], "b waits, a grows to 4"),
        ("one at a time, the highest", [9], [flexible("a", 1), flexible("b", 1, priority=1)], "b grows to 4"),
        ("then the oldest", [9], [flexible("a", 1), flexible("b", 1, since=901)], "b grows to 4"),
    ]
)  # fmt: skip
def test_a_flexible_job_grows_into_room_that_nobody_waits_for(
    nodes: list[Node], claims: list[Claim], expected: str
) -> None:
    assert words(plan(nodes, claims)) == expected


MESSAGES: list[tuple[str, list[Node] | list[int], list[Claim], str, int]] = [
    ("too little", [4], [runs("r", 1), waits("a", 2, 2)], "needs 2 × 2 CPU, 3 CPU free", 0),
    ("flexible", [4], [runs("r", 1), waits("a", (2, 4), 2)], "needs at least 2 × 2 CPU, 3 CPU free", 0),
    ("others ahead", [4], [runs("r", 3), waits("b", 2, age=9), waits("a", 2)],
     "needs 2 × 1 CPU, 1 CPU free; 1 job ahead", 1),
    ("GPU and memory", [node(8, 1, 4)], [runs("r", 1, gpu=1), waits("a", 1, 2, gpu=1, gib=1)],
     "needs 1 × 2 CPU + 1 GPU + 1.0 GiB memory, 7 CPU + 0 GPU + 4.0 GiB memory free", 0),
    ("in pieces", [2, 2, 4], [runs("r", 1, 4), waits("a", 1, 3)], "needs 1 × 3 CPU, 4 CPU free in too small pieces", 0),
    ("shrank", [2], [runs("r", 3), waits("a", 1)], "needs 1 × 1 CPU, nothing free", 0),
    ("never", [4], [waits("a", (2, 4), 3)], "needs at least 2 × 3 CPU, but the whole cluster has 4 CPU", 0),
    ("never, in pieces", [2, 2], [waits("a", 1, 3)],
     "needs 1 × 3 CPU, but the whole cluster has 4 CPU in too small pieces", 0),
    ("no cluster", [], [waits("a", 1)], "needs 1 × 1 CPU, but the whole cluster has nothing", 0),
    ("behind one that never runs", [4], [waits("b", 5, age=9), runs("r", 4), waits("a", 1)],
     "needs 1 × 1 CPU, 0 CPU free", 0),
    ("preempts", [4], [runs("r", 4), waits("a", 1, priority=1)],
     "needs 1 × 1 CPU, 0 CPU free; waits for 1 job to stop", 0),
    ("has preempted", [4], [runs("r", 2, leaving=True), runs("s", 2, leaving=True), waits("a", 3)],
     "needs 3 × 1 CPU, 0 CPU free; waits for 2 jobs to stop", 0),
    ("reserved", [4], [runs("r", 2), waits("a", 4, age=700)],
     "needs 4 × 1 CPU, 2 CPU free; holds a reservation", 0),
    ("behind a reservation", [4], [runs("r", 2), waits("b", 4, age=700), waits("a", 1)],
     "needs 1 × 1 CPU, 2 CPU free; 1 job ahead, 1 with a reservation", 1),
    ("too little, too, behind one", [4], [runs("r", 2), waits("b", 4, age=700), waits("a", 3)],
     "needs 3 × 1 CPU, 2 CPU free; 1 job ahead", 1),
    ("behind a preemption", [4], [runs("r", 2), waits("b", 4, priority=1), waits("a", 1)],
     "needs 1 × 1 CPU, 2 CPU free; 1 job ahead, 1 with a reservation", 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "claims", "message", "ahead"), [row[1:] for row in MESSAGES], ids=[row[0] for row in MESSAGES]
)
def test_what_a_job_waits_for_is_said_in_numbers(
    nodes: list[Node], claims: list[Claim], message: str, ahead: int
) -> None:
    found = plan(nodes, claims).waits["a"]
    assert (found.message, found.ahead) == (message, ahead)


@pytest.mark.parametrize(
    ("nodes", "claims", "stranded"),
    [
        ([4], [starts("a", 4)], []),
        ([2], [starts("a", 4)], ["a"]),
        ([4], [runs("r", 2), starts("a", 2)], []),
        ([2], [runs("r", 2), starts("a", 2)], ["a"]),
        ([4], [starts("old", 2, since=9), starts("new", 2, since=5), starts("newer", 2, since=1)], ["newer"]),
        ([2], [starts("old", 2, since=9), starts("new", 2, since=5), starts("newer", 2, since=1)], ["newer", "new"]),
        ([1], [runs("r", 2), starts("a", 1)], ["a"]),
        ([3], [starts("low", 2, since=9), starts("high", 2, since=1, priority=1)], ["low"]),
        ([2], [runs("leaves", 2, leaving=True), starts("a", 2)], []),
        ([2, 2], [starts("a", 1, cpu=4)], ["a"]),  # enough in the sum, but it fits on no node
        # First fit takes them one by one, but not all anew: the largest first. Ray has placed them, so nobody goes.
        ([4, 7], [starts(str(n), 1, cpu=cpu) for n, cpu in enumerate([2, 2, 3, 2, 2])], []),
    ],
)
def test_a_job_whose_machines_went_before_it_started_is_stranded(
    nodes: list[int], claims: list[Claim], stranded: list[str]
) -> None:
    assert list(plan(nodes, claims).stranded) == stranded
