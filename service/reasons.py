"""What a reason for the end of an attempt means for the job: one table. And how long to wait before the next one."""

import hashlib
from dataclasses import dataclass
from datetime import timedelta

from api.jobs import Reason


@dataclass(frozen=True)
class Policy:
    """Durations that decisions depend on, in seconds."""

    start_deadline: float
    stop_grace: float
    checkpoint_grace: float
    """For a stop that writes a checkpoint first."""
    retry_backoff: float
    backoff_limit: float


@dataclass(frozen=True)
class Meaning:
    retryable: bool
    counts: bool
    """Whether it is a fault of the job's own processes, which uses up one of the spec's retries."""
    waits: bool
    """Whether the next attempt waits, longer each time in a row; what was planned needs no wait."""
    sentence: str


def _ends(sentence: str) -> Meaning:
    return Meaning(False, False, False, sentence)


def _own_fault(sentence: str) -> Meaning:
    return Meaning(True, True, True, sentence)


def _infrastructure(sentence: str) -> Meaning:
    return Meaning(True, False, True, sentence)


def _planned(sentence: str) -> Meaning:
    return Meaning(True, False, False, sentence)


REASONS: dict[Reason, Meaning] = {
    Reason.COMPLETED: _ends("finished"),
    Reason.USER_CANCELLED: _ends("cancelled on request"),
    Reason.DEADLINE: _ends("the deadline passed; raise `deadline` or train fewer steps"),
    Reason.INVALID_DATA: _ends("the data cannot be used"),
    Reason.NON_FINITE_LOSS: _ends("loss or gradient is not finite; lower the learning rate"),
    Reason.UNSUPPORTED: _ends("the workers cannot do what the spec asks for"),
    Reason.CRASH_LOOP: _ends("the same fault came twice at the same step; look into the log, it will come again"),
    Reason.OUT_OF_MEMORY: _own_fault("a worker ran out of memory; use a smaller micro batch, or more memory"),
    Reason.WORKER_ERROR: _own_fault("a worker failed by itself; its log says where"),
    Reason.STORAGE_UNAVAILABLE: _infrastructure("the bucket did not answer"),
    Reason.WORKER_LOST: _infrastructure("the driver or its workers died"),
    Reason.RAY_LOST: _infrastructure("Ray lost the attempt"),
    Reason.START_TIMEOUT: _infrastructure("the attempt showed no sign of life"),
    Reason.HUNG: _infrastructure("the run stood still"),
    Reason.SUPERSEDED: _planned("a newer attempt took over"),
    Reason.USER_PAUSED: _planned("paused on request"),
    Reason.PREEMPTED: _planned("a job of higher priority needed the room"),
    Reason.RESIZED: _planned("it goes on with another number of workers"),
    Reason.DRAINED: _planned("its machine was about to go"),
    Reason.REWOUND: _planned("it goes back to a checkpoint to leave out a batch"),
}


def backoff(job_id: str, setbacks: int, policy: Policy) -> timedelta:
    """Return the wait before the next attempt: doubled with each setback up to the limit, less up to a half of it.

    The jitter, by which jobs that were lost together do not come back together, is a function of the job alone, so
    that a decision that is made again comes out the same.
    """
    longest = min(policy.retry_backoff * 2 ** min(setbacks - 1, 30), policy.backoff_limit)
    digest = hashlib.blake2b(f"backoff/{job_id}/{setbacks}".encode(), digest_size=4).digest()
    return timedelta(seconds=longest * (1 - int.from_bytes(digest, "little") / 2**33))
