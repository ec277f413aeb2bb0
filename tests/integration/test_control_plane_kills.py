"""kill -9 of real control planes, hundreds of times, at random instants, while Ray loses 15 % of its replies.

All is as in production but Ray and the workers: `lockstep-server serve` in processes of their own, one on SQLite or two
on PostgreSQL, an S3 server, and clients by HTTP, each request to any of them. Ray is an HTTP server with the semantics
of tests/fakes.py; the workers write what workers write. SIGKILL is not a power cut: what the kernel has taken over it
still writes.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from api.client import Client
from api.documents import (
    AttemptDocument,
    CheckpointRef,
    ControlDocument,
    FinalDocument,
    HeartbeatDocument,
    JobDocument,
    ResultDocument,
    SegmentDocument,
    StreamLine,
    now,
)
from api.jobs import ENDED, JobState, Reason
from api.layout import DatasetLayout, JobLayout, chunk
from api.storage import Bucket
from service.database import make_engine, migrate
from service.rows import JobFilter, JobRow
from service.store import Store
from service.tables import idempotency, metadata
from tests.fakes import FakeRay, dataset
from tests.faults.control_planes import ControlPlanes, control_planes, steady_port
from tests.faults.moments import Moments
from tests.faults.ray_server import ray_server
from tests.faults.waiting import wait_until
from tests.postgres import postgres
from tests.replay import ran, replayed
from tests.soak import soak

KILLS = {1: soak(1000, 120), 2: soak(500, 40)}
"""By the number of control planes that live at once."""
SEED = 1
KEY = "lk_kills_of_control_planes"
CLIENTS = 3
LIVE = 8
"""Jobs at once; clients wait while there are so many."""
CPUS = 6
STEPS = 10
LOST_REPLIES = 0.15
CLOCKS = {
    "LOCKSTEP_RECONCILE_INTERVAL": "0.02",
    "LOCKSTEP_REQUEST_TIMEOUT": "2",
    "LOCKSTEP_LEASE_SECONDS": "0.3",
    "LOCKSTEP_RATE_BURST": "1000000",
}
FIRST_SIGN = 20.0
"""Most seconds for which a kill waits for a control plane to take its first connection."""
LATEST = 0.2
"""Seconds after that for which a kill waits for what it is aimed at; or as long as the start took, if that is more."""
TRACE = {"connection.connect_tcp.complete": "connection", "http11.send_request_body.complete": "request"}
"""What the HTTP client calls the moments at which it has a connection, and at which its request is on the way."""
AIMS = {"start": (1, 0.2), "request": (3, 0.06), "commit": (4, 0.01), "submission": (1, 0.03), "end": (1, 0.1)}
"""What a kill is aimed at: at most which of these in a life, and within how many seconds after it the kill comes."""


@dataclass
class Users:
    """Clients that submit jobs with idempotency keys, each again until it is acknowledged."""

    urls: list[str]
    """Of the control planes; each try goes to any of them."""
    moments: Moments
    acknowledged: dict[str, str] = field(default_factory=dict)
    """Job ids by idempotency key."""
    ended: set[str] = field(default_factory=set)
    """Jobs whose workers have left a result."""
    enough: threading.Event = field(default_factory=threading.Event)
    """No further job; those that were submitted are still to be acknowledged."""
    over: threading.Event = field(default_factory=threading.Event)
    """Not even that: nobody will answer any more."""
    counts: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def work(self, number: int) -> None:
        """Be one client."""
        fate = random.Random(f"{SEED} {number}")
        with httpx2.Client(headers={"Authorization": f"Bearer {KEY}"}, timeout=10, trust_env=False) as http:
            while not self.enough.is_set():
                if len(self.acknowledged) - len(self.ended) >= LIVE:
                    self.look(http, fate, fate.choice(list(self.acknowledged.values())))
                    continue
                key = f"{number}-{self._count('keys')}"
                self.submit(http, fate, key)
                if fate.random() < 0.2:
                    assert self.submit(http, fate, key) == 200, "what was acknowledged is remembered"

    def look(self, http: httpx2.Client, fate: random.Random, job_id: str) -> None:
        """Look at a job that was acknowledged: whoever answers knows it."""
        with suppress(httpx2.TransportError):
            answer = http.get(f"{fate.choice(self.urls)}/v1/jobs/{job_id}", extensions={"trace": self._watch})
            self._count("answers")
            assert answer.status_code == 200, answer.text
        self.over.wait(0.02)

    def submit(self, http: httpx2.Client, fate: random.Random, key: str) -> int:
        """Submit until an answer comes; return its status."""
        body = {"name": f"job-{key}", "data": {"dataset": "words"}, "model": {"size": "1m"}, "steps": STEPS}
        unanswered = False
        while True:
            try:
                answer = http.post(
                    f"{fate.choice(self.urls)}/v1/jobs",
                    json=body,
                    headers={"Idempotency-Key": key},
                    extensions={"trace": self._watch},
                )
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                assert not self.over.wait(0.02), f"{key} was never acknowledged"
            except httpx2.TransportError:
                unanswered = True
                self._count("unanswered")
            else:
                self._count("answers")
                assert answer.status_code in (200, 201), answer.text
                self._acknowledge(key, answer, unanswered)
                return answer.status_code

    def _acknowledge(self, key: str, answer: httpx2.Response, unanswered: bool) -> None:
        known = self.acknowledged.setdefault(key, answer.json()["id"])
        assert answer.json()["id"] == known, "one key, one job"
        if answer.status_code == 200 and unanswered:
            self._count("absorbed")

    def _watch(self, name: str, _: Any) -> None:
        if name in TRACE:
            self.moments.note(TRACE[name])

    def _count(self, name: str) -> int:
        with self._lock:
            self.counts[name] += 1
            return self.counts[name]


class Workers:
    """What the drivers and worker groups of all submissions do: each goes on by one step at a time."""

    def __init__(self, ray: FakeRay, bucket: Bucket, users: Users, moments: Moments) -> None:
        self._ray, self._bucket, self._users, self._moments = ray, bucket, users, moments
        self._fate = random.Random(SEED + 1)
        self.over = threading.Event()

    def work(self) -> None:
        while not self.over.wait(0.01):
            for submission, status in list(self._ray.jobs.items()):
                if status == "PENDING":
                    self._begin(submission)
                elif status == "RUNNING" and self._fate.random() < 0.2:
                    self._end(submission)

    def _begin(self, submission: str) -> None:
        """The driver finds what it needs and means itself; rank 0 begins a segment."""
        job_id, attempt, layout = _named(submission)
        meant = self._bucket.get_document(layout.attempt(attempt), AttemptDocument)
        assert (meant.submission_id, meant.ray_session) == (submission, self._ray.session)
        assert self._bucket.get_document(layout.job, JobDocument).id == job_id
        assert self._bucket.get_document(layout.control(attempt), ControlDocument).wish == "run"
        segment = SegmentDocument(
            job_id=job_id,
            segment=f"{attempt}-0-x",
            origin=None,
            world_size=meant.workers or 1,
            fingerprint=None,
            created_at=now(),
        )
        here = layout.segment(segment.segment)
        self._ray.jobs[submission] = "RUNNING"
        self._bucket.put_document(here.document, segment)
        self._bucket.put_document(here.heartbeat, HeartbeatDocument(count=1, phase="step", step=1, limit=60))

    def _end(self, submission: str) -> None:
        job_id, attempt, layout = _named(submission)
        here = layout.segment(f"{attempt}-0-x")
        lines = [
            StreamLine(type="metrics", step=STEPS, at=now(), values={"loss": 1.5}),
            StreamLine(type="event", step=STEPS, at=now(), event="evaluation", message="evaluated"),
        ]
        result = ResultDocument(
            outcome="succeeded", reason=Reason.COMPLETED, message="trained", step=STEPS, created_at=now()
        )
        self._bucket.put(chunk(here.stream, 0, "jsonl"), "".join(f"{x.model_dump_json()}\n" for x in lines).encode())
        self._bucket.put_document(here.result, result)
        self._ray.jobs[submission] = "SUCCEEDED"
        self._users.ended.add(job_id)
        self._moments.note("end")


def _named(submission: str) -> tuple[str, int, JobLayout]:
    job_id, _, attempt = submission.rpartition("-")
    return job_id, int(attempt), JobLayout("default", job_id)


@dataclass
class Killing:
    """All that goes on during the test."""

    planes: ControlPlanes
    ports: list[int]
    """Where control planes live, one each."""
    users: Users
    workers: Workers
    moments: Moments
    aims: list[str]
    served: int = 0
    """Lives that have answered somebody before they were killed."""
    lives: dict[int, int] = field(default_factory=dict)
    """Process ids by port."""
    fate: random.Random = field(default_factory=lambda: random.Random(SEED))

    @contextmanager
    def busy(self) -> Iterator[list[Future[None]]]:
        """Let clients and workers work in threads inside the block."""
        with ThreadPoolExecutor(CLIENTS + 1) as pool:
            try:
                clients = [pool.submit(self.users.work, number) for number in range(CLIENTS)]
                yield [*clients, pool.submit(self.workers.work)]
            finally:
                for end in (self.users.enough, self.users.over, self.workers.over):
                    end.set()

    def live_and_die(self) -> None:
        """Start what control planes are missing and kill one of them at an instant that the seed says."""
        aim = self.fate.choice(self.aims)
        (most, within), port = AIMS[aim], self.fate.choice(self.ports)
        times, delay = self.fate.randint(1, most), self.fate.uniform(0, within)
        answers = self.users.counts["answers"]
        self.start()
        if aim != "start":
            began = time.monotonic()
            self.moments.await_next("connection", began + FIRST_SIGN)
            ready = time.monotonic()
            deadline = ready + max(LATEST, ready - began)
            for _ in range(times):
                self.moments.await_next(aim, deadline)
        time.sleep(delay)
        self.planes.kill(self.lives.pop(port))
        self.served += self.users.counts["answers"] > answers

    def start(self) -> None:
        for port in self.ports:
            if port not in self.lives:
                self.lives[port] = self.planes.start(port)

    def live_on(self, tasks: list[Future[None]]) -> None:
        """Let every job come to its end, with nobody killed any more."""
        self.start()
        self.users.enough.set()
        wait(tasks[:CLIENTS], 60, FIRST_EXCEPTION)
        check(tasks)
        with Client(self.users.urls[0], KEY) as client:
            live = [state for state in JobState if state not in ENDED]
            wait_until(lambda: not (check(tasks) and client.list(live, limit=1).items), 60)
        for process in self.lives.values():
            self.planes.kill(process)


def check(tasks: list[Future[None]]) -> bool:
    """Raise what a thread has raised; otherwise True."""
    return all(task.result() is None for task in tasks if task.done())


@pytest.mark.soak
@pytest.mark.timeout(soak(1200, 240))
@pytest.mark.parametrize("replicas", [1, 2])
def test_whenever_a_control_plane_is_killed_each_acknowledged_job_is_submitted_once_and_succeeds(
    replicas: int, storage: str, bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket.put_document(DatasetLayout("default", "words", "v1").document, dataset())
    with ExitStack() as stack:
        database = tmp_path / "lockstep.db" if replicas == 1 else None
        url = f"sqlite:///{database}" if database else stack.enter_context(postgres())
        moments, ray, lost = Moments(database), FakeRay(CPUS), Losses()
        ray.lose_reply = lost.draw
        ray.hook = lambda place: moments.note("submission") if place == "before POST /api/jobs/" else None
        ports = [steady_port() for _ in range(replicas)]
        (tmp_path / "key").write_text(KEY)
        environment = CLOCKS | {
            "LOCKSTEP_DATABASE_URL": url,
            "LOCKSTEP_STORAGE": storage,
            "LOCKSTEP_RAY_ADDRESS": stack.enter_context(ray_server(ray)),
            "LOCKSTEP_BOOTSTRAP_KEY_PATH": str(tmp_path / "key"),
        }
        planes = stack.enter_context(control_planes(environment, tmp_path / "control-planes.log"))
        users = Users([f"http://127.0.0.1:{port}" for port in ports], moments)
        aims = [aim for aim in AIMS if database or aim != "commit"]
        killing = Killing(planes, ports, users, Workers(ray, bucket, users, moments), moments, aims)
        began = time.monotonic()
        with killing.busy() as tasks:
            for _ in range(KILLS[replicas]):
                killing.live_and_die()
                check(tasks)
            seconds = time.monotonic() - began
            killing.live_on(tasks)

        jobs, counts, served = users.acknowledged, users.counts, killing.served
        with capsys.disabled():
            print(
                f"\n{KILLS[replicas]} kills in {seconds:.0f} s ({KILLS[replicas] / seconds:.1f}/s, seed {SEED}) of one "
                f"of {replicas} control planes, {served} of which had answered somebody; {len(jobs)} jobs; "
                f"{counts['unanswered']} posts without an answer, {counts['absorbed']} of which had made the job; "
                f"Ray lost {lost.lost} of {lost.drawn} replies, refused {len(ray.posts) - len(ray.taken)} submissions"
            )
        assert_hit(KILLS[replicas], len(jobs), served, counts["unanswered"], lost.lost)
        engine = make_engine(url)
        try:
            if database:
                assert_sound(engine)
            store = Store(engine)
            rows = store.page("default", JobFilter(), limit=10**6)
            assert_acknowledged(engine, rows, users.acknowledged)
            assert_submitted_once(ray, rows)
            for job in rows:
                assert_succeeded(store, bucket, job)
        finally:
            engine.dispose()


class Losses:
    """Draws by a seed whether a reply of Ray gets lost."""

    def __init__(self) -> None:
        self._fate = random.Random(SEED + 2)
        self.drawn = self.lost = 0

    def draw(self) -> bool:
        self.drawn += 1
        gone = self._fate.random() < LOST_REPLIES
        self.lost += gone
        return gone


def assert_hit(kills: int, jobs: int, served: int, unanswered: int, lost: int) -> None:
    """The kills came while there was something to hit: the other assertions would hold if nothing had happened."""
    assert served >= kills / 5, "most of the control planes were killed before they had answered anybody"
    assert jobs >= kills / 10, "there was hardly a job to lose"
    assert unanswered > 0, "no kill came between a submission and its answer"
    assert lost > 0, "Ray lost no reply"


def assert_sound(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        assert connection.execute(sa.text("PRAGMA integrity_check")).scalars().all() == ["ok"]
        assert connection.execute(sa.text("PRAGMA foreign_key_check")).all() == []


def assert_acknowledged(engine: sa.Engine, jobs: list[JobRow], acknowledged: dict[str, str]) -> None:
    """What was acknowledged is there, and nothing else is."""
    with engine.begin() as connection:
        records = connection.execute(sa.select(idempotency.c.key, idempotency.c.job_id)).all()
    assert dict(map(tuple, records)) == acknowledged
    assert sorted(job.id for job in jobs) == sorted(acknowledged.values())
    assert {job.id: job.name for job in jobs} == {found: f"job-{key}" for key, found in acknowledged.items()}


def assert_submitted_once(ray: FakeRay, jobs: list[JobRow]) -> None:
    """Whatever their ids, Ray took one submission for each job, for its first and only attempt; none was stopped."""
    meant = [ray.bodies[name]["metadata"] for _, name in ray.taken]
    taken = Counter((one["job_id"], one["attempt"]) for one in meant if isinstance(one, dict))
    assert taken == {(job.id, "1"): 1 for job in jobs}
    assert {name for _, name in ray.taken} == {f"{job.id}-1" for job in jobs}
    assert not ray.stops


def assert_succeeded(store: Store, bucket: Bucket, job: JobRow) -> None:
    """The job, its event log and the bucket tell the same."""
    assert replayed(store, job) == (job.state, job.attempt) == (JobState.SUCCEEDED, 1)
    assert ran(store, job) <= {f"{job.id}-1"}
    types = Counter(event.type for event in store.events(job.id, after=0, limit=10_000))
    assert types["evaluation"] == 1, "what the workers tell is noted once"
    assert job.progress["step"] == STEPS
    final = bucket.get_document(JobLayout("default", job.id).final, FinalDocument)
    assert (final.state, final.reason, final.message) == (job.state, job.reason, job.message)
    assert final.end == CheckpointRef(segment="1-0-x", step=STEPS) == CheckpointRef.model_validate(job.history_end)


@pytest.mark.soak
def test_a_database_whose_making_was_killed_is_made_whole_by_the_next_start(tmp_path: Path) -> None:
    fate, database = random.Random(SEED), tmp_path / "lockstep.db"
    url = f"sqlite:///{database}"
    environment, port = {"LOCKSTEP_DATABASE_URL": url, "LOCKSTEP_STORAGE": "s3://none"}, steady_port()
    with control_planes(environment, tmp_path / "control-planes.log") as planes:
        for _ in range(soak(200, 20)):
            life = planes.start(port)
            wait_until(database.exists)
            time.sleep(fate.uniform(0, 0.05))
            planes.kill(life)
            migrate(url)  # the first thing that the next one does
            engine = make_engine(url)
            assert_sound(engine)
            with engine.begin() as connection:
                assert compare_metadata(MigrationContext.configure(connection), metadata) == []
            engine.dispose()
            for file in tmp_path.glob("lockstep.db*"):
                file.unlink()
