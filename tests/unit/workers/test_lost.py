"""What those who watch a rank write down of its death."""

import pytest

from api.documents import FaultDocument, HeartbeatDocument, JobDocument, SegmentDocument
from api.jobs import Reason
from api.layout import SegmentLayout
from tests.fakes import T0, MemoryBucket, train_spec
from workers.attempt import Attempt
from workers.lost import give_notice, note_dead_ranks, note_lost

JOB = JobDocument(id="job-1", project="default", owner="me", spec=train_spec(), dataset_version="v1", created_at=T0)
ATTEMPT = Attempt(JOB, 2, "job-1-2", workers=2)


@pytest.fixture
def bucket() -> MemoryBucket:
    """Two starts of the group, the second with a heartbeat."""
    bucket = MemoryBucket()
    for name in ("2-0-a", "2-1-b"):
        document = SegmentDocument(
            job_id="job-1", segment=name, origin=None, world_size=2, fingerprint=None, created_at=T0
        )
        bucket.put_document(layout(name).document, document)
    bucket.put_document(layout("2-1-b").heartbeat, HeartbeatDocument(count=9, phase="step", step=7, limit=60))
    return bucket


def layout(segment: str) -> SegmentLayout:
    return ATTEMPT.layout.segment(segment)


def test_a_rank_that_died_without_a_word_gets_a_fault_in_the_segment_of_its_start(bucket: MemoryBucket) -> None:
    note_dead_ranks(bucket, ATTEMPT, 1, {1: (Reason.WORKER_LOST, "rank 1: killed")})
    fault = bucket.get_document(layout("2-1-b").fault(1), FaultDocument)
    assert (fault.rank, fault.step, fault.reason, fault.phase) == (1, 7, Reason.WORKER_LOST, "killed")
    assert not bucket.objects(layout("2-0-a").faults)


def test_what_a_rank_wrote_itself_stays(bucket: MemoryBucket) -> None:
    own = FaultDocument(
        rank=1, step=8, reason=Reason.WORKER_ERROR, phase="step", message="a division by zero", created_at=T0
    )
    bucket.put_document(layout("2-1-b").fault(1), own)
    note_dead_ranks(bucket, ATTEMPT, 1, {0: (Reason.WORKER_LOST, "gone"), 1: (Reason.WORKER_LOST, "ended")})
    assert bucket.get_document(layout("2-1-b").fault(0), FaultDocument).message == "gone"
    assert bucket.get_document(layout("2-1-b").fault(1), FaultDocument) == own


@pytest.mark.parametrize("restart", [1, 2])
def test_a_store_that_is_away_or_a_start_without_a_segment_harms_nobody(bucket: MemoryBucket, restart: int) -> None:
    """Ray Train's controller would take an error for a failure of its own."""
    bucket.reachable = restart != 1
    note_dead_ranks(bucket, ATTEMPT, restart, {0: (Reason.WORKER_LOST, "rank 0: killed")})
    bucket.reachable = True
    assert not [key for key in bucket.content if "/faults/" in key]


@pytest.mark.parametrize(
    ("of_the_rank", "of_the_driver", "told"),
    [
        (None, Reason.WORKER_LOST, Reason.WORKER_LOST),
        (Reason.OUT_OF_MEMORY, Reason.WORKER_LOST, Reason.OUT_OF_MEMORY),
        (Reason.HUNG, Reason.WORKER_LOST, Reason.HUNG),
        (Reason.WORKER_LOST, Reason.OUT_OF_MEMORY, Reason.OUT_OF_MEMORY),
        (Reason.WORKER_LOST, Reason.WORKER_ERROR, Reason.WORKER_ERROR),
    ],
)
def test_of_what_the_ranks_and_the_driver_say_the_attempts_fault_is_what_says_more(
    bucket: MemoryBucket, of_the_rank: Reason | None, of_the_driver: Reason, told: Reason
) -> None:
    if of_the_rank is not None:
        note_dead_ranks(bucket, ATTEMPT, 1, {1: (of_the_rank, "rank 1")})
    note_lost(bucket, ATTEMPT, of_the_driver, "Ray Train gave up")
    assert bucket.get_document(ATTEMPT.layout.fault(2), FaultDocument).reason is told


def test_whoever_gives_a_notice_learns_whether_it_was_taken(bucket: MemoryBucket) -> None:
    bucket.writable = False
    assert not give_notice(bucket, ATTEMPT, "the machine goes")
    bucket.writable = True
    assert give_notice(bucket, ATTEMPT, "the machine goes")
