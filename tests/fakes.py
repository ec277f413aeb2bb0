"""Stand-ins for S3 and Ray, in memory, and sample rows, specs and datasets for the service's tests.

The stand-ins imitate the other side of the wire, never our own logic.
"""

import json
import re
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest

from api.documents import (
    CheckpointRef,
    ControlDocument,
    DatasetDocument,
    FaultDocument,
    HeartbeatDocument,
    Manifest,
    ResultDocument,
    SegmentDocument,
    ShardDocument,
    SplitDocument,
    StreamLine,
)
from api.errors import InvalidData, ObjectMissing, StorageUnavailable
from api.jobs import JobState, Progress, Reason
from api.layout import JobLayout, chunk
from api.prepare_spec import PrepareSpec
from api.spec import TrainSpec, job_spec_adapter
from api.storage import Bucket, ObjectInfo
from service.leases import Leases
from service.ray_backend import RayBackend
from service.reconciler import Reconciler
from service.rows import JobRow, NewEvent
from service.settings import Settings
from service.store import Store
from tests.databases import database_url, make_database, opened

Hook = Callable[[str], None]
"""Called with the name of each side effect, before and after it; may raise."""


def no_hook(_: str) -> None:
    return None


class MemoryBucket(Bucket):
    """S3 in a dictionary. `reachable` and `writable` switch it off; every other method is Bucket's own."""

    def __init__(self, url: str = "s3://memory/root") -> None:
        self.url = url
        self.content: dict[str, bytes] = {}
        self.reachable = self.writable = True
        self.hook: Hook = no_hook
        self._lock = threading.Lock()

    def get(self, key: str) -> bytes:
        self._answer(key)
        with self._lock:
            if key not in self.content:
                raise ObjectMissing(f"{self.url}/{key} does not exist")
            return self.content[key]

    def get_range(self, key: str, start: int, length: int) -> bytes:
        body = self.get(key)[start : start + length]
        if len(body) != length:
            raise InvalidData(f"{self.url}/{key} gave {len(body)} bytes at {start} where {length} were asked for")
        return body

    def put(self, key: str, body: bytes) -> None:
        self._answer(key, self.writable)
        self.hook(f"before put {key}")
        with self._lock:
            self.content[key] = body
        self.hook(f"after put {key}")

    def put_views(self, key: str, views: Sequence[memoryview]) -> None:
        self.put(key, b"".join(views))

    def size(self, key: str) -> int:
        return len(self.get(key))

    def objects(self, prefix: str) -> list[ObjectInfo]:
        self._answer(prefix)
        with self._lock:
            return [ObjectInfo(key, len(body)) for key, body in sorted(self.content.items()) if key.startswith(prefix)]

    def files(self, prefix: str) -> list[ObjectInfo]:
        return [item for item in self.objects(prefix) if "/" not in item.key[len(prefix) :]]

    def folders(self, prefix: str) -> list[str]:
        rests = [item.key[len(prefix) :] for item in self.objects(prefix)]
        return sorted({rest.split("/", 1)[0] for rest in rests if "/" in rest})

    def delete(self, keys: list[str]) -> None:
        self._answer("many", self.writable)
        self.hook("before delete")
        with self._lock:
            for key in keys:
                self.content.pop(key, None)
        self.hook("after delete")

    def _answer(self, key: str, able: bool = True) -> None:
        if not (self.reachable and able):
            raise StorageUnavailable(f"the store did not answer for {self.url}/{key}")


