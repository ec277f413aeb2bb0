"""Writing checkpoints: a snapshot on the training thread, parts by all ranks in the background, then a manifest.

The protocol: each rank writes its part, reads it back, and puts a receipt with size and sha256 beside it. Rank 0
waits for all receipts, compares sizes with the store, and writes the manifest. Whatever has no manifest is garbage.
Ranks meet on the training thread alone, to take a snapshot all together or not at all; in the background they meet
only through the bucket. A segment's prefix is its own and a step is saved in it once, so what lies there is of one try.
"""

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from time import perf_counter

from api.documents import Manifest, Receipt, now
from api.errors import InvalidData, SnapshotFailed, StorageUnavailable
from api.layout import CheckpointLayout, JobLayout
from api.manifest import sealed
from api.storage import Bucket
from workers.failpoints import failpoint
from workers.restore import pieces
from workers.session import Session
from workers.snapshot import Snapshot, State, part_of

logger = logging.getLogger("lockstep.workers")

_ROUND = 0.1
"""Seconds for which a rank looks whether its own upload is done before all ranks meet again."""
_LOOKS = 0.05, 1.0
"""Seconds between two looks for receipts: at first, and at most."""


def skip_silently(step: int, reason: str) -> None:
    """Where nobody asks, what is skipped is in the worker's log alone."""


