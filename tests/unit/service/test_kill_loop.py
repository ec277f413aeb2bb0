"""The control plane dies at random instants, again and again: nothing is lost, nothing is done twice."""

import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from api.documents import ControlDocument
from api.jobs import ENDED, JobState, Reason
from api.layout import JobLayout
from service.store import JobRow, NewEvent, Store
from tests.fakes import Crash, Hook, World, job_id, no_hook

CRASHES = 100
FOLLOWS = {
    JobState.QUEUED: {JobState.STARTING, JobState.CANCELLED},
    JobState.STARTING: {JobState.RUNNING, JobState.RECOVERING, JobState.CANCELLING, *ENDED},
    JobState.RUNNING: {JobState.RECOVERING, JobState.CANCELLING, *ENDED},
    JobState.RECOVERING: {JobState.STARTING, JobState.CANCELLED},
    JobState.CANCELLING: ENDED,
}


class Mortal(Store):
    """The store, with a side effect's hook before and after each commit."""

    hook: Hook = staticmethod(no_hook)

    def apply(self, job: JobRow, changes: dict[str, Any], new_events: Sequence[NewEvent] = ()) -> JobRow | None:
        self.hook("before apply")
        applied = super().apply(job, changes, new_events)
        self.hook("after apply")
        return applied


class Fate:
    """Decides by a seed when the control plane dies, which replies get lost and what becomes of each attempt."""

    def __init__(self, world: World, seed: int, ray_restarts: bool) -> None:
        self.world, self.random, self.ray_restarts = world, random.Random(seed), ray_restarts
        self.crashes = self.jobs = 0
        self.fuse = 5
        self.places: Counter[str] = Counter()
        world.store = self.store = Mortal(world.store._engine)
        world.restart()

    def burn(self, place: str) -> None:
        self.fuse -= 1
        if self.fuse <= 0 and self.crashes < CRASHES:
            self.fuse = self.random.randint(1, 25)
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
        if self.random.random() < 0.3 and self.crashes < CRASHES:
            self.jobs += 1
            self.world.add(self.jobs, retries=1)
        if self.jobs and self.random.random() < 0.05:
            self.world.store.request_cancel(job_id(self.random.randint(1, self.jobs)))

    def workers(self) -> None:
        """What happens on Ray meanwhile: each attempt goes on, dies, finishes, or hears that it shall stop."""
        if self.ray_restarts and self.random.random() < 0.02:
            self.world.ray.restart(f"session-{self.crashes}-{self.random.random()}")
        for submission, status in list(self.world.ray.jobs.items()):
            if status in ("PENDING", "RUNNING"):
                self.work(submission, status)

    def work(self, submission: str, status: str) -> None:
        job, _, attempt = submission.rpartition("-")
        layout, number = JobLayout("default", job), int(attempt)
        wish = self.world.bucket.get_document(layout.control(number), ControlDocument).wish
        index = next(n for n in range(1, self.jobs + 1) if job_id(n) == job)
        jobs, chance = self.world.ray.jobs, self.random.random()
        if status == "PENDING":
            jobs[submission] = "RUNNING" if wish == "run" else "FAILED"
            if wish == "run":
                self.world.began(index)
        elif wish != "run":
            reason = Reason.USER_CANCELLED if wish == "cancel" else Reason.SUPERSEDED
            self.world.result(f"{number}-0-x", "stopped", reason, number=index)
            jobs[submission] = "SUCCEEDED"
        elif chance < 0.1:
            jobs[submission] = "FAILED"
        elif chance < 0.4:
            self.world.result(f"{number}-0-x", "succeeded", Reason.COMPLETED, number=index)
            jobs[submission] = "SUCCEEDED"

    def at_most_one_attempt_lives(self) -> None:
        alive = Counter(
            name.rpartition("-")[0] for name, s in self.world.ray.jobs.items() if s in ("PENDING", "RUNNING")
        )
        assert set(alive.values()) <= {1}


def replayed(store: Store, job: JobRow) -> tuple[JobState, int]:
    """Return state and attempt as the event log alone tells them; every step must be a legal one."""
    events = store.events(job.id, after=0, limit=10_000)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    states = [(event.state, event.data) for event in events if event.state is not None]
    assert states[0][0] is JobState.QUEUED
    for (before, _), (after, _) in pairwise(states):
        assert after in FOLLOWS[before]
    return states[-1][0], max([data.get("attempt", 0) for _, data in states])


@pytest.mark.parametrize("ray_restarts", [False, True])
def test_every_accepted_job_is_submitted_once_per_attempt_wherever_the_control_plane_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_restarts: bool
) -> None:
    world = World(tmp_path, monkeypatch)
    fate = Fate(world, seed=7, ray_restarts=ray_restarts)
    rounds = 0
    while fate.crashes < CRASHES or world.store.live():
        fate.users()
        fate.live_pass()
        fate.workers()
        fate.at_most_one_attempt_lives()
        rounds += 1
        assert rounds < 5000, f"no end is near: {[job.state for job in world.store.live()]}"

    jobs = [world.job(number) for number in range(1, fate.jobs + 1)]
    taken = Counter(submission for _, submission in world.ray.taken)
    assert set(taken.values()) == {1}
    for job in jobs:
        assert replayed(world.store, job) == (job.state, job.attempt)
        attempts = {f"{job.id}-{n}" for n in range(1, job.attempt + 1)}
        assert {name for name in taken if name.startswith(job.id)} <= attempts
        if not (ray_restarts or job.cancel_requested):
            assert attempts <= set(taken)
        assert (job.state == "cancelled") <= bool(job.cancel_requested)
        assert job.faults <= 1
        assert job.attempt == 0 or world.bucket.get(JobLayout("default", job.id).final)
    assert {job.state for job in jobs} == {"succeeded", "failed", "cancelled"}
    assert {"before put", "after put", "before POST", "after POST", "before apply", "after apply"} <= set(fate.places)
    world.store._engine.dispose()
