"""What a restart costs is added up from the streams, once."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from api.documents import SegmentDocument, StreamLine
from api.jobs import Progress
from api.layout import JobLayout, chunk
from service.progress import read_progress
from service.rows import JobRow
from tests.fakes import T0, MemoryBucket, row

LAYOUT = JobLayout("default", row(1).id)
Write = Callable[..., None]


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


def line(step: int, seconds: float, **values: float) -> StreamLine:
    return StreamLine(type="metrics", step=step, at=at(seconds), values=values)


def event(step: int, seconds: float, name: str) -> StreamLine:
    return StreamLine(type="event", step=step, at=at(seconds), event=name)


def write(bucket: MemoryBucket, segment: str, *lines: StreamLine) -> None:
    layout = LAYOUT.segment(segment)
    document = SegmentDocument(
        job_id=LAYOUT.job_id, segment=segment, origin=None, world_size=1, fingerprint=None, created_at=T0
    )
    bucket.put_document(layout.document, document)
    bucket.put(chunk(layout.stream, 0, "jsonl"), "".join(f"{one.model_dump_json()}\n" for one in lines).encode())


def read(job: JobRow, bucket: MemoryBucket) -> JobRow:
    changes: dict[str, Any]
    changes, _ = read_progress(job, bucket)
    return replace(job, **changes)


def test_a_restart_costs_the_time_until_the_run_has_its_checkpoint_again_and_the_steps_done_again() -> None:
    bucket, job = MemoryBucket(), row(1, attempt=1, attempt_at=at(0))
    write(bucket, "1-0-a", line(10, 20, seconds_per_step=2.0), line(17, 34, seconds_per_step=2.0))
    job = read(job, bucket)
    assert job.lost_seconds == 0
    assert Progress.model_validate(job.progress).at == at(34)

    write(bucket, "1-1-b", event(10, 41, "restart"), event(10, 42, "resumed"), line(20, 62, seconds_per_step=2.0))
    job = read(job, bucket)
    assert job.lost_seconds == (41 - 34) + (17 - 10) * 2
    assert read(job, bucket).lost_seconds == job.lost_seconds, "once"


def test_another_attempt_costs_from_its_beginning_since_before_that_the_job_was_in_the_line() -> None:
    bucket, job = MemoryBucket(), row(1, attempt=1, attempt_at=at(0))
    write(bucket, "1-0-a", line(10, 20, seconds_per_step=2.0))
    job = replace(read(job, bucket), attempt=2, attempt_at=at(500))
    write(bucket, "2-0-b", event(10, 508, "resumed"))
    assert read(job, bucket).lost_seconds == 8


def test_a_restart_is_counted_though_all_of_it_is_read_at_once() -> None:
    bucket, job = MemoryBucket(), row(1, attempt=1, attempt_at=at(0))
    write(bucket, "1-0-a", line(10, 20, seconds_per_step=2.0))
    write(bucket, "1-1-b", event(0, 25, "restart"))
    assert read(job, bucket).lost_seconds == 5 + 10 * 2


def test_what_two_clocks_do_not_agree_on_is_no_gain() -> None:
    bucket, job = MemoryBucket(), row(1, attempt=1, attempt_at=at(0))
    write(bucket, "1-0-a", line(10, 20))
    job = replace(read(job, bucket), attempt=2, attempt_at=at(500))
    write(bucket, "2-0-b", event(10, 499, "resumed"))
    assert read(job, bucket).lost_seconds == 0
