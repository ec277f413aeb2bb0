"""What a verification of checkpoints says: lines of JSON, of which the last one is the verdict.

The control plane reads, for the client has no bucket. All lines before the last say how far it is: while gigabytes are
read, somebody wants to know, and no proxy cuts off an answer that goes on.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Annotated, Literal

import httpx2
from pydantic import Field, TypeAdapter, ValidationError

from . import __version__
from .errors import InvalidData, Unreachable
from .jobs import Answer

MEDIA_TYPE = "application/x-ndjson"

Verdict = Literal["well", "damaged", "gone", "unknown"]
"""`gone`: it was deleted meanwhile, by retention or a user. `unknown`: the store did not answer."""


class Checking(Answer):
    """How far it is."""

    type: Literal["progress"] = "progress"
    step: int
    """The checkpoint that is being read."""
    checked: int
    """Bytes of it so far; less than before where a part is read once more, to be certain."""
    size: int
    """Bytes of it in all."""


ShowChecking = Callable[[Checking], None]


class Damage(Answer):
    """An object of a checkpoint that is not what was written."""

    name: str
    """Below the checkpoint's prefix."""
    kind: Literal["missing", "short", "altered"]
    message: str
    tensors: list[str] = Field(default_factory=list)
    """Those of the model's tensors in it that are lost. The optimizer's have no hashes of their own."""


class CheckedCheckpoint(Answer):
    """What became of a checkpoint."""

    step: int
    segment: str
    verdict: Verdict
    message: str
    """One sentence on it."""
    parts: int | None = None
    """As its manifest says; null if that could not be read."""
    size: int | None = None
    """Bytes of the parts."""
    damage: list[Damage] = Field(default_factory=list)


class Verification(Answer):
    """The last line: what became of all of them, oldest first."""

    type: Literal["verdict"] = "verdict"
    verdict: Verdict
    """`damaged` if any of them is, else `unknown` if that is not certain. What is gone counts for nothing, unless all
    are."""
    checkpoints: list[CheckedCheckpoint]


_LINE: TypeAdapter[Checking | Verification] = TypeAdapter(
    Annotated[Checking | Verification, Field(discriminator="type")]
)


def verdict_of(checkpoints: list[CheckedCheckpoint]) -> Verdict:
    """Return the verdict on several checkpoints; of none it is `gone`, since nothing there was found well."""
    found = {checkpoint.verdict for checkpoint in checkpoints}
    worst: tuple[Verdict, ...] = ("damaged", "unknown", "well", "gone")
    return next((verdict for verdict in worst if verdict in found), "gone")


def read_verification(
    response: httpx2.Response, job_id: str, progress: ShowChecking | None
) -> tuple[Verification, bytes]:
    """Read an answer to its last line; return what that says, and the line. Raises Unreachable if it breaks off."""
    with suppress(httpx2.RequestError):
        for line in split_lines(response.iter_bytes()):
            told = _parse(line)
            if isinstance(told, Verification):
                return told, line
            if progress is not None:
                progress(told)
    raise Unreachable(
        f"The verification of {job_id} broke off, so nothing is certain. Try again, perhaps a step at a time by --step."
    )


def split_lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield what a line end follows, and no empty lines. Only our own line end counts: text may hold others."""
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        yield from filter(None, whole)


def _parse(line: bytes) -> Checking | Verification:
    try:
        return _LINE.validate_json(line)
    except ValidationError as error:
        raise InvalidData(
            f"lockstep {__version__} does not understand the verification ({error.errors()[0]['msg']}). Is "
            "LOCKSTEP_URL right, and is the client as new as the server?"
        ) from error
