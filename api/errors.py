"""The errors of Lockstep: one tree. Each message says what happened, to what, and what to do.

LockstepError
├── ApiError                    an answer of the API that is not a success
│   ├── InvalidSpec             422: the faults are listed with their JSON paths
│   ├── Unauthorized            401
│   ├── Forbidden               403: the key's role does not allow it
│   ├── NotFound                404
│   ├── Conflict                409
│   ├── TooLarge                413
│   ├── HeadersTooLarge         431
│   ├── QuotaExceeded           429: the project has all that it may have
│   ├── RateLimited             429: too many requests
│   └── Unavailable             503: try again later
├── Unreachable                 no answer at all
├── StorageError                the bucket
│   ├── ObjectMissing           no such object
│   ├── StorageDenied           credentials or policy refused
│   └── StorageUnavailable      no answer, or only errors, after the retries
├── SnapshotFailed              no memory for a checkpoint's copy of the weights
├── InvalidData                 bytes that are not what their hash, header or schema says
└── Unsupported                 what a spec asks for and the machine cannot do
"""

from collections.abc import Collection
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from .fields import advice


class LockstepError(Exception):
    """The root of every error that Lockstep raises on purpose."""


class Fault(BaseModel):
    """One thing wrong with a request."""

    path: str
    """Where, as a JSON path: `$.model.width`."""
    message: str


class Problem(BaseModel):
    """The body of every error answer: RFC 9457 problem details, media type application/problem+json."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    type: str
    """Stable: `urn:lockstep:problem:<name>`; programs decide by it."""
    title: str
    status: int
    detail: str
    request_id: str
    errors: list[Fault] = Field(default_factory=list)


class ApiError(LockstepError):
    """An answer of the API that is not a success."""

    status: int = 500
    name: ClassVar[str] = "internal-error"
    title: ClassVar[str] = "Something went wrong on our side"

    def __init__(
        self,
        detail: str,
        *,
        errors: list[Fault] | None = None,
        request_id: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after = retry_after
        """In how many seconds it may go better, where that is known."""
        self.errors = errors or []
        self.request_id = request_id

    def problem(self, request_id: str) -> Problem:
        return Problem(
            type=f"urn:lockstep:problem:{self.name}",
            title=self.title,
            status=self.status,
            detail=self.detail,
            request_id=request_id,
            errors=self.errors,
        )


class BadRequest(ApiError):
    """400: the request is not JSON, or not HTTP as we understand it."""

    status, name, title = 400, "bad-request", "The request cannot be read"


class InvalidSpec(ApiError):
    """422: the request is readable but cannot be carried out; the faults say where."""

    status, name, title = 422, "invalid", "The request cannot be carried out"


class IdempotencyMismatch(ApiError):
    """422: an idempotency key came again with another body."""

    status, name, title = 422, "idempotency-mismatch", "This idempotency key belongs to another request"


class Unauthorized(ApiError):
    """401: no API key, or one that is not valid."""

    status, name, title = 401, "unauthorized", "An API key is needed"


class Forbidden(ApiError):
    """403: the key is valid, but its role does not allow this."""

    status, name, title = 403, "forbidden", "The role of this API key does not allow this"


class NotFound(ApiError):
    """404: no such thing, or none of yours."""

    status, name, title = 404, "not-found", "Not found"


class MethodNotAllowed(ApiError):
    """405: the path exists, the method does not."""

    status, name, title = 405, "method-not-allowed", "Method not allowed"


class Conflict(ApiError):
    """409: not in this state."""

    status, name, title = 409, "conflict", "Not possible in this state"


class TooLarge(ApiError):
    """413: the body is larger than any job spec."""

    status, name, title = 413, "too-large", "The request body is too large"


class HeadersTooLarge(ApiError):
    """431: the request's headers are larger than anything that this API knows."""

    status, name, title = 431, "headers-too-large", "The request headers are too large"


