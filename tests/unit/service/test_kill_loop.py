"""The control plane dies at random instants, again and again: nothing is lost, nothing is done twice."""

import random
from collections import Counter
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from api.documents import CheckpointRef
from api.errors import Conflict
from api.jobs import JobState, Reason
from api.layout import JobLayout
from service.tables import pins
from tests.fakes import Crash, World, job_id, no_hook
from tests.replay import ran, replayed
from tests.unit.service.mortal import Mortal

pytestmark = pytest.mark.database

CRASHES = 200
CPUS = 5
HOLD = (JobState.STARTING, JobState.RUNNING, JobState.PAUSING, JobState.CANCELLING)
SIZES: list[Any] = [1, 2, {"min": 1, "max": 4}, {"min": 2, "max": 4}]


class Fate:
    """Decides by a seed when the control plane dies, which replies get lost, what users want and what becomes of each
    attempt."""

    most = CRASHES

    def __init__(self, world: World, seed: int, ray_restarts: bool) -> None:
        self.world, self.random, self.ray_restarts = world, random.Random(seed), ray_restarts
        self.crashes = self.jobs = self.forks = self.rounds = 0
        self.fuse = 5
        self.places: Counter[str] = Counter()
        world.ray.nodes = [{"CPU": CPUS}]
        world.store = self.store = Mortal(world.store._engine)
        world.restart()

    def burn(self, place: str) -> None:
        self.fuse -= 1
        if self.fuse <= 0 and self.crashes < self.most:
            self.fuse = self.random.randint(1, 50)
            self.crashes += 1
            self.places[" ".join(place.split()[:2])] += 1
            raise Crash

    def live_pass(self) -> None:
        """One pass that may be cut short anywhere; then the process starts anew."""
        world = self.world
        self.store.hook = world.bucket.hook = world.ray.hook = self.burn
        world.ray.lose_reply = lambda: self.random.random() < 0.15
        try:
            world.passes(1, seconds=5)
        except Crash:
            world.restart()
        self.store.hook = world.bucket.hook = world.ray.hook = no_hook

    def users(self) -> None:
        """Submit, fork, pause, resume and cancel as it comes; in the end only resume what is paused."""
        if self.crashes == self.most:
            for job in self.store.live():
                self.store.request_resume(job.id, None, self.world.now)
            return
        self.rounds += 1
        if self.rounds % 45 < 15 and self.random.random() < 0.5:  # there are quiet times
            self.submit()
        for job in self.store.live():
            chance = self.random.random()
            if chance < 0.03:
                self.store.request_cancel(job.id, keep_checkpoint=chance < 0.015)
            elif chance < 0.1:
                self.store.request_pause(job.id)
            elif chance < 0.3:
                self.store.request_resume(job.id, self.random.choice([None, None, 2]), self.world.now)

    def submit(self) -> None:
        origin = None
        written = [key for key in self.world.bucket.content if key.endswith("/manifest.json")]
        if written and self.random.random() < 0.3:
            _, _, source, _, segment, step, _ = self.random.choice(written).split("/")
            origin = CheckpointRef(segment=segment, step=int(step.removeprefix("step-")), job_id=source)
        batch = {"global_size": 8, "micro_size": 2}
        resources = {"workers": self.random.choice(SIZES)}
        with suppress(Conflict):
            self.jobs += 1
            priority = self.random.choice([0, 0, 1])
            self.world.add(
                self.jobs,
                origin,
                retries=self.random.choice([0, 1]),
                batch=batch,
                resources=resources,
                priority=priority,
            )
            self.forks += origin is not None

    def workers(self) -> None:
        """What happens on Ray meanwhile: each attempt goes on, dies, finishes, or hears that it shall stop."""
        if self.ray_restarts and self.random.random() < 0.02:
            self.world.ray.restart(f"session-{self.crashes}-{self.random.random()}")
        for submission, status in list(self.world.ray.jobs.items()):
            if status in ("PENDING", "RUNNING"):
                self.work(submission, status)

    def work(self, submission: str, status: str) -> None:
        job, _, attempt = submission.rpartition("-")
        index = next(n for n in range(1, self.jobs + 1) if job_id(n) == job)
        assert self.world.job(index).attempt == int(attempt), "of an older attempt nothing lives"
        chance, segment = self.random.random(), f"{attempt}-0-x"
        if self.world.wish(int(attempt), index) != "run":
            if chance < 0.6:
                self.world.obey(index)
            return
        if status == "PENDING":
            self.world.began(index)
        elif chance < 0.05:
            self.world.die(self.random.choice([Reason.WORKER_ERROR, Reason.OUT_OF_MEMORY]), index)
        elif chance < 0.1:
            self.world.die(self.random.choice([None, Reason.STORAGE_UNAVAILABLE]), index)
        elif chance < 0.2:
            self.world.result(segment, "succeeded", Reason.COMPLETED, number=index)
            self.world.ray.jobs[submission] = "SUCCEEDED"
        elif chance < 0.4:
            self.world.checkpoint(segment, 3, index)

    def held(self) -> int:
        return sum(job.workers or 0 for job in self.store.live() if job.state in HOLD)

    def check(self) -> None:
        """What holds at every moment, however the last pass ended."""
        alive = Counter(n.rpartition("-")[0] for n, s in self.world.ray.jobs.items() if s in ("PENDING", "RUNNING"))
        assert set(alive.values()) <= {1}, "at most one attempt lives"
        live = self.store.live()
        assert self.held() <= CPUS, "no CPU is given out twice"
        with self.store._engine.begin() as connection:
            held = {(pin.holder, pin.job_id, pin.segment, pin.step) for pin in connection.execute(sa.select(pins))}
        begun = [(job.id, CheckpointRef.model_validate(job.init)) for job in live if job.init is not None]
        assert held == {(holder, at.job_id, at.segment, at.step) for holder, at in begun}, "live forks have their pin"


