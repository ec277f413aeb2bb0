"""What the writer promises whatever the store does: no manifest over anything that did not verify, and no job lost."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from api.documents import CheckpointRef, Receipt
from api.errors import InvalidData, SnapshotFailed, StorageUnavailable
from api.layout import JobLayout
from tests.checkpoints import JOB, LoneSession, write_checkpoint
from tests.fakes import MemoryBucket
from workers.checkpoint import CheckpointWriter
from workers.restore import read_checkpoint
from workers.snapshot import State

LAYOUT = JobLayout("default", JOB)
SEGMENT = "1-0-a"
STATE: State = {"model.a": torch.arange(6.0).view(2, 3), "optimizer.a.step": torch.ones(()), "model.b": torch.ones(5)}
#: More than any machine has, but a view of one number.
HUGE: State = {"model.a": torch.ones(1).expand(2**46)}


class Store(MemoryBucket):
    """A store in memory that can be away, keeps uploads waiting at a gate, and lies about what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.away: float | None = None
        self.asked: Callable[[], object] = lambda: None
        """Called each time that somebody asks whether the store is away."""
        self.gate = threading.Event()
        self.gate.set()
        self.lies: Iterator[Callable[[bytes], bytes]] = iter(())
        """What becomes of the next pieces that are read."""

    @property
    def away_since(self) -> float | None:
        self.asked()
        return self.away

    def put_views(self, key: str, views: Sequence[memoryview]) -> None:
        assert self.gate.wait(60)
        self.put(key, b"".join(views))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return next(self.lies, bytes)(super().get_range(key, start, length))


def flipped(body: bytes) -> bytes:
    return body[:-1] + bytes([body[-1] ^ 1])


def writer_for(
    store: Store, told: list[str] | None = None, timeout: float = 600.0, world_size: int = 1
) -> CheckpointWriter:
    """Rank 0's writer."""
    session = LoneSession(1, 0, 0, world_size)
    said = told if told is not None else []
    return CheckpointWriter(
        store,
        LAYOUT,
        SEGMENT,
        session,
        before_manifest=lambda: said.append("flushed"),
        on_commit=lambda manifest: said.append(f"committed {manifest.step}"),
        on_skip=lambda step, why: said.append(f"skipped {step}: {why}"),
        receipt_timeout=timeout,
    )


def committed(store: Store) -> list[int]:
    steps = [key.rsplit("/", 2)[1] for key in store.content if key.endswith("manifest.json")]
    return sorted(int(step.removeprefix("step-")) for step in steps)


def at(step: int) -> CheckpointRef:
    return CheckpointRef(segment=SEGMENT, step=step)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_what_is_saved_is_read_back_to_the_bit(store: Store, world_size: int) -> None:
    write_checkpoint(store, LAYOUT, at(4), STATE, world_size)
    read = read_checkpoint(store, LAYOUT, at(4))
    assert read.step == 4
    assert read.metrics == {"eval_loss": 4 / 7}
    assert read.state.keys() == STATE.keys()
    assert all(torch.equal(read.state[name], STATE[name]) for name in STATE)


def test_batches_left_out_on_purpose_come_back(store: Store) -> None:
    writer = writer_for(store)
    writer.save(4, STATE, {}, skipped=[2, 3])
    writer.wait()
    assert read_checkpoint(store, LAYOUT, at(4)).skipped == [2, 3]


def test_a_checkpoint_of_another_job_is_read_from_there(store: Store) -> None:
    write_checkpoint(store, LAYOUT, at(4), STATE)
    elsewhere = JobLayout("default", "job-of-mine")
    read = read_checkpoint(store, elsewhere, at(4).model_copy(update={"job_id": JOB}))
    assert torch.equal(read.state["model.b"], STATE["model.b"])


def test_metrics_are_durable_before_the_manifest(store: Store) -> None:
    said: list[str] = []
    store.hook = lambda effect: said.append(effect.rpartition("/")[2]) if "manifest" in effect else None
    writer = writer_for(store, said)
    writer.save(4, STATE, {})
    writer.wait()
    assert said == ["flushed", "manifest.json", "manifest.json", "committed 4"]


def test_training_is_held_by_the_snapshot_alone(store: Store) -> None:
    """While the upload waits, the tensors change, and the checkpoint is of before."""
    writer, weights = writer_for(store), torch.ones(4)
    store.gate.clear()
    assert writer.save(1, {"model.a": weights}, {})
    weights.zero_()
    assert committed(store) == []
    store.gate.set()
    writer.wait()
    assert read_checkpoint(store, LAYOUT, at(1)).state["model.a"].tolist() == [1.0] * 4


def test_a_second_checkpoint_waits_for_the_first_and_that_is_counted(store: Store) -> None:
    """There is one snapshot; what the first has not written yet must not be overwritten."""
    writer, asked = writer_for(store), iter(range(100))
    store.gate.clear()
    writer.save(1, {"model.a": torch.ones(4)}, {})
    before = writer.stalled
    store.asked = lambda: store.gate.set() if next(asked) == 2 else None  # when it has looked twice and waited
    writer.save(2, {"model.a": torch.zeros(4)}, {})
    writer.wait()
    assert writer.stalled - before >= 0.1
    assert [read_checkpoint(store, LAYOUT, at(step)).state["model.a"].sum() for step in (1, 2)] == [4, 0]


