"""Rebuilding the database from a bucket in memory: what comes back, what is named, what stays away."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from api.documents import CheckpointRef, ControlDocument, StreamLine
from api.errors import StorageUnavailable
from api.jobs import Reason
from api.layout import JobLayout
from service.rebuild import Outcome, WrongBucket, rebuild, summary
from service.rows import JobRow
from service.tables import jobs
from service.tenants import Tenants
from service.verification import find_written
from tests.fakes import ACCEPTED, T0, World, job_id, new_store, row, train_spec

pytestmark = pytest.mark.database


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(tmp_path, monkeypatch)
    yield made
    made.store._engine.dispose()


def again(world: World) -> Outcome:
    """Rebuild what the world's store is by now."""
    return rebuild(world.store, world.bucket, world.now, lambda line: None)


def lose(world: World, folder: Path) -> Outcome:
    """Lose the database, and have another one."""
    world.store._engine.dispose()
    folder.mkdir()
    world.store = new_store(folder)
    outcome = again(world)
    world.restart()
    return outcome


def line(step: int, event: str = "", **values: float) -> StreamLine:
    kind = "event" if event else "metrics"
    return StreamLine.model_validate({"type": kind, "step": step, "at": T0, "event": event, "values": values})


def finish(world: World, segment: str, number: int = 1) -> None:
    world.result(segment, "succeeded", Reason.COMPLETED, number=number)
    world.ray.jobs[world.submission(number)] = "SUCCEEDED"
    world.passes()
    assert world.job(number).state == "succeeded"


def trained(world: World) -> None:
    """A job that was retried, wrote checkpoints and succeeded."""
    segment = world.running(labels={"team": "a"})
    world.stream(segment, [line(4, loss=2.0), line(4, "checkpoint"), line(8, "checkpoint")])
    for step in (4, 8):
        world.checkpoint(segment, step)
    world.passes()
    world.die(Reason.WORKER_ERROR)
    world.passes(2, seconds=60)
    world.passes()
    second = world.began(origin=CheckpointRef(segment=segment, step=8))
    world.passes()
    world.stream(second, [line(10, loss=1.0, seconds_per_step=0.5), line(10, "evaluation")])
    world.passes()
    finish(world, second)


def lasting(job: JobRow) -> dict[str, Any]:
    """All of a row that a user could miss."""
    passing = ("state_since", "started_at", "ended_at", "attempt_at", "queued_at", "version", "setbacks", "stream")
    return {name: value for name, value in asdict(job).items() if name not in passing}


def test_a_job_that_has_ended_comes_back_as_it_was_and_is_not_run_again(world: World, tmp_path: Path) -> None:
    trained(world)
    before, told = world.job(), [kind for kind, _ in world.events() if kind not in ("state", "condition")]
    outcome = lose(world, tmp_path / "new")
    assert [job.id for job in outcome.rebuilt] == [job_id(1)]
    after = world.job()
    assert lasting(after) == lasting(before)
    assert (after.attempt, after.faults, after.result) == (2, 1, {"eval_loss": 1.5})
    assert (after.progress["step"], after.progress["values"]["loss"]) == (10, 1.0)
    assert [kind for kind, _ in world.events()] == ["rebuilt", *told]
    taken = list(world.ray.taken)
    world.passes(5)
    assert world.ray.taken == taken
    assert world.job() == after


def test_a_running_attempt_is_adopted_with_its_progress(world: World, tmp_path: Path) -> None:
    segment = world.running()
    world.stream(segment, [line(3, loss=2.0), line(3, "evaluation")])
    lose(world, tmp_path / "new")
    assert world.job().progress["step"] == 3
    world.passes(3)
    assert (world.job().state, world.job().attempt) == ("running", 1)
    world.stream(segment, [line(3, loss=2.0), line(3, "evaluation"), line(5, "evaluation")])
    world.passes()
    finish(world, segment)
    assert world.ray.taken == [("session-1", f"{job_id(1)}-1")]
    assert [kind for kind, _ in world.events()] == ["rebuilt", "evaluation", "evaluation", "state"]


def test_an_attempt_of_a_ray_that_is_gone_has_the_next_number_as_successor(world: World, tmp_path: Path) -> None:
    world.running()
    world.ray.restart("session-2")
    lose(world, tmp_path / "new")
    world.passes(4)
    assert (world.job().state, world.job().attempt) == ("starting", 2)
    assert world.ray.taken[-1] == ("session-2", f"{job_id(1)}-2")


def test_a_paused_job_stays_paused_and_goes_on_when_it_is_resumed(world: World, tmp_path: Path) -> None:
    world.running()
    world.store.request_pause(job_id(1))
    world.passes(2)
    world.obey()
    world.passes()
    lose(world, tmp_path / "new")
    world.passes(3, seconds=1000)
    assert world.job().state == "paused"
    assert world.store.request_resume(job_id(1), None, world.now)
    world.begin()
    assert world.job().attempt == 2


