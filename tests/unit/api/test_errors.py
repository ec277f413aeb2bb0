"""Errors: each maps to a problem and back, and faults say where in one plain sentence."""

from typing import Any

import pytest
from pydantic import ValidationError

import api.profile
from api.errors import (
    ApiError,
    Fault,
    InvalidData,
    LockstepError,
    Problem,
    StorageError,
    Unreachable,
    api_error,
    faults_of,
)
from api.spec import job_spec_adapter

KINDS: list[type[ApiError]] = [ApiError, *ApiError.__subclasses__()]
SPEC: dict[str, Any] = {"name": "tiny", "data": {"dataset": "words"}, "model": {"size": "1m"}}


def faults(spec: dict[str, Any]) -> list[Fault]:
    with pytest.raises(ValidationError) as caught:
        job_spec_adapter.validate_python(spec)
    return faults_of(caught.value.errors())


@pytest.mark.parametrize("kind", KINDS)
def test_every_api_error_comes_back_from_its_problem(kind: type[ApiError]) -> None:
    sent = kind("what happened", errors=[Fault(path="$.name", message="bad")])
    received = api_error(Problem.model_validate_json(sent.problem("r-7").model_dump_json()))
    assert type(received) is kind
    assert str(received) == "what happened"
    assert received.errors == sent.errors
    assert received.request_id == "r-7"


@pytest.mark.parametrize("kind", KINDS)
def test_a_problem_carries_the_status_and_the_stable_type(kind: type[ApiError]) -> None:
    problem = kind("x").problem("r")
    assert problem.status == kind.status
    assert 400 <= problem.status < 600
    assert problem.type == f"urn:lockstep:problem:{kind.name}"
    assert problem.title


def test_names_of_problems_are_unique() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS)


def test_every_kind_of_api_error_is_a_direct_subclass_so_that_it_can_be_found() -> None:
    assert not [grandchild for kind in ApiError.__subclasses__() for grandchild in kind.__subclasses__()]


def test_an_unknown_type_is_a_plain_api_error() -> None:
    problem = Problem(type="urn:lockstep:problem:teapot", title="t", status=418, detail="short", request_id="")
    assert type(api_error(problem)) is ApiError


@pytest.mark.parametrize("kind", [ApiError, Unreachable, StorageError, InvalidData, api.profile.ProfileError])
def test_there_is_one_tree(kind: type[Exception]) -> None:
    assert issubclass(kind, LockstepError)


@pytest.mark.parametrize(
    ("change", "path", "words"),
    [
        ({"surprise": 1}, "$.surprise", "unknown field; there are batch, checkpoint, clip, compile, data, deadline,"),
        ({"optimiser": {}}, "$.optimiser", "unknown field; did you mean optimizer?"),
        ({"model": {"size": "1m", "wdith": 3}}, "$.model.wdith", "unknown field; did you mean width?"),
        ({"clip": {"treshold": 3}}, "$.clip.treshold", "unknown field; did you mean threshold?"),
        ({"data": {}}, "$.data.dataset", "required"),
        ({"name": "Not A Name"}, "$.name", "'Not A Name' is not allowed"),
        ({"steps": "3"}, "$.steps", "input should be a valid integer"),
        ({"optimizer": {"betas": [0.9, "x"]}}, "$.optimizer.betas[1]", "input should be a valid number"),
        ({"kind": "bake"}, "$", "kind must be train or prepare"),
        ({"kind": "train", "steps": 0}, "$.steps", "greater than or equal to 1"),
        ({"steps": 1, "epochs": 1.0}, "$", "give steps or epochs"),
        ({"precision": "fp8"}, "$.precision", "input should be 'fp32' or 'bf16'"),
        ({"labels": {"k": "/"}}, "$.labels.k", "is not allowed"),
    ],
)
def test_a_fault_has_the_json_path_and_a_sentence(change: dict[str, Any], path: str, words: str) -> None:
    (fault,) = faults(SPEC | change)
    assert fault.path == path
    assert words in fault.message
    assert not fault.message.startswith("Value error")


def test_faults_of_a_prepare_job_carry_no_union_tags() -> None:
    source = {"type": "python-stdlib", "max_bytes": 1}
    (fault,) = faults({"kind": "prepare", "name": "p", "dataset": "d", "source": source})
    assert fault.path == "$.source.max_bytes"


def test_the_fields_of_a_source_are_known_whatever_its_type() -> None:
    source = {"type": "text", "folder": "texts", "max_bites": 1}
    (fault,) = faults({"kind": "prepare", "name": "p", "dataset": "d", "source": source})
    assert (fault.path, fault.message) == ("$.source.max_bites", "unknown field; did you mean max_bytes?")


def test_all_faults_are_listed_but_not_their_consequences() -> None:
    found = faults({"name": "tiny", "data": {"dataset": "Words"}, "model": {"layers": 2}})
    assert [fault.path for fault in found] == ["$.data.dataset", "$.model.width"]
    found = faults(SPEC | {"model": {"size": "9000b", "heads": 0}})
    assert [fault.path for fault in found] == ["$.model.size", "$.model.heads"], "the size would give the others"


def test_a_body_that_fastapi_found_at_fault_has_the_same_paths() -> None:
    error = {"type": "missing", "loc": ("body", "train", "model", "width"), "msg": "Field required"}
    assert faults_of([error]) == [Fault(path="$.model.width", message="this field is required")]


def test_a_long_wrong_name_is_cut_short_in_its_message() -> None:
    (fault,) = faults(SPEC | {"data": {"dataset": "X" * 90}})
    assert len(fault.message) < 200
