"""The training loop. Read `run_steps` first: it is the specification of a run.

It sees Ray only as a `Session`, so it also runs in one plain process and under torchrun.
"""

import hashlib
import logging
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from api.arithmetic import flops_per_token, samples, total_steps
from api.datasets import find_dataset
from api.documents import CheckpointRef, DatasetDocument, JobDocument, Manifest, ResultDocument, now
from api.errors import InvalidData, LockstepError, ObjectMissing, StorageError
from api.jobs import Reason
from api.layout import DatasetLayout, JobLayout
from api.spec import SampleSpec, TrainSpec
from api.storage import Bucket
from workers.checkpoint import CheckpointWriter, Restored, State, load_state, state_of
from workers.compile import compile_blocks
from workers.control import Control, Halt
from workers.data import TokenSplit, TrainBatches
from workers.evaluate import evaluate
from workers.metrics import Meter
from workers.model import Transformer, generate
from workers.optim import clip_gradients, learning_rate, make_optimizer, set_learning_rate
from workers.peak import measure_peak
from workers.segment import Segment, begin_segment, fingerprint_of
from workers.session import Session
from workers.settings import WorkerSettings
from workers.tokens import read_tokenizer
from workers.tree import Partial, across_ranks, push, put_root, same_start, take_leaf

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
    control = Control(bucket, segment.job.control(session.attempt), session, settings.control_interval)
    run: Run | None = None
    try:
        control.check()
        run = prepare_run(job, spec, segment, origin, control, settings)
        result = run_steps(run)
        if session.leads:
            segment.finish(result)
    except Halt as halt:
        if run is not None:
            run.settle()
        result = outcome(halt.outcome, halt.reason, halt.message, run.step if run else origin.step, {})
        if session.leads:
            segment.finish(result)
    except Exception:
        logger.exception(
            "rank %d stopped on an error, its own or of a rank that it lost", session.rank
        )  # into the job's own log; the group is restarted
        raise
    finally:
        control.close()
        if run is not None:
            run.close()
        segment.close()
    return result


@dataclass
class Run:
    """Everything that the loop works with. `step` counts finished optimizer steps."""

    spec: TrainSpec
    session: Session
    segment: Segment
    control: Control
    dataset: DatasetDocument
    tokenizer: Tokenizer | None
    """None if the dataset is a folder of bare shards."""
    model: Transformer
    parallel: nn.Module
    optimizer: torch.optim.Optimizer
    batches: TrainBatches
    eval_split: TokenSplit
    writer: CheckpointWriter
    meter: Meter
    total_steps: int
    step: int
    logged_step: int
    """Where the newest metric line of this segment ends; its start if there is none."""
    loss_sum: Tensor
    """This rank's losses (nats, summed over tokens) since the last multiple of `log_every`; float64 scalar."""
    evaluation: dict[str, float]
    """Of the present step, if it was evaluated; a checkpoint carries it."""
    checkpoint: CheckpointRef | None
    """The newest one, which may be the one that this segment began at."""

    def settle(self) -> None:
        """Let the checkpoint in flight be finished: after a loss that is not finite it is what the user has."""
        try:
            self.writer.wait()
        except StorageError as error:
            logger.warning("the checkpoint in flight was not written: %s", error)

    def close(self) -> None:
        self.batches.close()
        self.eval_split.cache.close()
        self.writer.close()


def run_steps(run: Run) -> ResultDocument:
    """Run from `run.step` to the end: micro-batches, reduce, clip, finite check, optimizer; then what is due."""
    spec = run.spec
    warm_up(run)
    while run.step < run.total_steps:
        step = run.step + 1
        run.evaluation = {}
        micro_batches = next_batch(run)
        accumulate_gradients(run, step, micro_batches)
        norm = float(clip_gradients(run.model, spec.clip))
        if not math.isfinite(norm):
            raise Halt("failed", Reason.NON_FINITE_LOSS, f"the gradient of step {step} is not finite ({norm})")
        rate = learning_rate(spec.schedule, spec.optimizer.learning_rate, step, run.total_steps)
        set_learning_rate(run.optimizer, rate)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.step = step

        last = step == run.total_steps
        if step % spec.log_every == 0 or last:
            log(run, rate, norm)
        if step % spec.evaluate.every == 0 or last:
            evaluate_now(run)
        if step % spec.checkpoint.every == 0 or last:
            save_checkpoint(run)
    return finish(run)


def next_batch(run: Run) -> list[tuple[Tensor, Tensor]]:
    """Return this rank's micro-batches; on the way all ranks agree that none has bad data and nobody wants a stop."""
    micro_batches: list[tuple[Tensor, Tensor]] = []
    fault: LockstepError | None = None
    try:
        micro_batches = run.batches.next()
    except (InvalidData, ObjectMissing) as error:
        fault = error
    run.control.check(fault)
    return micro_batches


