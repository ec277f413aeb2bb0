"""The control plane dies at one effect, at each in turn: every path of a job comes to the same end as undisturbed.

An effect is a commit, an object that is written or deleted, or a request to Ray that changes something; it dies before
and after each. The random deaths of the kill loop come in any combination; these leave none out.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from api.documents import CheckpointRef, FinalDocument, StreamLine
from api.jobs import Reason
from service.tables import pins
from tests.databases import on_postgres
from tests.fakes import T0, Crash, World, job_id, no_hook
from tests.replay import replayed
from tests.unit.service.mortal import Mortal

pytestmark = pytest.mark.database

Scenario = Callable[[World], Iterator[Callable[[], bool]]]
"""What users and workers do; it yields what it waits for."""
PASSES = 40


def state(world: World, wanted: str, number: int = 1) -> Callable[[], bool]:
    return lambda: world.job(number).state == wanted


def posted(world: World, number: int = 1) -> Callable[[], bool]:
    return lambda: world.ray.jobs.get(world.submission(number)) == "PENDING"


def told(world: World, wish: str, number: int = 1) -> Callable[[], bool]:
    return lambda: world.wish(world.job(number).attempt, number) == wish


def begins(world: World, number: int = 1, origin: CheckpointRef | None = None) -> Iterator[Callable[[], bool]]:
    yield posted(world, number)
    world.began(number, origin=origin)
    yield state(world, "running", number)


def succeeds(world: World, number: int = 1) -> Iterator[Callable[[], bool]]:
    world.result(f"{world.job(number).attempt}-0-x", "succeeded", Reason.COMPLETED, number=number)
    world.ray.jobs[world.submission(number)] = "SUCCEEDED"
    yield state(world, "succeeded", number)


def success(world: World) -> Iterator[Callable[[], bool]]:
    world.add()
    yield from begins(world)
    line = partial(StreamLine, at=T0)
    world.stream("1-0-x", [line(type="metrics", step=2, values={"loss": 1.0}),
                           line(type="event", step=2, event="checkpoint", message="step 2")])  # fmt: skip
    yield lambda: world.job().progress["step"] == 2
    yield from succeeds(world)


def worker_lost(world: World) -> Iterator[Callable[[], bool]]:
    world.add()
    yield from begins(world)
    at = world.checkpoint("1-0-x", 4)
    world.die()
    yield from begins(world, origin=at.model_copy(update={"job_id": None}))
    yield from succeeds(world)


def ray_restarted(world: World) -> Iterator[Callable[[], bool]]:
    world.add()
    yield from begins(world)
    world.ray.restart("session-2")
    yield from begins(world)
    yield from succeeds(world)


def pause_and_resume(world: World) -> Iterator[Callable[[], bool]]:
    world.add()
    yield from begins(world)
    world.store.request_pause(job_id(1))
    yield told(world, "pause")
    world.obey()
    yield state(world, "paused")
    world.store.request_resume(job_id(1), None, T0)
    yield from begins(world)
    yield from succeeds(world)


def cancel_with_checkpoint(world: World) -> Iterator[Callable[[], bool]]:
    world.add()
    yield from begins(world)
    world.store.request_cancel(job_id(1), keep_checkpoint=True)
    yield told(world, "cancel+")
    world.obey()
    yield state(world, "cancelled")


def cancel_by_force(world: World) -> Iterator[Callable[[], bool]]:
    world.add()
    yield from begins(world)
    world.store.request_cancel(job_id(1))
    yield told(world, "cancel")
    yield state(world, "cancelled")


def preemption(world: World) -> Iterator[Callable[[], bool]]:
    world.ray.nodes = [{"CPU": 1}]
    world.add()
    yield from begins(world)
    world.add(2, priority=1)
    yield told(world, "pause")
    world.obey()
    yield from begins(world, 2)
    yield from succeeds(world, 2)
    yield from begins(world)
    yield from succeeds(world)


def another_size(world: World) -> Iterator[Callable[[], bool]]:
    world.ray.nodes = [{"CPU": 1}]
    world.add(batch={"global_size": 8, "micro_size": 2}, resources={"workers": {"min": 1, "max": 2}})
    yield from begins(world)
    world.ray.nodes = [{"CPU": 2}]
    yield told(world, "pause")
    world.obey()
    yield from begins(world)
    yield from succeeds(world)


def fork(world: World) -> Iterator[Callable[[], bool]]:
    world.add()
    yield from begins(world)
    at = world.checkpoint("1-0-x", 4)
    yield from succeeds(world)
    world.add(2, at)
    yield from begins(world, 2, at)
    yield from succeeds(world, 2)


def deadline(world: World) -> Iterator[Callable[[], bool]]:
    world.add(deadline=60)
    yield from begins(world)
    yield told(world, "cancel")
    world.obey()
    yield state(world, "failed")


def retries_used_up(world: World) -> Iterator[Callable[[], bool]]:
    world.add(retries=1)
    yield from begins(world)
    world.die(Reason.WORKER_ERROR)
    yield from begins(world)
    world.die(Reason.WORKER_ERROR)
    yield state(world, "failed")


def never_begins(world: World) -> Iterator[Callable[[], bool]]:
    world.add()
    yield posted(world)
    world.now = T0.replace(hour=T0.hour + 1)
    yield lambda: world.job().attempt == 2
    yield from begins(world)
    yield from succeeds(world)


def deletion(world: World) -> Iterator[Callable[[], bool]]:
    yield from success(world)
    assert world.store.apply(world.job(), {"deleted_at": T0}) is not None
    yield lambda: not world.store.to_purge()


SCENARIOS: list[Scenario] = [
    success, worker_lost, ray_restarted, pause_and_resume, cancel_with_checkpoint, cancel_by_force, preemption,
    another_size, fork, deadline, retries_used_up, never_begins, deletion,
]  # fmt: skip


class Mortality:
    """Counts the effects of the control plane, and lets it die at one of them."""

    def __init__(self, world: World, dies_at: int | None) -> None:
        self.world, self.dies_at, self.count = world, dies_at, 0
        self.store = Mortal(world.store._engine)
        world.store = self.store
        world.restart()

    def effect(self, name: str) -> None:
        if " GET " in name:
            return
        self.count += 1
        if self.count == self.dies_at:
            raise Crash

    def live_pass(self) -> None:
        world = self.world
        self.store.hook = world.bucket.hook = world.ray.hook = self.effect
        try:
            world.passes(1, seconds=5)
        except Crash:
            world.restart()
        self.store.hook = world.bucket.hook = world.ray.hook = no_hook


def play(scenario: Scenario, folder: Path, patch: pytest.MonkeyPatch, dies_at: int | None) -> tuple[int, Any]:
    """Return how many effects there were, and how it ended."""
    world = World(folder, patch, resize_interval=10.0)
    mortality = Mortality(world, dies_at)
    for wanted in scenario(world):
        for _ in range(PASSES):
            if wanted():
                break
            mortality.live_pass()
        assert wanted(), f"it never comes to that after a death at effect {dies_at}"
    mortality.live_pass()
    found = outcome(world)
    world.store._engine.dispose()
    return mortality.count, found


def outcome(world: World) -> dict[str, Any]:
    """All that does not tell when; what must hold of every end is asserted."""
    taken = Counter(submission for _, submission in world.ray.taken)
    assert set(taken.values()) == {1}, "an attempt was submitted twice"
    assert set(Counter(world.ray.posts).values()) == {1}, "an attempt was posted again without a look"
    assert not {"PENDING", "RUNNING"} & set(world.ray.jobs.values()), "an attempt is left alive"
    with world.store._engine.begin() as connection:
        assert connection.execute(sa.select(pins)).all() == []
    ids = sorted({submission.rpartition("-")[0] for submission in taken})
    with world.store._engine.begin() as connection:
        rows = connection.execute(sa.text("SELECT * FROM jobs ORDER BY id")).mappings().all()
    times = {
        "created_at",
        "state_since",
        "queued_at",
        "attempt_at",
        "not_before",
        "started_at",
        "ended_at",
        "purged_at",
    }
    for number in range(1, len(ids) + 1):
        job = world.store.get(job_id(number), "default")
        if job is not None:
            assert replayed(world.store, job) == (job.state, job.attempt)
            assert all(world.wish(n, number) != "run" for n in range(1, job.attempt)), "an old attempt may still run"
    return {
        "jobs": [{name: value for name, value in row.items() if name not in {*times, "version"}} for row in rows],
        "events": [world.events(number) for number in range(1, len(ids) + 1)],
        "taken": world.ray.taken,
        "stopped": set(world.ray.stops),
        "objects": sorted(world.bucket.content),
        "wishes": {n: [world.wish(a, n) for a in range(1, world.job(n).attempt + 1)] for n in numbers(world)},
        "ends": [final(body) for key, body in world.bucket.content.items() if key.endswith("final.json")],
    }


def numbers(world: World) -> list[int]:
    """Return which of the jobs are not deleted."""
    return [n for n in (1, 2) if world.store.get(job_id(n), "default") is not None]


def final(body: bytes) -> dict[str, Any]:
    return FinalDocument.model_validate_json(body).model_dump(exclude={"created_at"})


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_a_death_at_any_effect_changes_nothing_in_the_end(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    effects, undisturbed = play(scenario, tmp_path, monkeypatch, None)
    assert effects > 10
    for effect in range(1, effects + 1, 5 if on_postgres() else 1):  # all of them on SQLite; both take minutes
        _, found = play(scenario, tmp_path, monkeypatch, effect)
        assert found == undisturbed, f"after a death at effect {effect}"
