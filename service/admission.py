"""Does a group of workers fit on the cluster? Pure functions; a group must fit node by node, not in the sum."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from api.spec import PrepareSpec, TrainSpec

Resources = Mapping[str, float]
"""CPU, GPU (counts) and memory (bytes)."""


@dataclass(frozen=True)
class Node:
    """One machine of the cluster and what it has in all."""

    id: str
    total: Resources


def bundles(spec: TrainSpec | PrepareSpec) -> list[dict[str, float]]:
    """Return what each process of a job reserves."""
    if isinstance(spec, PrepareSpec):
        return [{"CPU": float(spec.resources.cpus)}]
    each = {"CPU": float(spec.resources.cpus)}
    if spec.resources.gpus:
        each["GPU"] = float(spec.resources.gpus)
    if spec.resources.memory is not None:
        each["memory"] = float(spec.resources.memory)
    return [each] * spec.resources.workers


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


def why_never(spec: TrainSpec | PrepareSpec, nodes: Sequence[Node]) -> str | None:
    """Return why the cluster as it is could never place this job, in numbers; None if it could when idle."""
    if place(nodes, [bundles(spec)]) is not None:
        return None
    return f"needs {_describe(bundles(spec))}, but the whole cluster has {_sum(node.total for node in nodes)}"


def why_not_now(
    spec: TrainSpec | PrepareSpec, active: Sequence[TrainSpec | PrepareSpec], nodes: Sequence[Node], ahead: int
) -> str | None:
    """Return why a job must wait: earlier jobs in the line, or too little left beside the active ones."""
    if ahead:
        return f"{ahead} {'job' if ahead == 1 else 'jobs'} ahead in the line"
    groups = [bundles(other) for other in active]
    if place(nodes, [*groups, bundles(spec)]) is not None:
        return None
    free = place(nodes, groups)
    left = _sum(free) if free is not None else "nothing"
    others = f"{len(active)} active {'job' if len(active) == 1 else 'jobs'}"
    return f"needs {_describe(bundles(spec))}, {left} free beside {others}"


def _describe(group: Sequence[Resources]) -> str:
    return f"{len(group)} × {_sum(group[:1])}"


def _sum(parts: Iterable[Resources]) -> str:
    total: dict[str, float] = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, 0) + amount
    words = [f"{total[name]:g} {name}" for name in ("CPU", "GPU") if name in total]
    if "memory" in total:
        words.append(f"{total['memory'] / 2**30:.1f} GiB memory")
    return " + ".join(words) or "nothing"