class FakeRay:
    """Ray's REST API in memory: takes a submission id once, answers a duplicate with 500, forgets all on a restart."""

    def __init__(self, cpus: float = 8) -> None:
        self.session = "session-1"
        self.nodes: list[dict[str, float]] = [{"CPU": cpus, "memory": 16 * 2.0**30}]
        self.jobs: dict[str, str] = {}
        self.bodies: dict[str, dict[str, object]] = {}
        self.taken: list[tuple[str, str]] = []
        """Every (session, submission id) that was ever accepted."""
        self.posts: list[str] = []
        self.stops: list[str] = []
        self.reachable = True
        self.lose_reply: Callable[[], bool] = lambda: False
        """Whether the reply to a request that was carried out gets lost."""
        self.hook: Hook = no_hook

    def backend(self) -> RayBackend:
        return RayBackend("http://ray", None, 1.0, transport=httpx2.MockTransport(self.handle))

    def restart(self, session: str) -> None:
        """Come back empty, under another session name."""
        self.session, self.jobs = session, {}

    def handle(self, request: httpx2.Request) -> httpx2.Response:
        """Carry a request out and answer it; an httpx2.TransportError if no answer comes."""
        if not self.reachable:
            raise httpx2.ConnectError("connection refused", request=request)
        self.hook(f"before {request.method} {request.url.path}")
        response = self._act(request)
        self.hook(f"after {request.method} {request.url.path}")
        if self.lose_reply():
            raise httpx2.ReadTimeout("the reply was lost", request=request)
        return response

    def _act(self, request: httpx2.Request) -> httpx2.Response:
        path = request.url.path
        if path == "/api/version":
            return httpx2.Response(200, json={"session_name": self.session})
        if path == "/api/v0/nodes":
            rows = [
                {"node_id": f"node-{i}", "state": "ALIVE", "resources_total": {**total, "node:10.0.0.1": 1.0}}
                for i, total in enumerate(self.nodes)
            ]
            return httpx2.Response(200, json={"data": {"result": {"result": rows}}})
        if path == "/api/jobs/" and request.method == "POST":
            return self._submit(json.loads(request.content))
        match = re.fullmatch(r"/api/jobs/([^/]+)(/stop)?", path)
        if match is None or match[1] not in self.jobs:
            return httpx2.Response(404, text="no such job")
        if match[2]:
            self.stops.append(match[1])
            if self.jobs[match[1]] in ("PENDING", "RUNNING"):
                self.jobs[match[1]] = "STOPPED"
            return httpx2.Response(200, json={"stopped": True})
        return httpx2.Response(200, json={"status": self.jobs[match[1]], "message": "as Ray says"})

    def _submit(self, body: dict[str, object]) -> httpx2.Response:
        name = str(body["submission_id"])
        self.posts.append(name)
        if name in self.jobs:
            return httpx2.Response(500, text=f"ValueError: Job with submission_id {name} already exists")
        self.jobs[name] = "PENDING"
        self.bodies[name] = body
        self.taken.append((self.session, name))
        return httpx2.Response(200, json={"submission_id": name})


T0 = datetime(2026, 11, 23, 12, tzinfo=UTC)


def job_id(number: int) -> str:
    """Return the id of the number-th job; ids order as their numbers do."""
    digits = "".join("0123456789abcdefghjkmnpqrstvwxyz"[(number >> shift) & 31] for shift in range(95, -1, -5))
    return f"job-{digits}"


def train_spec(**fields: Any) -> TrainSpec:
    value = {"name": "first", "data": {"dataset": "words"}, "model": {"size": "1m"}, "steps": 10, **fields}
    spec = job_spec_adapter.validate_python(value)
    assert isinstance(spec, TrainSpec)
    return spec


def prepare_spec(**fields: Any) -> PrepareSpec:
    value = {"kind": "prepare", "name": "p", "dataset": "words", "source": {"type": "python-stdlib"}, **fields}
    spec = job_spec_adapter.validate_python(value)
    assert isinstance(spec, PrepareSpec)
    return spec


def row(number: int, spec: TrainSpec | PrepareSpec | None = None, **fields: Any) -> JobRow:
    """Return the number-th job, as accepted at T0 or `created_at`."""
    spec = spec or train_spec()
    defaults: dict[str, Any] = {
        "id": job_id(number),
        "project": "default",
        "owner": "key-1",
        "name": spec.name,
        "labels": dict(spec.labels),
        "spec": spec.model_dump(mode="json"),
        "dataset_version": "v1",
        "warnings": [],
        "state": JobState.QUEUED.value,
        "state_since": T0,
        "created_at": T0,
        "queued_at": fields.get("created_at", T0),
        "message": "accepted",
        "progress": Progress(total_steps=10).model_dump(),
        "retention": "active" if isinstance(spec, TrainSpec) else None,
    }
    return JobRow(**{**defaults, **fields})


