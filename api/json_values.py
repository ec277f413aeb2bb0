"""What JSON can hold, and what it cannot."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from .errors import Fault

_DEEPEST = 50
"""Levels of a job spec; far more than any has."""


def beyond_json(value: Any, path: str = "$", depth: int = 0) -> Fault | None:
    """Return the first value within that JSON does not have (NaN, another type, a loop), or None."""
    if depth > _DEEPEST:
        return Fault(path=path, message="nested too deeply for a job spec")
    if isinstance(value, Mapping):
        inner = [(f"{path}.{key}", item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        inner = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
    elif value is None or isinstance(value, str | int) or (isinstance(value, float) and isfinite(value)):
        return None
    else:
        return Fault(
            path=path,
            message=f"{value!r:.60} cannot be written as JSON, which has finite numbers, texts, lists and objects",
        )
    return next((fault for where, item in inner if (fault := beyond_json(item, where, depth + 1))), None)
