"""What an error in a rank means, and when a job that dies again and again is given up."""

import errno
from datetime import UTC, datetime, timedelta

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import DistBackendError, DistError, DistNetworkError, DistStoreError

from api.documents import FaultDocument
from api.errors import InvalidData, ObjectMissing, SnapshotFailed, StorageDenied, StorageUnavailable
from api.jobs import Reason
from workers.faults import SegmentEnd, cause_of, crash_loop, reason_of

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] "
NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, "
OWN = (Reason.WORKER_ERROR, Reason.OUT_OF_MEMORY)
NOISE = (Reason.WORKER_LOST, Reason.STORAGE_UNAVAILABLE)


def caused(error: Exception, cause: BaseException) -> Exception:
    """Return what `raise error from cause` raises."""
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), Reason.OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), Reason.OUT_OF_MEMORY),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                "to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
            ),
            Reason.OUT_OF_MEMORY,
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
            Reason.OUT_OF_MEMORY,
        ),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), Reason.OUT_OF_MEMORY),
        (DistBackendError(NCCL + "unhandled cuda error … Cuda failure 2 'out of memory'"), Reason.OUT_OF_MEMORY),
        (
            SnapshotFailed("the checkpoint of step 8 cannot be taken: a worker has no memory for a snapshot of 9 MiB"),
            Reason.OUT_OF_MEMORY,
        ),
        (caused(SnapshotFailed("no memory for a snapshot"), RuntimeError("of an allocator")), Reason.OUT_OF_MEMORY),
        (StorageUnavailable("the store did not answer for s3://b/k"), Reason.STORAGE_UNAVAILABLE),
        (StorageDenied("the store refused access"), Reason.STORAGE_UNAVAILABLE),
        (RuntimeError(GLOO + "Connection closed by peer [127.0.0.1]:1. This is typically …"), Reason.WORKER_LOST),
        (RuntimeError(GLOO + "Read error [127.0.0.1]:1: Connection reset by peer. This …"), Reason.WORKER_LOST),
        (RuntimeError(GLOO + "writev [127.0.0.1]:40000: Broken pipe"), Reason.WORKER_LOST),
        (RuntimeError(GLOO + "Timed out waiting 1800000ms for recv operation to complete"), Reason.WORKER_LOST),
        (RuntimeError("Gloo connectFullMesh failed with …"), Reason.WORKER_LOST),
        (ValueError("Default process group has not been initialized, please make sure to …"), Reason.WORKER_LOST),
        (ValueError("Invalid process group specified or has been destroyed."), Reason.WORKER_LOST),
        (DistNetworkError("The client socket has timed out after 300000ms"), Reason.WORKER_LOST),
        (DistStoreError("wait timeout after 300000ms, keys: /default_pg/0//cpu//0/1"), Reason.WORKER_LOST),
        (DistBackendError(NCCL + "remote process exited or there was a network error"), Reason.WORKER_LOST),
        (DistBackendError("NCCL communicator was aborted on rank 0."), Reason.WORKER_LOST),
        (DistBackendError(NCCL + "ncclInvalidUsage: This usually reflects invalid usage."), Reason.WORKER_ERROR),
        (DistBackendError(NCCL + "ncclUnhandledCudaError: Call to CUDA function failed."), Reason.WORKER_ERROR),
        (RuntimeError(GLOO + "op.preamble.length <= op.nbytes. 8 vs 4"), Reason.WORKER_ERROR),
        (DistError("of no kind that is known"), Reason.WORKER_ERROR),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"), Reason.WORKER_ERROR),
        (ObjectMissing("s3://b/k does not exist"), Reason.WORKER_ERROR),
        (InvalidData("the checkpoint does not fit this model"), Reason.WORKER_ERROR),
        (OSError(errno.ENOSPC, "No space left on device"), Reason.WORKER_ERROR),
        (ValueError("out of memory lane"), Reason.WORKER_ERROR),
        (KeyboardInterrupt(), Reason.WORKER_ERROR),
        (caused(RuntimeError("backend='inductor' raised"), MemoryError()), Reason.OUT_OF_MEMORY),
        (caused(ValueError("no"), caused(KeyError("no"), StorageDenied("no"))), Reason.STORAGE_UNAVAILABLE),
        (caused(StorageUnavailable("no answer"), MemoryError()), Reason.STORAGE_UNAVAILABLE),
    ],
    ids=lambda value: f"{type(value).__name__} {value}"[:60] if isinstance(value, BaseException) else str(value),
)
def test_an_error_means(error: BaseException, reason: Reason) -> None:
    assert reason_of(error) is reason


def test_an_error_that_merely_came_up_while_another_was_handled_is_one_of_its_own() -> None:
    error = ValueError("a fault in the handler")
    error.__context__ = StorageUnavailable("no answer")
    assert reason_of(error) is Reason.WORKER_ERROR


def test_an_error_that_names_itself_as_its_cause_ends_the_search() -> None:
    error = ValueError("raise error from error")
    error.__cause__ = error
    assert reason_of(error) is Reason.WORKER_ERROR


BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def fault(reason: Reason, step: int = 10, rank: int = 0, at: float = 0.0, message: str = "it said so") -> FaultDocument:
    return FaultDocument(
        rank=rank, step=step, reason=reason, phase="step", message=message, created_at=BEGIN + timedelta(seconds=at)
    )