ACCEPTED = NewEvent("state", "accepted", JobState.QUEUED)


def new_store(folder: Path) -> Store:
    """Return a store on an empty database of its own, that of the folder."""
    return Store(opened(make_database(folder)))


def leases_of(store: Store) -> Leases:
    """Return the leases of one more control plane on the same database; they wait for none that was there before."""
    return Leases(store._engine, seconds=0)


def settings_for(folder: Path, **fields: Any) -> Settings:
    """Return settings of which nothing comes from the environment of whoever runs the tests."""
    defaults: dict[str, Any] = {"database_url": database_url(folder), "storage": "s3://memory/root"}
    defaults |= {"rate_per_minute": 1e9, "rate_burst": 10**9, "stranger_rate_per_minute": 1e6}
    defaults["trusted_hosts"] = "testserver"  # the name that a TestClient asks for
    return Settings(**{**defaults, **fields})


def dataset(train_tokens: int = 100_001, eval_tokens: int = 10_001, vocab_size: int = 2048) -> DatasetDocument:
    def split(tokens: int) -> SplitDocument:
        shard = ShardDocument(name="shard-00000.bin", size=2 * tokens + 1024, tokens=tokens, blocks=["0" * 64])
        return SplitDocument(documents=1, tokens=tokens, text_bytes=4 * tokens, shards=[shard])

    return DatasetDocument(
        name="words",
        version="v1",
        tokenizer="bpe",
        vocab_size=vocab_size,
        dtype="uint16",
        splits={"train": split(train_tokens), "eval": split(eval_tokens)},
        unigram_loss=6.0,
        created_at=T0,
    )


class Crash(BaseException):
    """The process dies here."""


_STOPPED = {"pause": Reason.USER_PAUSED, "cancel": Reason.USER_CANCELLED, "superseded": Reason.SUPERSEDED}
"""What a worker group says that stopped because of a wish."""


