"""Who starts, who waits, who makes way, who grows: the scheduling decision of one pass, as one pure function.

The line is served by priority, then jobs whose attempt was lost before new ones, then age. What fits starts. What does
not is passed by smaller jobs behind it, but not for ever: in time it holds a reservation (EASY backfilling, Lifka 1995,
without run times, which nobody knows here). Three rooms decide. A room is a set of groups that shall stand on the nodes
together, by first fit, largest worker first, as `admission.place` has it:

- now: what jobs hold, and what this pass starts.
- soon: the same without jobs that are being stopped, and with the jobs that wait only for them. So what a preempted job
  leaves goes to the one that it made way for, and nobody is preempted twice for one need.
- later, while a job holds a reservation: that job and all that passed it, on otherwise empty nodes. Passed have those
  that began after the reservation did, at no higher priority.

A job starts when every room takes it. Why that starves nobody, given that jobs end: let R hold the reservation, and let
A be the jobs that R must wait for anyway: those that began before its reservation, and those of higher priority.

1. Who passes R stands beside R and all that passed before, on nodes without A. So R starts when A has ended.
2. First fit is not monotone: rarely, fewer groups fit worse, and 1 does not hold. But without A the room of later is
   that of soon with R in it, into which R did not fit. It takes nobody (and a preemption that could change that would
   have helped R), so the cluster runs empty, and there R fits.

So a job that nobody is ahead of starts at the latest two of the longest runs after its reservation began.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from service.admission import Node, Resources, amounts, describe

Shape = tuple[int, frozenset[tuple[str, float]]]
"""How many workers, and what each reserves."""


@dataclass(frozen=True)
class SchedulePolicy:
    """Durations in seconds."""

    reservation_age: float
    """In the line, until a job that does not fit holds a reservation."""
    resize_interval: float
    """From the beginning of an attempt until it may be restarted with more workers."""


@dataclass(frozen=True)
class Group:
    """Workers that run together; each reserves the same."""

    bundle: Resources
    workers: int

    @property
    def shape(self) -> Shape:
        return self.workers, frozenset(self.bundle.items())


@dataclass(frozen=True)
class Claim:
    """What a live job has or wants of the cluster."""

    job_id: str
    priority: int
    """Higher goes first."""
    queued_at: datetime
    """Its age in the line; kept when the job is preempted, resized or recovers."""
    sizes: tuple[int, ...]
    """Worker counts that it can run with, ascending; one element for a fixed size."""
    bundle: Resources
    """What each worker reserves."""
    preemptible: bool
    """It can be stopped by a checkpoint, and go on from there."""
    held: int
    """Workers that it holds now; 0: it waits."""
    began_at: datetime | None
    """When the present attempt began; None while it waits."""
    starting: bool
    """It holds workers, but none of them has been seen yet."""
    leaving: bool
    """It is being stopped: what it holds will be free soon."""
    recovering_since: datetime | None
    """It waits, but it ran until then; None if it is new in the line, or runs."""

    def group(self, workers: int) -> Group:
        return Group(self.bundle, workers)

    @property
    def least(self) -> Group:
        return self.group(self.sizes[0])

    @property
    def needs(self) -> str:
        """What it wants, in words and numbers."""
        words = describe([self.bundle] * self.sizes[0])
        return f"needs at least {words}" if len(self.sizes) > 1 else f"needs {words}"


@dataclass(frozen=True)
class Waiting:
    message: str
    """What for, in numbers."""
    ahead: int
    """Jobs before it in the line that wait, too; without those that can never run."""


@dataclass(frozen=True)
class Schedule:
    starts: Mapping[str, int]
    """Job → workers to start it with, now."""
    waits: Mapping[str, Waiting]
    """Every job that waits on."""
    preempts: Mapping[str, str]
    """Running job to stop by a checkpoint → the job that it makes way for."""
    resizes: Mapping[str, int]
    """Running job of flexible size → the larger number of workers to restart it with."""
    stranded: Collection[str]
    """Starting jobs for which there is no room any more: machines went before their workers came."""


def schedule(claims: Sequence[Claim], nodes: Sequence[Node], now: datetime, policy: SchedulePolicy) -> Schedule:
    """Return what to do about the jobs of the line and those that run. Pure; the order of `claims` does not matter.

    What it starts holds its room until the next pass, whether or not the caller can begin the attempt at once.
    """
    turn = _Pass([claim for claim in claims if claim.held], nodes, now, policy)
    for claim in sorted((claim for claim in claims if not claim.held), key=_line_order):
        turn.serve(claim)
    return Schedule(turn.starts, turn.waits, turn.preempts, turn.growth(), turn.stranded())


def _line_order(claim: Claim) -> tuple[int, bool, datetime, str]:
    return -claim.priority, claim.recovering_since is None, claim.queued_at, claim.job_id


class _Pass:
    """One walk along the line: what it has decided so far, and the rooms that follow from that."""

    def __init__(self, held: Sequence[Claim], nodes: Sequence[Node], time: datetime, policy: SchedulePolicy) -> None:
        self.starts: dict[str, int] = {}
        self.waits: dict[str, Waiting] = {}
        self.preempts: dict[str, str] = {}
        self._held, self._time, self._policy = held, time, policy
        self._leaving = [claim for claim in held if claim.leaving]
        self._promised: list[Claim] = []
        """What the room of soon has beside those that run: started in this pass, or waiting for a stop."""
        self._hopeless: set[Shape] = set()
        """For which no preemption makes room, nor will further down the line, where fewer jobs are lower."""
        self._ahead = self._reservations = 0
        self._empty = Room.of(sorted(nodes, key=_node_order), {})
        now = self._empty.changed(add={claim.job_id: claim.group(claim.held) for claim in held})
        soon = now.changed(out=[claim.job_id for claim in self._leaving]) if self._leaving else now
        self._rooms = [now, soon]
        """Now, soon and, while there is a reservation, later."""

    def serve(self, claim: Claim) -> None:
        """Start the job with the largest of its sizes that every room takes; or else say what it waits for."""
        for workers in reversed(claim.sizes):
            if (rooms := _add(self._rooms, claim, workers)) is not None:
                self._rooms = rooms
                self._promised.append(claim)
                self.starts[claim.job_id] = workers
                return
        if self._empty.plus(claim.job_id, claim.least) is None:
            message = f"{claim.needs}, but the whole cluster has {_amount(self._empty, claim.least)}"
            self.waits[claim.job_id] = Waiting(message + _pieces(self._empty, claim.least), self._ahead)
            return
        before = self._reservations
        self.waits[claim.job_id] = Waiting(self._message(claim, self._hold(claim), before), self._ahead)
        self._ahead += 1

    def _message(self, claim: Claim, hold: str, reservations: int) -> str:
        """Say in numbers what a job waits for; `reservations` are those of jobs ahead."""
        now = self._rooms[0]
        passes = now.plus(claim.job_id, claim.least) is not None
        message = f"{claim.needs}, {_amount(now, claim.least)} free"
        if not passes:
            message += _pieces(now, claim.least)
        if hold:
            message += f"; {hold}"
        if self._ahead:
            message += f"; {_jobs(self._ahead)} ahead"
            if passes and reservations:
                message += f", {reservations} with a reservation"
        return message

    def _hold(self, claim: Claim) -> str:
        """Keep room for a job that cannot start yet, if it has a right to that; return what to say of it."""
        if (rooms := _add(self._rooms[1:], claim, claim.sizes[0]) or self._make_way(claim)) is not None:
            self._rooms[1:] = rooms
            self._promised.append(claim)
            self._reservations += 1
            return f"waits for {_jobs(len(self._leaving) + len(self.preempts))} to stop"
        since = claim.recovering_since or claim.queued_at + timedelta(seconds=self._policy.reservation_age)
        if since > self._time or len(self._rooms) > 2:
            return ""
        self._rooms.append(self._later(claim, since))
        self._reservations += 1
        return "holds a reservation"

    def _later(self, claim: Claim, since: datetime) -> "Room":
        """Return the room of the reserved job and those that passed it."""
        others = [*self._held, *self._promised]
        awaited = [other.job_id for other in others if self._began(other) < since or other.priority > claim.priority]
        return self._rooms[1].changed(out=awaited, add={claim.job_id: claim.least})

    def _make_way(self, claim: Claim) -> "list[Room] | None":
        """Choose whom to preempt, the lowest and then the youngest first; return the rooms to come, or None.

        Nobody is chosen if that is not enough, and nobody again who is being stopped: they are not in the room of soon.
        """
        if claim.least.shape in self._hopeless:
            return None
        stay = [other for other in self._held if other.job_id in self._rooms[1].groups]
        may = [other for other in stay if other.preemptible and other.priority < claim.priority]
        may.sort(key=lambda other: (other.priority, -self._began(other).timestamp(), other.job_id))
        if not may or self._without(may, claim) is None:
            self._hopeless.add(claim.least.shape)
            return None
        enough = next(may[:count] for count in range(1, len(may) + 1) if self._without(may[:count], claim) is not None)
        victims = self._spare(enough, claim)
        self.preempts.update((victim.job_id, claim.job_id) for victim in victims)
        return self._without(victims, claim)

    def _spare(self, victims: list[Claim], claim: Claim) -> list[Claim]:
        """Take out any victim without which there is room enough, the highest and oldest first."""
        for victim in reversed(victims):
            rest = [other for other in victims if other is not victim]
            if self._without(rest, claim) is not None:
                return self._spare(rest, claim)
        return victims

    def _without(self, victims: Iterable[Claim], claim: Claim) -> "list[Room] | None":
        """Return the rooms to come with the victims out and the job in; None if one is too small for that."""
        out = [victim.job_id for victim in victims]
        rooms = [room.changed(out=out, add={claim.job_id: claim.least}) for room in self._rooms[1:]]
        return rooms if all(room.stands for room in rooms) else None

    def growth(self) -> dict[str, int]:
        """Return one running job that may have more workers: only while nobody waits and nobody is being stopped.

        A job that is being stopped may be one that grows; its room is not for another.
        """
        if self._ahead or self._leaving:
            return {}
        for claim in sorted(self._held, key=lambda claim: (-claim.priority, self._began(claim), claim.job_id)):
            settled = self._began(claim) + timedelta(seconds=self._policy.resize_interval) <= self._time
            if settled and claim.preemptible and (workers := self._larger(claim)) is not None:
                return {claim.job_id: workers}
        return {}

    def stranded(self) -> list[str]:
        """Return the starting jobs, the lowest and then the youngest first, without which the nodes are large enough.

        Only the sums count, since Ray may place what first fit does not; and a job that fits on no node at all.
        """
        total = self._empty.free or []
        held = [claim for claim in self._held if not claim.leaving]
        starting = [claim for claim in held if claim.starting]
        starting.sort(key=lambda claim: (claim.priority, -self._began(claim).timestamp(), claim.job_id))
        out = [claim.job_id for claim in starting if self._empty.plus(claim.job_id, claim.group(claim.held)) is None]
        for claim in starting:
            stay = [other.group(other.held) for other in held if other.job_id not in out]
            if not _exceeds(stay, total):
                break
            if claim.job_id not in out:
                out.append(claim.job_id)
        return out

    def _larger(self, claim: Claim) -> int | None:
        now = self._rooms[0]
        more = [size for size in reversed(claim.sizes) if size > claim.held]
        return next((size for size in more if now.plus("more workers", claim.group(size - claim.held))), None)

    def _began(self, claim: Claim) -> datetime:
        return claim.began_at or self._time


@dataclass(frozen=True)
class Room:
    """Groups on nodes, and what they leave free of each node; `free` is None if they do not fit together."""

    nodes: Sequence[Node]
    groups: Mapping[str, Group]
    free: Sequence[Resources] | None
    refused: set[Shape] = field(default_factory=set, compare=False)
    """Shapes of groups that were tried and did not fit: to place all anew takes time."""

    @classmethod
    def of(cls, nodes: Sequence[Node], groups: Mapping[str, Group]) -> "Room":
        """Place every group, largest worker first."""
        total = [node.total for node in nodes]
        free: Sequence[Resources] | None = None if _exceeds(groups.values(), total) else total
        for group in sorted(_merged(groups.values()), key=_size_order):
            free = _put(free, group) if free is not None else None
        return cls(nodes, groups, free)

    @property
    def stands(self) -> bool:
        return self.free is not None

    def plus(self, name: str, group: Group) -> "Room | None":
        """Return the room with one more group, in what is free or else with all placed anew; None if it has no room."""
        if self.free is None or group.shape in self.refused or _exceeds([group], self.free):
            return None
        if (free := _put(self.free, group)) is not None:
            return Room(self.nodes, {**self.groups, name: group}, free)
        if (anew := self.changed(add={name: group})).stands:
            return anew
        self.refused.add(group.shape)
        return None

    def changed(self, out: Iterable[str] = (), add: Mapping[str, Group] | None = None) -> "Room":
        """Return a room with some groups out and others in, all placed anew."""
        gone = set(out)
        stay = {name: group for name, group in self.groups.items() if name not in gone}
        return Room.of(self.nodes, {**stay, **(add or {})})


def _add(rooms: Sequence[Room], claim: Claim, workers: int) -> list[Room] | None:
    """Return the rooms with the job in each; None if one has no room for it."""
    more: list[Room] = []
    for at, room in enumerate(rooms):
        same = at > 0 and room is rooms[at - 1]  # while nobody is being stopped, soon is now
        if (grown := more[-1] if same else room.plus(claim.job_id, claim.group(workers))) is None:
            return None
        more.append(grown)
    return more


def _put(free: Sequence[Resources], group: Group) -> list[Resources] | None:
    """Return what is left of each node after placing a group, first fit; None if it does not fit."""
    rest, todo = list(free), group.workers
    for index, node in enumerate(free):
        count = todo
        for name, amount in group.bundle.items():
            if (has := node.get(name, 0.0)) < amount:
                break
            if amount and has < count * amount:
                count = int(has // amount)
        else:
            used = {name: node.get(name, 0.0) - count * amount for name, amount in group.bundle.items()}
            rest[index] = {**node, **used}
            todo -= count
            if not todo:
                return rest
    return None


def _exceeds(groups: Iterable[Group], free: Sequence[Resources]) -> bool:
    """Tell by the sum, which is quick, that groups cannot fit."""
    need: dict[str, float] = {}
    for group in groups:
        for name, amount in group.bundle.items():
            need[name] = need.get(name, 0.0) + amount * group.workers
    return any(total > sum(node.get(name, 0.0) for node in free) for name, total in need.items())


def _node_order(node: Node) -> tuple[float, float, float, str]:
    """Small nodes first, and those with GPUs last: whoever can do without a GPU leaves them alone, as Ray has it."""
    return node.total.get("GPU", 0), node.total.get("CPU", 0), node.total.get("memory", 0), node.id


def _size_order(group: Group) -> tuple[float, float, float]:
    return -group.bundle.get("GPU", 0), -group.bundle.get("CPU", 0), -group.bundle.get("memory", 0)


def _merged(groups: Iterable[Group]) -> list[Group]:
    """Return one group for all workers that reserve the same: where each goes is the same, and found faster."""
    workers: dict[frozenset[tuple[str, float]], int] = {}
    for group in groups:
        bundle = frozenset(group.bundle.items())
        workers[bundle] = workers.get(bundle, 0) + group.workers
    return [Group(dict(bundle), count) for bundle, count in workers.items()]


def _amount(room: Room, group: Group) -> str:
    """Say how much a room has of what a group needs."""
    if room.free is None:
        return "nothing"
    return amounts({name: node.get(name, 0.0) for name in group.bundle} for node in room.free)


def _pieces(room: Room, group: Group) -> str:
    """Say of a room that has enough in the sum for a group, which yet does not fit, why."""
    return "" if room.free is None or _exceeds([group], room.free) else " in too small pieces"


def _jobs(count: int) -> str:
    return f"{count} {'job' if count == 1 else 'jobs'}"
