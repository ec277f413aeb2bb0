"""Names and identifiers: what may appear in a URL, a bucket key, a Ray submission id or a Kubernetes label."""

import re
import secrets
import time
from typing import Annotated

from pydantic import StringConstraints

NAME = re.compile(r"^[a-z0-9](?:[a-z0-9-]*[a-z0-9])?$")
#: Lower-case letters, digits and dashes, 1 to 47 characters: safe as a bucket key segment, in a URL and as
#: a Kubernetes object name (KubeRay allows 47). No dot, no slash, no control character can get in.
Name = Annotated[str, StringConstraints(pattern=NAME.pattern, min_length=1, max_length=47)]

#: A job, by the id that it was given.
JobId = Annotated[str, StringConstraints(pattern=r"^job-[0-9a-hjkmnp-tv-z]{20}$")]

#: A dataset by name (its newest version) or pinned, `name@version`.
DatasetRef = Annotated[
    str,
    StringConstraints(
        pattern=r"^[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:@[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)?$",
        min_length=1,
        max_length=95,
    ),
]

END_OF_TEXT = "<|endoftext|>"
"""The token that ends a document, where a tokenizer of ours has one."""

_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"
JOB_ID = re.compile(r"^job-[0-9a-hjkmnp-tv-z]{20}$")


def new_job_id() -> str:
    """Return a fresh job id: 10 characters of milliseconds since 1970, 10 of randomness (50 bits).

    Ids of later jobs sort after those of earlier ones, so a list ordered by id is ordered by age.
    """
    millis = time.time_ns() // 1_000_000
    clock = "".join(_CROCKFORD[(millis >> shift) & 31] for shift in range(45, -1, -5))
    return f"job-{clock}{''.join(secrets.choice(_CROCKFORD) for _ in range(10))}"


def first_id_after(beginning: str) -> str | None:
    """Return the lowest id above all that begin so; None if there is none, or if no id begins so."""
    stem = beginning.removeprefix("job-").rstrip(_CROCKFORD[-1])
    if not JOB_ID.fullmatch(f"job-{stem:0<20}") or not stem:
        return None
    last = _CROCKFORD[_CROCKFORD.index(stem[-1]) + 1]
    return f"job-{stem[:-1] + last:0<20}"


def submission_id(job_id: str, attempt: int) -> str:
    """Return the Ray submission id of one attempt: deterministic, so that posting twice cannot run twice."""
    return f"{job_id}-{attempt}"
