"""Rooms: groups of workers on nodes, and what they leave free. Placed by first fit, largest worker first."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from service.admission import Node, Resources, amounts

Shape = tuple[int, frozenset[tuple[str, float]]]
"""How many workers, and what each reserves."""


@dataclass(frozen=True)
class Group:
    """Workers that run together; each reserves the same."""

    bundle: Resources
    workers: int

    @property
    def shape(self) -> Shape:
        return self.workers, frozenset(self.bundle.items())


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
        free: Sequence[Resources] | None = None if exceeds(groups.values(), total) else total
        for group in sorted(_merged(groups.values()), key=_size_order):
            free = _put(free, group) if free is not None else None
        return cls(nodes, groups, free)

    @property
    def stands(self) -> bool:
        return self.free is not None

    def plus(self, name: str, group: Group) -> "Room | None":
        """Return the room with one more group, in what is free or else with all placed anew; None if it has no room."""
        if self.free is None or group.shape in self.refused or exceeds([group], self.free):
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


def amount(room: Room, group: Group) -> str:
    """Say how much a room has of what a group needs."""
    if room.free is None:
        return "nothing"
    return amounts({name: node.get(name, 0.0) for name in group.bundle} for node in room.free)


def pieces(room: Room, group: Group) -> str:
    """Say of a room that has enough in the sum for a group, which yet does not fit, why."""
    return "" if room.free is None or exceeds([group], room.free) else " in too small pieces"


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


def exceeds(groups: Iterable[Group], free: Sequence[Resources]) -> bool:
    """Tell by the sum, which is quick, that groups cannot fit."""
    need: dict[str, float] = {}
    for group in groups:
        for name, amount in group.bundle.items():
            need[name] = need.get(name, 0.0) + amount * group.workers
    return any(total > sum(node.get(name, 0.0) for node in free) for name, total in need.items())


def _size_order(group: Group) -> tuple[float, float, float]:
    return -group.bundle.get("GPU", 0), -group.bundle.get("CPU", 0), -group.bundle.get("memory", 0)


def _merged(groups: Iterable[Group]) -> list[Group]:
    """Return one group for all workers that reserve the same: where each goes is the same, and found faster."""
    workers: dict[frozenset[tuple[str, float]], int] = {}
    for group in groups:
        bundle = frozenset(group.bundle.items())
        workers[bundle] = workers.get(bundle, 0) + group.workers
    return [Group(dict(bundle), count) for bundle, count in workers.items()]