def accumulate_gradients(run: Run, step: int, micro_batches: list[tuple[Tensor, Tensor]]) -> None:
    """Leave the gradients of the global batch's mean loss in the parameters, the same on every rank."""
    if run.spec.determinism == "elastic":
        sum_in_a_tree(run, step, micro_batches)
    else:
        sum_by_ddp(run, step, micro_batches)


def sum_by_ddp(run: Run, step: int, micro_batches: list[tuple[Tensor, Tensor]]) -> None:
    """Add up this rank's gradients; only the last micro-batch is synchronised, while its backward runs."""
    scale = run.session.world_size / tokens_per_step(run.spec)  # DDP averages over ranks, the mean is over all tokens
    for i, micro_batch in enumerate(micro_batches):
        with no_sync(run) if i < len(micro_batches) - 1 else nullcontext():
            loss = forward_backward(run, step, run.session.rank * len(micro_batches) + i, micro_batch, scale)
        run.loss_sum += loss.double()


def sum_in_a_tree(run: Run, step: int, micro_batches: list[tuple[Tensor, Tensor]]) -> None:
    """Sum gradients and losses in an order that the world size does not change (see workers/tree.py).

    Every rank then knows the loss of all of them; rank 0 alone keeps it.
    """
    parameters = list(run.model.parameters())
    partials: list[Partial] = []
    for i, micro_batch in enumerate(micro_batches):
        place = run.session.rank * len(micro_batches) + i
        loss = forward_backward(run, step, place, micro_batch, 1 / tokens_per_step(run.spec))
        push(partials, take_leaf(parameters, loss))
    (subtree,) = partials
    run.loss_sum += put_root(parameters, across_ranks(subtree.total, run.session)).double() * run.session.leads