def test_a_job_that_was_never_written_is_lost_and_one_without_an_attempt_is_not(world: World, tmp_path: Path) -> None:
    world.running(2)
    world.add(1)
    for key in [key for key in world.bucket.content if "attempts" in key or "segments" in key]:
        del world.bucket.content[key]  # it died before it wrote more than job.json
    outcome = lose(world, tmp_path / "new")
    assert [job.id for job in world.store.live()] == [job_id(2)]
    assert [(job.state, job.attempt) for job in outcome.rebuilt] == [("recovering", 1)]


@pytest.mark.parametrize("deleted", [1, 2, 3, 4, 5])
def test_a_half_deleted_job_does_not_come_back(world: World, tmp_path: Path, deleted: int) -> None:
    """A purge dies after so many of its objects."""
    trained(world)
    assert world.store.apply(world.job(), {"deleted_at": world.now}) is not None
    left, delete = [deleted], world.bucket.delete

    def dies(keys: list[str]) -> None:
        delete(keys[: left[0]])
        left[0] -= min(left[0], len(keys))
        if left[0] == 0:
            raise StorageUnavailable("gone")

    world.bucket.delete = dies  # type: ignore[method-assign]
    world.passes()
    world.bucket.delete = delete  # type: ignore[method-assign]
    assert world.store.to_purge()
    outcome = lose(world, tmp_path / "new")
    assert world.store.everything() == []
    assert (outcome.half_deleted, outcome.damaged) == ([job_id(1)], {})


def test_what_is_damaged_is_named_and_the_rest_is_rebuilt(world: World, tmp_path: Path) -> None:
    for number in range(1, 6):
        world.running(number)
    world.bucket.put(world.layout(1).job, b"{")
    del world.bucket.content[world.layout(2).attempt(1)]
    world.bucket.put(world.layout(3).segment("1-0-x").stream + "000000.jsonl", b"{}\n")
    world.bucket.put(world.layout(4).final, world.bucket.get(world.layout(5).job))
    outcome = lose(world, tmp_path / "new")
    assert sorted(outcome.damaged) == [job_id(n) for n in (1, 2, 3, 4)]
    assert [job.id for job in world.store.everything()] == [job_id(3), job_id(5)], "a stream is not all of a job"
    assert "job.json is not a valid JobDocument" in outcome.damaged[job_id(1)]
    assert "attempts/1/attempt.json is missing" in outcome.damaged[job_id(2)]
    assert "its stream cannot be read" in outcome.damaged[job_id(3)]
    said = summary(outcome)
    assert said[-1] == "rebuilt 2, renewed 0, damaged 4 (2 running)"
    assert [words.split()[0] for words in said[:-1]] == sorted(outcome.damaged)


def test_what_the_database_does_not_take_is_damaged_and_the_rest_is_rebuilt(world: World, tmp_path: Path) -> None:
    for number in (1, 2):
        world.running(number)
    world.bucket.put_document(world.layout(1).control(10**20), ControlDocument())
    assert list(lose(world, tmp_path / "new").damaged) == [job_id(1)]
    assert [job.id for job in world.store.everything()] == [job_id(2)]


def test_to_rebuild_again_or_what_is_whole_changes_nothing(world: World, tmp_path: Path) -> None:
    trained(world)
    world.running(2)
    world.add(3)
    before = world.store.everything()
    assert again(world) == Outcome()
    assert world.store.everything() == before
    lose(world, tmp_path / "new")
    after, events = world.store.everything(), world.events(1)
    assert again(world) == Outcome()
    assert (world.store.everything(), world.events(1)) == (after, events)


def test_an_end_that_a_pause_came_before_is_none_once_the_job_goes_on(world: World) -> None:
    """The bucket was told of the end, and then the row had changed: it is not the one that has ended."""
    world.running()
    world.die(Reason.INVALID_DATA)

    def pause(effect: str) -> None:
        if effect == f"before put {world.layout().final}":
            world.store.request_pause(job_id(1))

    world.bucket.hook = pause
    world.passes(4)
    assert world.job().state == "paused"
    assert again(world) == Outcome()
    assert world.store.request_resume(job_id(1), None, world.now)
    world.passes()
    world.begin()
    assert again(world) == Outcome()
    assert (world.job().state, world.job().attempt) == ("running", 2)


def test_jobs_of_every_project_come_back(world: World, tmp_path: Path) -> None:
    world.running(1)
    for key, body in list(world.bucket.content.items()):
        moved = key.replace("default/", "other/").replace(job_id(1), job_id(2))
        body = body.replace(b'"project":"default"', b'"project":"other"')
        world.bucket.put(moved, body.replace(job_id(1).encode(), job_id(2).encode()))
    world.bucket.put("other/datasets/words/v1/dataset.json", b"{}")
    world.bucket.put("other/jobs/something/else", b"{}")
    assert lose(world, tmp_path / "new").damaged == {}
    assert [(job.project, job.id) for job in world.store.everything()] == [
        ("default", job_id(1)), ("other", job_id(2))]  # fmt: skip


def test_what_a_live_fork_begins_at_is_pinned_again(world: World, tmp_path: Path) -> None:
    segment = world.running(1)
    at = world.checkpoint(segment, 4)
    finish(world, segment)
    world.add(2, at)
    world.begin(2)
    lose(world, tmp_path / "new")
    assert world.store.pinned(job_id(1), world.now) == {CheckpointRef(segment=segment, step=4)}
    finish(world, "1-0-x", 2)
    assert world.store.pinned(job_id(1), world.now) == set()


