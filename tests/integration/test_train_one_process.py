"""One worker trains in this process against a real store: it finishes, and resumes to the bit after a crash."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import workers.gradients
import workers.train
from api.documents import CheckpointRef, ControlDocument, JobDocument, SegmentDocument
from api.jobs import Reason
from api.storage import Bucket
from tests.training import (
    drop,
    events,
    flip_a_bit,
    history_lines,
    layout_of,
    make_dataset,
    manifests,
    result_of,
    rewrite,
    segment_lines,
    segment_names,
    settings_for,
    train_alone,
    train_job,
)
from workers.checkpoint import CheckpointWriter
from workers.optim import clip_gradients
from workers.restore import read_checkpoint
from workers.run import Run
from workers.session import Session
from workers.settings import WorkerSettings
from workers.snapshot import State

#: What a run may do otherwise than the job of `train_job` does.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "constant": {"schedule": {"type": "constant", "warmup_steps": 11}},
    "linear": {"schedule": {"type": "linear", "floor": 0.0}},
    "inverse_sqrt": {"schedule": {"type": "inverse_sqrt", "warmup_steps": 3}},
    "wsd": {"schedule": {"type": "wsd", "decay_fraction": 0.5}},
    "infinity_norm": {"clip": {"type": "infinity_norm", "threshold": 0.01}},
    "value": {"clip": {"type": "value", "threshold": 0.001}},
    "no clip": {"clip": None},
    "bf16": {"precision": "bf16"},
    "elastic": {"determinism": "elastic", "batch": {"global_size": 8, "micro_size": 2}},
}
#: Few kernels: compiling is what costs time.
COMPILED: dict[str, Any] = {
    "compile": True,
    "model": {"layers": 2, "width": 16, "heads": 2, "dropout": 0.1, "positions": "learned", "activation": "gelu"},
}
#: The compiler warns of what it does itself, and would take an error for its own failure.
TORCHS_WARNINGS = pytest.mark.filterwarnings("default")


class Crash(BaseException):
    """Stands for the death of the process."""


@pytest.fixture
def compiled_kernels(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep compiled kernels in a folder of this test session."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "inductor"))


@pytest.fixture
def settings(storage: str, bucket: Bucket, tmp_path: Path) -> WorkerSettings:
    """A bucket with a dataset, and an empty cache."""
    settings = settings_for(storage, tmp_path / "cache")
    make_dataset(bucket, settings)
    return settings


def crash_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next run die right after a step, once its checkpoints are written."""
    original = workers.train.next_batch

    def next_batch(run: Run) -> object:
        if run.step == step:
            run.writer.wait()
            raise Crash
        return original(run)

    monkeypatch.setattr(workers.train, "next_batch", next_batch)


def crash(job: JobDocument, bucket: Bucket, settings: WorkerSettings, step: int, restart: int = 0) -> str:
    """Train until the process dies after a step; return the segment that it leaves."""
    with pytest.MonkeyPatch.context() as patch:
        crash_after(step, patch)
        with pytest.raises(Crash):
            train_alone(job, bucket, settings, restart=restart)
    return segment_names(bucket, job)[-1]


def state_at(bucket: Bucket, job: JobDocument, segment: str, step: int) -> State:
    return read_checkpoint(bucket, layout_of(job), CheckpointRef(segment=segment, step=step)).state


