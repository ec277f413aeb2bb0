"""What a spec says of sizes, of its place in the line, of bad batches and of where it begins."""

from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from api.errors import faults_of
from api.prepare_spec import PrepareSpec
from api.spec import TrainSpec, WorkerRange, job_spec_adapter
from tests.unit.api.test_spec import PREPARE, SPEC, prepare, refused, train

JOB = "job-01h4x5y6z7abcdefghjk"


def sizes(workers: Any, global_size: int = 32, micro_size: int | None = 2, **fields: Any) -> list[int]:
    batch = {"global_size": global_size, "micro_size": micro_size}
    return train(batch=batch, resources={"workers": workers}, **fields).sizes


def faults(**changes: Any) -> list[tuple[str, str]]:
    with pytest.raises(ValidationError) as caught:
        job_spec_adapter.validate_python(SPEC | changes)
    return [(fault.path, fault.message) for fault in faults_of(list(caught.value.errors()))]


@pytest.mark.parametrize(
    ("workers", "batch", "found"),
    [
        (4, (32, 2), [4]),
        ({"min": 1, "max": 4}, (32, 2), [1, 2, 4]),
        ({"min": 2, "max": 8}, (24, 2), [2, 3, 4, 6]),
        ({"min": 3, "max": 3}, (24, 2), [3]),
        ({"min": 5, "max": 16}, (32, 2), [8, 16]),
        ({"min": 1, "max": 4096}, (8, 2), [1, 2, 4]),
        ({"min": 1, "max": 4}, (32, None), [1, 2, 4]),
    ],
)
def test_the_sizes_of_a_job_are_those_that_divide_its_micro_batches(
    workers: Any, batch: tuple[int, int | None], found: list[int]
) -> None:
    assert sizes(workers, *batch) == found


def test_an_elastic_run_takes_the_powers_of_two_of_its_range() -> None:
    assert sizes({"min": 1, "max": 7}, determinism="elastic") == [1, 2, 4]
    assert sizes({"min": 3, "max": 16}, determinism="elastic") == [4, 8, 16]


def test_a_range_says_its_least_and_its_most() -> None:
    resources = train(batch={"micro_size": 2}, resources={"workers": {"min": 2, "max": 8}}).resources
    assert (resources.workers, resources.least, resources.most) == (WorkerRange(min=2, max=8), 2, 8)
    fixed = train(resources={"workers": 2}).resources
    assert (fixed.workers, fixed.least, fixed.most) == (2, 2, 2)


def test_without_a_micro_size_a_range_takes_what_suits_its_most_workers() -> None:
    spec = train(batch={"global_size": 48}, resources={"workers": {"min": 1, "max": 4}})
    assert (spec.micro_batch, spec.micro_batches, spec.sizes) == (6, 8, [1, 2, 4])


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8), st.integers(1, 60))
def test_every_size_is_in_the_range_and_divides_the_micro_batches(low: int, more: int, micro: int, count: int) -> None:
    fits = [n for n in range(low, low + more + 1) if count % n == 0]
    workers = {"min": low, "max": low + more}
    if fits:
        assert sizes(workers, count * micro, micro) == fits
    else:
        words = f"no number of workers from {low} to {low + more} divides the {count} micro-batches of a global batch"
        batch = {"global_size": count * micro, "micro_size": micro}
        refused(SPEC | {"batch": batch, "resources": {"workers": workers}}, words)


RANGE: dict[str, Any] = {"batch": {"global_size": 32, "micro_size": 2}}


