"""Writing a checkpoint, cut off anywhere; and what the training does meanwhile.

Two workers die at each write of the protocol in turn: the next start always finds a complete checkpoint, and ends with
the bits of a run that nothing happened to.
"""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
import torch.distributed as dist

import workers.train
from api.documents import CheckpointRef, JobDocument, SegmentDocument
from api.errors import SnapshotFailed, StorageUnavailable
from api.storage import Bucket
from tests.servers import BUCKET, S3, use_store
from tests.training import (
    history_lines,
    layout_of,
    make_dataset,
    manifests,
    segment_lines,
    segment_names,
    settings_for,
    train_alone,
    train_job,
)
from workers.checkpoint import CheckpointWriter
from workers.restore import read_checkpoint
from workers.run import Run
from workers.session import Session
from workers.settings import WorkerSettings
from workers.snapshot import State
from workers.train import train

RANKS = 2
#: Where a rank dies while it writes its second checkpoint, and the checkpoints at which the next start may begin.
DEATHS: dict[tuple[int, str], set[int]] = {
    (0, "before_part"): {2},
    (0, "after_part"): {2},
    (0, "after_read_back"): {2},
    (0, "after_receipt"): {2},
    (0, "before_flush"): {2},
    (0, "after_flush"): {2},
    (0, "after_manifest"): {4},
    (1, "before_part"): {2},
    (1, "after_part"): {2},
    (1, "after_read_back"): {2},
    (1, "after_receipt"): {2, 4},  # all that rank 0 needs is there, if it is quick enough
}


def job_of(name: str) -> JobDocument:
    """Six steps on two workers, a checkpoint after each second one."""
    return train_job(
        name,
        model={"layers": 1, "width": 16, "heads": 2, "dropout": 0.1},
        batch={"global_size": 4, "micro_size": 1},
        steps=6,
        log_every=1,
        evaluate={"every": 3, "sequences": 4},
        checkpoint={"every": 2},
        sample=None,
        resources={"workers": RANKS},
    )


@dataclass(frozen=True)
class Place:
    """Where the ranks work: what their processes are told."""

    storage: str
    environment: dict[str, str]
    folder: Path

    def group(self, what: Callable[..., Any], *arguments: Any) -> list[ForkServerProcess]:
        """Start a process for each rank, joined by gloo, that calls `what(session, place, *arguments)`.

        They are forks of one process that has imported everything, so a group starts in a fraction of a second.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.training", "torch._dynamo"])  # the latter the optimizer would import
        meeting = str(self.folder / uuid4().hex)
        group = [
            context.Process(target=_rank, args=(rank, meeting, self, what, arguments), daemon=True)
            for rank in range(RANKS)
        ]
        for process in group:
            process.start()
        return group

    def run(self, what: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Let a group come to its end; return what `what` returned on each rank, as JSON."""
        group = self.group(what, *arguments)
        for process in group:
            process.join(120)
        assert [process.exitcode for process in group] == [0] * RANKS
        return [json.loads((self.folder / f"answer-{rank}.json").read_text()) for rank in range(RANKS)]