class World:
    """Everything around one reconciler, and what the workers would do."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, **fields: Any) -> None:
        """`fields` are settings."""
        self.store, self.bucket, self.ray = new_store(folder), MemoryBucket(), FakeRay()
        self.settings, self.now = settings_for(folder, **fields), T0
        patch.setattr("service.reconciler.now", lambda: self.now)
        self.restart()

    def restart(self) -> None:
        """The control plane comes up again and remembers nothing."""
        self.reconciler = Reconciler(
            self.store,
            self.bucket,
            self.ray.backend(),
            self.settings,
            leases_of(self.store),
            clock=lambda: (self.now - T0).total_seconds(),
        )

    def add(self, number: int = 1, origin: CheckpointRef | None = None, **fields: Any) -> JobRow:
        """Accept a job; `fields` are of its spec, `origin` is the checkpoint of another job that it begins at."""
        init = origin.model_dump() if origin is not None else None
        job = row(number, train_spec(**fields), created_at=self.now, init=init)
        assert self.store.insert(job, ACCEPTED, None) is None
        return job

    def passes(self, count: int = 1, seconds: float = 1) -> None:
        for _ in range(count):
            self.now += timedelta(seconds=seconds)
            self.reconciler.reconcile_all()

    def job(self, number: int = 1) -> JobRow:
        found = self.store.get(job_id(number), "default")
        assert found is not None
        return found

    def layout(self, number: int = 1) -> JobLayout:
        return JobLayout("default", job_id(number))

    def submission(self, number: int = 1) -> str:
        return f"{job_id(number)}-{self.job(number).attempt}"

    def began(self, number: int = 1, restart: int = 0, origin: CheckpointRef | None = None) -> str:
        """The driver runs and its worker group writes its segment."""
        job = self.job(number)
        self.ray.jobs[self.submission(number)] = "RUNNING"
        name = f"{job.attempt}-{restart}-x"
        document = SegmentDocument(
            job_id=job.id,
            segment=name,
            origin=origin,
            world_size=job.workers or 1,
            fingerprint=None,
            created_at=T0,
        )
        self.bucket.put_document(self.layout(number).segment(name).document, document)
        return name

    def running(self, number: int = 1, **fields: Any) -> str:
        """A job that has begun; returns its segment."""
        self.add(number, **fields)
        return self.begin(number)

    def begin(self, number: int = 1) -> str:
        """Let a job that waits begin its next attempt; returns its segment."""
        self.passes(2)
        segment = self.began(number)
        self.passes()
        assert self.job(number).state == "running"
        return segment

    def result(self, segment: str, outcome: str, reason: Reason, step: int = 10, number: int = 1) -> None:
        fields = {"outcome": outcome, "reason": reason, "message": "so it was", "step": step, "created_at": T0}
        document = ResultDocument.model_validate({**fields, "values": {"eval_loss": 1.5}})
        self.bucket.put_document(self.layout(number).segment(segment).result, document)

    def checkpoint(self, segment: str, step: int, number: int = 1) -> CheckpointRef:
        fields = {"world_size": 1, "parts": [], "metrics": {}, "created_at": T0}
        document = Manifest.model_validate({"job_id": job_id(number), "segment": segment, "step": step, **fields})
        self.bucket.put_document(self.layout(number).segment(segment).checkpoint(step).manifest, document)
        return CheckpointRef(segment=segment, step=step, job_id=job_id(number))

    def beat(self, segment: str, count: int, limit: float = 60, number: int = 1) -> None:
        """Rank 0 gives a sign of life."""
        document = HeartbeatDocument(count=count, phase="step", step=count, limit=limit)
        self.bucket.put_document(self.layout(number).segment(segment).heartbeat, document)

    def die(self, reason: Reason | None = None, number: int = 1) -> None:
        """The driver ends without a result, and says why if it still can."""
        if reason is not None:
            fields = {"rank": 0, "step": 5, "phase": "step", "message": "rank 0: so it was", "created_at": T0}
            document = FaultDocument.model_validate({"reason": reason, **fields})
            self.bucket.put_document(self.layout(number).fault(self.job(number).attempt), document)
        self.ray.jobs[self.submission(number)] = "FAILED"

    def obey(self, number: int = 1, step: int = 5) -> bool:
        """Let the driver of the present attempt do what its control document says; False if that is to go on."""
        attempt, submission = self.job(number).attempt, self.submission(number)
        control = self.bucket.get_document(self.layout(number).control(attempt), ControlDocument)
        if control.wish == "run":
            return False
        if self.ray.jobs[submission] == "PENDING":  # it looks before it begins
            self.ray.jobs[submission] = "FAILED"
            return True
        segment = f"{attempt}-0-x"
        if control.wish == "pause" or control.keep_checkpoint:
            self.checkpoint(segment, step, number)
        self.result(segment, "stopped", _STOPPED[control.wish], step, number)
        self.ray.jobs[submission] = "SUCCEEDED"
        return True

    def stream(self, segment: str, lines: list[StreamLine], index: int = 0) -> None:
        body = "".join(f"{line.model_dump_json()}\n" for line in lines)
        self.bucket.put(chunk(self.layout().segment(segment).stream, index, "jsonl"), body.encode())

    def wish(self, attempt: int = 1, number: int = 1) -> str:
        """What the control document says; `+` for a checkpoint first."""
        control = self.bucket.get_document(self.layout(number).control(attempt), ControlDocument)
        return control.wish + "+" * control.keep_checkpoint

    def events(self, number: int = 1) -> list[tuple[str, str]]:
        found = self.store.events(job_id(number), after=0, limit=1000)
        assert [event.seq for event in found] == list(range(1, len(found) + 1))
        return [(event.type, event.state.value if event.state else event.message) for event in found]
