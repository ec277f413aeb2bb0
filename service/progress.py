"""How far a run is, and what its workers tell: read from the streams in the bucket, kept with the job."""

import dataclasses
from typing import Any

from api.documents import StreamLine
from api.jobs import Progress
from api.layout import JobLayout
from api.storage import Bucket
from service.rows import JobRow, NewEvent
from service.run_reader import Place, numbers, read_new_lines


def read_progress(job: JobRow, bucket: Bucket) -> tuple[dict[str, Any], list[NewEvent]]:
    """Return the changes to a job's row since its streams were last read, and the workers' new events."""
    place = Place(**job.stream) if job.stream else Place()
    lines, after = read_new_lines(bucket, JobLayout(job.project, job.id), place)
    if not lines:
        return {}, []
    progress = Progress.model_validate(job.progress)
    for segment, line in lines:
        if segment != place.segment:  # a restart begins where its checkpoint was
            progress = progress.model_copy(update={"step": line.step, "eta_seconds": None})
            place = dataclasses.replace(place, segment=segment)
        progress = advanced(progress, line)
    events = [_event(segment, line) for segment, line in lines if line.type == "event"]
    return {"progress": progress.model_dump(), "stream": dataclasses.asdict(after)}, events


def advanced(progress: Progress, line: StreamLine) -> Progress:
    """Return the progress after one more line."""
    if line.type == "event":
        return progress
    values = {**progress.values, **numbers(line)}
    left = None
    # A metric line carries the rate at which its steps went by.
    if progress.total_steps and "seconds_per_step" in values:
        left = (progress.total_steps - line.step) * values["seconds_per_step"]
    return Progress(step=line.step, total_steps=progress.total_steps, values=values, eta_seconds=left)


def _event(segment: str, line: StreamLine) -> NewEvent:
    return NewEvent(line.event, line.message, data={"step": line.step, "segment": segment, **line.values}, at=line.at)
