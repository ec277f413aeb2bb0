"""The reconciler against a real store, a Ray and a bucket in memory: crashes, lost replies, restarts, cancels."""

import dataclasses
import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import DataError

from api.documents import (
    AttemptDocument,
    CheckpointRef,
    ControlDocument,
    FinalDocument,
    JobDocument,
    Manifest,
    StreamLine,
)
from api.jobs import JobState, Reason
from api.layout import chunk
from service import observer
from service import reconciler as reconciler_module
from service.lifecycle import Observation, RayStatus, Turn
from service.observer import observe, observe_cluster
from service.rows import JobRow
from service.standstill import Standstill
from tests.fakes import ACCEPTED, T0, Crash, World, job_id, row, train_spec

pytestmark = pytest.mark.database


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(tmp_path, monkeypatch)
    yield made
    made.store._engine.dispose()


def test_a_job_goes_from_the_line_to_its_end(world: World) -> None:
    world.add()
    world.passes()
    assert world.job().state == "starting"
    assert world.ray.posts == []
    world.passes()
    assert world.ray.posts == [f"{job_id(1)}-1"]
    attempt = world.bucket.get_document(world.layout().attempt(1), AttemptDocument)
    assert (attempt.submission_id, attempt.ray_session) == (f"{job_id(1)}-1", "session-1")
    assert world.bucket.get_document(world.layout().job, JobDocument).spec == train_spec()
    segment = world.began()
    world.passes(3)
    assert (world.job().state, world.job().started_at) == ("running", T0 + timedelta(seconds=3))
    world.result(segment, "succeeded", Reason.COMPLETED)
    world.passes()
    assert world.job().state == "running"
    world.ray.jobs[world.submission()] = "SUCCEEDED"
    world.passes()
    job = world.job()
    assert (job.state, job.reason, job.result) == ("succeeded", "completed", {"eval_loss": 1.5})
    assert job.ended_at == world.now
    final = world.bucket.get_document(world.layout().final, FinalDocument)
    assert (final.state, final.reason, final.end) == (
        "succeeded", Reason.COMPLETED, CheckpointRef(segment=segment, step=10))  # fmt: skip
    assert job.history_end == final.end.model_dump() if final.end else False
    assert [e for e in world.events() if e[0] == "state"] == [
        ("state", state) for state in ("queued", "starting", "running", "succeeded")]  # fmt: skip
    assert world.ray.posts == [f"{job_id(1)}-1"]


def look(world: World, job: JobRow) -> Observation:
    """See what there is to see of a job now."""
    ray = world.ray.backend()
    return observe(job, observe_cluster(ray), ray, world.bucket, Turn(), Standstill(600), 0)


def test_a_slow_control_plane_starts_no_attempt_that_another_has_ended(world: World) -> None:
    """It has read the row; before it posts, the job is cancelled from end to end."""
    world.add()
    world.passes()
    stale = world.job()
    seen = look(world, stale)
    world.store.request_cancel(stale.id)
    world.passes(3)
    assert world.job().state == "cancelled"
    world.reconciler.reconcile(stale, observe_cluster(world.ray.backend()), Turn())  # it sees what was told
    written = dict(world.bucket.content)
    world.reconciler._submit(stale, seen)  # it had looked before that
    assert world.ray.posts == []
    assert world.bucket.content == written


def test_what_an_attempt_was_told_is_not_called_back(world: World) -> None:
    world.add()
    world.passes()
    world.bucket.put_document(world.layout().control(1), ControlDocument(wish="superseded"))
    world.passes(3)
    assert (world.ray.posts, world.wish(), world.job().state) == ([], "superseded", "starting")
    world.passes(2, seconds=600)
    assert world.job().state == "starting"
    assert world.job().attempt == 2


