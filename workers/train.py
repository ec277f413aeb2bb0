"""The training loop. Read `run_steps` first: it is the specification of a run.

It sees Ray only as a `Session`, so it also runs in one plain process and under torchrun.
"""

import logging
import math
from contextlib import nullcontext
from time import perf_counter
from typing import Any

import torch
from tokenizers import Tokenizer

from api.documents import CheckpointRef, JobDocument, ResultDocument, now
from api.errors import InvalidData, ObjectMissing, StorageError
from api.jobs import Reason
from api.spec import SampleSpec, TrainSpec
from api.storage import Bucket, Timeouts
from workers.checkpoint import seconds_away
from workers.control import Control, Halt
from workers.data import Batch
from workers.evaluate import evaluate
from workers.gradients import accumulate_gradients, tokens_per_step, warm_up
from workers.heartbeat import Heartbeat
from workers.model import generate
from workers.optim import clip_gradients, learning_rate, set_learning_rate
from workers.run import LoopState, Run, prepare_run
from workers.segment import SKIPPED_BATCH, Segment, begin_segment, fingerprint_of
from workers.session import Session
from workers.settings import WorkerSettings
from workers.snapshot import state_of
from workers.watchdog import Limits, Watchdog, asks, write_report

logger = logging.getLogger("lockstep.workers")


def train(job: JobDocument, session: Session, bucket: Bucket, settings: WorkerSettings) -> ResultDocument:
    """Train a job from its newest verified checkpoint to its end; return the outcome, the same on every rank.

    An outcome that the loop knows (finished, stopped on request, bad data, a loss that is not finite) is returned
    by all ranks together. Anything else raises: the worker group is then restarted and resumes.
    """
    spec = job.spec
    assert isinstance(spec, TrainSpec)
    torch.set_num_threads(spec.resources.cpus)
    segment, origin = begin_segment(job, session, bucket, fingerprint_of(spec, session), settings.stream_interval)
    watchdog = watch(segment, settings)
    heartbeat = Heartbeat(segment, watchdog, settings.heartbeat_interval)
    control = Control(bucket, segment.job, session, settings.control_interval, on_look=heartbeat.write)
    run: Run | None = None
    try:
        segment.refuse_crash_loop()
        control.check()
        run = prepare_run(job, spec, segment, origin, control, watchdog, settings)
        result = run_steps(run)
        segment.finish(result)
    except Halt as halt:
        if run is not None:
            settle(run, halt)
        result = outcome(halt.outcome, halt.reason, halt.message, segment.step, halt.values)
        segment.finish(result)
    except Exception as error:
        # Into the job's own log; the group is restarted.
        logger.exception("rank %d stopped on an error, its own or of a rank that it lost", session.rank)
        segment.note_fault(error, watchdog.pulse().phase)
        raise
    finally:
        watchdog.close()
        control.close()
        if run is not None:
            run.close()
        segment.close()
    return result


def watch(segment: Segment, settings: WorkerSettings) -> Watchdog:
    """Start this rank's watchdog. It asks the store by a bucket of its own, which gives up within seconds."""
    store = Bucket(segment.bucket.url, Timeouts(connect=3.0, read=3.0, attempts=1))
    probe = asks(store, segment.layout.document)
    watchdog = Watchdog(
        Limits(first=settings.hang_start_seconds, least=settings.hang_seconds),
        # A store may answer the probe, and yet not what this rank waits for.
        store_answers=lambda: not seconds_away(segment.bucket) and probe(),
        on_hang=lambda stacks, hang: write_report(segment, segment.step, stacks, hang),
    )
    watchdog.start()
    return watchdog


def run_steps(run: Run) -> ResultDocument:
    """Run from `run.step` to the end: micro-batches, reduce, clip, finite check, optimizer; then what is due."""
    spec = run.spec
    warm_up(run)
    if run.owes_evaluation:  # a stop cut it short, after the checkpoint's step
        evaluate_now(run)
    while run.step < run.total_steps:
        began, step = perf_counter(), run.step + 1
        norm = finite_gradients(run, step)
        rate = learning_rate(spec.schedule, spec.optimizer.learning_rate, step, run.total_steps)
        set_learning_rate(run.optimizer, rate)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.done(step, perf_counter() - began)

        last = step == run.total_steps
        if step % spec.log_every == 0 or last:
            log(run, rate, norm)
        if step % spec.evaluate.every == 0 or last:
            evaluate_now(run)
        if step % spec.checkpoint.every == 0 or last:
            save_checkpoint(run, required=last)
    return finish(run)


def finite_gradients(run: Run, step: int) -> float:
    """Leave the clipped gradients of the step's batch in the parameters; return their norm before clipping.

    A batch whose gradient is not finite fails the run, or is left out and the next one taken.
    """
    while True:
        batch = next_batch(run)
        losses_before = run.loss_sum.clone()
        accumulate_gradients(run, step, batch.micro_batches)
        norm = float(clip_gradients(run.model, run.spec.clip))
        if math.isfinite(norm):
            return norm
        run.loss_sum = losses_before
        run.optimizer.zero_grad()
        leave_out(run, step, batch.number, f"the gradient of step {step} is not finite ({norm})")