def end(number: int, began: int, *faults: FaultDocument) -> SegmentEnd:
    return SegmentEnd(f"1-{number}-aaaaaaaa", began, faults)


def ends(*what: tuple[int, Reason, int] | tuple[int]) -> list[SegmentEnd]:
    """Return one end for each (began, reason, step of the fault), or (began,) for one without a word."""
    return [
        end(i, each[0], *([fault(each[1], each[2], at=i)] if len(each) == 3 else [])) for i, each in enumerate(what)
    ]


def test_the_cause_is_the_earliest_fault_of_a_process_of_ones_own() -> None:
    lost = fault(Reason.WORKER_LOST, rank=0, at=1)
    hung = fault(Reason.HUNG, rank=1, at=2)
    own = fault(Reason.OUT_OF_MEMORY, rank=2, at=3)
    later = fault(Reason.WORKER_ERROR, rank=3, at=4)
    assert cause_of([lost, later, own, hung]) == own
    assert cause_of([lost, hung]) == hung
    assert cause_of([fault(Reason.WORKER_LOST, rank=1, at=2), lost]) == lost
    assert cause_of([]) is None


ERROR, MEMORY, LOST = Reason.WORKER_ERROR, Reason.OUT_OF_MEMORY, Reason.WORKER_LOST
STORE, HUNG = Reason.STORAGE_UNAVAILABLE, Reason.HUNG


@pytest.mark.parametrize(
    ("what", "loops"),
    [
        ([], False),
        ([(0, ERROR, 10)], False),
        ([(0, ERROR, 10), (0, ERROR, 10)], True),
        ([(0, MEMORY, 10), (0, MEMORY, 10)], True),
        ([(0, ERROR, 0), (0, ERROR, 0)], True),
        ([(0, ERROR, 10), (0, MEMORY, 10)], False),
        ([(0, ERROR, 10), (0, ERROR, 11)], False),
        ([(0, ERROR, 10), (0, ERROR, 11), (0, ERROR, 10)], False),
        ([(0, ERROR, 10), (8, ERROR, 10)], True),
        ([(0, ERROR, 10), (8, ERROR, 10), (8, ERROR, 10)], True),
        ([(8, ERROR, 10), (4, ERROR, 10)], True),
        ([(0, ERROR, 10), (0, ERROR, 10), (12, LOST, 13)], False),
        ([(0, ERROR, 10), (8,), (8, ERROR, 10)], True),
        ([(0, LOST, 10)] * 9, False),
        ([(0, STORE, 10)] * 9, False),
        ([(0,)] * 9, False),
        ([(0, ERROR, 10), (0, LOST, 10), (0,), (0, STORE, 10), (0, HUNG, 10), (0, ERROR, 10), (0, LOST, 3)], True),
        ([(0, HUNG, 10)] * 2, False),
        ([(0, HUNG, 10)] * 3, True),
        ([(0, HUNG, 10), (0, HUNG, 11), (0, HUNG, 10)], False),
        ([(0, HUNG, 10), (0, LOST, 10), (0, HUNG, 10), (0,), (0, HUNG, 10)], True),
        ([(0, HUNG, 10), (8, HUNG, 10), (8, HUNG, 10)], True),
        ([(0, Reason.DRAINED, 10)] * 9, False),
    ],
)
def test_a_loop_is(what: list[tuple[int, Reason, int] | tuple[int]], loops: bool) -> None:
    assert (crash_loop(ends(*what)) is not None) is loops


def test_a_loop_is_told_with_its_segments_step_reason_and_last_message() -> None:
    said = crash_loop(
        [
            end(0, 4, fault(ERROR, 10, message="index 7 is out of range")),
            end(1, 4),
            end(2, 4, fault(LOST, 9, rank=1), fault(ERROR, 10, at=1, message="index 8 is out of range")),
        ]
    )
    assert said == (
        "2 starts in a row (1-0-aaaaaaaa, 1-2-aaaaaaaa) ended at step 10 with worker_error, and did not come "
        "past it; the last one said: index 8 is out of range"
    )


def test_the_faults_of_peers_that_lost_a_rank_do_not_hide_its_own() -> None:
    one = [fault(LOST, 10, rank=0, at=1), fault(MEMORY, 10, rank=1, at=2), fault(LOST, 10, rank=2, at=3)]
    assert crash_loop([end(0, 0, *one), end(1, 0, *one)]) is not None


starts = st.tuples(st.sampled_from([0, 4, 8]), st.sampled_from([*OWN, HUNG]), st.sampled_from([8, 9]))
noises = st.lists(st.sampled_from([(), *((reason,) for reason in NOISE)]), max_size=4)


@given(what=st.lists(starts, min_size=1, max_size=6), data=st.data())
def test_what_infrastructure_does_between_makes_no_loop_and_hides_none(
    what: list[tuple[int, Reason, int]], data: st.DataObject
) -> None:
    plain = ends(*what)
    noisy: list[SegmentEnd] = []
    for i, one in enumerate(plain):
        noisy.append(one)
        # What is started anew and lost at once has begun where its successor will.
        following = plain[i + 1].began if i + 1 < len(plain) else one.began
        for reasons in data.draw(noises):
            noisy.append(end(90, min(one.began, following), *(fault(reason, 9) for reason in reasons)))
    assert (crash_loop(noisy) is None) == (crash_loop(plain) is None)
    assert crash_loop([one for one in noisy if one not in plain]) is None
