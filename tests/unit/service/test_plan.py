"""Plans: every figure follows from the spec, every refusal has its numbers, and no field is left out."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from api.arithmetic import BATCHES_AHEAD, parameter_count
from api.errors import Fault, InvalidSpec
from api.jobs import MemoryPlan, Plan, TrainPlan
from api.prepare_spec import PrepareSpec
from api.spec import TrainSpec, job_spec_adapter
from service.admission import Node
from service.memory import CHECKPOINT_PIECE, block_bytes_per_token, memory_plan
from service.plan import plan_prepare, plan_train
from tests.fakes import dataset, job_id, prepare_spec, train_spec

GIB = 2.0**30
CLUSTER = [Node("a", {"CPU": 8, "memory": 16 * GIB}), Node("b", {"CPU": 4, "memory": 32 * GIB})]


def plan(nodes: Sequence[Node] | None = CLUSTER, **fields: Any) -> TrainPlan:
    return plan_train(train_spec(**fields), dataset(), nodes, {"entrypoint": "x"})


def refusal(nodes: Sequence[Node] | None = CLUSTER, **fields: Any) -> list[Fault]:
    with pytest.raises(InvalidSpec) as caught:
        plan(nodes, **fields)
    assert caught.value.detail == caught.value.errors[0].message
    return caught.value.errors


def test_steps_tokens_and_epochs_follow_from_each_other() -> None:
    fields: dict[str, Any] = {"data": {"dataset": "words", "sequence_length": 100}, "batch": {"global_size": 10}}
    by_epochs = plan(steps=None, epochs=2.0, **fields)
    assert (by_epochs.steps, by_epochs.tokens_per_step, by_epochs.tokens) == (200, 1000, 200_000)
    assert by_epochs.epochs == 2.0
    by_steps = plan(steps=50, **fields)
    assert (by_steps.steps, by_steps.tokens, by_steps.epochs) == (50, 50_000, 0.5)
    one_epoch = plan(steps=None, **fields)
    assert one_epoch.steps == 100


def memory(vocab_size: int = 2048, **fields: Any) -> MemoryPlan:
    spec = train_spec(**fields)
    return memory_plan(spec, parameter_count(spec.model, vocab_size, spec.data.sequence_length), vocab_size)


def test_memory_counts_four_numbers_for_each_parameter_and_the_snapshot() -> None:
    made = plan(resources={"workers": 4})
    weights = 4 * made.parameters
    planned = made.memory_per_worker
    assert (planned.weights, planned.gradients, planned.optimizer) == (weights, weights, 2 * weights)
    assert (planned.certain, made.checkpoint_size) == (4 * weights, 3 * weights)
    assert planned.snapshot == 3 * weights // 4 + CHECKPOINT_PIECE
    assert memory().snapshot == 3 * weights + CHECKPOINT_PIECE
    names = ("ddp_buckets", "partial_sums", "activations", "data", "snapshot")
    assert planned.total == planned.certain + sum(getattr(planned, name) for name in names)


@pytest.mark.parametrize(
    ("workers", "global_size", "determinism", "buckets", "sums"),
    [
        (1, 32, "default", 0, 0),  # no other rank
        (4, 32, "default", 0, 0),  # one micro-batch each: the gradients are the buckets
        (2, 32, "default", 1, 0),  # the first micro-batch's gradients lie beside the buckets
        (4, 32, "elastic", 0, 1),  # one leaf each
        (1, 32, "elastic", 0, 3),  # four leaves: at the last one, sums of two and of one
    ],
)
def test_gradients_are_held_once_more_for_buckets_and_for_each_level_of_the_tree(
    workers: int, global_size: int, determinism: str, buckets: int, sums: int
) -> None:
    batch = {"global_size": global_size, "micro_size": 8}
    planned = memory(batch=batch, resources={"workers": workers}, determinism=determinism)
    assert (planned.ddp_buckets, planned.partial_sums) == (buckets * planned.weights, sums * planned.weights)


SHAPE = {"layers": 3, "width": 64, "heads": 4, "ffn_width": 100}
PLAIN = SHAPE | {"norm": "layer", "activation": "gelu", "positions": "learned"}


@pytest.mark.parametrize(
    ("fields", "numbers"),
    [
        # In widths: two norms with input, normalised and output; q, k, v, attention twice. Four feed-forward widths.
        ({"model": SHAPE}, 11 * 64 + 4 * 100 + 4),
        ({"model": SHAPE | {"kv_heads": 1}}, 9 * 64 + 2 * 16 + 4 * 100 + 4),
        ({"model": PLAIN}, 8 * 64 + 2 * 100 + 4),
        # Scores thrice, and a mask after attention and after feed-forward; the first output of attention is not kept.
        ({"model": SHAPE | {"dropout": 0.1}}, 12 * 64 + 3 * 4 * 256 + 4 * 100),
        ({"model": SHAPE | {"dropout": 0.1}, "resources": {"gpus": 1}}, 13 * 64 + 4 * 100 + 4),
        # What matrices read and write is halved; norms keep fp32, and each matrix its own copy of what it reads.
        ({"model": SHAPE, "precision": "bf16"}, (4 + 2.5 + 2.5) * 64 + 2 * 100 + 4),
    ],
)  # fmt: skip
def test_activations_count_what_each_block_keeps_of_a_token(fields: dict[str, Any], numbers: float) -> None:
    assert block_bytes_per_token(train_spec(**fields)) == 4 * numbers


def test_activations_are_those_of_one_micro_batch_with_the_widest_point_of_backward() -> None:
    """With many tokens in the vocabulary the logits are it, with few a block."""
    batch = {"micro_size": 4, "global_size": 64}
    fields: dict[str, Any] = {"model": SHAPE, "batch": batch, "data": {"dataset": "words", "sequence_length": 100}}
    block = 400 * block_bytes_per_token(train_spec(**fields))
    embedding = 2 * 4 * 64
    assert memory(20, **fields).activations == 4 * block + 20 * embedding
    assert memory(50_000, **fields).activations == 3 * block + 3 * 4 * 400 * 50_000 + 50_000 * embedding
    matrices = 3 * (4 * 64 * 64 + 3 * 64 * 100) + 20 * 64
    half = 400 * block_bytes_per_token(train_spec(**fields, precision="bf16"))
    assert memory(20, **fields, precision="bf16").activations == 4 * half + 20 * embedding + 2 * matrices
    apart = fields | {"model": SHAPE | {"tied_embeddings": False}}
    assert memory(20, **apart).activations == 4 * block + 20 * embedding // 2


def test_a_worker_holds_as_many_batches_ready_as_the_plan_counts() -> None:
    planned = memory(batch={"global_size": 64}, resources={"workers": 4}, data={"dataset": "w", "sequence_length": 100})
    assert planned.data == BATCHES_AHEAD * 16 * 100 * (8 + 8)


@pytest.mark.parametrize(
    ("nodes", "fields", "path", "numbers"),
    [
        (CLUSTER, {"model": {"size": "1m", "vocab_size": 4096}}, "$.model.vocab_size", ["2048", "4096"]),
        (CLUSTER, {"data": {"dataset": "words", "sequence_length": 100_001}}, "$.data.sequence_length",
         ["100001", "100001"]),
        (CLUSTER, {"data": {"dataset": "words", "sequence_length": 10_001}}, "$.data.sequence_length",
         ["eval", "10001 tokens"]),
        (CLUSTER, {"schedule": {"warmup_steps": 10}}, "$.schedule.warmup_steps", ["10", "10"]),
        (CLUSTER, {"resources": {"cpus": 9}}, "$.resources", ["9 CPU", "12 CPU"]),
        (CLUSTER, {"batch": {"global_size": 13}, "resources": {"workers": 13}}, "$.resources",
         ["13 × 1 CPU", "12 CPU"]),
        (CLUSTER, {"resources": {"gpus": 1}}, "$.resources", ["1 GPU", "12 CPU"]),
        (CLUSTER, {"resources": {"memory": "40GiB"}}, "$.resources", ["40.0 GiB", "48.0 GiB"]),
        (CLUSTER, {"model": {"size": "1.5b"}, "resources": {"memory": "2GiB"}}, "$.model", ["2.00 GiB"]),
        ([Node("a", {"CPU": 8, "memory": 1 * GIB})], {"model": {"size": "124m"}}, "$.model", ["1.00 GiB"]),
        (None, {"model": {"size": "1.5b"}, "resources": {"memory": "2GiB"}}, "$.model", ["2.00 GiB"]),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field_and_both_numbers(
    nodes: Sequence[Node] | None, fields: dict[str, Any], path: str, numbers: list[str]
) -> None:
    messages = [fault.message for fault in refusal(nodes, **fields) if fault.path == path]
    assert messages
    assert all(any(number in message for message in messages) for number in numbers)
    assert all(len(re.findall(r"\d+", message)) >= 2 for message in messages)


def test_a_batch_that_does_not_divide_is_refused_before_any_plan() -> None:
    with pytest.raises(ValidationError, match=r"global_size 10 does not divide over 3 workers"):
        train_spec(batch={"global_size": 10}, resources={"workers": 3})
    with pytest.raises(
        ValidationError, match=r"global_size 12 is not a multiple of batch.micro_size 4 × 2 workers = 8"
    ):
        train_spec(batch={"global_size": 12, "micro_size": 4}, resources={"workers": 2})


def test_all_faults_are_told_at_once() -> None:
    found = refusal(schedule={"warmup_steps": 11}, resources={"cpus": 99})
    assert [fault.path for fault in found] == ["$.schedule.warmup_steps", "$.resources"]


def test_a_warm_up_one_step_shorter_than_the_run_is_taken() -> None:
    assert plan(schedule={"warmup_steps": 9}).steps == 10


def test_memory_that_may_not_do_is_a_warning_and_memory_that_cannot_do_a_refusal() -> None:
    """Certain: weights, gradients, optimizer; expected: everything."""
    planned = plan().memory_per_worker
    evaluate = {"sequences": 5}

    def with_bytes(count: int) -> list[str]:
        return plan(resources={"memory": count}, evaluate=evaluate).warnings

    assert with_bytes(int(planned.total / 0.8) + 1) == []
    for count in (int(planned.total / 0.8) - 1, planned.certain):
        [warning] = with_bytes(count)
        assert "it may run out of memory" in warning
        assert len(re.findall(r"[\d.]+ GiB", warning)) == 2
    assert refusal(resources={"memory": planned.certain - 1})[0].path == "$.model"


def test_workers_on_one_node_share_its_memory() -> None:
    node = [Node("a", {"CPU": 8, "memory": 0.5 * GIB})]
    assert plan(node, model={"size": "10m"}).warnings != []
    assert refusal(node, model={"size": "10m"}, resources={"workers": 8})[0].path == "$.model"


def test_a_job_of_flexible_size_is_planned_for_each_of_its_sizes() -> None:
    """What a worker takes is that of the hungriest size; it is refused only if no size can do."""
    batch = {"global_size": 32, "micro_size": 8}
    sizes = [memory(batch=batch, resources={"workers": workers}) for workers in (1, 2, 4)]
    made = plan(batch=batch, resources={"workers": {"min": 1, "max": 4}})
    assert made.memory_per_worker == max(sizes, key=lambda one: one.total)
    node = [Node("a", {"CPU": 8, "memory": 0.5 * GIB})]
    [warning] = plan(node, model={"size": "10m"}, batch=batch, resources={"workers": {"min": 1, "max": 4}}).warnings
    assert "may run out of memory" in warning
    assert refusal(node, model={"size": "10m"}, batch=batch, resources={"workers": {"min": 4, "max": 4}})


def test_a_job_of_flexible_size_must_have_room_for_its_fewest_workers() -> None:
    batch = {"global_size": 64, "micro_size": 1}
    assert plan(batch=batch, resources={"workers": {"min": 8, "max": 64}}).steps == 10
    [fault] = refusal(batch=batch, resources={"workers": {"min": 16, "max": 64}})
    assert fault.message.startswith("needs 16 × 1 CPU, but the whole cluster has 12 CPU")


def test_a_cluster_that_does_not_answer_is_a_warning() -> None:
    [warning] = plan(None, evaluate={"sequences": 5}).warnings
    assert warning.startswith("Ray does not answer")
    assert plan_prepare(prepare_spec(), None, {}).warnings == [warning]


def test_an_eval_split_smaller_than_wished_is_a_warning() -> None:
    data = {"dataset": "words", "sequence_length": 100}
    [warning] = plan(data=data, evaluate={"sequences": 101}).warnings
    assert warning.startswith("evaluate.sequences is 101, but the eval split holds 100")
    assert plan(data=data, evaluate={"sequences": 100}).warnings == []


def test_a_preparation_that_cannot_be_placed_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="needs 1 × 9 CPU, but the whole cluster has 12 CPU"):
        plan_prepare(prepare_spec(resources={"cpus": 9}), CLUSTER, {})


def leaves(model: BaseModel, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every field of a spec that holds a value and not another model."""
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name)


