"""The job spec: what it fills in, what it refuses, and that JSON neither adds nor loses anything."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from api.prepare_spec import PrepareSpec
from api.spec import SIZES, TrainSpec, job_spec_adapter

SPEC: dict[str, Any] = {"name": "tiny", "data": {"dataset": "words"}, "model": {"size": "1m"}}
PREPARE: dict[str, Any] = {"kind": "prepare", "name": "p", "dataset": "words", "source": {"type": "python-stdlib"}}


def train(**changes: Any) -> TrainSpec:
    spec = job_spec_adapter.validate_python(SPEC | changes)
    assert isinstance(spec, TrainSpec)
    return spec


def prepare(**changes: Any) -> PrepareSpec:
    spec = job_spec_adapter.validate_python(PREPARE | changes)
    assert isinstance(spec, PrepareSpec)
    return spec


def nested(path: str, value: Any) -> dict[str, Any]:
    """Return the smallest spec with one more value at a dotted path."""
    spec: dict[str, Any] = json.loads(json.dumps(SPEC))
    *parents, last = path.split(".")
    place = spec
    for parent in parents:
        place = place.setdefault(parent, {})
    place[last] = value
    return spec


def refused(spec: Any, words: str = "", build: Callable[[Any], object] = job_spec_adapter.validate_python) -> None:
    with pytest.raises(ValidationError) as caught:
        build(spec)
    assert words in str(caught.value)


def test_the_smallest_spec_is_a_training_job_with_usable_defaults() -> None:
    spec = train()
    assert (spec.kind, spec.task, spec.retries, spec.seed) == ("train", "generation", 3, 0)
    assert (spec.steps, spec.epochs, spec.deadline) == (None, None, None)
    assert (spec.optimizer.learning_rate, spec.optimizer.betas) == (6e-4, (0.9, 0.95))
    assert spec.clip is not None
    assert spec.clip.threshold == 1.0
    assert (spec.batch.global_size, spec.micro_batch, spec.micro_batches) == (32, 8, 4)
    assert (spec.resources.workers, spec.resources.cpus, spec.resources.gpus) == (1, 1, 0)


def test_the_smallest_prepare_spec() -> None:
    spec = prepare()
    assert spec.tokenizer.type == "bpe"
    assert (spec.split, spec.eval_fraction) == ("document", 0.1)


def test_null_switches_clipping_and_the_sample_off() -> None:
    spec = train(clip=None, sample=None)
    assert spec.clip is None
    assert spec.sample is None


@pytest.mark.parametrize("size", SIZES)
def test_a_size_names_layers_width_and_heads(size: str) -> None:
    model = train(model={"size": size}).model
    assert (model.layers, model.width, model.heads) == SIZES[size]
    assert model.kv_heads == model.heads
    assert model.head_dim * model.heads == model.width


def test_fields_beside_a_size_win() -> None:
    model = train(model={"size": "10m", "layers": 2, "kv_heads": 3}).model
    assert (model.layers, model.width, model.heads, model.kv_heads) == (2, 384, 6, 3)


def test_a_width_beside_a_size_brings_its_own_heads() -> None:
    model = train(model={"size": "1.5b", "width": 512}).model
    assert (model.width, model.heads) == (512, 8)


def test_without_a_size_layers_and_width_are_needed() -> None:
    refused(SPEC | {"model": {"layers": 2}}, "width")
    refused(SPEC | {"model": {"width": 64}}, "layers")
    refused(SPEC | {"model": {"size": "7b"}}, "size")
    assert train(model={"layers": 2, "width": 64}).model.heads == 1


@pytest.mark.parametrize(("activation", "inner"), [("gelu", 512), ("swiglu", 344)])
def test_the_feed_forward_width_follows_the_activation(activation: str, inner: int) -> None:
    assert train(model={"size": "1m", "activation": activation}).model.ffn_width == inner


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"layers": 1, "width": 64, "heads": 3}, "multiple of 6"),
        ({"layers": 1, "width": 64, "heads": 64}, "even dimension"),
        ({"layers": 1, "width": 64, "heads": 4, "kv_heads": 3}, "kv_heads 3 does not divide heads 4"),
        ({"layers": 1, "width": 65}, "multiple of 2"),
    ],
)
def test_heads_must_divide_the_width(model: dict[str, Any], words: str) -> None:
    refused(SPEC | {"model": model}, words)


@pytest.mark.parametrize(
    "path",
    ["surprise", "model.surprise", "data.surprise", "optimizer.surprise", "batch.surprise", "resources.surprise",
     "schedule.surprise", "clip.surprise", "evaluate.surprise", "checkpoint.surprise", "sample.surprise"],
)  # fmt: skip
def test_an_unknown_field_is_refused_everywhere(path: str) -> None:
    refused(nested(path, 1), "Extra inputs are not permitted")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("steps", "3"), ("steps", 3.0), ("steps", True), ("seed", "0"), ("retries", 1.5), ("compile", "true"),
        ("compile", 0), ("name", 5), ("epochs", "1"), ("labels", []), ("labels", {"k": 1}), ("model.layers", "2"),
        ("optimizer.learning_rate", "6e-4"), ("optimizer.betas", [0.9]), ("optimizer.betas", [0.9, 0.95, 0.99]),
        ("optimizer.betas", "ab"), ("resources.memory", True), ("resources.memory", "lots"), ("data", "words"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_refused_not_converted(path: str, value: Any) -> None:
    refused(nested(path, value))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, -1.0])
@pytest.mark.parametrize(
    "path",
    ["epochs", "optimizer.learning_rate", "optimizer.epsilon", "optimizer.weight_decay", "schedule.floor",
     "clip.threshold", "sample.temperature", "model.dropout"],
)  # fmt: skip
def test_a_number_must_be_finite_and_in_range(path: str, value: float) -> None:
    refused(nested(path, value))


def test_nan_in_json_text_is_refused() -> None:
    text = json.dumps(nested("optimizer.learning_rate", math.nan))
    refused(text, build=job_spec_adapter.validate_json)


@pytest.mark.parametrize("value", [10**30, 2**63, -1])
@pytest.mark.parametrize(
    "path",
    ["steps", "seed", "retries", "deadline", "log_every", "model.layers", "model.width", "model.vocab_size",
     "data.sequence_length", "batch.global_size", "batch.micro_size", "resources.workers", "resources.memory",
     "evaluate.sequences"],
)  # fmt: skip
def test_a_huge_or_negative_number_is_refused(path: str, value: int) -> None:
    refused(nested(path, value))


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a..b", "a/b", "../a", "a\\b", "a\n", "\na", "a\x00", "a\x1b[0m", "A", "Tiny", "a b", "a_b", "-a",
     "a-", "ä", "a" * 48, "a%2fb"],
)  # fmt: skip
def test_a_name_that_could_leave_its_place_is_refused(name: str) -> None:
    refused(SPEC | {"name": name})
    refused(SPEC | {"data": {"dataset": name}} if len(name) < 48 else SPEC | {"name": name})
    refused(PREPARE | {"dataset": name})
    refused(PREPARE | {"source": {"type": "text", "folder": name}})


@pytest.mark.parametrize("name", ["a", "0", "tiny-stories", "a--b", "a" * 47])
def test_a_plain_name_is_accepted(name: str) -> None:
    assert train(name=name).name == name


@pytest.mark.parametrize("ref", ["words@", "@v1", "a@b@c", "a@../b", "a@B"])
def test_a_dataset_reference_is_a_name_and_at_most_one_version(ref: str) -> None:
    refused(SPEC | {"data": {"dataset": ref}})
    assert train(data={"dataset": "words@job-1"}).data.dataset == "words@job-1"


@pytest.mark.parametrize(
    "labels", [{"K": "v"}, {"": "v"}, {"k": "\n"}, {"k": "v" * 64}, {f"k{i}": "v" for i in range(17)}]
)
def test_labels_are_few_short_and_printable(labels: dict[str, str]) -> None:
    refused(SPEC | {"labels": labels})
    assert train(labels={"team": "LM", "empty": ""}).labels == {"team": "LM", "empty": ""}


def test_steps_and_epochs_exclude_each_other() -> None:
    refused(SPEC | {"steps": 5, "epochs": 1.0}, "not both")
    assert train(epochs=0.5).epochs == 0.5


@pytest.mark.parametrize(
    ("schedule", "floor", "decay_fraction"),
    [
        ({}, 0.1, None),
        ({"type": "linear"}, 0.1, None),
        ({"type": "inverse_sqrt", "floor": 0.0}, 0.0, None),
        ({"type": "wsd"}, 0.1, 0.2),
        ({"type": "wsd", "decay_fraction": 0.5, "floor": 0.3}, 0.3, 0.5),
        ({"type": "constant"}, None, None),
    ],
)
def test_a_schedule_has_the_defaults_of_its_shape(
    schedule: dict[str, Any], floor: float | None, decay_fraction: float | None
) -> None:
    made = train(schedule=schedule).schedule
    assert (made.floor, made.decay_fraction) == (floor, decay_fraction)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"type": "constant", "floor": 0.1}, "a constant schedule has no floor; leave it out"),
        ({"type": "cosine", "decay_fraction": 0.1}, "decay_fraction belongs to the wsd schedule; cosine has none"),
        ({"type": "wsd", "decay_fraction": 0.0}, "greater than 0"),
    ],
)
def test_what_a_schedule_would_ignore_is_refused(schedule: dict[str, Any], words: str) -> None:
    refused(SPEC | {"schedule": schedule}, words)


def test_the_best_checkpoints_need_an_evaluation_at_each() -> None:
    words = "checkpoint.every 30 is not a multiple of evaluate.every 20"
    refused(SPEC | {"checkpoint": {"every": 30, "keep_best": 1}, "evaluate": {"every": 20}}, words)
    assert train(checkpoint={"every": 40, "keep_best": 1}, evaluate={"every": 20}).checkpoint.keep_best == 1
    assert train(checkpoint={"every": 30, "keep_last": 1}, evaluate={"every": 20}).checkpoint.keep_last == 1


@pytest.mark.parametrize(
    ("batch", "workers", "words"),
    [
        ({"global_size": 8}, 2, "needs batch.micro_size"),
        ({"global_size": 12, "micro_size": 2}, 3, "a power of two of workers, not 3; the nearest are 2 and 4"),
        ({"global_size": 12, "micro_size": 2}, 2, "not 6; the nearest are 4 and 8, so a batch.global_size of 8 or 16"),
    ],
)
def test_an_elastic_run_needs_powers_of_two_and_says_the_nearest(
    batch: dict[str, int], workers: int, words: str
) -> None:
    refused(SPEC | {"determinism": "elastic", "batch": batch, "resources": {"workers": workers}}, words)


def test_an_elastic_run_of_powers_of_two_is_taken() -> None:
    made = train(determinism="elastic", batch={"global_size": 24, "micro_size": 3}, resources={"workers": 4})
    assert made.determinism == "elastic"


@pytest.mark.parametrize(
    ("size", "micro", "workers", "words"),
    [(10, None, 3, "nearest that fit are 9 and 12"), (2, None, 3, "least that fits is 3"),
     (20, 4, 2, "nearest that fit are 16 and 24"), (10, 2, 3, "nearest that fit are 6 and 12")],
)  # fmt: skip
def test_a_batch_that_does_not_divide_is_told_the_nearest_that_does(
    size: int, micro: int | None, workers: int, words: str
) -> None:
    refused(SPEC | {"batch": {"global_size": size, "micro_size": micro}, "resources": {"workers": workers}}, words)


@pytest.mark.parametrize(("text", "count"), [("4GiB", 4 * 2**30), ("4GB", 4 * 10**9), (2**30, 2**30)])
def test_memory_is_read_from_text_with_a_unit(text: str | int, count: int) -> None:
    assert train(resources={"memory": text}).resources.memory == count


def test_an_unknown_kind_is_refused_by_name() -> None:
    kinds: list[Any] = [1, None, []]
    for kind in kinds:
        refused(SPEC | {"kind": kind})
    refused(SPEC | {"kind": "bake"}, "kind must be train or prepare")
    refused([])


@pytest.mark.parametrize(
    ("batch", "workers", "words"),
    [
        ({"global_size": 10}, 3, "does not divide over 3 workers; the nearest that fit are 9 and 12"),
        ({"global_size": 12, "micro_size": 5}, 1, "not a multiple of batch.micro_size 5 × 1"),
        ({"global_size": 12, "micro_size": 4}, 2, "= 8; the nearest that fit are 8 and 16"),
        ({"global_size": 11, "micro_size": 4}, 2, "over 2 workers; the nearest that fit are 8 and 16"),
        ({"global_size": 2, "micro_size": 4}, 1, "not a multiple"),
        ({"global_size": 1}, 2, "does not divide over 2 workers; the least that fits is 2"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(batch: dict[str, int], workers: int, words: str) -> None:
    refused(SPEC | {"batch": batch, "resources": {"workers": workers}}, words)


@given(workers=st.integers(1, 64), share=st.integers(1, 512))
def test_the_default_micro_batch_is_the_largest_divisor_up_to_eight(workers: int, share: int) -> None:
    spec = train(batch={"global_size": workers * share}, resources={"workers": workers})
    assert spec.micro_batch == max(m for m in range(1, 9) if share % m == 0)
    assert spec.micro_batches * spec.micro_batch == spec.batch.global_size
    assert spec.micro_batches % workers == 0


@st.composite
def specs(draw: st.DrawFn) -> dict[str, Any]:
    workers, micro, accumulation = (draw(st.integers(1, 6)) for _ in range(3))
    optional = {
        "labels": st.dictionaries(st.sampled_from(["a", "b/c"]), st.text("aZ0 .-", max_size=0) | st.just("v-1")),
        "steps": st.integers(1, 10**9) | st.none(),
        "seed": st.integers(0, 2**63 - 1),
        "clip": st.none() | st.fixed_dictionaries({"threshold": st.floats(1e-300, 1e9)}),
        "sample": st.none() | st.fixed_dictionaries({"prompt": st.text(min_size=1, max_size=9)}),
        "optimizer": st.fixed_dictionaries(
            {
                "learning_rate": st.floats(0, 10, exclude_min=True),
                "betas": st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=2),
            }
        ),
        "evaluate": st.fixed_dictionaries({"sequences": st.none() | st.integers(1, 99)}),
    }
    fields: dict[str, Any] = draw(st.fixed_dictionaries({}, optional=optional))
    return fields | {
        "name": draw(st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)),
        "data": {"dataset": "words"},
        "model": {"size": draw(st.sampled_from(list(SIZES)))},
        "batch": {"global_size": workers * micro * accumulation, "micro_size": draw(st.sampled_from([None, micro]))},
        "resources": {"workers": workers, "memory": draw(st.sampled_from([None, "2GiB", 2**31]))},
    }


@given(specs())
def test_a_training_spec_survives_json_unchanged(given_spec: dict[str, Any]) -> None:
    spec = job_spec_adapter.validate_json(json.dumps(given_spec))
    text = spec.model_dump_json()
    again = job_spec_adapter.validate_json(text)
    assert again == spec
    assert again.model_dump_json() == text
    assert job_spec_adapter.validate_python(json.loads(text)) == spec


@given(st.sampled_from(["bpe", "characters"]), st.floats(1e-9, 1, exclude_max=True), st.integers(1024, 2**31 - 1))
def test_a_prepare_spec_survives_json_unchanged(tokenizer: str, fraction: float, shard: int) -> None:
    spec = prepare(tokenizer={"type": tokenizer}, eval_fraction=fraction, shard_tokens=shard)
    text = spec.model_dump_json()
    assert job_spec_adapter.validate_json(text) == spec
    assert job_spec_adapter.validate_json(text).model_dump_json() == text


def test_every_field_is_described_in_the_schema() -> None:
    """The schema is what API docs are made of, so a field without a sentence is a hole in them."""
    schema = job_spec_adapter.json_schema()
    bare = [
        f"{model}.{field}"
        for model, body in schema["$defs"].items()
        for field, about in body.get("properties", {}).items()
        if not about.keys() & {"description", "$ref", "oneOf"}  # what these name describes itself
    ]
    assert bare == []