def test_a_job_that_has_changed_since_it_was_read_is_left_for_the_next_pass(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another control plane has gone on with it while this one was busy with others."""
    for number in (1, 2):
        world.add(number)

    def slow(job: JobRow, *_: object) -> None:
        if job.id == job_id(1):
            second = world.job(2)
            assert world.store.apply(second, {"message": "another was here"}) is not None
        done.append(job.id)

    done: list[str] = []
    monkeypatch.setattr(world.reconciler, "reconcile", slow)
    world.passes()
    assert done == [job_id(1)]


def test_a_slow_control_plane_does_not_overwrite_the_end_that_another_has_recorded(world: World) -> None:
    segment = world.running()
    stale = world.job()
    world.result(segment, "succeeded", Reason.COMPLETED)
    world.ray.jobs[world.submission()] = "SUCCEEDED"
    world.passes(2)
    ended = world.job()
    assert ended.state == "succeeded"
    world.result(segment, "failed", Reason.INVALID_DATA)  # what the slow one saw
    world.reconciler.reconcile(stale, observe_cluster(world.ray.backend()), Turn())
    assert world.job() == ended
    final = world.bucket.get_document(world.layout().final, FinalDocument)
    assert (final.state, final.reason, final.created_at) == (ended.state, ended.reason, ended.ended_at)


def test_a_slow_control_plane_that_would_pause_takes_no_end_away(world: World) -> None:
    """While it looked, another one has ended the job."""
    world.running()
    world.store.request_pause(job_id(1))
    world.passes(2)
    world.obey()
    stale = world.job()
    world.store.request_cancel(job_id(1))
    world.passes(4)
    ended = world.job()
    assert ended.state == "cancelled"
    world.bucket.put_document(world.layout().control(1), ControlDocument(wish="pause", reason=Reason.USER_PAUSED))
    world.reconciler.reconcile(stale, observe_cluster(world.ray.backend()), Turn())
    assert world.job() == ended
    assert world.bucket.get_document(world.layout().final, FinalDocument).state == "cancelled"


@pytest.mark.parametrize("place", ["after_intent", "after_attempt_record", "after_submit"])
def test_a_crash_at_any_place_submits_exactly_once(world: World, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def crash(name: str, _: str) -> None:
        if name == place:
            raise Crash

    world.add()
    with monkeypatch.context() as patch:
        patch.setattr(reconciler_module, "failpoint", crash)
        with pytest.raises(Crash):
            world.passes(2)
    world.restart()
    world.passes(3)
    assert world.ray.taken == [("session-1", f"{job_id(1)}-1")]
    assert (world.job().state, world.job().attempt) == ("starting", 1)
    assert world.ray.posts == [f"{job_id(1)}-1"]


def test_a_lost_reply_is_found_by_looking_not_by_posting_again(world: World) -> None:
    world.add()
    world.passes()
    # The reply to the post is the third of a pass: version, nodes, status, post.
    answers = iter([False, False, False, True])
    world.ray.lose_reply = lambda: next(answers, False)
    world.passes(3)
    assert world.ray.posts == [f"{job_id(1)}-1"]
    assert world.job().state == "starting"


def test_a_duplicate_answered_with_500_is_adopted(world: World) -> None:
    world.add()
    world.passes()
    unseen = dataclasses.replace(look(world, world.job()), ray=RayStatus.ABSENT)
    world.ray.jobs[f"{job_id(1)}-1"] = "PENDING"
    world.reconciler._submit(world.job(), unseen)
    assert world.ray.posts == [f"{job_id(1)}-1"]
    world.began()
    world.passes()
    assert (world.job().state, world.job().attempt) == ("running", 1)


def test_a_ray_that_comes_back_empty_gets_another_attempt(world: World) -> None:
    world.running()
    world.ray.restart("session-2")
    world.passes()
    assert (world.job().state, world.job().faults, world.wish(1)) == ("recovering", 0, "superseded")
    world.passes(4)
    assert (world.job().state, world.job().attempt, world.job().ray_session) == ("starting", 2, "session-2")
    assert world.ray.taken[-1] == ("session-2", f"{job_id(1)}-2")
    assert world.wish(2) == "run"


def test_a_faulty_job_is_tried_again_until_the_retries_are_used_up(world: World) -> None:
    segment = world.running(retries=1)
    world.die(Reason.WORKER_ERROR)
    world.passes()
    assert (world.job().state, world.job().faults) == ("recovering", 1)
    world.passes(4)
    assert (world.job().state, world.job().attempt) == ("starting", 2)
    segment = world.began(origin=CheckpointRef(segment=segment, step=5))
    world.passes()
    world.die(Reason.WORKER_ERROR)
    world.passes()
    job = world.job()
    assert (job.state, job.reason, job.attempt) == ("failed", "worker_error", 2)
    assert job.message == "a worker failed by itself; its log says where, 2 times: rank 0: so it was"
    assert job.history_end is not None
    assert job.history_end["segment"] == segment


def test_a_job_whose_workers_die_of_nothing_of_its_own_is_tried_again_for_ever(world: World) -> None:
    world.running(retries=0)
    for attempt in range(1, 12):
        assert world.job().attempt == attempt
        world.die(Reason.STORAGE_UNAVAILABLE if attempt % 2 else None)
        world.passes()
        assert (world.job().state, world.job().faults) == ("recovering", 0)
        world.passes(1, seconds=60)
        world.begin()


def test_attempts_that_are_lost_in_a_row_are_begun_ever_later(world: World) -> None:
    world.running()
    waits = []
    for _ in range(7):
        world.die()
        world.passes()
        not_before = world.job().not_before
        assert not_before is not None
        waits.append((not_before - world.now).total_seconds())
        world.passes(int(waits[-1]))
        assert world.job().state == "recovering", "not before its time"
        world.passes()
        assert (world.job().state, world.job().not_before) == ("starting", None)
        world.begin()
    assert all(longest / 2 <= wait <= longest for wait, longest in zip(waits, (2, 4, 8, 16, 32, 60, 60), strict=True))
    assert world.job().setbacks == 7
    world.passes(1, seconds=60)
    world.die()
    world.passes()
    assert world.job().setbacks == 1, "it ran for long"


def test_a_job_that_died_keeps_its_newest_checkpoint_in_the_history(world: World) -> None:
    """Metric lines are rarer than checkpoints can be: the end is not before the newest manifest."""
    segment = world.running(retries=0)
    world.stream(segment, [StreamLine(type="metrics", step=20, at=T0, values={"loss": 1.0})])
    manifest = Manifest(job_id=job_id(1), segment=segment, step=25, world_size=1, parts=[], metrics={}, created_at=T0)
    world.bucket.put_document(world.layout().segment(segment).checkpoint(25).manifest, manifest)
    world.die(Reason.OUT_OF_MEMORY)
    world.passes()
    assert world.job().history_end == CheckpointRef(segment=segment, step=25).model_dump()


def test_an_attempt_without_a_sign_of_life_is_stopped_and_begun_anew(world: World) -> None:
    world.add()
    world.passes(2)
    world.passes(1, seconds=601)
    assert world.ray.stops == [f"{job_id(1)}-1"]
    assert world.job().state == "recovering"


@pytest.mark.parametrize("state", ["queued", "starting", "posted", "running", "recovering"])
def test_a_cancel_ends_the_job_in_every_state(world: World, state: str) -> None:
    if state == "queued":
        world.add()
    elif state in ("starting", "posted"):
        world.add()
        world.passes(1 if state == "starting" else 2)
    else:
        world.running()
    if state == "recovering":
        world.ray.restart("session-2")
        world.passes()
        assert world.job().state == "recovering"
    assert world.store.request_cancel(job_id(1))
    world.passes(2)
    if state in ("posted", "running"):
        assert (world.job().state, world.wish()) == ("cancelling", "cancel")
        world.ray.jobs[world.submission()] = "SUCCEEDED"
    world.passes(2)
    assert (world.job().state, world.job().reason) == ("cancelled", "user_cancelled")
    assert world.ray.stops == []
    before = (world.ray.posts, world.job())
    world.passes(2)
    assert (world.ray.posts, world.job()) == before


@pytest.mark.parametrize("writable", [True, False])
def test_who_does_not_hear_is_stopped_by_force_after_the_grace(world: World, writable: bool) -> None:
    world.running()
    world.store.request_cancel(job_id(1))
    world.bucket.writable = writable
    world.passes(2)
    assert world.ray.stops == []
    world.passes(1, seconds=30)
    assert world.ray.stops == [f"{job_id(1)}-1"]
    world.bucket.writable = True
    world.passes(2)
    assert (world.job().state, world.wish()) == ("cancelled", "cancel")


def test_who_finishes_before_it_hears_has_succeeded(world: World) -> None:
    segment = world.running()
    world.store.request_cancel(job_id(1))
    world.passes()
    world.result(segment, "succeeded", Reason.COMPLETED)
    world.ray.jobs[world.submission()] = "SUCCEEDED"
    world.passes(2)
    assert (world.job().state, world.job().result) == ("succeeded", {"eval_loss": 1.5})


def test_a_deadline_ends_a_waiting_job_at_once_and_a_running_one_by_stopping(world: World) -> None:
    world.ray.nodes = [{"CPU": 1}]
    world.running(deadline=60)
    world.add(2, deadline=60)
    world.passes(1, seconds=60)
    assert (world.job(1).state, world.job(1).stop_reason, world.job(2).state) == ("cancelling", "deadline", "failed")
    world.passes()
    assert world.wish() == "cancel"
    world.ray.jobs[world.submission()] = "SUCCEEDED"
    world.passes()
    assert [(world.job(n).state, world.job(n).reason) for n in (1, 2)] == [("failed", "deadline")] * 2


def test_jobs_are_admitted_in_the_order_in_which_they_came(world: World) -> None:
    world.ray.nodes = [{"CPU": 4}]
    for number, cpus in ((1, 3), (2, 2), (3, 1)):
        world.add(number, resources={"cpus": cpus})
    world.passes(2)
    assert [world.job(n).state for n in (1, 2, 3)] == ["starting", "queued", "starting"], "the small one passes"
    assert [condition["message"] for condition in world.job(2).conditions] == ["needs 1 × 2 CPU, 0 CPU free"]
    world.ray.jobs[world.submission(1)] = "SUCCEEDED"
    world.result(world.began(1), "succeeded", Reason.COMPLETED)
    world.ray.jobs[world.submission(1)] = "SUCCEEDED"
    world.passes(2)
    assert [world.job(n).state for n in (1, 2, 3)] == ["succeeded", "starting", "starting"]
    assert [world.job(n).workers for n in (2, 3)] == [1, 1]


def since(world: World) -> tuple[str, datetime, str]:
    [condition] = world.job().conditions
    return condition["type"], datetime.fromisoformat(condition["since"]), condition["message"]


@pytest.mark.parametrize("state", ["queued", "starting", "running"])
@pytest.mark.parametrize("what", ["ray", "bucket"])
def test_what_does_not_answer_is_a_condition_and_no_change_of_state(world: World, state: str, what: str) -> None:
    if state == "running":
        world.running()
    else:
        world.add()
        world.passes(2 if state == "starting" else 0)
    broken = world.ray if what == "ray" else world.bucket
    broken.reachable = False
    world.passes()
    kind, first, message = since(world)
    assert (kind, first) == ("ray_unreachable" if what == "ray" else "storage_unreachable", world.now)
    assert "did not answer" in message
    world.passes(3, seconds=3600)
    assert (world.job().state, since(world)) == (state, (kind, first, message))
    assert [e[0] for e in world.events()].count("condition") == 1
    broken.reachable = True
    world.passes(2)
    assert world.job().conditions == []
    assert world.job().attempt == 1
    assert world.ray.posts.count(f"{job_id(1)}-1") <= 1


def test_a_condition_whose_words_change_keeps_its_beginning(world: World) -> None:
    world.ray.nodes = [{"CPU": 1}]
    for number in (1, 2, 3):
        world.add(number)
    world.passes()
    [first] = world.job(3).conditions
    assert first["message"] == "needs 1 × 1 CPU, 0 CPU free; 1 job ahead"
    world.store.request_cancel(job_id(2))
    world.passes(2)
    [second] = world.job(3).conditions
    assert second["message"] == "needs 1 × 1 CPU, 0 CPU free"
    assert second["since"] == first["since"]
    assert [kind for kind, _ in world.events(3)] == ["state", "condition"]


def test_a_decision_on_a_row_that_has_changed_is_dropped(world: World) -> None:
    world.add()
    cluster = observe_cluster(world.ray.backend())
    stale = world.job()
    world.store.request_cancel(job_id(1))
    world.reconciler.reconcile(stale, cluster, Turn(workers=1))
    assert (world.job().state, world.job().attempt) == ("queued", 0)
    assert world.ray.posts == []
    world.passes()
    assert world.job().state == "cancelled"


def test_the_objects_of_a_deleted_job_are_deleted_once_the_bucket_answers(world: World) -> None:
    segment = world.running()
    world.result(segment, "failed", Reason.INVALID_DATA)
    world.ray.jobs[world.submission()] = "FAILED"
    world.passes()
    world.bucket.put("default/jobs/job-another/job.json", b"{}")
    world.bucket.put("default/datasets/words/v1/dataset.json", b"{}")
    world.bucket.writable = False
    assert world.store.apply(world.job(), {"deleted_at": world.now}) is not None
    world.passes()
    assert len(world.store.to_purge()) == 1
    world.bucket.writable = True
    world.passes()
    assert world.store.to_purge() == []
    assert sorted(world.bucket.content) == [
        "default/datasets/words/v1/dataset.json", "default/jobs/job-another/job.json"]  # fmt: skip


def test_a_control_plane_that_is_told_to_stop_begins_no_further_purge(world: World) -> None:
    for number in (1, 2):
        world.store.insert(row(number, state="failed", deleted_at=T0), ACCEPTED, None)
        world.bucket.put(world.layout(number).job, b"{}")
    world.bucket.hook = lambda effect: world.reconciler.loop.stop()
    world.passes()
    assert [job.id for job in world.store.to_purge()] == [job_id(2)]


def test_progress_and_the_workers_events_are_mirrored_once_each_over_restarts(world: World) -> None:
    def metrics(step: int) -> StreamLine:
        return StreamLine(type="metrics", step=step, at=T0, values={"loss": float(step), "seconds_per_step": 2.0})

    def event(step: int) -> StreamLine:
        return StreamLine(type="event", step=step, at=T0, event="checkpoint", message=f"step {step}")

    segment = world.running()
    lines = [metrics(2), event(2), metrics(4)]
    for count in (1, 2, 3):
        world.stream(segment, lines[:count])
        world.restart()
        world.passes(2)
    assert (world.job().progress["step"], world.job().progress["eta_seconds"]) == (4, 12.0)
    second = world.began(restart=1, origin=CheckpointRef(segment=segment, step=2))
    world.stream(second, [event(3)])
    world.passes()
    assert (world.job().progress["step"], world.job().progress["eta_seconds"]) == (3, None)
    world.stream(second, [event(3), metrics(3)])
    world.restart()
    world.passes(2)
    assert (world.job().progress["step"], world.job().progress["values"]["loss"]) == (3, 3.0)
    assert [e for e in world.events() if e[0] == "checkpoint"] == [("checkpoint", "step 2"), ("checkpoint", "step 3")]


def test_an_event_that_no_database_would_take_does_not_keep_a_job_from_its_end(world: World) -> None:
    segment = world.running()
    line = {"type": "event", "step": 1, "at": T0.isoformat(), "event": "x" * 33}
    world.bucket.put(world.layout().segment(segment).stream + "000000.jsonl", json.dumps(line).encode() + b"\n")
    world.result(segment, "succeeded", Reason.COMPLETED)
    world.ray.jobs[world.submission()] = "SUCCEEDED"
    world.passes(2)
    assert (world.job().state, world.job().progress["step"]) == ("succeeded", 0)


def test_a_damaged_stream_does_not_keep_a_job_from_its_end(world: World) -> None:
    segment = world.running()
    world.bucket.put(chunk(world.layout().segment(segment).stream, 0, "jsonl"), b"{torn\n")
    world.result(segment, "succeeded", Reason.COMPLETED)
    world.ray.jobs[world.submission()] = "SUCCEEDED"
    world.passes()
    assert world.job().state == "succeeded"


@pytest.mark.parametrize("trouble", [KeyError("a bug"), DataError("INSERT", {}, Exception("value too long"))])
def test_the_trouble_of_one_job_stops_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    for number in (1, 2):
        world.add(number)

    def observe(job: JobRow, *rest: Any) -> Any:
        if job.id == job_id(1):
            raise trouble
        return observer.observe(job, *rest)

    monkeypatch.setattr(reconciler_module, "observe", observe)
    world.passes()
    assert [world.job(n).state for n in (1, 2)] == ["queued", "starting"]


def test_a_job_of_a_newer_release_is_watched_and_can_be_ended_but_is_not_begun(world: World) -> None:
    """As after a release was taken back: what we do not know of its spec would be left out."""
    world.running(1)
    world.add(2)
    for number in (1, 2):
        job = world.job(number)
        assert world.store.apply(job, {"spec": {**job.spec, "of_tomorrow": 1}}) is not None
    world.passes(3)
    assert [world.job(n).state for n in (1, 2)] == ["running", "queued"]
    for number in (1, 2):
        world.store.request_cancel(job_id(number))
    world.passes(2)
    world.obey()
    world.passes(2)
    assert [world.job(n).state for n in (1, 2)] == ["cancelled", "cancelled"]


def test_a_view_has_the_deadline_counted_from_acceptance() -> None:
    job = dataclasses.replace(row(1, train_spec(deadline=60)), state=JobState.RUNNING.value)
    assert reconciler_module.view(job).deadline == T0 + timedelta(seconds=60)
    assert reconciler_module.view(row(1)).deadline is None
