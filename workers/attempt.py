"""The beginning of every attempt, before anything is done: is it ours to run, here and now?"""

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass

from api.documents import AttemptDocument, ControlDocument, JobDocument
from api.layout import JobLayout
from api.spec import TrainSpec
from api.storage import Bucket

logger = logging.getLogger("lockstep.workers")

NOT_OURS = 3
"""Exit code of a driver whose attempt was not its own to run."""


@dataclass(frozen=True)
class Attempt:
    """One attempt of a job, as the control plane wrote it down before submitting it."""

    job: JobDocument
    number: int
    submission_id: str
    workers: int
    """World size."""

    @property
    def layout(self) -> JobLayout:
        return JobLayout(self.job.project, self.job.id)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run one attempt of a job. Started by Ray for the control plane.")
    parser.add_argument("--project", required=True)
    parser.add_argument("--job", required=True)
    parser.add_argument("--attempt", required=True, type=int)
    return parser.parse_args(argv)


def claim(bucket: Bucket, project: str, job_id: str, number: int, session_name: Callable[[], str]) -> Attempt | None:
    """Return the attempt if it is meant for this Ray session and still wanted, else None.

    A submission can reach Ray late, after the control plane has given it up and begun another attempt; and a Ray
    that came back empty is another session. Either way this attempt must not run.
    """
    layout = JobLayout(project, job_id)
    attempt = bucket.get_document(layout.attempt(number), AttemptDocument)
    here = session_name()
    if attempt.ray_session != here:
        logger.error("attempt %s is meant for Ray session %s, this is %s", number, attempt.ray_session, here)
        return None
    control = bucket.find_document(layout.control(number), ControlDocument) or ControlDocument()
    if control.wish != "run":
        logger.error("attempt %s is not wanted any more: %s", number, control.wish)
        return None
    job = bucket.get_document(layout.job, JobDocument)
    fewest = job.spec.resources.least if isinstance(job.spec, TrainSpec) else 1
    return Attempt(job, number, attempt.submission_id, attempt.workers or fewest)


def log_to_stderr() -> None:
    """Send our own log to stderr, where Ray collects it as the driver's log."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