def forward_backward(run: Run, step: int, place: int, micro_batch: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """Add the gradients of scale × the loss of a micro-batch, by its place in the global batch; return the loss."""
    torch.manual_seed(dropout_seed(run.spec.seed, step, place))
    tokens_BT, targets_BT = micro_batch
    loss = run.parallel(tokens_BT.to(run.session.device), targets_BT.to(run.session.device))
    (loss * scale).backward()
    value: Tensor = loss.detach()
    return value


def tokens_per_step(spec: TrainSpec) -> int:
    return spec.batch.global_size * spec.data.sequence_length


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """Return 32 bits from (seed, step, global micro-batch): never from the rank, so world size changes no mask.

    32, because torch's CPU generator keeps only the low 32 bits of a seed.
    """
    digest = hashlib.blake2b(f"dropout/{seed}/{step}/{micro_batch}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def no_sync(run: Run) -> AbstractContextManager[Any]:
    if isinstance(run.parallel, DistributedDataParallel):
        return run.parallel.no_sync()
    return nullcontext()


def warm_up(run: Run) -> None:
    """One synchronised forward and backward, thrown away.

    DDP puts its gradient buckets into another order after the first backward. Without this, the first step after
    a resume would sum in another order than the same step of an uninterrupted run.
    """
    if not isinstance(run.parallel, DistributedDataParallel):
        return
    shape = (run.spec.micro_batch, run.spec.data.sequence_length)
    tokens_BT = torch.zeros(shape, dtype=torch.int64, device=run.session.device)
    run.parallel(tokens_BT, tokens_BT).backward()
    run.optimizer.zero_grad()


def log(run: Run, rate: float, norm: float) -> None:
    """Write a metric line: the mean loss of the steps since the last multiple of `log_every`, and how it went."""
    every = run.spec.log_every
    tokens = tokens_per_step(run.spec)
    steps = run.step % every or every
    loss = float(run.session.total(run.loss_sum.view(1))) / (steps * tokens)
    run.loss_sum.zero_()
    trained = run.step - run.logged_step
    values = run.meter.line(trained, trained * tokens, run.batches.waited, run.writer.stalled)
    run.logged_step = run.step
    line = {"loss": loss, "learning_rate": rate, "grad_norm": norm, **values}
    run.segment.journal.metrics(run.step, line)
    if run.session.leads:
        run.session.show({"step": run.step, **line})


def evaluate_now(run: Run) -> None:
    start = perf_counter()
    loss = evaluate(
        run.model, run.eval_split, run.spec.evaluate.sequences, run.spec.micro_batch, run.session, run.control
    )
    run.meter.pause(perf_counter() - start)
    if not math.isfinite(loss):
        raise Halt("failed", Reason.NON_FINITE_LOSS, f"the eval loss of step {run.step} is not finite ({loss})")
    run.evaluation = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}
    run.segment.journal.metrics(run.step, run.evaluation)
    run.segment.journal.event(run.step, "evaluation", f"step {run.step}: eval loss {loss:.4f}", **run.evaluation)


def save_checkpoint(run: Run) -> None:
    run.writer.save(run.step, {**state_of(run.model, run.optimizer), **loop_state(run)}, run.evaluation)
    run.checkpoint = CheckpointRef(segment=run.segment.id, step=run.step)


def loop_state(run: Run) -> State:
    """Return what the loop itself has half done: the losses since the last metric line, summed over ranks."""
    return {"loop.loss_sum": run.session.total(run.loss_sum.view(1))}


def finish(run: Run) -> ResultDocument:
    """Wait until the last checkpoint is committed, generate the sample, and say what was made."""
    run.writer.wait()
    run.session.gather(True)  # every rank's part is written before any rank leaves
    assert run.checkpoint is not None  # one follows the last step
    values: dict[str, Any] = {
        **run.evaluation,
        **({} if run.dataset.unigram_loss is None else {"unigram_loss": run.dataset.unigram_loss}),
        "checkpoint": run.segment.job.segment(run.checkpoint.segment).checkpoint(run.step).prefix,
    }
    if run.spec.sample is not None and run.tokenizer is not None and run.session.leads:
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


def prepare_run(
    job: JobDocument, spec: TrainSpec, segment: Segment, origin: Restored, control: Control, settings: WorkerSettings
) -> Run:
    """Open the data, build model and optimizer, put the checkpoint in; Halt on every rank if the data is bad."""
    session, bucket = segment.session, segment.bucket
    fault: LockstepError | None = None
    try:
        dataset, tokenizer, layout = open_dataset(job, spec, bucket)
        train_split = TokenSplit(bucket, layout, dataset, "train", settings.cache, settings.cache_bytes)
        eval_split = TokenSplit(bucket, layout, dataset, "eval", settings.cache, settings.cache_bytes)
        for split in (train_split, eval_split):
            split.require(spec.data.sequence_length)
    except (InvalidData, ObjectMissing) as error:
        fault = error
    control.check(fault)

    peak = measure_peak(session, spec.precision, settings.peak_seconds)
    torch.manual_seed(dropout_seed(spec.seed, 0, 0))
    model = Transformer(spec.model, dataset.vocab_size, spec.data.sequence_length, spec.precision).to(session.device)
    if spec.compile:
        control.check(compile_blocks(model, spec.micro_batch), Reason.UNSUPPORTED)
    optimizer = make_optimizer(model, spec.optimizer)
    if origin.step:
        load_state(model, optimizer, origin.state)
    loss_sum = origin.state.get("loop.loss_sum", torch.zeros(1, dtype=torch.float64)) * session.leads
    origin.state.clear()
    micros = spec.micro_batches // session.world_size
    batches = TrainBatches(
        train_split,
        sequence_length=spec.data.sequence_length,
        seed=spec.seed,
        global_size=spec.batch.global_size,
        micro_size=spec.micro_batch,
        micro_range=range(session.rank * micros, (session.rank + 1) * micros),
        first_step=origin.step + 1,
    )
    steps = total_steps(spec, samples(dataset, "train", spec.data.sequence_length))
    flops = flops_per_token(spec.model, dataset.vocab_size, spec.data.sequence_length)
    writer = CheckpointWriter(
        bucket,
        JobLayout(job.project, job.id),
        segment.id,
        session,
        before_manifest=segment.journal.flush,
        on_commit=lambda manifest: announce(segment, manifest),
        receipt_timeout=settings.receipt_timeout,
    )
    return Run(
        spec=spec,
        session=session,
        segment=segment,
        control=control,
        dataset=dataset,
        tokenizer=tokenizer,
        model=model,
        parallel=data_parallel(model, session, spec.determinism),
        optimizer=optimizer,
        batches=batches,
        eval_split=eval_split,
        writer=writer,
        meter=Meter(flops, session.device, peak),
        total_steps=steps,
        step=origin.step,
        logged_step=origin.step,
        loss_sum=loss_sum.view(()).to(session.device),
        evaluation=origin.metrics,
        checkpoint=origin.point,
    )


def open_dataset(
    job: JobDocument, spec: TrainSpec, bucket: Bucket
) -> tuple[DatasetDocument, Tokenizer | None, DatasetLayout]:
    """Return the pinned dataset, and its tokenizer if it has one; InvalidData or ObjectMissing say what is wrong."""
    name = spec.data.dataset.partition("@")[0]
    layout = DatasetLayout(job.project, name, job.dataset_version or "")
    dataset = find_dataset(bucket, job.project, f"{name}@{layout.version}", spec.model.vocab_size)
    if layout.is_bare:
        return dataset, None, layout
    return dataset, read_tokenizer(bucket.get(layout.tokenizer), dataset.tokenizer_sha256, layout.tokenizer), layout


def data_parallel(model: Transformer, session: Session, determinism: str) -> nn.Module:
    """Wrap for gradient averaging over ranks, overlapped with the backward pass; one process needs none.

    Elastic runs average in an order of their own, so they need only the same start on every rank.
    """
    if determinism == "elastic":
        same_start(model, session)
        return model
    if session.world_size == 1:
        return model
    device_ids = [session.device] if session.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def announce(segment: Segment, manifest: Manifest) -> None:
    segment.journal.event(
        manifest.step,
        "checkpoint",
        f"step {manifest.step}: checkpoint written, {manifest.size / 2**20:.1f} MiB in {manifest.world_size} parts",
        size=manifest.size,
        segment=manifest.segment,
    )