@pytest.mark.parametrize(
    ("fields", "path", "words"),
    [
        ({"resources": {"workers": {"min": 4, "max": 2}}}, "$.resources.workers", "min 4 is above max 2"),
        ({"resources": {"workers": {"min": 0, "max": 2}}}, "$.resources.workers.min", "greater than or equal to 1"),
        ({"resources": {"workers": {"min": 1, "max": 5000}}}, "$.resources.workers.max", "less than or equal to 4096"),
        ({"resources": {"workers": {"min": 1}}}, "$.resources.workers.max", "this field is required"),
        ({"resources": {"workers": {"min": 1, "max": 2, "step": 1}}}, "$.resources.workers.step", "unknown field"),
        ({"resources": {"workers": {"min": "1", "max": 2}}}, "$.resources.workers.min", "valid integer"),
        ({"resources": {"workers": [1, 2]}}, "$.resources.workers", "valid integer"),
        ({"resources": {"workers": "2"}}, "$.resources.workers", "valid integer"),
        ({"resources": {"workers": 0}}, "$.resources.workers", "greater than or equal to 1"),
        ({"resources": {"workers": {"min": 9, "max": 15}}}, "$",
         "no number of workers from 9 to 15 divides the 16 micro-batches of a global batch"),
        ({"resources": {"workers": {"min": 3, "max": 3}}, "determinism": "elastic"}, "$",
         "no number of workers from 3 to 3 divides the 16 micro-batches of a global batch and is a power of two"),
        ({"batch": {"global_size": 31, "micro_size": 2}, "resources": {"workers": {"min": 1, "max": 2}}}, "$",
         "batch.global_size 31 is not a multiple of batch.micro_size 2; the nearest that fit are 30 and 32"),
        ({"batch": {"global_size": 32}, "resources": {"workers": {"min": 1, "max": 3}}}, "$",
         "batch.global_size 32 does not divide over 3 workers; the nearest that fit are 30 and 33"),
        ({"batch": {}, "resources": {"workers": {"min": 1, "max": 2}}, "determinism": "elastic"}, "$",
         "determinism elastic needs batch.micro_size"),
    ],
)  # fmt: skip
def test_a_range_that_cannot_be_is_refused_by_its_path(fields: dict[str, Any], path: str, words: str) -> None:
    [(where, message)] = faults(**{**RANGE, **fields})
    assert where == path
    assert words in message


def test_a_range_survives_json() -> None:
    spec = train(**RANGE, resources={"workers": {"min": 2, "max": 8}})
    again = job_spec_adapter.validate_json(spec.model_dump_json())
    assert again == spec
    assert job_spec_adapter.validate_python(spec.model_dump(mode="json")) == spec
    assert job_spec_adapter.validate_python(spec) == spec


@pytest.mark.parametrize(("workers", "valid"), [(2, True), ({"min": 1, "max": 2}, True), (0, False), ("2", False),
    ({"min": 1}, False), ({"min": 1, "max": 2, "step": 1}, False), ([1, 2], False)])  # fmt: skip
def test_the_json_schema_knows_both_forms_of_workers(workers: Any, valid: bool) -> None:
    spec = {**SPEC, **RANGE, "resources": {"workers": workers}}
    assert jsonschema_rs.is_valid(job_spec_adapter.json_schema(), spec) is valid


@pytest.mark.parametrize(("build", "base"), [(train, SPEC), (prepare, PREPARE)])
def test_a_priority_is_a_small_number_of_either_sign(build: Any, base: dict[str, Any]) -> None:
    assert build().priority == 0
    assert [build(priority=value).priority for value in (-100, 100)] == [-100, 100]
    for value in (-101, 101, 1.0, "high", None, True):
        refused(base | {"priority": value}, "priority")


def test_a_bad_batch_fails_the_job_unless_the_spec_says_otherwise() -> None:
    assert (train().on_non_finite, train().non_finite_limit) == ("fail", 3)
    assert train(on_non_finite="rewind", non_finite_limit=1).on_non_finite == "rewind"
    assert faults(on_non_finite="ignore") == [("$.on_non_finite", "input should be 'fail', 'skip' or 'rewind'")]
    for value in (0, 1001, "3"):
        refused(SPEC | {"non_finite_limit": value}, "non_finite_limit")


def test_a_job_may_begin_at_a_checkpoint_of_another() -> None:
    init = train(init={"from_job": JOB}).init
    assert init is not None
    assert (init.from_job, init.step, train().init) == (JOB, None, None)
    given = train(init={"from_job": JOB, "step": 400})
    assert job_spec_adapter.validate_json(given.model_dump_json()) == given
    [(path, message)] = faults(init={"from_job": "tiny"})
    assert (path, message) == ("$.init.from_job", "'tiny' is not a job's id; `lockstep list` shows the ids")


@pytest.mark.parametrize("field", ["init", "on_non_finite", "determinism"])
def test_a_preparation_has_no_checkpoints_to_begin_at(field: str) -> None:
    refused(PREPARE | {field: None}, "Extra inputs are not permitted")
    assert field in TrainSpec.model_fields
    assert field not in PrepareSpec.model_fields


def test_a_range_in_which_no_size_fits_is_refused_with_the_nearest_that_do() -> None:
    spec = {
        "name": "x",
        "data": {"dataset": "d"},
        "model": {"size": "1m"},
        "batch": {"global_size": 24, "micro_size": 2},
        "resources": {"workers": {"min": 7, "max": 10}},
    }
    with pytest.raises(
        ValidationError, match="divides the 12 micro-batches of a global batch; the nearest that do are 6 and 12"
    ):
        job_spec_adapter.validate_python(spec)
