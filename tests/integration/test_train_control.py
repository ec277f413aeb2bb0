"""Stops of every kind, batches left out, forks and crash loops: in one process, against a real S3 server."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import workers.evaluate
import workers.gradients
import workers.train
from api.documents import (
    CheckpointRef,
    ControlDocument,
    FaultDocument,
    HeartbeatDocument,
    JobDocument,
    NoticeDocument,
    SegmentDocument,
    now,
)
from api.jobs import Reason
from api.storage import Bucket
from tests.training import (
    events,
    history_lines,
    layout_of,
    make_dataset,
    manifests,
    result_of,
    segment_names,
    settings_for,
    train_alone,
    train_job,
)
from workers.restore import read_checkpoint
from workers.run import Run
from workers.settings import WorkerSettings
from workers.snapshot import State


@pytest.fixture
def settings(storage: str, bucket: Bucket, tmp_path: Path) -> WorkerSettings:
    settings = settings_for(storage, tmp_path / "cache")
    make_dataset(bucket, settings)
    return settings


def final_state(bucket: Bucket, job: JobDocument, step: int = 12) -> State:
    segment = next(segment for segment, written in reversed(manifests(bucket, job)) if written == step)
    return read_checkpoint(bucket, layout_of(job), CheckpointRef(segment=segment, step=step)).state


def assert_same_end(bucket: Bucket, one: JobDocument, other: JobDocument) -> None:
    ours, theirs = final_state(bucket, one), final_state(bucket, other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert history_lines(bucket, one) == history_lines(bucket, other)


def seen(run: Run) -> None:
    """Wait until rank 0's thread has seen what is wanted."""
    while run.control._wanted == 0:
        time.sleep(0.005)


def tell_before_step(
    patch: pytest.MonkeyPatch, bucket: Bucket, job: JobDocument, step: int, control: ControlDocument
) -> None:
    """Let the wish come while the step before is done."""
    original = workers.train.next_batch

    def next_batch(run: Run) -> object:
        if run.step + 1 == step and run.segment.id.startswith("1-"):
            bucket.put_document(layout_of(job).control(1), control)
            seen(run)
        return original(run)

    patch.setattr(workers.train, "next_batch", next_batch)


