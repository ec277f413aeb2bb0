"""Does a group of workers fit on the cluster? Pure functions; a group must fit node by node, not in the sum."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from api.prepare_spec import PrepareSpec
from api.spec import TrainSpec
from service.settings import NodeGroup

Resources = Mapping[str, float]
"""CPU, GPU (counts) and memory (bytes)."""


@dataclass(frozen=True)
class Node:
    """One machine of the cluster and what it has in all."""

    id: str
    total: Resources


def bundles(spec: TrainSpec | PrepareSpec, workers: int | None = None) -> list[dict[str, float]]:
    """Return what each process of a job reserves, with so many workers; without a number, with the fewest."""
    if isinstance(spec, PrepareSpec):
        return [{"CPU": float(spec.resources.cpus)}]
    each = {"CPU": float(spec.resources.cpus)}
    if spec.resources.gpus:
        each["GPU"] = float(spec.resources.gpus)
    if spec.resources.memory is not None:
        each["memory"] = float(spec.resources.memory)
    return [each] * (workers or spec.resources.least)


def place(nodes: Sequence[Node], groups: Iterable[Sequence[Resources]]) -> list[dict[str, float]] | None:
    """Return what is left on each node after placing every bundle, first fit, largest first; None if one fails."""
    free = [dict(node.total) for node in nodes]
    every = [bundle for group in groups for bundle in group]
    for bundle in sorted(every, key=lambda b: (b.get("GPU", 0), b.get("CPU", 0), b.get("memory", 0)), reverse=True):
        home = next((node for node in free if all(node.get(k, 0) >= v for k, v in bundle.items())), None)
        if home is None:
            return None
        for name, amount in bundle.items():
            home[name] -= amount
    return free


def with_addable(nodes: Sequence[Node], groups: Iterable[NodeGroup]) -> list[Node]:
    """Return the nodes that are there and those that may be added. One that has what a group's have is one of them."""
    every = list(nodes)
    for number, group in enumerate(groups):
        there = sum(all(node.total.get(k, 0) >= v for k, v in group.resources.items()) for node in nodes)
        every += [
            Node(f"addable-{number}-{i}", {str(kind): amount for kind, amount in group.resources.items()})
            for i in range(group.max - there)
        ]
    return every


def why_never(spec: TrainSpec | PrepareSpec, nodes: Sequence[Node], workers: int | None = None) -> str | None:
    """Return why the cluster could never place this job, in numbers; None if it could when idle.

    With so many workers; without a number, with the fewest.
    """
    group = bundles(spec, workers)
    if place(nodes, [group]) is not None:
        return None
    return f"needs {describe(group)}, but the whole cluster has {amounts(node.total for node in nodes)}"


def needs(spec: TrainSpec | PrepareSpec, sizes: Sequence[int]) -> str:
    """Say what a job wants, in numbers: `2 × 1 CPU`, or `1 to 4 × 1 CPU`."""
    count = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    return f"{count} × {amounts(bundles(spec)[:1])}"


def describe(group: Sequence[Resources]) -> str:
    return f"{len(group)} × {amounts(group[:1])}"


def amounts(parts: Iterable[Resources]) -> str:
    total: dict[str, float] = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, 0) + amount
    words = [f"{total[name]:g} {name}" for name in ("CPU", "GPU") if name in total]
    if "memory" in total:
        words.append(f"{total['memory'] / 2**30:.1f} GiB memory")
    return " + ".join(words) or "nothing"
