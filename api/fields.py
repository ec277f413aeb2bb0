"""Which fields a job spec has at a place: for the answer to one that it does not have."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel

from .prepare_spec import PrepareSpec
from .spec import TrainSpec

_KINDS: dict[int | str, type[BaseModel]] = {"train": TrainSpec, "prepare": PrepareSpec}


def advice(loc: Sequence[int | str]) -> str:
    """Say which field may be meant by an unknown one, given pydantic's location of it; else which ones exist."""
    known = _fields_beside(loc)
    if not known:
        return "see the job spec in the API docs for those that exist"
    if meant := get_close_matches(str(loc[-1]), known, n=1):
        return f"did you mean {meant[0]}?"
    return f"there are {', '.join(known)}"


def _fields_beside(loc: Sequence[int | str]) -> list[str]:
    """Return the fields at the place of the last part of a location; none if that is not within a job spec."""
    start = next((i for i, part in enumerate(loc) if part in _KINDS), None)
    if start is None:
        return []
    here = [_KINDS[loc[start]]]
    for part in loc[start + 1 : -1]:
        fields = [model.model_fields[str(part)] for model in here if part in model.model_fields]
        here = [inner for field in fields for inner in _models(field.annotation)] if fields else here  # else a tag
    return sorted({name for model in here for name in model.model_fields})


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the models that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]