@pytest.mark.parametrize("step", [1, 6, 9])
def test_a_paused_run_goes_on_to_the_same_bits(
    bucket: Bucket, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    undisturbed, paused = train_job("undisturbed"), train_job("paused")
    train_alone(undisturbed, bucket, settings)
    tell_before_step(monkeypatch, bucket, paused, step, ControlDocument(wish="pause"))
    result = train_alone(paused, bucket, settings)
    assert (result.outcome, result.reason, result.step) == ("stopped", Reason.USER_PAUSED, step - 1)
    if step > 1:
        assert (segment_names(bucket, paused)[0], step - 1) in manifests(bucket, paused)
    assert train_alone(paused, bucket, settings, attempt=2).outcome == "succeeded"
    assert_same_end(bucket, undisturbed, paused)


@pytest.mark.parametrize("step", [4, 12])
def test_a_pause_in_the_middle_of_an_evaluation_is_honoured_at_once_and_the_evaluation_made_up_for(
    bucket: Bucket, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    undisturbed, paused = train_job("undisturbed"), train_job("paused")
    train_alone(undisturbed, bucket, settings)
    runs: list[Run] = []
    begin, batch = workers.train.evaluate_now, workers.evaluate._loss_sum

    def evaluate_now(run: Run) -> None:
        runs.append(run)
        begin(run)

    def loss_sum(*arguments: object) -> float:
        if runs[-1].step == step and runs[-1].segment.id.startswith("1-"):
            bucket.put_document(layout_of(paused).control(1), ControlDocument(wish="pause"))
            seen(runs[-1])
        return batch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(workers.train, "evaluate_now", evaluate_now)
    monkeypatch.setattr(workers.evaluate, "_loss_sum", loss_sum)
    result = train_alone(paused, bucket, settings)
    assert (result.reason, result.step) == (Reason.USER_PAUSED, step)
    first = segment_names(bucket, paused)[0]
    assert (step, "evaluation") not in events(bucket, paused, first)
    assert train_alone(paused, bucket, settings, attempt=2).outcome == "succeeded"
    second = segment_names(bucket, paused)[-1]
    document = bucket.get_document(layout_of(paused).segment(second).document, SegmentDocument)
    assert document.redoes_evaluation
    assert (step, "evaluation") in events(bucket, paused, second)
    assert history_lines(bucket, paused) == history_lines(bucket, undisturbed)


def test_a_cancelled_run_writes_a_checkpoint_only_if_that_is_wanted(
    bucket: Bucket, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for keep in (True, False):
        job = train_job(f"cancelled-{keep}".lower())
        with monkeypatch.context() as patch:
            tell_before_step(patch, bucket, job, 7, ControlDocument(wish="cancel", keep_checkpoint=keep))
            result = train_alone(job, bucket, settings)
        assert (result.reason, result.step) == (Reason.USER_CANCELLED, 6)
        assert [step for _, step in manifests(bucket, job)] == ([4, 6] if keep else [4])


def test_a_notice_that_the_machine_goes_leads_to_a_checkpoint(
    bucket: Bucket, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, drained = train_job("undisturbed"), train_job("drained")
    train_alone(undisturbed, bucket, settings)
    original = workers.train.next_batch

    def next_batch(run: Run) -> object:
        if run.step == 6 and run.segment.id.startswith("1-"):
            notice = NoticeDocument(message="bye", created_at=now())
            bucket.put_document(layout_of(drained).notice(1), notice)
            seen(run)
        return original(run)

    monkeypatch.setattr(workers.train, "next_batch", next_batch)
    result = train_alone(drained, bucket, settings)
    assert (result.outcome, result.reason, result.step) == ("stopped", Reason.DRAINED, 6)
    assert train_alone(drained, bucket, settings, attempt=2).outcome == "succeeded"
    assert_same_end(bucket, undisturbed, drained)


def poison(patch: pytest.MonkeyPatch, *numbers: int) -> list[tuple[int, int]]:
    """Let the gradients of some global batches come out as NaN; return the (step, batch) pairs as they are trained."""
    trained: list[tuple[int, int]] = []
    take, original = workers.train.next_batch, workers.gradients.accumulate_gradients
    newest: list[int] = []

    def next_batch(run: Run) -> object:
        batch = take(run)
        newest[:] = [batch.number]
        return batch

    def accumulate(run: Run, step: int, micro_batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        original(run, step, micro_batches)
        trained.append((step, newest[0]))
        if newest[0] in numbers:
            next(iter(run.model.parameters())).grad.fill_(float("nan"))  # type: ignore[union-attr]

    patch.setattr(workers.train, "next_batch", next_batch)
    patch.setattr(workers.train, "accumulate_gradients", accumulate)
    return trained


def without(numbers: set[int], steps: int = 12) -> list[tuple[int, int]]:
    good = [number for number in range(1, steps + len(numbers) + 1) if number not in numbers]
    return list(enumerate(good[:steps], 1))


def test_a_batch_that_is_not_finite_is_skipped_before_it_touches_anything(
    bucket: Bucket, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = train_job("skipping", on_non_finite="skip")
    trained = poison(monkeypatch, 3, 7, 8)
    assert train_alone(job, bucket, settings).outcome == "succeeded"
    assert [pair for pair in trained if pair[1] not in (3, 7, 8)] == without({3, 7, 8})
    (segment,) = segment_names(bucket, job)
    assert [step for step, event in events(bucket, job, segment) if event == "skipped"] == [3, 6, 6]
    last = read_checkpoint(bucket, layout_of(job), CheckpointRef(segment=segment, step=12))
    assert last.skipped == [3, 7, 8]
    assert all(values["loss"] == values["loss"] for _, values in history_lines(bucket, job) if "loss" in values)


def test_a_skipping_run_that_crashes_resumes_behind_what_it_left_out(
    bucket: Bucket, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, crashed = (train_job(name, on_non_finite="skip") for name in ("undisturbed", "crashed"))
    poison(monkeypatch, 3, 7)
    train_alone(undisturbed, bucket, settings)

    class Crash(Exception):
        pass

    with monkeypatch.context() as patch:
        before = workers.train.log

        def log(run: Run, rate: float, norm: float) -> None:
            before(run, rate, norm)
            if run.step == 9:
                run.writer.wait()
                raise Crash

        patch.setattr(workers.train, "log", log)
        with pytest.raises(Crash):
            train_alone(crashed, bucket, settings)
    trained = poison(monkeypatch, 3, 7)
    train_alone(crashed, bucket, settings, restart=1)
    assert trained[0] == (9, 11)
    assert_same_end(bucket, undisturbed, crashed)


def test_a_run_that_rewinds_leaves_the_batch_out_on_the_way(
    bucket: Bucket, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewinding, skipping = train_job("rewinding", on_non_finite="rewind"), train_job("skipping", on_non_finite="skip")
    trained = poison(monkeypatch, 7)
    first = train_alone(rewinding, bucket, settings)
    assert (first.outcome, first.reason, first.step) == ("stopped", Reason.REWOUND, 6)
    assert result_of(bucket, rewinding, segment_names(bucket, rewinding)[0]).values == {"skipped_batch": 7}
    trained.clear()
    assert train_alone(rewinding, bucket, settings, attempt=2).outcome == "succeeded"
    assert trained == without({7})[4:]  # from the checkpoint of step 4 on
    train_alone(skipping, bucket, settings)
    assert_same_end(bucket, rewinding, skipping)


def test_only_so_many_batches_may_be_left_out(
    bucket: Bucket, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = train_job("hopeless", on_non_finite="skip", non_finite_limit=2)
    poison(monkeypatch, *range(5, 50))
    result = train_alone(job, bucket, settings)
    assert (result.outcome, result.reason, result.step) == ("failed", Reason.NON_FINITE_LOSS, 4)
    assert "2 batches have been left out already" in result.message
    assert [step for _, step in manifests(bucket, job)] == [4]


def forked(name: str, source: JobDocument, segment: str, step: int, **changes: object) -> JobDocument:
    origin = CheckpointRef(segment=segment, step=step, job_id=source.id)
    return train_job(name, **changes).model_copy(update={"init": origin})


def test_a_fork_goes_on_as_its_source_would_have(bucket: Bucket, settings: WorkerSettings) -> None:
    source = train_job("source")
    train_alone(source, bucket, settings)
    (segment,) = segment_names(bucket, source)
    fork = forked("fork", source, segment, 8)
    assert train_alone(fork, bucket, settings).outcome == "succeeded"
    ours, theirs = final_state(bucket, fork), final_state(bucket, source)
    assert [name for name in ours if name.startswith("model.") and not torch.equal(ours[name], theirs[name])] == []
    (first,) = segment_names(bucket, fork)
    assert events(bucket, fork, first)[0] == (8, "forked")
    assert min(step for step, _ in history_lines(bucket, fork)) == 9


def test_a_fork_may_log_in_another_rhythm_and_resumes_from_its_own_checkpoints(
    bucket: Bucket, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = train_job("source", log_every=1)
    train_alone(source, bucket, settings)
    (segment,) = segment_names(bucket, source)
    losses = {step: values["loss"] for step, values in history_lines(bucket, source) if "loss" in values}
    fork = forked("fork", source, segment, 4, log_every=10)
    tell_before_step(monkeypatch, bucket, fork, 10, ControlDocument(wish="pause"))
    assert train_alone(fork, bucket, settings).reason is Reason.USER_PAUSED
    assert train_alone(fork, bucket, settings, attempt=2).outcome == "succeeded"
    lines = {step: values["loss"] for step, values in history_lines(bucket, fork) if "loss" in values}
    assert lines[10] == pytest.approx(sum(losses[step] for step in range(5, 11)) / 6)


def crashing(patch: pytest.MonkeyPatch, error: Callable[[], Exception], step: int) -> None:
    original = workers.train.next_batch

    def next_batch(run: Run) -> object:
        if run.step == step:
            run.writer.wait()
            raise error()
        return original(run)

    patch.setattr(workers.train, "next_batch", next_batch)


def test_the_same_fault_twice_at_the_same_step_is_a_loop_and_ends_the_job(
    bucket: Bucket, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = train_job("looping")
    crashing(monkeypatch, lambda: IndexError("index 8 is out of range"), 6)
    for restart in range(2):
        with pytest.raises(IndexError):
            train_alone(job, bucket, settings, restart=restart)
    newest = segment_names(bucket, job)[-1]
    fault = bucket.get_document(layout_of(job).segment(newest).fault(0), FaultDocument)
    assert (fault.reason, fault.step, fault.rank) == (Reason.WORKER_ERROR, 6, 0)
    assert "IndexError: index 8 is out of range" in fault.message
    result = train_alone(job, bucket, settings, restart=2)
    assert (result.outcome, result.reason) == ("failed", Reason.CRASH_LOOP)
    assert "index 8 is out of range" in result.message


def test_lost_peers_never_make_a_loop(
    bucket: Bucket, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = train_job("unlucky")
    with monkeypatch.context() as patch:
        crashing(patch, lambda: RuntimeError("Connection closed by peer [10.0.0.1]:4711"), 6)
        for restart in range(4):
            with pytest.raises(RuntimeError):
                train_alone(job, bucket, settings, restart=restart)
    assert train_alone(job, bucket, settings, restart=4).outcome == "succeeded"


def test_rank_0_shows_a_sign_of_life(bucket: Bucket, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    job = train_job("alive")
    tell_before_step(monkeypatch, bucket, job, 9, ControlDocument(wish="pause"))
    train_alone(job, bucket, settings)
    beat = bucket.get_document(layout_of(job).segment(segment_names(bucket, job)[0]).heartbeat, HeartbeatDocument)
    assert beat.limit >= settings.hang_seconds
    assert beat.count > 0 or beat.phase == "start"