def test_what_a_live_fork_begins_at_is_pinned_once_the_job_that_wrote_it_is_mended(
    world: World, tmp_path: Path
) -> None:
    segment = world.running(1)
    at = world.checkpoint(segment, 4)
    finish(world, segment)
    world.add(2, at)
    world.begin(2)
    document = world.bucket.get(world.layout(1).job)
    world.bucket.put(world.layout(1).job, b"{")
    assert list(lose(world, tmp_path / "new").damaged) == [job_id(1)]
    world.bucket.put(world.layout(1).job, document)
    assert [job.id for job in again(world).rebuilt] == [job_id(1)]
    assert world.store.pinned(job_id(1), world.now) == {CheckpointRef(segment=segment, step=4)}


def test_a_checkpoint_that_was_deleted_before_is_not_missed_by_a_verification(world: World, tmp_path: Path) -> None:
    trained(world)
    del world.bucket.content[world.layout().segment("1-0-x").checkpoint(4).manifest]
    lose(world, tmp_path / "new")
    assert find_written(world.bucket, world.store, world.job(), None) == [CheckpointRef(segment="1-0-x", step=8)]
    assert ("retention", "step 4: no checkpoint there any more when the database was rebuilt") in world.events()


def test_a_bucket_that_does_not_answer_leaves_the_rest_for_the_next_time(world: World, tmp_path: Path) -> None:
    world.running()
    world.bucket.reachable = False
    with pytest.raises(StorageUnavailable):
        lose(world, tmp_path / "new")
    world.bucket.reachable = True
    again(world)
    assert world.job().state == "running"


def test_another_bucket_is_refused_before_anything_changes(world: World) -> None:
    world.running()
    world.bucket.content.clear()
    before = world.store.everything()
    with pytest.raises(WrongBucket, match="check LOCKSTEP_STORAGE"):
        again(world)
    assert world.store.everything() == before


def test_a_job_of_a_backup_that_was_deleted_since_is_ended_and_not_run_again(world: World) -> None:
    """One that had only just begun then may not have been written yet: it goes on."""
    world.running(1)
    world.running(2)
    world.store.insert(row(3, train_spec(), state="starting", attempt=1, ray_session="session-1"), ACCEPTED, None)
    world.bucket.delete([item.key for item in world.bucket.objects(world.layout(1).prefix)])
    outcome = again(world)
    assert outcome.gone == [job_id(1)]
    assert (world.job(1).state, world.job(1).reason) == ("cancelled", "user_cancelled")
    assert [job.id for job in world.store.live()] == [job_id(2), job_id(3)]
    [entry] = Tenants(world.store._engine).audit("default", 9, None)
    assert (entry.actor, entry.action, entry.target) == ("operator", "job.end", job_id(1))
    assert again(world) == Outcome()


def test_a_job_of_a_backup_that_was_paused_before_it_was_submitted_stays_paused(world: World) -> None:
    world.running(2)
    world.add(1)
    world.passes()
    assert world.job(1).state == "starting"
    world.store.request_pause(job_id(1))
    world.passes(3)
    assert (world.job(1).state, world.wish(1)) == ("paused", "pause")
    assert again(world) == Outcome()
    assert world.job(1).state == "paused"


def put_back(world: World, backup: list[JobRow]) -> None:
    """Put the rows of a while ago in place of the present ones."""
    with world.store._writer.begin() as connection:
        for was in backup:
            connection.execute(jobs.update().where(jobs.c.id == was.id).values(**asdict(was)))


def test_jobs_that_have_gone_on_since_a_backup_are_as_the_bucket_says(world: World) -> None:
    segment = world.running(1)
    world.running(2)
    backup = [world.job(number) for number in (1, 2)]
    finish(world, segment, 1)
    world.ray.restart("session-2")
    world.passes(4)
    assert world.job(2).attempt == 2
    ended = world.job(1)
    put_back(world, backup)
    outcome = again(world)
    assert {job.id for job in outcome.renewed} == {job_id(1), job_id(2)}
    assert (world.job(1).state, world.job(1).result) == ("succeeded", ended.result)
    assert (world.job(2).attempt, world.job(2).ray_session) == (2, "session-2")
    world.passes(3)
    assert [session for session, name in world.ray.taken if name == f"{job_id(2)}-2"] == ["session-2"]
    assert again(world) == Outcome()


def test_the_projects_of_the_jobs_come_back(world: World, tmp_path: Path) -> None:
    trained(world)
    theirs = JobLayout("theirs", job_id(1))
    for key in [key for key in world.bucket.content if key.startswith("default/")]:
        moved = world.bucket.content.pop(key).replace(b'"project":"default"', b'"project":"theirs"')
        world.bucket.content[theirs.prefix + key.removeprefix(world.layout().prefix)] = moved
    assert [job.project for job in lose(world, tmp_path / "new").rebuilt] == ["theirs"]
    assert Tenants(world.store._engine).project("theirs").archived_at is None
