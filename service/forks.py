"""Jobs that begin at a checkpoint of another one: which checkpoint, and whether it fits. A retry is such a job, too."""

from api.documents import CheckpointRef
from api.errors import Fault, InvalidSpec
from api.layout import JobLayout
from api.spec import InitSpec, TrainSpec
from api.storage import Bucket
from service.rows import JobRow
from service.run_reader import read_checkpoints


def find_origin(bucket: Bucket, source: JobRow | None, init: InitSpec) -> CheckpointRef:
    """Return the checkpoint that a spec wants to begin at; InvalidSpec if there is none."""
    if source is None:
        raise _invalid("from_job", f"there is no job {init.from_job}")
    end = CheckpointRef.model_validate(source.history_end) if source.history_end else None
    found = read_checkpoints(bucket, JobLayout(source.project, source.id), end)
    chosen = [c for c in found if init.step is None or c.step == init.step]
    if chosen:
        return CheckpointRef(segment=chosen[-1].segment, step=chosen[-1].step, job_id=source.id)
    if not found:
        raise _invalid("from_job", f"job {source.id} has no checkpoint")
    steps = ", ".join(str(c.step) for c in found[-10:])
    raise _invalid("step", f"job {source.id} has no checkpoint of step {init.step}; the newest are {steps}")


def fork_faults(spec: TrainSpec, source: TrainSpec, vocab_sizes: tuple[int, int], step: int, steps: int) -> list[Fault]:
    """Return why a job of `steps` steps cannot begin at step `step` of another.

    `vocab_sizes`: of the new job's dataset, and of the source's.
    """
    free = {"dropout", "size", "vocab_size"}  # what changes no tensor, and what is compared apart
    mine, theirs = (s.model.model_dump(exclude=free) for s in (spec, source))
    faults = [
        Fault(path=f"$.model.{name}", message=f"the checkpoint to begin at has {name} {theirs[name]}, not {value}")
        for name, value in mine.items()
        if value != theirs[name]
    ]
    if vocab_sizes[0] != vocab_sizes[1]:
        words = f"the checkpoint to begin at has a vocabulary of {vocab_sizes[1]}, this dataset has {vocab_sizes[0]}"
        faults.append(Fault(path="$.data.dataset", message=words))
    if spec.model.positions == "learned" and spec.data.sequence_length != source.data.sequence_length:
        words = f"learned positions of the checkpoint are for sequences of {source.data.sequence_length} tokens"
        faults.append(Fault(path="$.data.sequence_length", message=words))
    if step >= steps:
        words = f"the checkpoint to begin at is of step {step}; a run of {steps} steps has ended before"
        faults.append(Fault(path="$.steps", message=words))
    return faults


def retry_spec(source: JobRow, newest: CheckpointRef | None) -> TrainSpec:
    """Return the spec by which a job that ended goes on from its newest checkpoint, or else where it once began."""
    spec = source.parsed_spec
    assert isinstance(spec, TrainSpec)
    if newest is not None:
        return spec.model_copy(update={"init": InitSpec(from_job=source.id, step=newest.step)})
    if spec.init is not None and source.init is not None:  # there, although that job may have newer ones by now
        return spec.model_copy(update={"init": InitSpec(from_job=spec.init.from_job, step=source.init["step"])})
    return spec


def _invalid(field: str, message: str) -> InvalidSpec:
    return InvalidSpec(message, errors=[Fault(path=f"$.init.{field}", message=message)])