OTHER: dict[str, Any] = {
    "name": "other", "labels": {"a": "b"}, "priority": 7, "retries": 1, "deadline": 9, "seed": 5, "kind": "serve",
    "task": "pairs",
    "data.dataset": "words@v1", "data.sequence_length": 128, "model.family": "encoder", "model.size": "3m",
    "model.layers": 3, "model.width": 64, "model.heads": 2, "model.kv_heads": 2, "model.vocab_size": 4096,
    "model.positions": "learned", "model.norm": "layer", "model.activation": "gelu", "model.ffn_width": 100,
    "model.tied_embeddings": False, "model.dropout": 0.5, "model.bias": True, "optimizer.type": "sgd",
    "optimizer.learning_rate": 0.5, "optimizer.betas": [0.5, 0.6], "optimizer.epsilon": 0.1,
    "optimizer.weight_decay": 0.2, "schedule.type": "constant", "schedule.warmup_steps": 3, "schedule.floor": 0.5,
    "schedule.decay_fraction": 0.5,
    "batch.global_size": 64, "batch.micro_size": 4, "steps": 20, "epochs": 3.0, "clip.type": "value",
    "clip.threshold": 2.0, "on_non_finite": "skip", "non_finite_limit": 9, "init": {"from_job": job_id(1)},
    "precision": "bf16", "compile": True, "log_every": 3, "evaluate.every": 7,
    "evaluate.sequences": 3, "checkpoint.every": 9, "checkpoint.keep_last": 3, "checkpoint.keep_best": 2,
    "sample.prompt": "Once", "sample.tokens": 9, "sample.temperature": 0.5, "resources.workers": 2,
    "resources.cpus": 2, "resources.gpus": 1, "resources.memory": 2**30, "determinism": "elastic",
    "dataset": "other", "source.type": "web", "source.max_bytes": 100_000, "tokenizer.type": "characters",
    "tokenizer.vocab_size": 300, "split": "tail", "eval_fraction": 0.2, "shard_tokens": 5000,
}  # fmt: skip
NUMBERS = {
    "data.sequence_length", "model.layers", "model.width", "model.kv_heads", "model.positions",
    "model.activation", "model.ffn_width", "model.tied_embeddings", "model.bias", "batch.global_size", "steps",
    "resources.workers", "model.heads", "model.norm", "model.dropout", "batch.micro_size", "precision", "determinism",
}  # fmt: skip
"""Fields of which a figure of the plan must change with them, beside the spec itself."""

COMPANIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "decay_fraction": ("schedule", {"type": "wsd"}),
    "keep_best": ("checkpoint", {"every": 200}),
    "determinism": ("batch", {"global_size": 32, "micro_size": 8}),
}
"""What else a field needs to be taken."""

TRAIN_LEAVES = list(leaves(train_spec()))
PREPARE_LEAVES = list(leaves(prepare_spec()))


def changed(spec: TrainSpec | PrepareSpec, path: tuple[str, ...]) -> Plan | None:
    """Return the plan with one field changed; None if that is refused."""
    value = spec.model_dump(mode="json", exclude_unset=True)
    inner = value
    for name in path[:-1]:
        inner = inner.setdefault(name, {})
    inner[path[-1]] = OTHER[".".join(path)]
    if path[-1] in COMPANIONS:
        group, fields = COMPANIONS[path[-1]]
        value[group] = value.get(group, {}) | fields
    try:
        other = job_spec_adapter.validate_python(value)
        if isinstance(other, PrepareSpec):
            return plan_prepare(other, CLUSTER, {})
        return plan_train(other, dataset(), CLUSTER, {})
    except (ValidationError, InvalidSpec):
        return None


def test_the_walk_reaches_every_field() -> None:
    assert {".".join(path) for path in TRAIN_LEAVES + PREPARE_LEAVES} == set(OTHER)