@pytest.mark.parametrize(("ray_restarts", "seed"), [(False, 2), (True, 1)])
def test_every_accepted_job_is_submitted_once_per_attempt_wherever_the_control_plane_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_restarts: bool, seed: int
) -> None:
    world = World(tmp_path, monkeypatch, resize_interval=10.0)
    fate = Fate(world, seed, ray_restarts)
    rounds = 0
    while fate.crashes < CRASHES or world.store.live():
        fate.users()
        fate.live_pass()
        fate.workers()
        fate.check()
        rounds += 1
        assert rounds < 5000, f"no end is near: {[job.state for job in world.store.live()]}"

    jobs = [world.job(number) for number in range(1, fate.jobs + 1)]
    taken = Counter(submission for _, submission in world.ray.taken)
    assert set(taken.values()) == {1}
    moves: Counter[tuple[str, str]] = Counter()
    for job in jobs:
        assert replayed(world.store, job) == (job.state, job.attempt)
        states = [event.state for event in world.store.events(job.id, after=0, limit=10_000) if event.state]
        moves.update(pairwise(state.value for state in states))
        attempts = {f"{job.id}-{n}" for n in range(1, job.attempt + 1)}
        assert ran(world.store, job) <= {name for name in taken if name.startswith(job.id)} <= attempts
        if not (ray_restarts or {JobState.PAUSING, JobState.CANCELLING} & set(states)):
            assert attempts <= set(taken)
        assert (job.state == "cancelled") <= bool(job.cancel_requested)
        assert job.faults <= job.parsed_spec.retries
        assert job.attempt == 0 or world.bucket.get(JobLayout("default", job.id).final)
    assert {job.state for job in jobs} == {"succeeded", "failed", "cancelled"}
    assert {"before put", "after put", "before POST", "after POST", "before apply", "after apply"} <= set(fate.places)
    everything = {("pausing", "paused"), ("paused", "queued"), ("pausing", "queued"), ("pausing", "recovering"),
                  ("pausing", "cancelling"), ("running", "recovering"), ("queued", "paused")}  # fmt: skip
    assert everything <= set(moves), "of these seeds all happened: pauses, jobs that made way, other sizes, cancels"
    assert fate.forks
    world.store._engine.dispose()
