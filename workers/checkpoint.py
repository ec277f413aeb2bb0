"""Checkpoints: a snapshot on the training thread, parts written by all ranks in the background, a manifest last.

The protocol: each rank writes its part, reads it back, and puts a receipt with size and sha256 beside it. Rank 0
waits for all receipts, compares sizes with the store, and writes the manifest. Whatever has no manifest is garbage.
No collective leaves the training thread: ranks meet only through the bucket.
"""

import hashlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from api.documents import CheckpointRef, Manifest, Receipt, SegmentDocument, now
from api.errors import InvalidData, ObjectMissing, StorageUnavailable
from api.history import history
from api.layout import CheckpointLayout, JobLayout
from api.storage import Bucket
from workers.session import Session

logger = logging.getLogger("lockstep.workers")

State = dict[str, Tensor]


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Return everything that a resume needs, by name: parameters and, for each, what the optimizer keeps.

    The tensors are the live ones; the order of the data and dropout follow from the step alone.
    """
    state: State = {}
    for name, parameter in model.named_parameters():
        state[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            state[f"optimizer.{name}.{key}"] = value
    return state


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Put a saved state into a fresh model and optimizer; InvalidData if a tensor is missing or misshapen."""
    for name, parameter in model.named_parameters():
        parameter.data.copy_(_fitting(state, f"model.{name}", parameter.shape))
        shapes = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        optimizer.state[parameter] = {
            key: _fitting(state, f"optimizer.{name}.{key}", shape).to(parameter.device) for key, shape in shapes.items()
        }


def _fitting(state: State, name: str, shape: torch.Size) -> Tensor:
    saved = state.get(name)
    if saved is None or saved.shape != shape:
        raise InvalidData(f"the checkpoint does not fit this model: {name} is missing or of another shape")
    return saved


def part_of(sizes: dict[str, int], rank: int, world_size: int) -> list[str]:
    """Return the names of the tensors that `rank` writes: largest first, each to the rank with the fewest bytes."""
    load_of = [0] * world_size
    mine = []
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        lightest = load_of.index(min(load_of))
        load_of[lightest] += sizes[name]
        if lightest == rank:
            mine.append(name)
    return mine


def sha256_of(tensor: Tensor) -> str:
    """Return the sha256 of a contiguous CPU tensor's bytes, which are the bytes that safetensors writes for it."""
    return hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().data).hexdigest()