def next_batch(run: Run) -> Batch:
    """Return this rank's part of a global batch; all ranks agree that none has bad data and nobody wants a stop."""
    batch, fault = Batch(0, []), None
    try:
        batch = run.batches.next()
    except (InvalidData, ObjectMissing) as error:
        fault = error
    run.control.check(fault)
    return batch


def leave_out(run: Run, step: int, number: int, why: str) -> None:
    """Leave a batch out on purpose, if the spec allows one more; Halt if not, or if that means going back."""
    action, limit = run.spec.on_non_finite, run.spec.non_finite_limit
    if action == "fail":
        raise Halt("failed", Reason.NON_FINITE_LOSS, why)
    if len(run.segment.skipped) >= limit:
        raise Halt("failed", Reason.NON_FINITE_LOSS, f"{why}, and {limit} batches have been left out already")
    if action == "rewind":
        raise Halt("stopped", Reason.REWOUND, f"{why}: batch {number} will be left out", values={SKIPPED_BATCH: number})
    run.segment.skipped.append(number)
    run.segment.journal.event(step, "skipped", f"{why}: batch {number} is left out", batch=number)


def settle(run: Run, halt: Halt) -> None:
    """Leave behind what the end of the run shall have: a checkpoint of the present step, or the one in flight.

    After a loss that is not finite, the one in flight is what the user has.
    """
    try:
        if halt.checkpoint and run.step > (run.saved.step if run.saved is not None else 0):
            save_checkpoint(run)
        run.writer.wait()
    except StorageError as error:
        logger.warning("the last checkpoint was not written: %s", error)


def log(run: Run, rate: float, norm: float) -> None:
    """Write a metric line: the mean loss of the steps since the last multiple of `log_every`, and how it went."""
    tokens = tokens_per_step(run.spec)
    loss = float(run.session.total(run.loss_sum.view(1))) / (run.loss_steps * tokens)
    run.loss_sum.zero_()
    run.loss_steps = 0
    trained = run.step - run.logged_step
    values = run.meter.line(trained, trained * tokens, run.batches.waited, run.writer.stalled)
    run.logged_step = run.step
    line = {"loss": loss, "learning_rate": rate, "grad_norm": norm, **values}
    note(run, line)


def note(run: Run, line: dict[str, float]) -> None:
    """Write a metric line of the present step, and show it to whoever watches live."""
    run.segment.journal.metrics(run.step, line)
    if run.session.leads:
        run.session.show({"step": run.step, **line})


def evaluate_now(run: Run) -> None:
    start = perf_counter()
    run.owes_evaluation = True
    loss = evaluate(
        run.model,
        run.eval_split,
        run.spec.evaluate.sequences,
        run.spec.micro_batch,
        run.session,
        check=run.control.check,
        moved=lambda: run.watchdog.beat("evaluation"),
    )
    run.meter.pause(perf_counter() - start)
    if not math.isfinite(loss):
        raise Halt("failed", Reason.NON_FINITE_LOSS, f"the eval loss of step {run.step} is not finite ({loss})")
    run.owes_evaluation = False
    run.evaluation = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}
    note(run, run.evaluation)
    run.segment.journal.event(run.step, "evaluation", f"step {run.step}: eval loss {loss:.4f}", **run.evaluation)


def save_checkpoint(run: Run, required: bool = False) -> None:
    """Write one; where the store is away or memory is short, the training goes on without it, unless it must be."""
    loop = LoopState(run.session.total(run.loss_sum.view(1)), run.loss_steps, run.owes_evaluation)
    state = {**state_of(run.model, run.optimizer), **loop.tensors()}
    if run.writer.save(run.step, state, run.evaluation, run.segment.skipped, required):
        run.saved = CheckpointRef(segment=run.segment.id, step=run.step)


def finish(run: Run) -> ResultDocument:
    """Wait until the last checkpoint is committed, generate the sample, and say what was made."""
    run.writer.wait()
    assert run.saved is not None  # one follows the last step
    values: dict[str, Any] = {
        **run.evaluation,
        **({} if run.dataset.unigram_loss is None else {"unigram_loss": run.dataset.unigram_loss}),
        "checkpoint": run.segment.job.segment(run.saved.segment).checkpoint(run.step).prefix,
    }
    if run.spec.sample is not None and run.tokenizer is not None and run.session.leads:
        run.watchdog.beat("sample")
        values["sample"] = sample(run, run.spec.sample, run.tokenizer)
    return outcome("succeeded", Reason.COMPLETED, f"trained {run.step} steps", run.step, values)


def sample(run: Run, spec: SampleSpec, tokenizer: Tokenizer) -> str:
    prompt = tokenizer.encode(spec.prompt).ids or [0]
    generator = torch.Generator().manual_seed(run.spec.seed & 0xFFFFFFFF)
    # The context grows by a token at a time; compiled blocks would be compiled anew for each of its lengths.
    with torch.compiler.set_stance("force_eager") if run.spec.compile else nullcontext():
        tokens = generate(run.model, prompt, spec.tokens, spec.temperature, generator)
    return spec.prompt + tokenizer.decode(tokens)


def outcome(kind: Any, reason: Reason, message: str, step: int, values: dict[str, Any]) -> ResultDocument:
    return ResultDocument(outcome=kind, reason=reason, message=message, step=step, values=values, created_at=now())
