"""The Python client: one synchronous class whose methods are the routes of the API.

    with Client("http://127.0.0.1:8700", key) as client:
        job = client.submit({"name": "tiny", "data": {"dataset": "stdlib"}, "model": {"size": "1m"}})
        for update in client.follow(job.id):
            print(update.job.state, update.job.progress.step)

Every method raises `ApiError` for an answer that is not a success, `Unreachable` when there is none, and
`InvalidData` for one that this version does not understand.
"""

import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, Any, NoReturn, Self, TypeVar
from urllib.parse import quote

import httpx2
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from . import __version__
from .download import ShowProgress, save
from .errors import (
    ApiError,
    BadRequest,
    Fault,
    InvalidData,
    InvalidSpec,
    NotFound,
    Problem,
    RateLimited,
    Unavailable,
    Unreachable,
    api_error,
)
from .jobs import (
    Checkpoint,
    Event,
    Job,
    JobState,
    LogLine,
    MetricPoint,
    ModelFile,
    Page,
    Plan,
    QueueEntry,
    Readiness,
    Rewind,
)
from .json_values import beyond_json
from .live import EVENT_KINDS, LOG_KINDS, LONGEST_PAUSE, METRIC_KINDS, Kinds, Stream
from .prepare_spec import PrepareSpec
from .project_client import ProjectClient
from .spec import TrainSpec
from .sse import MEDIA_TYPE
from .verification import ShowChecking, Verification, read_verification

T = TypeVar("T")
Spec = Mapping[str, Any] | TrainSpec | PrepareSpec

RETRY_SECONDS = 3.0
"""How long a request that may safely be repeated is repeated while there is no answer, or only a 503."""
PATIENCE_SECONDS = 120.0
"""How long `follow` and live streams wait for a control plane that is away."""
SILENCE_SECONDS = 45.0
"""How long a live stream may bring nothing before it counts as broken: three times the server's keep-alive."""
PAGE = 200
"""Items asked for at once where all of them are wanted."""

_JOB = TypeAdapter(Job)
_JOBS = TypeAdapter(Page[Job])
_PLAN: TypeAdapter[Plan] = TypeAdapter(Annotated[Plan, Field(discriminator="kind")])
_EVENTS = TypeAdapter(Page[Event])
_METRICS = TypeAdapter(Page[MetricPoint])
_CHECKPOINTS = TypeAdapter(Page[Checkpoint])
_LOGS = TypeAdapter(Page[LogLine])
_QUEUE = TypeAdapter(Page[QueueEntry])
_READINESS = TypeAdapter(Readiness)


@dataclass(frozen=True)
class Update:
    """What `follow` saw at one look: the job, and the events since the last look, oldest first."""

    job: Job
    events: tuple[Event, ...]


