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

A project's quotas come before the rooms. Whoever waits for one keeps no room and is passed by other projects; by its
own, only until it would hold a reservation. What a job with a reservation needs of the quota is kept, too.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from api.layout import PROJECT
from api.tenants import Quotas
from service.admission import Node, Resources, describe
from service.allowance import Allowances
from service.rooms import Group, Room, Shape, amount, exceeds, pieces


@dataclass(frozen=True)
class SchedulePolicy:
    """Durations in seconds."""

    reservation_age: float
    """In the line, until a job that does not fit holds a reservation."""
    resize_interval: float
    """From the beginning of an attempt until it may be restarted with more workers."""


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
    project: str = PROJECT
    """Whose quotas bind it."""

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


def schedule(
    claims: Sequence[Claim],
    nodes: Sequence[Node],
    now: datetime,
    policy: SchedulePolicy,
    quotas: Mapping[str, Quotas] | None = None,
) -> Schedule:
    """Return what to do about the jobs of the line and those that run. Pure; the order of `claims` does not matter.

    `quotas`: by project; one that is not in it has none.

    What it starts holds its room until the next pass, whether or not the caller can begin the attempt at once.
    """
    turn = _Pass([claim for claim in claims if claim.held], nodes, now, policy, quotas or {})
    for claim in sorted((claim for claim in claims if not claim.held), key=_line_order):
        turn.serve(claim)
    return Schedule(turn.starts, turn.waits, turn.preempts, turn.growth(), turn.stranded())


def _line_order(claim: Claim) -> tuple[int, bool, datetime, str]:
    return -claim.priority, claim.recovering_since is None, claim.queued_at, claim.job_id


class _Pass:
    """One walk along the line: what it has decided so far, and the rooms that follow from that."""

    def __init__(
        self,
        held: Sequence[Claim],
        nodes: Sequence[Node],
        time: datetime,
        policy: SchedulePolicy,
        quotas: Mapping[str, Quotas],
    ) -> None:
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
        self._allowances = Allowances(quotas, ((claim.project, claim.group(claim.held)) for claim in held))
        self._at_quota: Counter[str] = Counter()
        """Jobs of each project that wait for its quota."""
        self._closed: dict[str, str] = {}
        """Projects of which nobody passes the job that has waited so long for the quota."""
        self._empty = Room.of(sorted(nodes, key=_node_order), {})
        now = self._empty.changed(add={claim.job_id: claim.group(claim.held) for claim in held})
        soon = now.changed(out=[claim.job_id for claim in self._leaving]) if self._leaving else now
        self._rooms = [now, soon]
        """Now, soon and, while there is a reservation, later."""

    def serve(self, claim: Claim) -> None:
        """Start the job with the largest of its sizes that its quota and every room take; or say what it waits for."""
        if (why := self._beyond_quota(claim)) is not None:
            self._wait(claim, f"{claim.needs}; {why}")
            self._at_quota[claim.project] += 1
            return
        for workers in reversed(claim.sizes):
            if not self._allowances.allow(claim.project, claim.group(workers)):
                continue
            if (rooms := _add(self._rooms, claim, workers)) is not None:
                self._rooms = rooms
                self._promised.append(claim)
                self.starts[claim.job_id] = workers
                self._allowances.take(claim.project, claim.group(workers))
                return
        if not self._is_possible(claim):
            message = f"{claim.needs}, but the whole cluster has {amount(self._empty, claim.least)}"
            self._wait(claim, message + pieces(self._empty, claim.least))
            return
        before = self._reservations
        if hold := self._hold(claim):  # what it will take of its quota is not for a job behind it
            self._allowances.take(claim.project, claim.least)
        self._wait(claim, self._message(claim, hold, before))
        self._ahead += 1

    def _wait(self, claim: Claim, message: str) -> None:
        self.waits[claim.job_id] = Waiting(message, self._ahead + self._at_quota.total())

    def _is_possible(self, claim: Claim) -> bool:
        return self._empty.plus(claim.job_id, claim.least) is not None

    def _beyond_quota(self, claim: Claim) -> str | None:
        """Say why a job may not start, although there may be room; None if its project's quota allows it.

        It keeps no room, and nobody of another project waits for it. Of its own, nobody passes it in the end.
        """
        if (first := self._closed.get(claim.project)) is not None:
            return f"{first} is ahead and waits for the quota of project {claim.project}"
        why = self._allowances.why_not(claim.project, claim.least)
        if why is not None and self._aged(claim) and self._has_hope(claim):
            self._closed[claim.project] = claim.job_id
        return why

    def _has_hope(self, claim: Claim) -> bool:
        return self._allowances.ever(claim.project, claim.least) and self._is_possible(claim)

    def _message(self, claim: Claim, hold: str, reservations: int) -> str:
        """Say in numbers what a job waits for; `reservations` are those of jobs ahead."""
        now = self._rooms[0]
        passes = now.plus(claim.job_id, claim.least) is not None
        message = f"{claim.needs}, {amount(now, claim.least)} free"
        if not passes:
            message += pieces(now, claim.least)
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
        if not self._aged(claim) or len(self._rooms) > 2:
            return ""
        self._rooms.append(self._later(claim, self._entitled(claim)))
        self._reservations += 1
        return "holds a reservation"

    def _entitled(self, claim: Claim) -> datetime:
        """Return from when on nobody passes a job for ever."""
        return claim.recovering_since or claim.queued_at + timedelta(seconds=self._policy.reservation_age)

    def _aged(self, claim: Claim) -> bool:
        return self._entitled(claim) <= self._time

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
            if not exceeds(stay, total):
                break
            if claim.job_id not in out:
                out.append(claim.job_id)
        return out

    def _larger(self, claim: Claim) -> int | None:
        now = self._rooms[0]
        more = [(size, claim.group(size - claim.held)) for size in reversed(claim.sizes) if size > claim.held]
        allowed = [] if self._at_quota[claim.project] else more
        allowed = [(size, group) for size, group in allowed if self._allowances.allow(claim.project, group)]
        return next((size for size, group in allowed if now.plus("more workers", group)), None)

    def _began(self, claim: Claim) -> datetime:
        return claim.began_at or self._time


def _add(rooms: Sequence[Room], claim: Claim, workers: int) -> list[Room] | None:
    """Return the rooms with the job in each; None if one has no room for it."""
    more: list[Room] = []
    for at, room in enumerate(rooms):
        same = at > 0 and room is rooms[at - 1]  # while nobody is being stopped, soon is now
        if (grown := more[-1] if same else room.plus(claim.job_id, claim.group(workers))) is None:
            return None
        more.append(grown)
    return more


def _node_order(node: Node) -> tuple[float, float, float, str]:
    """Small nodes first, and those with GPUs last: whoever can do without a GPU leaves them alone, as Ray has it."""
    return node.total.get("GPU", 0), node.total.get("CPU", 0), node.total.get("memory", 0), node.id


def _jobs(count: int) -> str:
    return f"{count} {'job' if count == 1 else 'jobs'}"