def assert_same_bits(one: State, other: State) -> None:
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_finishes_and_leaves_everything_that_it_promises(bucket: Bucket, settings: WorkerSettings) -> None:
    job = train_job("whole", steps=40, log_every=10, checkpoint={"every": 10}, evaluate={"every": 20, "sequences": 10})
    result = train_alone(job, bucket, settings)
    (segment,) = segment_names(bucket, job)
    document = bucket.get_document(layout_of(job).segment(segment).document, SegmentDocument)
    lines = history_lines(bucket, job)
    losses = [values["loss"] for _, values in lines if "loss" in values]
    assert (result.outcome, result.reason, result.step) == ("succeeded", Reason.COMPLETED, 40)
    assert result_of(bucket, job, segment) == result
    assert (document.origin, document.world_size) == (None, 1)
    assert [step for step, _ in lines] == [10, 20, 20, 30, 40, 40]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.05
    assert manifests(bucket, job) == [(segment, step) for step in range(10, 41, 10)]
    assert result.values["eval_loss"] == lines[-1][1]["eval_loss"]
    assert result.values["sample"].startswith("ab")
    assert bucket.objects(result.values["checkpoint"] + "manifest.json")
    assert bucket.objects(layout_of(job).segment(segment).logs(0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_crashed_run_resumes_and_ends_as_if_nothing_had_happened(
    bucket: Bucket, settings: WorkerSettings, variant: str
) -> None:
    assert_exact_resume(bucket, settings, VARIANTS[variant])


@TORCHS_WARNINGS
@pytest.mark.usefixtures("compiled_kernels")
def test_a_compiled_run_resumes_to_the_bit_and_compiles_each_shape_once(
    bucket: Bucket, settings: WorkerSettings
) -> None:
    """One graph for training, one for evaluation and one for its last micro-batch, in each of the three starts; the
    sample compiles none."""
    torch._dynamo.utils.counters.clear()
    assert_exact_resume(bucket, settings, COMPILED)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 9


def assert_exact_resume(bucket: Bucket, settings: WorkerSettings, changes: dict[str, Any]) -> None:
    undisturbed, crashed = train_job("undisturbed", **changes), train_job("crashed", **changes)
    train_alone(undisturbed, bucket, settings)
    first = crash(crashed, bucket, settings, step=10)
    result = train_alone(crashed, bucket, settings, restart=1)
    (whole,) = segment_names(bucket, undisturbed)
    second = segment_names(bucket, crashed)[-1]
    document = bucket.get_document(layout_of(crashed).segment(second).document, SegmentDocument)
    assert document.origin == CheckpointRef(segment=first, step=8)
    assert events(bucket, crashed, second)[:2] == [(8, "restart"), (8, "resumed")]
    assert "fingerprint" not in [event for _, event in events(bucket, crashed, second)]
    assert_same_bits(state_at(bucket, undisturbed, whole, 12), state_at(bucket, crashed, second, 12))
    assert history_lines(bucket, crashed) == history_lines(bucket, undisturbed)
    assert result.values["sample"] == result_of(bucket, undisturbed, whole).values["sample"]


def test_any_number_of_crashes_leaves_no_gap_and_no_duplicate(bucket: Bucket, settings: WorkerSettings) -> None:
    undisturbed, crashed = train_job("undisturbed"), train_job("crashed")
    train_alone(undisturbed, bucket, settings)
    for restart, step in enumerate((2, 5, 5, 7, 11)):
        crash(crashed, bucket, settings, step=step, restart=restart)
    train_alone(crashed, bucket, settings, attempt=2)
    assert history_lines(bucket, crashed) == history_lines(bucket, undisturbed)
    last = {job.id: segment_names(bucket, job)[-1] for job in (undisturbed, crashed)}
    assert_same_bits(*(state_at(bucket, job, last[job.id], 12) for job in (undisturbed, crashed)))


def test_a_run_that_died_after_its_last_checkpoint_ends_with_that_checkpoint(
    bucket: Bucket, settings: WorkerSettings
) -> None:
    job = train_job("late", steps=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers.train, "sample", lambda *_: (_ for _ in ()).throw(Crash()))
        with pytest.raises(Crash):
            train_alone(job, bucket, settings)
    first = segment_names(bucket, job)[-1]
    result = train_alone(job, bucket, settings, restart=1)
    assert (result.outcome, result.step) == ("succeeded", 8)
    assert result.values["checkpoint"] == layout_of(job).segment(first).checkpoint(8).prefix
    assert bucket.objects(result.values["checkpoint"] + "manifest.json")
    assert result.values["eval_loss"] > 0


def test_bf16_learns_as_fp32_does(bucket: Bucket, settings: WorkerSettings) -> None:
    common: dict[str, Any] = {"steps": 40, "log_every": 10, "checkpoint": {"every": 40}, "evaluate": {"every": 40}}
    curves = {}
    for precision in ("fp32", "bf16"):
        job = train_job(precision, precision=precision, **common)
        result = train_alone(job, bucket, settings)
        losses = [values["loss"] for _, values in history_lines(bucket, job) if "loss" in values]
        curves[precision] = [*losses, result.values["eval_loss"]]
        assert losses[-1] < losses[0] - 0.05
        (segment,) = segment_names(bucket, job)
        assert {tensor.dtype for tensor in state_at(bucket, job, segment, 40).values()} == {
            torch.float32, torch.float64  # the latter only for the sum of the losses
        }  # fmt: skip
    assert curves["bf16"] != curves["fp32"]
    fall = curves["fp32"][0] - curves["fp32"][-1]
    assert curves["bf16"] == pytest.approx(curves["fp32"], abs=0.1 * fall)


@TORCHS_WARNINGS
def test_without_a_compiler_a_compiled_run_fails_and_says_what_to_do(bucket: Bucket, settings: WorkerSettings) -> None:
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    job = train_job("uncompiled", **COMPILED)
    with fresh_cache(), config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        result = train_alone(job, bucket, settings)
    assert (result.outcome, result.reason, result.step) == ("failed", Reason.UNSUPPORTED, 0)
    assert "no-such-compiler" in result.message
    assert "set compile to false" in result.message
    assert result_of(bucket, job, segment_names(bucket, job)[0]) == result


@pytest.mark.parametrize("damage", ["bit flipped", "cut short", "part gone", "manifest flipped", "manifest gone"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    bucket: Bucket, settings: WorkerSettings, damage: str
) -> None:
    job = train_job("damaged")
    first = crash(job, bucket, settings, step=10)
    newest = layout_of(job).segment(first).checkpoint(8)
    match damage:
        case "bit flipped":
            rewrite(bucket, newest.part(0, 1), flip_a_bit)
        case "cut short":
            rewrite(bucket, newest.part(0, 1), lambda body: body[:-100])
        case "part gone":
            drop(bucket, newest.part(0, 1))
        case "manifest flipped":
            rewrite(bucket, newest.manifest, lambda body: body.replace(b'"sha256":"', b'"sha256":"0', 1))
        case "manifest gone":
            drop(bucket, newest.manifest)
    result = train_alone(job, bucket, settings, restart=1)
    second = segment_names(bucket, job)[-1]
    said = events(bucket, job, second)
    assert result.outcome == "succeeded"
    assert (4, "resumed") in said
    if damage == "manifest gone":  # it never was a checkpoint: a run that dies while writing one leaves the same
        assert "fallback" not in [event for _, event in said]
    else:
        fallback = next(line for line in segment_lines(bucket, job, second) if line.event == "fallback")
        assert fallback.step == 4
        assert newest.prefix in fallback.message


def test_a_checkpoint_is_a_snapshot_however_late_it_is_written(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, weights, trained_on = layout_of(train_job("snapshot")), torch.ones(4), threading.Event()
    original = CheckpointWriter._write

    def late(*arguments: Any) -> None:
        trained_on.wait(30)
        original(*arguments)

    monkeypatch.setattr(CheckpointWriter, "_write", late)
    alone = Session(attempt=1, restart=0)
    writer = CheckpointWriter(
        bucket, layout, "1-0-a", alone, before_manifest=lambda: None, on_commit=lambda manifest: None
    )
    writer.save(1, {"weights": weights}, {})
    weights.zero_()
    trained_on.set()
    writer.wait()
    writer.close()
    state = read_checkpoint(bucket, layout, CheckpointRef(segment="1-0-a", step=1)).state
    assert state["weights"].tolist() == [1.0] * 4


def test_with_every_checkpoint_damaged_the_run_begins_anew_and_says_why(
    bucket: Bucket, settings: WorkerSettings
) -> None:
    job = train_job("ruined")
    first = crash(job, bucket, settings, step=10)
    for step in (4, 8):
        rewrite(bucket, layout_of(job).segment(first).checkpoint(step).part(0, 1), flip_a_bit)
    assert train_alone(job, bucket, settings, restart=1).outcome == "succeeded"
    assert [step for step, event in events(bucket, job, segment_names(bucket, job)[-1]) if event == "fallback"] == [
        0,
        0,
    ]
    assert len(segment_names(bucket, job)) == 1


def test_a_wish_to_cancel_is_honoured_within_one_step(
    bucket: Bucket, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = train_job("cancelled", steps=1000)
    original = workers.train.evaluate_now

    def cancelled_meanwhile(run: Run) -> None:
        original(run)
        bucket.put_document(layout_of(job).control(1), ControlDocument(wish="cancel"))
        while run.control._wanted == 0:  # until rank 0's thread has seen it
            time.sleep(0.005)

    monkeypatch.setattr(workers.train, "evaluate_now", cancelled_meanwhile)
    result = train_alone(job, bucket, settings)
    assert (result.outcome, result.reason, result.step) == ("stopped", Reason.USER_CANCELLED, 4)
    assert result_of(bucket, job, segment_names(bucket, job)[0]) == result


@pytest.mark.parametrize(("wish", "reason"), [("cancel", Reason.USER_CANCELLED), ("superseded", Reason.SUPERSEDED)])
def test_an_attempt_that_is_not_wanted_any_more_trains_nothing(
    bucket: Bucket, settings: WorkerSettings, wish: str, reason: Reason
) -> None:
    job = train_job("unwanted")
    bucket.put(layout_of(job).control(1), ControlDocument.model_validate({"wish": wish}).model_dump_json().encode())
    result = train_alone(job, bucket, settings)
    assert (result.outcome, result.reason, result.step) == ("stopped", reason, 0)
    assert history_lines(bucket, job) == []


def test_a_loss_that_is_not_finite_fails_the_run_and_spoils_no_checkpoint(
    bucket: Bucket, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = train_job("exploded")
    original = workers.gradients.accumulate_gradients

    def poisoned(run: Run, step: int, *arguments: object, **named: object) -> None:
        if step == 6:
            with torch.no_grad():
                run.model.embedding.weight[0, 0] = float("nan")
        original(run, step, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(workers.train, "accumulate_gradients", poisoned)
    result = train_alone(job, bucket, settings)
    (segment,) = segment_names(bucket, job)
    assert (result.outcome, result.reason, result.step) == ("failed", Reason.NON_FINITE_LOSS, 5)
    assert "step 6" in result.message
    assert manifests(bucket, job) == [(segment, 4)]
    assert all(tensor.isfinite().all() for tensor in state_at(bucket, job, segment, 4).values())


def test_an_evaluation_that_is_not_finite_fails_the_run_before_the_checkpoint(
    bucket: Bucket, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = train_job("poisoned-evaluation")
    monkeypatch.setattr(workers.train, "evaluate", lambda *_, **__: float("nan"))
    result = train_alone(job, bucket, settings)
    assert (result.outcome, result.reason, result.step) == ("failed", Reason.NON_FINITE_LOSS, 4)
    assert manifests(bucket, job) == []


def test_a_checkpoint_in_flight_is_finished_when_the_run_fails_after_it(
    bucket: Bucket, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = train_job("failing")
    put, calls = Bucket.put, iter(range(100))

    def slow_put(self: Bucket, key: str, body: bytes) -> None:
        if key.endswith(".safetensors"):
            time.sleep(0.5)
        put(self, key, body)

    def poisoned(*arguments: object) -> torch.Tensor:
        norm = clip_gradients(*arguments)  # type: ignore[arg-type]
        return norm * float("nan") if next(calls) == 4 else norm

    monkeypatch.setattr(Bucket, "put", slow_put)
    monkeypatch.setattr(workers.train, "clip_gradients", poisoned)
    result = train_alone(job, bucket, settings)
    (segment,) = segment_names(bucket, job)
    assert (result.reason, result.step) == (Reason.NON_FINITE_LOSS, 4)
    assert manifests(bucket, job) == [(segment, 4)]
