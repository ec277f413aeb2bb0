"""Control over a run, on a real store, a Ray and a bucket in memory: pause, resume, sizes, priorities, standstill."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api.documents import AttemptDocument, CheckpointRef, FaultDocument, FinalDocument, JobDocument
from api.jobs import Reason
from service.reconciler import view
from tests.fakes import T0, World, job_id, row

pytestmark = pytest.mark.database

BATCH = {"global_size": 16, "micro_size": 2}
FLEXIBLE: dict[str, Any] = {"batch": BATCH, "resources": {"workers": {"min": 1, "max": 4}}}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(tmp_path, monkeypatch)
    yield made
    made.store._engine.dispose()


def states(world: World, number: int = 1) -> list[str]:
    return [state for kind, state in world.events(number) if kind == "state"]


def test_a_running_job_pauses_with_a_checkpoint_and_goes_on_as_the_next_attempt(world: World) -> None:
    world.running()
    assert world.store.request_pause(job_id(1))
    world.passes(2)
    assert (world.job().state, world.wish()) == ("pausing", "pause")
    assert world.obey()
    world.passes()
    assert (world.job().state, world.job().message) == ("paused", "paused on request")
    assert world.layout().segment("1-0-x").checkpoint(5).manifest in world.bucket.content
    before = world.job()
    world.passes(3, seconds=1e6)
    assert world.job() == before, "for as long as nobody resumes it"
    resumed = world.now
    assert world.store.request_resume(job_id(1), None, resumed)
    world.passes(2)
    assert (world.job().state, world.job().attempt, world.job().queued_at) == ("starting", 2, resumed)
    world.begin()
    assert states(world) == ["queued", "starting", "running", "pausing", "paused", "queued", "starting", "running"]
    assert [world.job().faults, world.job().setbacks] == [0, 0]


@pytest.mark.parametrize("state", ["queued", "starting", "posted", "recovering"])
def test_a_pause_holds_the_job_in_every_state(world: World, state: str) -> None:
    if state == "recovering":
        world.running()
        world.die()
        world.passes()
    else:
        world.add()
        world.passes({"queued": 0, "starting": 1, "posted": 2}[state])
    assert world.store.request_pause(job_id(1))
    posts = list(world.ray.posts)
    world.passes(2)
    if state == "posted":
        assert (world.job().state, world.wish()) == ("pausing", "pause")
        assert world.obey()
    world.passes(2)
    assert world.job().state == "paused"
    assert world.ray.posts == posts
    assert world.store.request_resume(job_id(1), None, world.now)
    world.passes(1, seconds=60)
    world.begin()


def test_who_writes_no_checkpoint_within_the_grace_is_paused_by_force(world: World) -> None:
    world.running()
    world.store.request_pause(job_id(1))
    world.passes(2)
    world.passes(1, seconds=world.settings.stop_grace + 1)
    assert world.ray.stops == [], "a checkpoint takes longer than a stop"
    world.passes(1, seconds=world.settings.checkpoint_grace)
    assert world.ray.stops == [f"{job_id(1)}-1"]
    world.passes()
    assert world.job().state == "paused"


def test_a_job_that_is_resumed_before_it_has_stopped_goes_on_by_itself(world: World) -> None:
    world.running()
    world.store.request_pause(job_id(1))
    world.passes(2)
    assert world.store.request_resume(job_id(1), None, world.now)
    world.passes()
    assert (world.job().state, world.wish()) == ("pausing", "pause"), "a wish is never taken back"
    world.obey()
    world.passes(4)
    assert (world.job().state, world.job().attempt, world.wish(2)) == ("starting", 2, "run")


def test_a_paused_job_holds_nothing(world: World) -> None:
    world.ray.nodes = [{"CPU": 1}]
    world.running(1)
    world.add(2)
    world.store.request_pause(job_id(1))
    world.passes(2)
    assert world.job(2).state == "queued"
    world.obey()
    world.passes(3)
    assert (world.job(1).state, world.job(2).state) == ("paused", "starting")
    world.store.request_resume(job_id(1), None, world.now)
    world.passes(2)
    assert world.job(1).conditions[0]["message"] == "needs 1 × 1 CPU, 0 CPU free"


def test_a_job_is_resumed_with_the_number_of_workers_that_was_asked_for(world: World) -> None:
    world.running(**FLEXIBLE)
    assert (world.job().workers, len(world.ray.posts)) == (4, 1)
    world.store.request_pause(job_id(1))
    world.passes(2)
    world.obey()
    world.passes()
    world.store.request_resume(job_id(1), 2, world.now)
    world.passes()
    world.begin()
    assert (world.job().workers, world.job().workers_wanted) == (2, 2)
    assert world.bucket.get_document(world.layout().attempt(2), AttemptDocument).workers == 2
    world.passes(2, seconds=world.settings.resize_interval + 1)
    assert world.job().workers == 2, "and keeps it"


@pytest.mark.parametrize("keep", [False, True])
def test_a_cancel_keeps_a_checkpoint_only_if_that_was_asked_for(world: World, keep: bool) -> None:
    world.running()
    assert world.store.request_cancel(job_id(1), keep_checkpoint=keep)
    world.passes(2)
    assert (world.job().state, world.wish()) == ("cancelling", "cancel+" if keep else "cancel")
    world.passes(1, seconds=world.settings.stop_grace + 1)
    assert bool(world.ray.stops) is not keep, "a checkpoint takes longer"
    if keep:
        world.obey()
    world.passes(2)
    job = world.job()
    assert (job.state, job.reason) == ("cancelled", "user_cancelled")
    assert (world.layout().segment("1-0-x").checkpoint(5).manifest in world.bucket.content) is keep
    final = world.bucket.get_document(world.layout().final, FinalDocument)
    assert final.end == CheckpointRef(segment="1-0-x", step=5 if keep else 0)


def test_a_paused_job_can_be_cancelled_and_its_history_ends_at_its_checkpoint(world: World) -> None:
    world.running()
    world.store.request_pause(job_id(1))
    world.passes(2)
    world.obey()
    world.passes()
    world.store.request_cancel(job_id(1))
    world.passes()
    assert world.job().state == "cancelled"
    assert world.job().history_end == CheckpointRef(segment="1-0-x", step=5).model_dump()


def test_a_job_of_higher_priority_makes_a_lower_one_write_a_checkpoint_and_wait(world: World) -> None:
    world.ray.nodes = [{"CPU": 1}]
    world.running(1)
    queued_at = world.job().queued_at
    world.add(2, priority=5)
    world.passes()
    assert (world.job(1).state, world.job(1).message) == ("pausing", f"making way for {job_id(2)}")
    assert world.job(2).conditions[0]["message"] == "needs 1 × 1 CPU, 0 CPU free; waits for 1 job to stop"
    world.passes()
    assert (world.wish(), world.job(2).state) == ("pause", "queued")
    world.obey()
    world.passes()
    assert (world.job(1).state, world.job(1).queued_at) == ("queued", queued_at)
    world.begin(2)
    world.passes(3)
    assert (world.job(1).state, world.job(1).attempt) == ("queued", 1)
    world.result("1-0-x", "succeeded", Reason.COMPLETED, number=2)
    world.ray.jobs[world.submission(2)] = "SUCCEEDED"
    world.passes(2)
    assert (world.job(1).state, world.job(1).attempt, world.job(1).setbacks) == ("starting", 2, 0)
    assert states(world) == ["queued", "starting", "running", "pausing", "queued", "starting"]


def test_a_job_of_flexible_size_grows_at_a_checkpoint_when_there_is_room(world: World) -> None:
    world.ray.nodes = [{"CPU": 2}]
    world.running(**FLEXIBLE)
    assert world.job().workers == 2
    world.ray.nodes = [{"CPU": 4}]
    world.passes(1, seconds=world.settings.resize_interval - 10)
    assert world.job().state == "running", "not so soon"
    world.passes(1, seconds=20)
    assert (world.job().state, world.job().message) == ("pausing", "restarting with 4 workers")
    world.passes()
    world.obey()
    world.passes()
    assert (world.job().state, world.job().not_before) == ("recovering", world.now)
    world.begin()
    assert (world.job().workers, world.job().attempt, world.job().setbacks) == (4, 2, 0)
    assert states(world)[2:] == ["running", "pausing", "recovering", "starting", "running"]


def test_a_job_of_flexible_size_comes_back_smaller_when_a_machine_is_gone(world: World) -> None:
    world.running(**FLEXIBLE)
    assert world.job().workers == 4
    world.ray.nodes = [{"CPU": 3}]
    world.die()
    world.passes(1)
    world.passes(1, seconds=60)
    world.begin()
    assert world.job().workers == 2, "3 divide no 8 micro-batches"


def test_a_run_whose_watchdogs_failed_is_ended_and_begun_anew(world: World) -> None:
    segment = world.running()
    for count in range(3):
        world.beat(segment, count, limit=60)
        world.passes(1, seconds=100)
    world.passes(1, seconds=119)
    assert world.job().state == "running"
    world.passes(1, seconds=1)
    assert (world.job().state, world.wish()) == ("recovering", "superseded")
    assert world.ray.stops == [f"{job_id(1)}-1"]
    assert world.job().message == "nothing has moved for 120 s, last in step at step 2, and nothing came of that"
    assert (world.job().faults, world.job().setbacks) == (0, 1)


def test_a_run_that_is_known_to_have_lost_a_rank_has_as_long_as_a_start_to_move_again(world: World) -> None:
    segment = world.running()
    world.beat(segment, 1, limit=60)
    world.passes()
    fault = FaultDocument(rank=1, step=1, reason=Reason.WORKER_LOST, phase="step", message="killed", created_at=T0)
    world.bucket.put_document(world.layout().segment(segment).fault(1), fault)
    world.passes(1, seconds=120)
    assert world.job().state == "running", "Ray starts the group again"
    world.passes(1, seconds=world.settings.start_deadline - 121)
    assert world.job().state == "running"
    world.passes(1, seconds=1)
    assert (world.job().state, world.wish()) == ("recovering", "superseded")


@pytest.mark.parametrize("what", ["bucket", "control plane"])
def test_a_standstill_is_counted_anew_after_an_outage(world: World, what: str) -> None:
    """Neither a bucket nor a control plane that was away says anything about the run."""
    segment = world.running()
    world.beat(segment, 1, limit=60)
    world.passes()
    if what == "bucket":
        world.bucket.reachable = False
        world.passes(1, seconds=1000)
        world.bucket.reachable = True
    else:
        world.restart()
    world.passes(1, seconds=1000)
    world.passes(1, seconds=119)
    assert world.job().state == "running"
    world.passes(1, seconds=1)
    assert world.job().state == "recovering"


def test_a_run_that_has_ended_is_not_hung(world: World) -> None:
    segment = world.running()
    world.beat(segment, 1)
    world.passes()
    world.result(segment, "succeeded", Reason.COMPLETED)
    world.passes(1, seconds=1000)
    assert world.job().state == "running"
    world.ray.jobs[world.submission()] = "SUCCEEDED"
    world.passes()
    assert world.job().state == "succeeded"


def test_nobody_is_remembered_who_has_ended(world: World) -> None:
    segment = world.running()
    world.beat(segment, 1)
    world.passes()
    world.store.request_cancel(job_id(1))
    world.passes(2)
    world.ray.jobs[world.submission()] = "FAILED"
    world.passes(2)
    assert world.job().state == "cancelled"
    world.passes()
    assert not world.reconciler._standstill._seen


@pytest.mark.parametrize(("reason", "state", "faults"), [
    (Reason.OUT_OF_MEMORY, "recovering", 1), (Reason.STORAGE_UNAVAILABLE, "recovering", 0),
    (Reason.CRASH_LOOP, "failed", 0)])  # fmt: skip
def test_what_the_driver_says_of_its_end_decides(world: World, reason: Reason, state: str, faults: int) -> None:
    world.running()
    world.die(reason)
    world.passes()
    assert (world.job().state, world.job().faults) == (state, faults)
    assert "rank 0: so it was" in world.job().message


def test_the_workers_learn_the_size_of_their_attempt_and_where_their_job_begins(world: World) -> None:
    world.running(2)
    origin = world.checkpoint("1-0-x", 5, number=2)
    world.add(1, origin=origin, **FLEXIBLE)
    world.passes(2)
    assert world.bucket.get_document(world.layout().job, JobDocument).init == origin
    assert world.bucket.get_document(world.layout().attempt(1), AttemptDocument).workers == 4
    assert world.job().attempt_at == world.job().state_since


def test_a_view_tells_what_users_want() -> None:
    job = row(1, cancel_requested=1, keep_checkpoint=1, pause_requested=1, setbacks=3, stop_reason="preempted")
    seen = view(job)
    assert (seen.cancel_requested, seen.keep_checkpoint, seen.pause_requested) == (True, True, True)
    assert (seen.id, seen.setbacks, seen.stop_reason) == (job_id(1), 3, Reason.PREEMPTED)


def test_an_attempt_whose_machines_are_gone_is_taken_back_and_a_smaller_one_begins(world: World) -> None:
    world.ray.nodes = [{"CPU": 4}]
    world.add(resources={"workers": {"min": 1, "max": 4}}, batch={"global_size": 8, "micro_size": 2})
    world.passes(2)
    assert (world.job().state, world.job().workers) == ("starting", 4)
    world.ray.nodes = [{"CPU": 2}]
    world.passes(1, seconds=1)
    assert world.job().state == "starting"
    world.passes(2, seconds=10)
    assert (world.wish(), world.ray.stops) == ("superseded", [f"{job_id(1)}-1"])
    world.passes(2, seconds=10)
    assert (world.job().state, world.job().attempt, world.job().workers) == ("starting", 2, 2)