class CheckpointWriter:
    """Writes this rank's parts in the background, one checkpoint at a time.

    `save` and `wait` are collective: every rank calls them at the same step.
    """

    def __init__(
        self,
        bucket: Bucket,
        layout: JobLayout,
        segment: str,
        session: Session,
        before_manifest: Callable[[], None],
        on_commit: Callable[[Manifest], None],
        on_skip: Callable[[int, str], None] = skip_silently,
        moved: Callable[[], None] = lambda: None,
        receipt_timeout: float = 600.0,
    ) -> None:
        """`before_manifest` makes the metrics durable; `on_commit` hears of each finished one, both on rank 0.

        `on_skip` hears, on every rank, the step of a checkpoint that was not taken, and why; `moved` of each time that
        all ranks met while they waited for an upload.
        """
        self._bucket, self._layout, self._segment, self._session = bucket, layout, segment, session
        self._before_manifest, self._on_commit, self._on_skip = before_manifest, on_commit, on_skip
        self._moved, self._receipt_timeout = moved, receipt_timeout
        self._snapshot = Snapshot()
        self._newest_step = 0
        self._pool = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: futures.Future[None] | None = None
        self._closed = threading.Event()
        self.stalled = 0.0
        """Seconds that checkpoints have held the training thread: waiting for the previous one, and the snapshot."""

    def save(
        self,
        step: int,
        state: State,
        metrics: dict[str, float],
        skipped: Sequence[int] = (),
        required: bool = False,
    ) -> bool:
        """Copy this rank's part of the state and let it be written in the background; return whether it was taken.

        Waits for the previous checkpoint first. None is taken, on any rank, while the store is away from one of them
        or one has no memory for it. A required one waits for the store, and SnapshotFailed says that it cannot be.
        """
        start = perf_counter()
        obstacle = self._obstacle(self._part_of(state), required)
        if obstacle is None:
            assert step > self._newest_step, "a segment holds each step once"
            self._newest_step = step
            self._pending = self._pool.submit(self._write, step, metrics, list(skipped))
        elif required:
            raise SnapshotFailed(f"the checkpoint of step {step} cannot be taken: {obstacle}")
        else:
            self._on_skip(step, obstacle)
        self.stalled += perf_counter() - start
        return obstacle is None

    def wait(self) -> None:
        """Wait with all ranks, however long, until the newest checkpoint is committed; raise if it never will be."""
        while self._meet(busy=not self._finished())[0]:
            pass
        self._pending = None

    def close(self) -> None:
        """Give up what is not written."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _part_of(self, state: State) -> State:
        sizes = {name: tensor.nbytes for name, tensor in state.items()}
        mine = part_of(sizes, self._session.rank, self._session.world_size)
        return {name: state[name].detach() for name in mine}

    def _obstacle(self, part: State, required: bool) -> str | None:
        """Meet until every rank has its snapshot; return what is in the way of a checkpoint, the same on each."""
        lacking: int | None = None
        while True:
            away = 0 if required else seconds_away(self._bucket)
            if lacking is None and not away and self._finished():
                lacking = self._take(part)
            busy, longest_away, most_lacking = self._meet(lacking is None, away, lacking or 0)
            if longest_away:
                return f"the store has been away for {longest_away} s"
            if most_lacking:
                return f"a worker has no memory for a snapshot of {most_lacking / 2**20:.0f} MiB"
            if not busy:
                return None

    def _meet(self, busy: bool, away: int = 0, lacking: int = 0) -> tuple[bool, int, int]:
        """Return the most of each over all ranks; if the previous checkpoint failed on one, raise on every one."""
        done = self._pending is not None and self._pending.done()
        fault = self._pending.exception() if self._pending is not None and done else None
        failed, any_busy, away, lacking = self._session.maximum(fault is not None, busy, away, lacking)
        self._moved()
        if failed:
            self._pending = None
            raise fault or StorageUnavailable("another worker could not write its part of the checkpoint before")
        return bool(any_busy), away, lacking

    def _finished(self) -> bool:
        """Return whether this rank is done with the previous checkpoint; waits a moment for it."""
        return self._pending is None or not futures.wait([self._pending], _ROUND).not_done

    def _take(self, part: State) -> int:
        """Take the snapshot; return the bytes for which there is no memory."""
        try:
            self._snapshot.take(part)
        except SnapshotFailed as error:
            logger.warning("rank %d: %s", self._session.rank, error)
            return sum(tensor.nbytes for tensor in part.values())
        return 0

    def _write(self, step: int, metrics: dict[str, float], skipped: list[int]) -> None:
        """Write this rank's part and, on rank 0, the manifest. In the background."""
        checkpoint = self._layout.segment(self._segment).checkpoint(step)
        self._write_part(checkpoint)
        if self._session.leads:
            manifest = Manifest(
                job_id=self._layout.job_id,
                segment=self._segment,
                step=step,
                world_size=self._session.world_size,
                parts=self._await_receipts(checkpoint),
                metrics=metrics,
                skipped=skipped,
                created_at=now(),
            )
            self._commit(checkpoint, manifest)

    def _write_part(self, checkpoint: CheckpointLayout) -> None:
        rank, world_size = self._session.rank, self._session.world_size
        key, views = checkpoint.part(rank, world_size), self._snapshot.views()
        digest, size = hashlib.sha256(), sum(view.nbytes for view in views)
        for view in views:
            digest.update(view)
        failpoint("before_part")
        self._bucket.put_views(key, views)
        failpoint("after_part")
        self._read_back(key, size, digest.hexdigest())
        failpoint("after_read_back")
        receipt = Receipt(
            rank=rank,
            name=key.removeprefix(checkpoint.prefix),
            size=size,
            sha256=digest.hexdigest(),
            tensors=self._snapshot.model_hashes(),
        )
        self._bucket.put_document(checkpoint.receipt(rank, world_size), receipt)
        failpoint("after_receipt")

    def _read_back(self, key: str, size: int, sha256: str) -> None:
        """Compare what the store has with what it was given: twice if they differ, for the wire can flip a bit too."""
        for _ in range(2):
            digest = hashlib.sha256()
            try:
                for piece in pieces(self._bucket, key, 0, size):
                    digest.update(piece)
                    del piece  # before the next one is read
            except InvalidData as error:
                raise StorageUnavailable(f"{key} reads back shorter than it was written") from error
            if digest.hexdigest() == sha256:
                return
        raise StorageUnavailable(f"{key} reads back otherwise than it was written")

    def _await_receipts(self, checkpoint: CheckpointLayout) -> list[Receipt]:
        """Return every rank's receipt, once all are there and the parts are as large as they say.

        Only the pauses between looks count towards the time limit, not what a store that is away takes to answer.
        """
        world_size = self._session.world_size
        keys = [checkpoint.receipt(rank, world_size) for rank in range(world_size)]
        pause, waited = _LOOKS[0], 0.0
        while missing := set(keys) - {item.key for item in self._bucket.files(checkpoint.prefix)}:
            if waited > self._receipt_timeout:
                raise StorageUnavailable(f"after {waited:.0f} s these are not there: {', '.join(sorted(missing))}")
            if self._closed.wait(pause):
                raise StorageUnavailable(f"{checkpoint.prefix} is given up, since its run has ended")
            waited, pause = waited + pause, min(_LOOKS[1], 1.3 * pause)
        receipts = [self._bucket.get_document(key, Receipt) for key in keys]
        for rank, receipt in enumerate(receipts):
            key = checkpoint.part(rank, world_size)
            if checkpoint.prefix + receipt.name != key or self._bucket.size(key) != receipt.size:
                raise StorageUnavailable(f"{key} is not as large as its receipt says")
        return receipts

    def _commit(self, checkpoint: CheckpointLayout, manifest: Manifest) -> None:
        failpoint("before_flush")
        self._before_manifest()
        failpoint("after_flush")
        self._bucket.put(checkpoint.manifest, sealed(manifest))
        failpoint("after_manifest")
        self._on_commit(manifest)


def seconds_away(bucket: Bucket) -> int:
    """Return for how long a patient bucket has had no answer from the store, at least 1; 0 if it answers."""
    since: float | None = getattr(bucket, "away_since", None)
    return 0 if since is None else max(1, round(time.monotonic() - since))
