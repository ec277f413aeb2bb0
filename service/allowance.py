"""What a project may still have of workers, CPUs and GPUs at once. Pure; a limit that is not set allows all."""

from collections.abc import Iterable, Mapping
from math import inf

from api.tenants import Quotas
from service.rooms import Group

KINDS = ("workers", "CPU", "GPU")


def limits_of(quotas: Quotas) -> dict[str, float]:
    given = (quotas.running_workers, quotas.running_cpus, quotas.running_gpus)
    return {kind: inf if limit is None else limit for kind, limit in zip(KINDS, given, strict=True)}


def taken_by(group: Group) -> dict[str, float]:
    per_worker = {"workers": 1.0, **group.bundle}
    return {kind: per_worker.get(kind, 0.0) * group.workers for kind in KINDS}


def never(project: str, quotas: Quotas, group: Group) -> str | None:
    """Say why a group is beyond a project's quota even if nothing else of it runs; None if it is not."""
    limits, taken = limits_of(quotas), taken_by(group)
    over = next((kind for kind in KINDS if taken[kind] > limits[kind]), None)
    return None if over is None else f"project {project} may have {limits[over]:g} {over} at once"


class Allowances:
    """The quotas of each project, and what it has of them: what runs, and what was given in this pass."""

    def __init__(self, quotas: Mapping[str, Quotas], held: Iterable[tuple[str, Group]]) -> None:
        self._quotas = quotas
        self._used = {project: dict.fromkeys(KINDS, 0.0) for project in quotas}
        for project, group in held:
            self.take(project, group)

    def take(self, project: str, group: Group) -> None:
        if (used := self._used.get(project)) is not None:
            for kind, amount in taken_by(group).items():
                used[kind] += amount

    def allow(self, project: str, group: Group) -> bool:
        return self.why_not(project, group) is None

    def ever(self, project: str, group: Group) -> bool:
        """Tell whether the project may have a group once nothing else of it runs."""
        return project not in self._quotas or never(project, self._quotas[project], group) is None

    def why_not(self, project: str, group: Group) -> str | None:
        """Say in numbers why a project may not have a group now; None if it may."""
        if (quotas := self._quotas.get(project)) is None:
            return None
        limits, used, taken = limits_of(quotas), self._used[project], taken_by(group)
        for kind in KINDS:
            if taken[kind] and used[kind] + taken[kind] > limits[kind]:
                return f"project {project} may have {limits[kind]:g} {kind} at once and has {used[kind]:g}"
        return None
