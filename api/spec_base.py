"""What every kind of job spec has, and how strictly specs are read."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from .names import Name

_KEY = r"[a-z0-9]([a-z0-9._/-]{0,61}[a-z0-9])?"
_VALUE = r"[A-Za-z0-9]?[A-Za-z0-9._ -]{0,62}"
LabelKey = Annotated[str, StringConstraints(pattern=f"^{_KEY}$")]
LabelValue = Annotated[str, StringConstraints(pattern=f"^{_VALUE}$", max_length=63)]
#: What jobs are listed by: `key=value`, or `key` alone for any value.
LabelFilter = Annotated[str, StringConstraints(pattern=f"^{_KEY}(={_VALUE})?$")]
Labels = Annotated[dict[LabelKey, LabelValue], Field(max_length=16)]


class Strict(BaseModel):
    """A model that refuses unknown fields, coerced types, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class JobSpecBase(Strict):
    name: Name
    """What people call the job: lower-case letters, digits, dashes. Need not be unique."""
    labels: Labels = Field(default_factory=dict)
    """Up to 16 key-value pairs of your own, shown with the job."""
    priority: int = Field(default=0, ge=-100, le=100)
    """Who goes first where there is not room for all: higher before lower, then older before younger. A higher one
    makes lower trainings checkpoint and wait."""
    retries: int = Field(default=3, ge=0, le=100)
    """New attempts allowed after faults of the job's own processes, such as an error or too little memory; the same
    fault twice at the same step ends the job at once. Lost workers, machines, clusters and buckets do not count."""
    deadline: int | None = Field(default=None, ge=1, le=10**9)
    """Seconds from acceptance after which the job is stopped and failed; null means none."""
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    """Fixes initial weights, data order and dropout."""
