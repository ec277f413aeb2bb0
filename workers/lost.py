"""What is written down around an attempt by those who watch its ranks: notices, and why it was lost."""

import logging
from collections.abc import Mapping

from api.documents import FaultDocument, HeartbeatDocument, NoticeDocument, SegmentDocument, now
from api.errors import LockstepError
from api.jobs import Reason
from api.layout import SegmentId, SegmentLayout
from api.storage import Bucket, Timeouts
from workers.attempt import Attempt
from workers.faults import cause_of

logger = logging.getLogger("lockstep.workers")

BRIEFLY = Timeouts(connect=3.0, read=5.0, attempts=2)
"""For what is written when something is lost, perhaps the store as well: somebody waits for that."""


def give_notice(bucket: Bucket, attempt: Attempt, message: str) -> bool:
    """Tell rank 0 that the attempt must end soon; return whether the store has taken it."""
    logger.warning("%s: the ranks are told to write a checkpoint", message)
    try:
        bucket.put_document(attempt.layout.notice(attempt.number), NoticeDocument(message=message, created_at=now()))
    except LockstepError as error:
        logger.error("the notice was not written: %s", error)
        return False
    return True


def note_lost(bucket: Bucket, attempt: Attempt, reason: Reason, message: str) -> None:
    """Write down why an attempt is lost: what its last ranks said, if that says more than their end shows."""
    shown = FaultDocument(rank=0, step=0, reason=reason, phase="driver", message=message[:2000], created_at=now())
    try:
        # At equal weight the ranks' word is older, and so it goes first.
        fault = cause_of([*_faults(bucket, attempt), shown]) or shown
        bucket.put_document(attempt.layout.fault(attempt.number), fault)
    except LockstepError as error:
        logger.error("why the attempt was lost was not written: %s", error)


def note_dead_ranks(bucket: Bucket, attempt: Attempt, restart: int, deaths: Mapping[int, tuple[Reason, str]]) -> None:
    """Leave a fault document for each rank that was killed and could not write one; what one wrote itself stays.

    `deaths`: reason and message by rank. Ray Train waits for this before it starts the group again, so a store that
    does not answer is asked once.
    """
    try:
        segment = _segment(bucket, attempt, restart)
        if segment is None:
            return
        known = {item.key for item in bucket.files(segment.faults)}
        silent = [rank for rank in deaths if segment.fault(rank) not in known]
        beat = bucket.find_document(segment.heartbeat, HeartbeatDocument) if silent else None
        for rank in silent:
            reason, message = deaths[rank]
            step = beat.step if beat is not None else 0
            fault = FaultDocument(
                rank=rank, step=step, reason=reason, phase="killed", message=message[:2000], created_at=now()
            )
            bucket.put_document(segment.fault(rank), fault)
    except LockstepError as error:
        logger.warning("which ranks are gone was not written: %s", error)


def _faults(bucket: Bucket, attempt: Attempt) -> list[FaultDocument]:
    """Return what the ranks of the attempt's newest segment left."""
    segment = _segment(bucket, attempt)
    if segment is None:
        return []
    return [bucket.get_document(item.key, FaultDocument) for item in bucket.files(segment.faults)]


def _segment(bucket: Bucket, attempt: Attempt, restart: int | None = None) -> SegmentLayout | None:
    """Return the newest segment that an attempt, or one start of its group, has begun."""
    names = sorted(SegmentId.parse(name) for name in bucket.folders(attempt.layout.segments))
    for name in reversed(names):
        if name.attempt == attempt.number and restart in (None, name.restart):
            layout = attempt.layout.segment(name)
            if bucket.find_document(layout.document, SegmentDocument) is not None:
                return layout
    return None
