"""What the death of a rank means: the reason that an error stands for, and whether a job dies in a loop. All pure."""

import errno
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError

from api.documents import FaultDocument
from api.errors import SnapshotFailed, StorageDenied, StorageUnavailable
from api.jobs import Reason

OWN = frozenset({Reason.WORKER_ERROR, Reason.OUT_OF_MEMORY})
"""Faults of the job's own processes: all others are what the infrastructure did to it."""

_MEMORY = re.compile(r"(can't|cannot) allocate memory|out of memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)
_LOST_PEER = re.compile(
    r"connection (closed|reset) by peer|connection (refused|timed out)|broken pipe|(host|network) is unreachable"
    r"|timed out waiting \d+ms for (send|recv) operation|connectFullMesh failed|timeout caused pair closure",
    re.IGNORECASE,
)
"""What gloo says, in a plain RuntimeError, when another rank is gone or silent (torch 2.13)."""
_TORN_DOWN = re.compile(r"process group has not been initialized|invalid process group", re.IGNORECASE)
"""What torch says, in a ValueError, after Ray Train has taken the group apart, because another rank was lost, below a
rank that still trains."""
_NCCL_OWN = re.compile(r"ncclUnhandledCudaError|ncclInvalidUsage|ncclInvalidArgument")
"""NCCL errors that no other rank can be the cause of."""

_OWN_LOOP = 2
_HUNG_LOOP = 3


def reason_of(error: BaseException) -> Reason:
    """Return what an exception in a rank's training means.

    The first in the chain `raise … from …` that has a name of its own decides; without one the process failed by
    itself. An error that merely came up while another was handled does not count as its consequence.
    """
    known = (_known(link) for link in _chain(error))
    return next((reason for reason in known if reason is not None), Reason.WORKER_ERROR)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        yield link
        seen.add(id(link))
        link = link.__cause__


def _known(error: BaseException) -> Reason | None:
    text = str(error)
    match error:
        case MemoryError() | torch.OutOfMemoryError() | SnapshotFailed():
            return Reason.OUT_OF_MEMORY
        case OSError() if error.errno == errno.ENOMEM:
            return Reason.OUT_OF_MEMORY
        case RuntimeError() if _MEMORY.search(text):
            return Reason.OUT_OF_MEMORY
        case StorageUnavailable() | StorageDenied():
            return Reason.STORAGE_UNAVAILABLE
        case DistBackendError() if _NCCL_OWN.search(text):
            return Reason.WORKER_ERROR
        case DistBackendError() | DistNetworkError() | DistStoreError():
            return Reason.WORKER_LOST
        case RuntimeError() if _LOST_PEER.search(text):
            return Reason.WORKER_LOST
        case ValueError() if _TORN_DOWN.search(text):
            return Reason.WORKER_LOST
    return None


@dataclass(frozen=True)
class SegmentEnd:
    """A segment that ended without an outcome."""

    segment: str
    began: int
    """The step that it began at."""
    faults: tuple[FaultDocument, ...]
    """What its ranks left; none if they were killed."""


def cause_of(faults: Iterable[FaultDocument]) -> FaultDocument | None:
    """Return the fault that the others of one segment follow from: the earliest, but a fault of a process's own first.

    When a rank fails by itself, all others lose it and say so; a rank that hangs is noticed by those that wait for it.
    """
    return min(faults, key=lambda fault: (_weight(fault.reason), fault.created_at), default=None)


def _weight(reason: Reason) -> int:
    return 0 if reason in OWN else 1 if reason is Reason.HUNG else 2


def crash_loop(ends: Sequence[SegmentEnd]) -> str | None:
    """Return why another start would only end like the ones before, or None. Oldest end first.

    Only faults at or past the newest checkpoint that any segment began at are looked at: the run has come past all
    others. Among these it is a loop if

    - the last two faults of the job's own processes (an error, or no memory) are equal in step and reason, or
    - the last three hangs are equal in step.

    All other ends (a lost worker, a store that did not answer, a process killed without a word) neither make a loop
    nor hide one, however many lie between. A hang does not hide the loop of the others either.
    """
    newest = max((end.began for end in ends), default=0)
    found = [(end.segment, cause_of(end.faults)) for end in ends]
    causes = [(segment, cause) for segment, cause in found if cause is not None and cause.step >= newest]
    own = [(segment, cause) for segment, cause in causes if cause.reason in OWN]
    hung = [(segment, cause) for segment, cause in causes if cause.reason is Reason.HUNG]
    return _repeated(own[-_OWN_LOOP:], _OWN_LOOP) or _repeated(hung[-_HUNG_LOOP:], _HUNG_LOOP)


def _repeated(last: Sequence[tuple[str, FaultDocument]], times: int) -> str | None:
    if len(last) < times or len({(cause.step, cause.reason) for _, cause in last}) > 1:
        return None
    segments, (_, cause) = ", ".join(segment for segment, _ in last), last[-1]
    return (
        f"{times} starts in a row ({segments}) ended at step {cause.step} with {cause.reason}, and did not come "
        f"past it; the last one said: {cause.message}"
    )
