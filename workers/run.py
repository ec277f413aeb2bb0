"""What a training run works with, and how it is put together: data, model, optimizer, the state of a checkpoint."""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from api.arithmetic import flops_per_token, samples, total_steps
from api.datasets import find_dataset
from api.documents import CheckpointRef, DatasetDocument, JobDocument, Manifest
from api.errors import InvalidData, LockstepError, ObjectMissing
from api.jobs import Reason
from api.layout import DatasetLayout
from api.spec import TrainSpec
from api.storage import Bucket
from workers.checkpoint import CheckpointWriter
from workers.compile import compile_blocks
from workers.control import Control
from workers.data import TokenSplit, TrainBatches
from workers.metrics import Meter
from workers.model import Transformer
from workers.optim import make_optimizer
from workers.order import batch_number
from workers.peak import measure_peak
from workers.restore import Restored
from workers.seeds import dropout_seed
from workers.segment import OWES_EVALUATION, Segment
from workers.session import Session
from workers.settings import WorkerSettings
from workers.snapshot import State, load_state
from workers.tokens import read_tokenizer
from workers.tree import same_start
from workers.watchdog import Watchdog

LOSS_SUM, LOSS_STEPS = "loop.loss_sum", "loop.loss_steps"


@dataclass
class Run:
    """Everything that the loop works with."""

    spec: TrainSpec
    session: Session
    segment: Segment
    control: Control
    watchdog: Watchdog
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
    logged_step: int
    """Where the newest metric line of this segment ends; its start if there is none."""
    saved: CheckpointRef | None
    """The newest checkpoint, which may be the one that this segment began at."""
    loss_sum: Tensor
    """This rank's losses (nats, summed over tokens) since the last multiple of `log_every`; float64 scalar."""
    loss_steps: int
    """How many steps that is."""
    evaluation: dict[str, float]
    """Of the present step, if it was evaluated; a checkpoint carries it."""
    owes_evaluation: bool
    """Whether an evaluation of the present step has begun, here or before a stop, and is not done."""

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return self.segment.step

    def done(self, step: int, seconds: float) -> None:
        """One more step is finished; it took so long."""
        self.segment.step = step
        self.loss_steps += 1
        self.evaluation = {}
        self.watchdog.step_done(seconds)

    def close(self) -> None:
        self.batches.close()
        self.eval_split.cache.close()
        self.writer.close()


def prepare_run(
    job: JobDocument,
    spec: TrainSpec,
    segment: Segment,
    origin: Restored,
    control: Control,
    watchdog: Watchdog,
    settings: WorkerSettings,
) -> Run:
    """Open the data, build model and optimizer, put the checkpoint in; Halt on every rank if the data is bad."""
    session, bucket, length = segment.session, segment.bucket, spec.data.sequence_length
    fault: LockstepError | None = None
    try:
        dataset, tokenizer, layout = open_dataset(job, spec, bucket)
        train_split = TokenSplit(bucket, layout, dataset, "train", settings.cache, settings.cache_bytes)
        eval_split = TokenSplit(bucket, layout, dataset, "eval", settings.cache, settings.cache_bytes)
        for split in (train_split, eval_split):
            split.require(length)
    except (InvalidData, ObjectMissing) as error:
        fault = error
    control.check(fault)

    peak = measure_peak(session, spec.precision, settings.peak_seconds)
    model, optimizer = make_model(spec, dataset.vocab_size, session, control, watchdog)
    if origin.point is not None:
        load_state(model, optimizer, origin.state)
    loop = LoopState.of(origin)
    origin.state.clear()
    micros = spec.micro_batches // session.world_size
    batches = TrainBatches(
        train_split,
        sequence_length=length,
        seed=spec.seed,
        global_size=spec.batch.global_size,
        micro_size=spec.micro_batch,
        micro_range=range(session.rank * micros, (session.rank + 1) * micros),
        first_batch=batch_number(origin.step + 1, segment.skipped),
        skipped=segment.skipped,
    )
    steps = total_steps(spec, samples(dataset, "train", length))
    writer = CheckpointWriter(
        bucket,
        segment.job,
        segment.id,
        session,
        before_manifest=segment.journal.flush,
        on_commit=lambda manifest: announce(segment, manifest),
        on_skip=lambda step, why: segment.journal.event(
            step, "checkpoint_skipped", f"step {step}: checkpoint skipped: {why}"
        ),
        moved=lambda: watchdog.beat("upload"),
        receipt_timeout=settings.receipt_timeout,
    )
    return Run(
        spec=spec,
        session=session,
        segment=segment,
        control=control,
        watchdog=watchdog,
        dataset=dataset,
        tokenizer=tokenizer,
        model=model,
        parallel=data_parallel(model, session, spec.determinism),
        optimizer=optimizer,
        batches=batches,
        eval_split=eval_split,
        writer=writer,
        meter=Meter(flops_per_token(spec.model, dataset.vocab_size, length), session.device, peak),
        total_steps=steps,
        logged_step=origin.step,
        saved=origin.point,
        loss_sum=(loop.loss_sum * session.leads).view(()).to(session.device),
        loss_steps=loop.loss_steps,
        evaluation=origin.metrics if origin.own else {},
        owes_evaluation=loop.owes_evaluation,
    )


@dataclass(frozen=True)
class LoopState:
    """What the loop itself has half done at a checkpoint."""

    loss_sum: Tensor
    """The losses since the last metric line, summed over ranks; float64, (1,)."""
    loss_steps: int
    """How many steps that is."""
    owes_evaluation: bool

    @classmethod
    def of(cls, origin: Restored) -> "LoopState":
        """Return that of a checkpoint; nothing is half done at the start, nor where another job's is forked."""
        nothing = torch.zeros(1, dtype=torch.float64)
        loss_sum, steps, owes = (
            origin.state.get(name, nothing) if origin.own else nothing
            for name in (LOSS_SUM, LOSS_STEPS, OWES_EVALUATION)
        )
        return cls(loss_sum, int(steps), bool(owes))

    def tensors(self) -> State:
        counts = {LOSS_STEPS: self.loss_steps, OWES_EVALUATION: self.owes_evaluation}
        return {
            LOSS_SUM: self.loss_sum,
            **{k: torch.tensor([float(v)], dtype=torch.float64) for k, v in counts.items()},
        }


def make_model(
    spec: TrainSpec, vocab_size: int, session: Session, control: Control, watchdog: Watchdog
) -> tuple[Transformer, torch.optim.Optimizer]:
    """Return fresh weights, the same for every world size, compiled if wanted; and their optimizer."""
    torch.manual_seed(dropout_seed(spec.seed, 0, 0))
    model = Transformer(spec.model, vocab_size, spec.data.sequence_length, spec.precision).to(session.device)
    if spec.compile:
        watchdog.beat("compile")
        control.check(compile_blocks(model, spec.micro_batch), Reason.UNSUPPORTED)
        watchdog.beat("start")
    return model, make_optimizer(model, spec.optimizer)


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
