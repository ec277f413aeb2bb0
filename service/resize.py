"""Whether a paused job can go on with another number of workers. Pure."""

from collections.abc import Sequence

from api.prepare_spec import PrepareSpec
from api.spec import TrainSpec
from api.tenants import Quotas
from service.admission import Node, why_never
from service.quotas import beyond_quota


def why_not_with(
    spec: TrainSpec | PrepareSpec, workers: int, nodes: Sequence[Node] | None, project: str, quotas: Quotas
) -> str | None:
    """Return why a job cannot run with so many workers; None if it can. `nodes`: None while Ray does not answer."""
    if isinstance(spec, TrainSpec) and not spec.can_run_with(workers):
        why = f"the job cannot run with {workers} workers: they must divide its {spec.micro_batches} micro-batches"
        why += " and be a power of two" if spec.determinism == "elastic" else ""
        return f"{why}; {' or '.join(map(str, spec.nearest_sizes(workers, workers)))} would do"
    if (why_beyond := beyond_quota(spec, project, quotas, workers)) is not None:
        return why_beyond
    return why_never(spec, nodes, workers) if nodes is not None else None