@pytest.mark.parametrize("path", TRAIN_LEAVES, ids=".".join)
def test_no_field_of_a_training_is_accepted_and_ignored(path: tuple[str, ...]) -> None:
    spec = train_spec(model={"layers": 2, "width": 32, "heads": 4})
    before = plan_train(spec, dataset(), CLUSTER, {})
    after = changed(spec, path)
    if after is None:
        return
    assert isinstance(after, TrainPlan)
    assert after.spec != before.spec
    figures = {"spec", "submission", "warnings"}
    if ".".join(path) in NUMBERS:
        assert after.model_dump(exclude=figures) != before.model_dump(exclude=figures)


@pytest.mark.parametrize("path", PREPARE_LEAVES, ids=".".join)
def test_no_field_of_a_preparation_is_accepted_and_ignored(path: tuple[str, ...]) -> None:
    after = changed(prepare_spec(), path)
    assert after is None or after.spec != prepare_spec()


REFUSED = [
    "kind", "task", "model.family", "optimizer.type", "model.vocab_size", "resources.gpus", "epochs",
]  # fmt: skip
"""Fields of one value so far, and those that dataset, cluster or another field rule out here."""


@pytest.mark.parametrize("field", REFUSED)
def test_what_does_not_fit_is_refused(field: str) -> None:
    assert changed(train_spec(), tuple(field.split("."))) is None


def test_nothing_else_is_refused() -> None:
    spec = train_spec(model={"layers": 2, "width": 32, "heads": 4})
    assert [".".join(path) for path in TRAIN_LEAVES if changed(spec, path) is None] == sorted(
        REFUSED, key=[".".join(path) for path in TRAIN_LEAVES].index
    )
