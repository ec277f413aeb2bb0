"""The plan of a job: what it will need and do, from the spec, the dataset and the cluster. Pure; refuses in numbers."""

from collections.abc import Sequence
from typing import Any

from api.arithmetic import parameter_count, samples, total_steps
from api.documents import DatasetDocument
from api.errors import Fault, InvalidSpec
from api.jobs import MemoryPlan, PreparePlan, TrainPlan
from api.prepare_spec import PrepareSpec
from api.spec import TrainSpec
from service.admission import Node, why_never
from service.memory import memory_plan

_FLOAT = 4
"""Bytes of an fp32 number."""


def plan_prepare(spec: PrepareSpec, nodes: Sequence[Node] | None, submission: dict[str, Any]) -> PreparePlan:
    """Return the plan of a preparation; InvalidSpec if the cluster could never place it."""
    _refuse(_placement_faults(spec, nodes))
    return PreparePlan(spec=spec, submission=submission, warnings=_cluster_warnings(nodes))


def plan_train(
    spec: TrainSpec, dataset: DatasetDocument, nodes: Sequence[Node] | None, submission: dict[str, Any]
) -> TrainPlan:
    """Return the plan of a training; InvalidSpec with every fault if it cannot work.

    `nodes` is None while Ray does not answer: then nothing is said about placement, and a warning says so.
    """
    length = spec.data.sequence_length
    train_samples = samples(dataset, "train", length)
    _refuse(_data_faults(spec, dataset, train_samples))
    steps = total_steps(spec, train_samples)
    parameters = parameter_count(spec.model, dataset.vocab_size, length)
    sized = [_sized(spec, workers) for workers in spec.sizes]
    memories = [(memory_plan(one, parameters, dataset.vocab_size), _memory_available(one, nodes)) for one in sized]
    # With the fewest workers, each needs the most, and may have the most room.
    _refuse(_schedule_faults(spec, steps) + _placement_faults(spec, nodes) + _memory_faults(*memories[0]))
    warnings = next((found for memory in memories if (found := _memory_warnings(*memory))), [])
    return TrainPlan(
        spec=spec,
        dataset_version=dataset.version,
        parameters=parameters,
        steps=steps,
        tokens_per_step=spec.batch.global_size * length,
        tokens=steps * spec.batch.global_size * length,
        epochs=steps * spec.batch.global_size / train_samples,
        memory_per_worker=memories[0][0],
        checkpoint_size=3 * parameters * _FLOAT,
        submission=submission,
        warnings=_cluster_warnings(nodes) + warnings + _data_warnings(spec, dataset),
    )


def _sized(spec: TrainSpec, workers: int) -> TrainSpec:
    """Return the spec with this number of workers in place of a range."""
    return spec.model_copy(update={"resources": spec.resources.model_copy(update={"workers": workers})})


def _refuse(faults: list[Fault]) -> None:
    if faults:
        raise InvalidSpec(faults[0].message, errors=faults)


def _data_faults(spec: TrainSpec, dataset: DatasetDocument, train_samples: int) -> list[Fault]:
    faults = []
    wanted = spec.model.vocab_size
    if wanted is not None and wanted != dataset.vocab_size:
        faults.append(
            Fault(
                path="$.model.vocab_size",
                message=f"the dataset {dataset.name}@{dataset.version} was made with a vocabulary of "
                f"{dataset.vocab_size}, not {wanted}; leave the field out, or prepare another dataset",
            )
        )
    if dataset.tokenizer == "none" and dataset.dtype == "uint16" and dataset.vocab_size > 2**16:
        faults.append(
            Fault(
                path="$.model.vocab_size",
                message=f"the shards of {dataset.name} are uint16, which has {2**16} values; a vocabulary of "
                f"{dataset.vocab_size} is not theirs",
            )
        )
    length = spec.data.sequence_length
    eval_samples = samples(dataset, "eval", length)
    for split, count in (("train", train_samples), ("eval", eval_samples)):
        if count == 0:
            faults.append(
                Fault(
                    path="$.data.sequence_length",
                    message=f"no shard of the {split} split holds a sequence of {length} tokens and its target; "
                    f"the split has {dataset.splits[split].tokens} tokens",
                )
            )
    return faults


def _schedule_faults(spec: TrainSpec, steps: int) -> list[Fault]:
    warmup = spec.schedule.warmup_steps
    if warmup is not None and warmup >= steps:
        message = f"a warm-up of {warmup} steps does not fit into a run of {steps}"
        return [Fault(path="$.schedule.warmup_steps", message=message)]
    return []


def _placement_faults(spec: TrainSpec | PrepareSpec, nodes: Sequence[Node] | None) -> list[Fault]:
    why = why_never(spec, nodes) if nodes is not None else None
    return [Fault(path="$.resources", message=why)] if why else []


def _memory_available(spec: TrainSpec, nodes: Sequence[Node] | None) -> int | None:
    """Bytes that one worker may use: what it reserves, else its share of the largest node it can share."""
    if spec.resources.memory is not None:
        return spec.resources.memory
    if not nodes or spec.resources.gpus:
        return None
    largest = max(nodes, key=lambda node: node.total.get("memory", 0))
    neighbours = min(spec.resources.most, max(1, int(largest.total.get("CPU", 1) // spec.resources.cpus)))
    return int(largest.total.get("memory", 0)) // neighbours


def _memory_faults(memory: MemoryPlan, available: int | None) -> list[Fault]:
    if available is None or memory.certain <= available:
        return []
    message = (
        f"weights, gradients and optimizer alone take {_gib(memory.certain)} on each worker, "
        f"which has {_gib(available)}; use a smaller model or more memory"
    )
    return [Fault(path="$.model", message=message)]


def _memory_warnings(memory: MemoryPlan, available: int | None) -> list[str]:
    if available is None:
        return []
    if memory.total <= 0.8 * available:
        return []
    return [
        f"the job is expected to take {_gib(memory.total)} of the {_gib(available)} of each worker; it may run out of "
        "memory. A smaller batch.micro_size or data.sequence_length takes less"
    ]


def _data_warnings(spec: TrainSpec, dataset: DatasetDocument) -> list[str]:
    return _sample_warnings(spec, dataset) + _evaluation_warnings(spec, dataset)


def _sample_warnings(spec: TrainSpec, dataset: DatasetDocument) -> list[str]:
    if dataset.tokenizer != "none" or "sample" not in spec.model_fields_set or spec.sample is None:
        return []
    return [f"the dataset {dataset.name} is a folder of token shards and has no tokenizer: no sample is generated"]


def _evaluation_warnings(spec: TrainSpec, dataset: DatasetDocument) -> list[str]:
    if "sequences" not in spec.evaluate.model_fields_set:
        return []
    wanted, there = spec.evaluate.sequences, samples(dataset, "eval", spec.data.sequence_length)
    if wanted is None or wanted <= there:
        return []
    return [f"evaluate.sequences is {wanted}, but the eval split holds {there}; all of them are used"]


def _cluster_warnings(nodes: Sequence[Node] | None) -> list[str]:
    if nodes is not None:
        return []
    return ["Ray does not answer: the job will wait for it, and whether the cluster can place it is not known"]


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