class CheckpointWriter:
    """Writes this rank's parts in the background, one checkpoint at a time."""

    def __init__(
        self,
        bucket: Bucket,
        layout: JobLayout,
        segment: str,
        session: Session,
        before_manifest: Callable[[], None],
        on_commit: Callable[[Manifest], None],
        receipt_timeout: float = 600.0,
    ) -> None:
        """`before_manifest` makes the metrics durable; `on_commit` hears of each finished one, both on rank 0."""
        self._bucket, self._layout, self._segment, self._session = bucket, layout, segment, session
        self._before_manifest, self._on_commit = before_manifest, on_commit
        self._receipt_timeout = receipt_timeout
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self.stalled = 0.0
        """Seconds that checkpoints have held the training thread: waiting for the previous one, and the snapshot."""

    def save(self, step: int, state: State, metrics: dict[str, float]) -> None:
        """Snapshot this rank's part and hand it to the background thread; waits for the previous one first."""
        start = perf_counter()
        self.wait()
        sizes = {name: tensor.nbytes for name, tensor in state.items()}
        mine = part_of(sizes, self._session.rank, self._session.world_size)
        snapshot = {name: state[name].detach().to("cpu", copy=True).contiguous() for name in mine}
        self._pending = self._pool.submit(self._write, step, snapshot, metrics)
        self.stalled += perf_counter() - start

    def wait(self) -> None:
        """Wait until the newest checkpoint is committed (rank 0) or this rank's part is (others)."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _write(self, step: int, snapshot: State, metrics: dict[str, float]) -> None:
        checkpoint = self._layout.segment(self._segment).checkpoint(step)
        self._write_part(checkpoint, snapshot)
        if self._session.leads:
            receipts = self._await_receipts(checkpoint)
            self._before_manifest()
            manifest = Manifest(
                job_id=self._layout.job_id,
                segment=self._segment,
                step=step,
                world_size=self._session.world_size,
                parts=receipts,
                metrics=metrics,
                created_at=now(),
            )
            self._bucket.put_document(checkpoint.manifest, manifest)
            self._on_commit(manifest)

    def _write_part(self, checkpoint: CheckpointLayout, snapshot: State) -> None:
        rank, world_size = self._session.rank, self._session.world_size
        tensors = {name: sha256_of(tensor) for name, tensor in snapshot.items() if name.startswith("model.")}
        body = save(snapshot)
        digest = hashlib.sha256(body).hexdigest()
        key = checkpoint.part(rank, world_size)
        size = len(body)
        self._bucket.put(key, body)
        del body  # the snapshot and one serialised copy at a time
        if hashlib.sha256(self._bucket.get(key)).hexdigest() != digest:
            raise StorageUnavailable(f"{key} reads back otherwise than it was written")
        name = key.removeprefix(checkpoint.prefix)
        receipt = Receipt(rank=rank, name=name, size=size, sha256=digest, tensors=tensors)
        self._bucket.put_document(checkpoint.receipt(rank, world_size), receipt)

    def _await_receipts(self, checkpoint: CheckpointLayout) -> list[Receipt]:
        world_size = self._session.world_size
        receipts: dict[int, Receipt] = {}
        deadline = time.monotonic() + self._receipt_timeout
        while len(receipts) < world_size:
            for rank in set(range(world_size)) - set(receipts):
                receipt = self._bucket.find_document(checkpoint.receipt(rank, world_size), Receipt)
                if receipt is not None:
                    receipts[rank] = receipt
            if len(receipts) < world_size:
                if time.monotonic() > deadline:
                    missing = sorted(set(range(world_size)) - set(receipts))
                    raise StorageUnavailable(f"no receipts of ranks {missing} for {checkpoint.prefix}")
                time.sleep(0.05)
        for receipt in receipts.values():
            if self._bucket.size(checkpoint.prefix + receipt.name) != receipt.size:
                raise StorageUnavailable(f"{checkpoint.prefix}{receipt.name} is not as large as its receipt says")
        return [receipts[rank] for rank in range(world_size)]


def read_segments(bucket: Bucket, layout: JobLayout) -> list[SegmentDocument]:
    """Return the segments of a job; a folder without `segment.json` never began."""
    found = (
        bucket.find_document(layout.segment(name).document, SegmentDocument) for name in bucket.folders(layout.segments)
    )
    return [segment for segment in found if segment is not None]


def resume_points(bucket: Bucket, layout: JobLayout, segments: list[SegmentDocument]) -> list[CheckpointRef]:
    """Return the committed checkpoints on the job's history, newest first."""
    points = []
    for span in reversed(history(segments)):
        committed = [
            int(name.removeprefix("step-"))
            for name in bucket.folders(layout.segment(span.segment).prefix)
            if name.startswith("step-")
        ]
        points += [
            CheckpointRef(segment=span.segment, step=step)
            for step in sorted(committed, reverse=True)
            if span.contains(step)
        ]
    return points


@dataclass(frozen=True)
class Restored:
    """Where a run begins: a verified checkpoint, or step 0 with nothing."""

    point: CheckpointRef | None
    state: State
    metrics: dict[str, float]

    @property
    def step(self) -> int:
        return self.point.step if self.point is not None else 0


def read_checkpoint(bucket: Bucket, layout: JobLayout, point: CheckpointRef) -> Restored:
    """Return a checkpoint's whole state, every byte verified.

    ObjectMissing if it was never committed or lost an object, InvalidData if a part is short or altered.
    """
    checkpoint = layout.segment(point.segment).checkpoint(point.step)
    manifest = bucket.get_document(checkpoint.manifest, Manifest)
    state: State = {}
    for part in manifest.parts:
        body = bucket.get(checkpoint.prefix + part.name)
        if len(body) != part.size or hashlib.sha256(body).hexdigest() != part.sha256:
            raise InvalidData(f"{checkpoint.prefix}{part.name} is not what its manifest says")
        state.update(load(body))
    return Restored(point, state, manifest.metrics)


def newest_valid(bucket: Bucket, layout: JobLayout, segments: list[SegmentDocument]) -> tuple[Restored, list[str]]:
    """Return the newest checkpoint that verifies, and why newer ones were passed over."""
    passed_over: list[str] = []
    for point in resume_points(bucket, layout, segments):
        try:
            return read_checkpoint(bucket, layout, point), passed_over
        except ObjectMissing as error:
            # Without a manifest it was never a checkpoint: a run died while writing it. With one, it is damaged.
            if bucket.objects(layout.segment(point.segment).checkpoint(point.step).manifest):
                passed_over.append(str(error))
        except InvalidData as error:
            passed_over.append(str(error))
    return Restored(None, {}, {}), passed_over