class Client:
    """A connection to one control plane. Close it, or use it in a `with` block.

    `timeout` is in seconds, for connecting and for each wait on the answer. `transport`, `sleep` and `clock`
    exist for tests.
    """

    def __init__(
        self,
        url: str,
        api_key: str,
        *,
        transport: httpx2.BaseTransport | None = None,
        timeout: float = 30.0,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.url = url.rstrip("/")
        self.last_answer = b""
        """Body of the newest answer, byte for byte, for programs that want all that the API said."""
        self.project = ProjectClient(self)
        """The project that the key opens."""
        self._sleep = sleep
        self._clock = clock
        self._timeout = timeout
        self._http = httpx2.Client(
            headers={"Authorization": f"Bearer {api_key}", "User-Agent": f"lockstep/{__version__}"},
            transport=transport,
            timeout=timeout,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def submit(self, spec: Spec, *, idempotency_key: str | None = None) -> Job:
        """Submit a job, or return the one that was submitted with the same key before.

        The default key is fresh, which makes this client's own retries safe; give one of your own to make a
        whole script safe to run again. Raises InvalidSpec, IdempotencyMismatch, BadRequest.
        """
        headers = {"Idempotency-Key": _idempotency_key(idempotency_key)}
        return self._ask(_JOB, "POST", "/v1/jobs", body=_json(spec), headers=headers)

    def plan(self, spec: Spec) -> Plan:
        """Return what a job would need and do, without creating it. Raises InvalidSpec."""
        return self._ask(_PLAN, "POST", "/v1/jobs", params={"dry_run": "true"}, body=_json(spec))

    def get(self, job_id: str) -> Job:
        return self._ask(_JOB, "GET", _path(job_id))

    def list(
        self,
        state: JobState | str | Iterable[JobState | str] | None = None,
        name: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
        label: str | Iterable[str] | None = None,
    ) -> Page[Job]:
        """Return one page of jobs, newest first: those in any of the states that have all of the labels.

        A label is `key=value`, or `key` for any value.
        """
        params = {"state": _all(state), "name": name, "limit": limit, "cursor": cursor, "label": _all(label)}
        return self._ask(_JOBS, "GET", "/v1/jobs", params=params)

    def iter_jobs(
        self,
        state: JobState | str | Iterable[JobState | str] | None = None,
        name: str | None = None,
        label: str | Iterable[str] | None = None,
    ) -> Iterator[Job]:
        """Yield all jobs that `list` would, newest first, asking for further pages as needed."""
        states, labels, cursor = _all(state), _all(label), None
        while True:
            page = self.list(states, name, PAGE, cursor, labels)
            yield from page.items
            if not (cursor := page.next_cursor):
                return

    def cancel(self, job_id: str, keep_checkpoint: bool = False) -> Job:
        """Ask for a job to be stopped, after one more checkpoint if wanted. Raises Conflict when it has ended."""
        body = _json({"keep_checkpoint": keep_checkpoint})
        return self._ask(_JOB, "POST", _path(job_id, "cancel"), body=body, patience=0)

    def pause(self, job_id: str) -> Job:
        """Ask a training to write a checkpoint and let go of its workers. Raises Conflict when it cannot."""
        return self._ask(_JOB, "POST", _path(job_id, "pause"), patience=0)

    def resume(self, job_id: str, workers: int | None = None) -> Job:
        """Let a paused job go on. Raises Conflict when it is not paused, InvalidSpec when it cannot run so."""
        return self._ask(_JOB, "POST", _path(job_id, "resume"), body=_json({"workers": workers}), patience=0)

    def retry(self, job_id: str, *, idempotency_key: str | None = None) -> Job:
        """Submit an ended job once more: a new job that goes on from its newest checkpoint. Otherwise as `submit`."""
        headers = {"Idempotency-Key": _idempotency_key(idempotency_key)}
        return self._ask(_JOB, "POST", _path(job_id, "retry"), headers=headers)

    def queue(self) -> Page[QueueEntry]:
        """Return the jobs that wait for their turn, who is next first."""
        return self._ask(_QUEUE, "GET", "/v1/queue")

    def delete(self, job_id: str) -> None:
        """Delete an ended job with everything it wrote. Raises Conflict while it runs."""
        self._call("DELETE", _path(job_id), patience=0)

    def events(self, job_id: str, after: int = 0, limit: int = PAGE) -> Page[Event]:
        """Return the events whose `seq` is greater than `after`, oldest first."""
        return self._ask(_EVENTS, "GET", _path(job_id, "events"), params={"after": after, "limit": limit})

    def metrics(
        self,
        job_id: str,
        keys: Iterable[str] | None = None,
        from_step: int = 0,
        max_points: int | None = None,
    ) -> Page[MetricPoint]:
        """Return the metrics of a job's history by step; `keys` picks some, `max_points` thins them out."""
        joined = None if keys is None else ",".join(keys)
        params = {"keys": joined, "from_step": from_step, "max_points": max_points}
        return self._ask(_METRICS, "GET", _path(job_id, "metrics"), params=params)

    def checkpoints(self, job_id: str) -> Page[Checkpoint]:
        return self._ask(_CHECKPOINTS, "GET", _path(job_id, "checkpoints"))

    def download(self, job_id: str, step: int, name: ModelFile, to: Path, progress: ShowProgress | None = None) -> None:
        """Write one file of a checkpoint to the path `to`, replacing what is there once all of it has come.

        Raises NotFound, SaveError if it cannot be written, and Unreachable if it breaks off, which a file does whose
        checkpoint is damaged.
        """
        path = _path(job_id, "checkpoints", str(step), "files", name)
        with self._begun(path, headers={"Accept-Encoding": "identity"}) as response:
            save(response, to, progress)

    def verify(self, job_id: str, step: int | None = None, progress: ShowChecking | None = None) -> Verification:
        """Let the control plane read every byte of a job's checkpoints, or of one step's, and return what it found.

        `progress` is called while it reads. Raises NotFound, and Unreachable if it breaks off: then nothing is certain.
        """
        with self._begun(_path(job_id, "verification"), {"step": step}) as response:
            found, self.last_answer = read_verification(response, job_id, progress)
        return found

    def delete_checkpoint(self, job_id: str, step: int) -> None:
        """Delete one checkpoint. Raises Conflict while something needs it."""
        self._call("DELETE", _path(job_id, "checkpoints", str(step)), patience=0)

    def logs(self, job_id: str, rank: int | None = None, cursor: str | None = None) -> Page[LogLine]:
        """Return one page of what the workers wrote: all of them, or one rank."""
        return self._ask(_LOGS, "GET", _path(job_id, "logs"), params={"rank": rank, "cursor": cursor})

    def ready(self) -> Readiness:
        """Return how the control plane sees itself; one that is not ready is an answer, not an error."""
        response = self._once("GET", "/readyz")
        if not response.is_success and response.status_code != httpx2.codes.SERVICE_UNAVAILABLE:
            self._refuse(response)
        return self._read(_READINESS, response)

    def follow(self, job_id: str, poll_seconds: float = 1.0, *, patience: float = PATIENCE_SECONDS) -> Iterator[Update]:
        """Yield an update every `poll_seconds` until the job has ended; the last one holds its end.

        A control plane that is away is waited for up to `patience` seconds (the job does not need it), then
        Unreachable is raised. It polls, and opens no live stream: progress is part of the job, not an event.
        """
        after = 0
        while True:
            # The job first: events up to an end that it shows are then certain to be there.
            job = self._wait_for(_JOB, _path(job_id), patience)
            events = tuple(self._new_events(job_id, after, patience))
            after = events[-1].seq if events else after
            yield Update(job, events)
            if job.state.ended:
                return
            self._sleep(poll_seconds)

    def tail(self, job_id: str, rank: int | None = None, *, patience: float = PATIENCE_SECONDS) -> Iterator[LogLine]:
        """Yield the log lines that exist, then new ones, until the job has ended. Raises as `follow` does."""
        return self.stream_logs(job_id, rank, patience=patience)

    def stream_events(
        self, job_id: str, last_id: str | None = None, *, patience: float = PATIENCE_SECONDS
    ) -> Stream[Event]:
        """Yield the events that exist, then new ones, until the job has ended.

        `last_id`: begin after it; it is the `last_id` of an earlier stream. Raises Unreachable when the control
        plane is away for longer than `patience` seconds, NotFound when the job is, InvalidData when what is stored
        is damaged.
        """
        return self._stream(_path(job_id, "events"), EVENT_KINDS, last_id, patience)

    def stream_metrics(
        self,
        job_id: str,
        keys: Iterable[str] | None = None,
        from_step: int = 0,
        last_id: str | None = None,
        *,
        patience: float = PATIENCE_SECONDS,
    ) -> Stream[MetricPoint | Rewind]:
        """Yield the points that exist, then new ones, until the job has ended. Otherwise as `stream_events`.

        A Rewind says beyond which step to forget the points so far; what is left then always equals `metrics`.
        """
        params = {"keys": None if keys is None else ",".join(keys), "from_step": from_step}
        return self._stream(_path(job_id, "metrics"), METRIC_KINDS, last_id, patience, params)

    def stream_logs(
        self,
        job_id: str,
        rank: int | None = None,
        last_id: str | None = None,
        *,
        patience: float = PATIENCE_SECONDS,
    ) -> Stream[LogLine]:
        """Yield the log lines that exist, then new ones, until the job has ended. Otherwise as `stream_events`."""
        return self._stream(_path(job_id, "logs"), LOG_KINDS, last_id, patience, {"rank": rank})

    def _new_events(self, job_id: str, after: int, patience: float) -> Iterator[Event]:
        while True:
            page = self._wait_for(_EVENTS, _path(job_id, "events"), patience, params={"after": after, "limit": PAGE})
            yield from page.items
            if not page.items or not page.next_cursor:
                return
            after = page.items[-1].seq

    def _stream(
        self,
        path: str,
        kinds: Kinds[T],
        last_id: str | None,
        patience: float,
        params: Mapping[str, Any] | None = None,
    ) -> Stream[T]:
        def connect(since: str | None) -> AbstractContextManager[Iterator[bytes]]:
            return self._open(path, params or {}, since)

        return Stream(connect, kinds, last_id, patience, self._sleep, self._clock)

    @contextmanager
    def _open(self, path: str, params: Mapping[str, Any], last_id: str | None) -> Iterator[Iterator[bytes]]:
        """Ask for a stream and give its bytes. Raises what `_call` does, and Unreachable when it breaks."""
        headers = {"Accept": MEDIA_TYPE} | ({} if last_id is None else {"Last-Event-ID": last_id})
        with self._begun(path, params, headers) as response:
            if not response.headers.get("content-type", "").startswith(MEDIA_TYPE):
                raise InvalidData(f"{response.url} answered with no live stream. Is the server as new as the client?")
            yield response.iter_bytes()

    @contextmanager
    def _begun(
        self, path: str, params: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[httpx2.Response]:
        """Ask for what comes piece by piece, and give the answer when it begins. Raises what `_open` does."""
        given = {key: value for key, value in (params or {}).items() if value is not None}
        timeout = httpx2.Timeout(self._timeout, read=max(self._timeout, SILENCE_SECONDS))
        try:
            with self._http.stream("GET", self.url + path, params=given, headers=headers, timeout=timeout) as response:
                if not response.is_success:
                    response.read()
                    self._refuse(response)
                yield response
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            raise self._no_answer(error) from error

    def _wait_for(self, answer: TypeAdapter[T], path: str, patience: float, **request: Any) -> T:
        try:
            return self._ask(answer, "GET", path, patience=patience, **request)
        except (Unreachable, Unavailable) as error:
            raise Unreachable(f"Gave up after {patience:.0f} s. {error}") from error

    def _ask(self, answer: TypeAdapter[T], method: str, path: str, **request: Any) -> T:
        return self._read(answer, self._call(method, path, **request))

    def _call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        patience: float = RETRY_SECONDS,
    ) -> httpx2.Response:
        """Send until there is an answer other than 503 or a rate limit, for at most `patience` seconds; 0: once."""
        began = self._clock()
        for attempt in count():
            try:
                response = self._once(method, path, params=params, body=body, headers=headers)
                if response.is_success:
                    return response
                self._refuse(response)
            except (Unreachable, Unavailable, RateLimited) as error:
                pause = min(0.2 * 2 ** min(attempt, 10), LONGEST_PAUSE)
                if isinstance(error, RateLimited) and error.retry_after is not None:
                    pause = max(pause, error.retry_after)
                if self._clock() - began + pause > patience:
                    raise
                self._sleep(pause)
        raise AssertionError("count() does not end")

    def _once(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx2.Response:
        given = {key: value for key, value in (params or {}).items() if value is not None}
        kind = {"Content-Type": "application/json"} if body is not None else {}
        try:
            response = self._http.request(
                method, self.url + path, params=given, content=body, headers={**kind, **(headers or {})}
            )
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            raise self._no_answer(error) from error
        self.last_answer = response.content
        return response

    def _no_answer(self, error: Exception) -> Unreachable:
        return Unreachable(
            f"No answer from {self.url} ({str(error) or type(error).__name__}). Start the control plane "
            "with `make up` or `lockstep-server up`, or set LOCKSTEP_URL to where it runs."
        )

    def _read(self, answer: TypeAdapter[T], response: httpx2.Response) -> T:
        try:
            return answer.validate_json(response.content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the body"
            raise InvalidData(
                f"lockstep {__version__} does not understand the answer of {response.url} "
                f"({where}: {first['msg']}). Is LOCKSTEP_URL right, and is the client as new as the server?"
            ) from error

    def _refuse(self, response: httpx2.Response) -> NoReturn:
        """Raise the error that an answer stands for, whether it is one of ours or a proxy's."""
        try:
            problem = Problem.model_validate_json(response.content)
        except ValidationError:
            status = f"{response.status_code} {response.reason_phrase}".strip()
            # A gateway in front of a control plane that is away says 502 to 504.
            kind = Unavailable if response.status_code in (502, 503, 504) else ApiError
            raise kind(
                f"{response.url} answered {status}, but not in the way of Lockstep. Is LOCKSTEP_URL right?"
            ) from None
        found = api_error(problem)
        wait = response.headers.get("retry-after", "")
        found.retry_after = float(wait) if wait.isascii() and wait.isdigit() else None
        raise found


def _idempotency_key(given: str | None) -> str:
    """Return a fresh key, or the given one; BadRequest if no header can carry it."""
    key = str(uuid.uuid4()) if given is None else given
    if not (key and key.isascii() and key.isprintable()):
        raise BadRequest(f"{key!r} cannot be an idempotency key: use printable ASCII characters.")
    return key


def _path(job_id: str, *rest: str) -> str:
    """Return the path of a job or of something below it; what is not an id cannot lead elsewhere."""
    if not job_id.strip("."):
        raise NotFound(f"{job_id!r} is not a job id; `lockstep list` shows those that exist.")
    return "/".join(["/v1/jobs", quote(job_id, safe=""), *rest])


def _all(values: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return none, one or many as a tuple; text is one."""
    return () if values is None else (values,) if isinstance(values, str) else tuple(values)


def _json(spec: Spec) -> bytes:
    if isinstance(spec, BaseModel):
        return spec.model_dump_json().encode()
    try:
        return json.dumps(spec, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        fault = beyond_json(spec) or Fault(path="$", message=str(error))
        raise InvalidSpec(f"{fault.path}: {fault.message}", errors=[fault]) from error