def test_while_the_store_is_away_checkpoints_are_skipped_and_a_required_one_is_not(store: Store) -> None:
    said: list[str] = []
    writer = writer_for(store, said)
    store.away = time.monotonic() - 89.6
    assert writer.save(4, STATE, {}) is False
    assert writer.save(8, STATE, {}, required=True) is True
    store.away = None
    writer.wait()
    assert committed(store) == [8]
    assert said == ["skipped 4: the store has been away for 90 s", "flushed", "committed 8"]


def test_an_upload_that_hangs_on_a_store_that_is_away_does_not_hold_the_training(store: Store) -> None:
    said: list[str] = []
    writer = writer_for(store, said)
    store.gate.clear()
    writer.save(1, STATE, {})
    store.away = time.monotonic()
    assert writer.save(2, STATE, {}) is False
    assert said == ["skipped 2: the store has been away for 1 s"]
    store.away = None
    store.gate.set()
    assert writer.save(3, STATE, {}) is True
    writer.wait()
    assert committed(store) == [1, 3]


def test_no_memory_costs_this_checkpoint_and_not_the_next(store: Store) -> None:
    said: list[str] = []
    writer = writer_for(store, said)
    assert writer.save(4, HUGE, {}) is False
    assert said == ["skipped 4: a worker has no memory for a snapshot of 268435456 MiB"]
    with pytest.raises(SnapshotFailed, match="checkpoint of step 8 cannot be taken: a worker has no memory"):
        writer.save(8, HUGE, {}, required=True)
    assert writer.save(12, STATE, {}) is True
    writer.wait()
    assert committed(store) == [12]


def test_a_part_that_reads_back_otherwise_once_was_the_wire(store: Store) -> None:
    store.lies = iter([flipped])
    write_checkpoint(store, LAYOUT, at(4), STATE)
    assert committed(store) == [4]


def test_a_part_that_reads_back_otherwise_twice_gets_no_receipt_and_no_manifest(store: Store) -> None:
    store.lies = iter([flipped, flipped])
    writer = writer_for(store)
    writer.save(4, STATE, {})
    with pytest.raises(StorageUnavailable, match="reads back otherwise than it was written"):
        writer.wait()
    assert [key.rpartition("/")[2] for key in store.content] == ["part-00000-of-00001.safetensors"]


def test_a_part_that_the_store_cut_short_gets_no_receipt(store: Store) -> None:
    store.hook = lambda effect: cut(store) if effect.startswith("after put") else None
    writer = writer_for(store)
    writer.save(4, STATE, {})
    with pytest.raises(StorageUnavailable, match="reads back shorter than it was written"):
        writer.save(8, STATE, {})
    assert committed(store) == []


def cut(store: Store) -> None:
    for key, body in store.content.items():
        if key.endswith(".safetensors"):
            store.content[key] = body[:-1]


def test_a_part_that_became_another_size_after_its_receipt_gets_no_manifest(store: Store) -> None:
    store.hook = lambda effect: cut(store) if effect.startswith("after put") and "receipt" in effect else None
    writer = writer_for(store)
    writer.save(4, STATE, {})
    with pytest.raises(StorageUnavailable, match="not as large as its receipt says"):
        writer.wait()
    assert committed(store) == []


def test_a_receipt_of_another_part_gets_no_manifest(store: Store) -> None:
    checkpoint = LAYOUT.segment(SEGMENT).checkpoint(4)
    other = Receipt(rank=0, name="part-00000-of-00002.safetensors", size=1, sha256="0" * 64)
    store.put_document(checkpoint.receipt(1, 2), other)
    store.put(checkpoint.part(1, 2), b"1")
    writer = writer_for(store, world_size=2)
    writer.save(4, STATE, {})
    with pytest.raises(StorageUnavailable, match=r"part-00001-of-00002\.safetensors is not"):
        writer.wait()
    assert committed(store) == []


def test_without_the_others_receipts_there_is_no_manifest_and_their_names_are_told(store: Store) -> None:
    writer = writer_for(store, timeout=0.0, world_size=3)
    writer.save(4, STATE, {})
    with pytest.raises(StorageUnavailable, match=r"part-00001-of-00003.*part-00002-of-00003"):
        writer.wait()
    assert committed(store) == []


def test_a_writer_that_is_closed_stops_to_wait_for_the_others(store: Store) -> None:
    writer = writer_for(store, world_size=2)
    writer.save(4, STATE, {})
    writer.close()
    with pytest.raises(StorageUnavailable, match="given up, since its run has ended"):
        writer.wait()


def test_an_upload_that_failed_is_told_at_the_next_checkpoint(store: Store) -> None:
    writer = writer_for(store)
    store.writable = False
    writer.save(4, STATE, {})
    with pytest.raises(StorageUnavailable, match="did not answer"):
        writer.save(8, STATE, {})


def test_a_segment_holds_each_step_once(store: Store) -> None:
    """Else a receipt of the first try could come to stand for a part of the second."""
    writer = writer_for(store)
    writer.save(4, STATE, {})
    with pytest.raises(AssertionError):
        writer.save(4, STATE, {})


@pytest.mark.parametrize("lies", [1, 2])
def test_a_restore_reads_once_more_before_it_calls_a_part_damaged(store: Store, lies: int) -> None:
    write_checkpoint(store, LAYOUT, at(4), {"model.a": torch.ones(3)})
    # A part is read in three: the header's length, the header, the tensors. Only the last is wrong.
    store.lies = iter([bytes, bytes, flipped] * lies)
    if lies == 1:
        assert read_checkpoint(store, LAYOUT, at(4)).state["model.a"].tolist() == [1.0] * 3
    else:
        with pytest.raises(InvalidData, match="not what its manifest says"):
            read_checkpoint(store, LAYOUT, at(4))