class QuotaExceeded(ApiError):
    """429: the project has all that its quotas allow; nothing was changed."""

    status, name, title = 429, "quota-exceeded", "The project's quota is used up"


class RateLimited(ApiError):
    """429: too many requests in a short time; nothing was done."""

    status, name, title = 429, "rate-limited", "Too many requests"


class Unavailable(ApiError):
    """503: something that this request needs does not answer."""

    status, name, title = 503, "unavailable", "Try again later"


def api_error(problem: Problem) -> ApiError:
    """Return the error that an answer stands for; a plain ApiError for a type that we do not know."""
    name = problem.type.rpartition(":")[2]
    kind = next((k for k in ApiError.__subclasses__() if k.name == name), ApiError)
    error = kind(problem.detail, errors=problem.errors, request_id=problem.request_id)
    error.status = problem.status
    return error


class Unreachable(LockstepError):
    """The control plane did not answer."""


class StorageError(LockstepError):
    """The bucket did not do what was asked."""


class ObjectMissing(StorageError):
    """There is no object at this key."""


class StorageDenied(StorageError):
    """The store refused the credentials, or they do not allow this."""


class StorageUnavailable(StorageError):
    """The store did not answer, or answered only with errors."""


class SnapshotFailed(LockstepError):
    """There is no memory for a copy of the weights: this checkpoint is not written, the training goes on."""


class InvalidData(LockstepError):
    """Bytes are not what their hash, their header or their schema says."""


class Unsupported(LockstepError):
    """A spec asks for something that this machine cannot do."""


def faults_of(errors: list[Any]) -> list[Fault]:
    """Translate pydantic's error list: JSON paths without union tags, one plain sentence each."""
    faults = []
    sized = {error["loc"][:-1] for error in errors if error["loc"][-1:] == ("size",)}
    for error in errors:
        if error["type"] == "default_factory_not_called" or _would_come_of_size(error, sized):
            continue  # a consequence of another fault in the list
        faults.append(Fault(path=_json_path(error["loc"]), message=_sentence(error)))
    return faults


def _would_come_of_size(error: Any, sized: Collection[tuple[int | str, ...]]) -> bool:
    """Whether a field is only missing because the size that gives it is wrong."""
    *parent, name = error["loc"] or ("",)
    return error["type"] == "missing" and name in ("layers", "width") and tuple(parent) in sized


#: What pydantic puts into a location that is no field: the request's body, and the tags of unions.
_NO_FIELDS = {"body", "train", "prepare", "python-stdlib"}
#: Tags that are also names of fields, elsewhere.
_TAGS = {("source", "text"), ("workers", "number"), ("workers", "range")}


def _json_path(loc: tuple[int | str, ...]) -> str:
    path = "$"
    for before, part in zip((None, *loc), loc, strict=False):
        if part in _NO_FIELDS or (before, part) in _TAGS:
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path


def _sentence(error: Any) -> str:
    match error["type"]:
        case "extra_forbidden":
            return f"unknown field; {advice(error['loc'])}"
        case "missing":
            return "this field is required"
        case "value_error":
            return str(error["msg"]).removeprefix("Value error, ")
        case "string_pattern_mismatch" if error["loc"][-1] in ("job_id", "from_job"):
            return f"{str(error['input'])[:60]!r} is not a job's id; `lockstep list` shows the ids"
        case "string_pattern_mismatch" if error["loc"][:2] == ("query", "label"):
            return f"{str(error['input'])[:60]!r} is no label; write `key=value`, or `key` alone for any value"
        case "string_pattern_mismatch" if error["loc"][-1] in ("name", "dataset", "folder"):
            return f"{str(error['input'])[:60]!r} is not allowed here; use small letters, digits and dashes"
        case "string_pattern_mismatch":
            return f"{str(error['input'])[:60]!r} is not allowed here; it must match {error['ctx']['pattern']}"
        case _:
            message = str(error["msg"])
            return message[:1].lower() + message[1:]