def _rank(rank: int, meeting: str, place: Place, what: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(place.environment, GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    answer = what(Session(attempt=1, restart=0, rank=rank, world_size=RANKS), place, *arguments)
    (place.folder / f"answer-{rank}.json").write_text(json.dumps(answer))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def place(s3_server: S3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A dataset, and the run that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        use_store(s3_server, patch)
        folder = tmp_path_factory.mktemp("ranks")
        place = Place(f"s3://{BUCKET}/{uuid4().hex}", s3_server.environment(), folder)
        make_dataset(Bucket(place.storage), settings_for(place.storage, folder / "cache"))
        place.run(training, "undisturbed", 0)
        yield place


@pytest.fixture
def bucket(place: Place, s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    use_store(s3_server, monkeypatch)
    return Bucket(place.storage)


@pytest.fixture
def settings(place: Place) -> WorkerSettings:
    return settings_for(place.storage, place.folder / "cache")


def training(session: Session, place: Place, name: str, restart: int, death: tuple[int, str] | None = None) -> None:
    """Train a job; if so, let one rank die at a place, while it writes its second checkpoint."""
    if death is not None and death[0] == session.rank:
        os.environ["LOCKSTEP_FAILPOINT"] = f"{death[1]}:2"
    own = Session(attempt=1, restart=restart, rank=session.rank, world_size=RANKS)
    train(job_of(name), own, Bucket(place.storage), settings_for(place.storage, place.folder / "cache"))


def die(place: Place, name: str, death: tuple[int, str]) -> None:
    """Train until a rank is killed, and kill the others, as Ray does."""
    group = place.group(training, name, 0, death)
    group[death[0]].join(60)
    assert group[death[0]].exitcode == -signal.SIGKILL, f"no rank came by {death}"
    for process in group:
        process.kill()
        process.join()


def state_of(bucket: Bucket, job: JobDocument, segment: str, step: int) -> State:
    return read_checkpoint(bucket, layout_of(job), CheckpointRef(segment=segment, step=step)).state


@pytest.mark.parametrize("death", DEATHS, ids=lambda death: f"rank {death[0]} {death[1]}")
def test_a_run_killed_at_any_write_of_a_checkpoint_ends_as_if_nothing_had_happened(
    place: Place, bucket: Bucket, death: tuple[int, str]
) -> None:
    undisturbed, job = job_of("undisturbed"), job_of(f"killed-{death[0]}-{death[1]}")
    die(place, job.id, death)
    listed = manifests(bucket, job)
    assert listed
    for segment, step in listed:
        state_of(bucket, job, segment, step)  # raises if a byte of it is missing or wrong

    place.run(training, job.id, 1)
    resumed = segment_names(bucket, job)[-1]
    origin = bucket.get_document(layout_of(job).segment(resumed).document, SegmentDocument).origin
    assert origin is not None
    assert origin.step in DEATHS[death]
    assert origin.step == max(step for _, step in listed)
    assert history_lines(bucket, job) == history_lines(bucket, undisturbed)
    ours = state_of(bucket, job, resumed, 6)
    theirs = state_of(bucket, undisturbed, segment_names(bucket, undisturbed)[-1], 6)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


class Gated(Bucket):
    """A store that lets parts of checkpoints pass at a gate, and says how long it has been away."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.gate = threading.Event()
        self.gate.set()
        self.away_since: float | None = None
        self.broken = False

    def put_views(self, key: str, views: Sequence[memoryview]) -> None:
        if key.endswith(".safetensors"):
            assert self.gate.wait(60)
            if self.broken:
                raise StorageUnavailable("the store has been away for too long")
        super().put_views(key, views)


def agreeing(session: Session, place: Place) -> dict[str, Any]:
    """Let one rank alone meet each obstacle; return what `save` says on this rank, and why."""
    bucket, said, taken = Gated(place.storage), list[str](), dict[str, bool]()
    first = session.rank == 0
    state = {"model.a": torch.ones(64), "model.b": torch.ones(64)}
    writer = CheckpointWriter(
        bucket,
        layout_of(job_of("agreed")),
        "1-0-a",
        session,
        before_manifest=lambda: None,
        on_commit=lambda manifest: None,
        on_skip=lambda step, why: said.append(f"{step}: {why}"),
    )
    bucket.away_since = None if first else time.monotonic() - 6.6
    taken["away from one"] = writer.save(1, state, {})
    bucket.away_since = None
    taken["answering"] = writer.save(2, state, {})
    writer.wait()
    if not first:
        bucket.gate.clear()
    taken["going up"] = writer.save(3, state, {})
    bucket.away_since = None if first else time.monotonic() - 6.6
    taken["still going up on one"] = writer.save(4, state, {})
    bucket.away_since = None
    bucket.gate.set()
    # 2^46 numbers, as a view of one: the larger tensor is rank 0's part.
    taken["no memory on one"] = writer.save(5, {**state, "model.a": torch.ones(1).expand(2**46)}, {})
    try:
        writer.save(6, {**state, "model.a": torch.ones(1).expand(2**46)}, {}, required=True)
    except SnapshotFailed as error:
        said.append(str(error))
    taken["memory"] = writer.save(7, state, {})
    writer.wait()
    bucket.broken = not first
    writer.save(8, state, {})
    try:
        writer.save(9, state, {})
    except StorageUnavailable as error:
        said.append(str(error))
    writer.close()
    return {"taken": taken, "said": said}


def test_all_ranks_take_a_checkpoint_or_none_does(place: Place, bucket: Bucket) -> None:
    """Whatever is in the way on one of them; rank 0 alone would wait for the other's receipt."""
    one, other = place.run(agreeing)
    assert one["taken"] == other["taken"]
    assert one["taken"] == {
        "away from one": False,
        "answering": True,
        "going up": True,
        "still going up on one": False,
        "no memory on one": False,
        "memory": True,
    }
    lack = "a worker has no memory for a snapshot of 268435456 MiB"
    assert one["said"] == [
        "1: the store has been away for 7 s",
        "4: the store has been away for 7 s",
        f"5: {lack}",
        f"the checkpoint of step 6 cannot be taken: {lack}",
        "another worker could not write its part of the checkpoint before",
    ]
    assert other["said"] == [*one["said"][:-1], "the store has been away for too long"]
    assert [step for _, step in manifests(bucket, job_of("agreed"))] == [2, 3, 7]


def test_training_goes_on_while_a_checkpoint_is_uploaded(
    place: Place, bucket: Bucket, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upload of step 4 waits until step 7 is done, and still holds the weights of step 4."""
    held, free = train_job("held"), train_job("free")
    train_alone(free, bucket, settings)
    gated, listed, original = Gated(place.storage), list[list[tuple[str, int]]](), workers.train.next_batch
    gated.gate.clear()

    def next_batch(run: Run) -> object:
        if run.step == 7:
            listed.append(manifests(bucket, held))
            gated.gate.set()
        return original(run)

    monkeypatch.setattr(workers.train, "next_batch", next_batch)
    train_alone(held, gated, settings)
    (segment,) = segment_names(bucket, held)
    assert listed == [[]]
    assert manifests(bucket, held) == [(segment, step) for step in (4, 8, 12)]
    ours, theirs = state_of(bucket, held, segment, 4), state_of(bucket, free, segment_names(bucket, free)[0], 4)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_training_goes_on_while_the_store_is_away_and_waits_for_it_at_the_end(
    place: Place, bucket: Bucket, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Away from step 3 to the end: the checkpoints of 4 and 8 are skipped, that of 12 is not."""
    job, gated, original = train_job("away"), Gated(place.storage), workers.train.next_batch

    def next_batch(run: Run) -> object:
        if run.step == 3:
            gated.away_since = time.monotonic()
        return original(run)

    monkeypatch.setattr(workers.train, "next_batch", next_batch)
    result = train_alone(job, gated, settings)
    (segment,) = segment_names(bucket, job)
    assert result.outcome == "succeeded"
    assert manifests(bucket, job) == [(segment, 12)]
    skipped = [line for line in segment_lines(bucket, job, segment) if line.event == "checkpoint_skipped"]
    assert [line.step for line in skipped] == [4, 8]
    assert skipped[0].message == "step 4: checkpoint skipped: the store has been away for 1 s"
