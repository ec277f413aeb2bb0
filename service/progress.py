"""How far a run is, and what its workers tell: read from the streams in the bucket, kept with the job."""

import dataclasses
from datetime import datetime
from typing import Any

from api.documents import StreamLine
from api.jobs import Progress
from api.layout import JobLayout, SegmentId
from api.storage import Bucket
from service.rows import JobRow, NewEvent
from service.run_reader import Place, numbers, read_new_lines


def read_progress(job: JobRow, bucket: Bucket) -> tuple[dict[str, Any], list[NewEvent]]:
    """Return the changes to a job's row since its streams were last read, and the workers' new events."""
    place = Place(**job.stream) if job.stream else Place()
    lines, after = read_new_lines(bucket, JobLayout(job.project, job.id), place)
    if not lines:
        return {}, []
    progress, lost = Progress.model_validate(job.progress), job.lost_seconds
    for segment, line in lines:
        if segment != place.segment:  # a restart begins where its checkpoint was
            if place.segment:
                lost += lost_seconds(progress, line, _since(job, progress, place.segment, segment))
            progress = progress.model_copy(update={"step": line.step, "eta_seconds": None})
            place = dataclasses.replace(place, segment=segment)
        progress = advanced(progress, line)
    events = [_event(segment, line) for segment, line in lines if line.type == "event"]
    changes = {"progress": progress.model_dump(mode="json"), "stream": dataclasses.asdict(after), "lost_seconds": lost}
    return changes, events


def lost_seconds(before: Progress, first: StreamLine, since: datetime | None) -> float:
    """Return what a restart cost: the time from `since` to the first line after it, and the steps done again."""
    again = max(before.step - first.step, 0) * before.values.get("seconds_per_step", 0.0)
    passed = (first.at - since).total_seconds() if since is not None else 0.0
    return max(passed, 0.0) + again  # two machines have two clocks


def _since(job: JobRow, before: Progress, old: str, new: str) -> datetime | None:
    """Return from when on a restart cost time: the last sign of the run before it, or the new attempt's beginning.

    What lies between two attempts is time in the line, which is not counted here.
    """
    same = SegmentId.parse(old).attempt == SegmentId.parse(new).attempt
    return before.at if same else job.attempt_at


def advanced(progress: Progress, line: StreamLine) -> Progress:
    """Return the progress after one more line."""
    if line.type == "event":
        return progress.model_copy(update={"at": line.at})
    values = {**progress.values, **numbers(line)}
    left = None
    # A metric line carries the rate at which its steps went by.
    if progress.total_steps and "seconds_per_step" in values:
        left = (progress.total_steps - line.step) * values["seconds_per_step"]
    return Progress(step=line.step, total_steps=progress.total_steps, values=values, eta_seconds=left, at=line.at)


def _event(segment: str, line: StreamLine) -> NewEvent:
    return NewEvent(line.event, line.message, data={"step": line.step, "segment": segment, **line.values}, at=line.at)
