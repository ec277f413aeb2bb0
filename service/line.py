"""The line of jobs in one pass: from rows and nodes to what the schedule says of each job (service/schedule.py)."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from api.jobs import JobState, QueueEntry
from api.prepare_spec import PrepareSpec
from api.spec import TrainSpec
from api.tenants import Quotas
from service.admission import Node, bundles, needs, with_addable
from service.lifecycle import Turn
from service.logs import about
from service.rows import JobRow
from service.schedule import Claim, Schedule, SchedulePolicy, schedule
from service.settings import Settings

logger = logging.getLogger("lockstep.service")

_STRANDED_FOR = timedelta(seconds=10)
WAITING = (JobState.QUEUED, JobState.RECOVERING)
_HOLD = (JobState.STARTING, JobState.RUNNING, JobState.PAUSING, JobState.CANCELLING)


def take_turns(
    live: Sequence[JobRow],
    nodes: Sequence[Node],
    settings: Settings,
    now: datetime,
    quotas: Mapping[str, Quotas] | None = None,
) -> dict[str, Turn]:
    """Return each job's turn in this pass, by id. `quotas`: by project."""
    policy = SchedulePolicy(reservation_age=settings.reservation_age, resize_interval=settings.resize_interval)
    claims = [found for job in live if (found := claim(job)) is not None]
    plan = schedule(claims, with_addable(nodes, settings.addable_nodes), now, policy, quotas)
    projects = {found.job_id: found.project for found in claims}
    return {found.job_id: _turn(found.job_id, plan, projects) for found in claims}


def lasting(
    before: Mapping[str, datetime], turns: Mapping[str, Turn], now: datetime
) -> tuple[dict[str, datetime], dict[str, Turn]]:
    """Leave `stranded` to those turns whose job has been stranded for a while; return since when each has been, too.

    A job that runs and has lost its machine holds its room until that is noticed: for this nobody shall give way.
    """
    since = {job_id: before.get(job_id, now) for job_id, turn in turns.items() if turn.stranded}
    short = {job_id for job_id, at in since.items() if now < at + _STRANDED_FOR}
    return since, {
        job_id: replace(turn, stranded=turn.stranded and job_id not in short) for job_id, turn in turns.items()
    }


def claim(job: JobRow) -> Claim | None:
    """Return what a job has or wants of the cluster; None if it is nothing now, or its spec cannot be read."""
    state = JobState(job.state)
    if state not in WAITING + _HOLD or (state in WAITING and (job.pause_requested or job.cancel_requested)):
        return None
    try:
        spec = job.parsed_spec
    except ValueError as error:  # one job that this version cannot read must not stop the others
        with about(job=job.id):
            logger.error("its spec cannot be read: %s", error)
        return None
    waits = state in WAITING
    return Claim(
        job_id=job.id,
        priority=spec.priority,
        queued_at=job.queued_at or job.created_at,
        sizes=sizes(spec, job.workers_wanted),
        bundle=bundles(spec)[0],
        preemptible=isinstance(spec, TrainSpec),
        held=0 if waits else job.workers or sizes(spec, None)[0],
        began_at=None if waits else job.attempt_at or job.state_since,
        starting=state is JobState.STARTING,
        leaving=state in (JobState.PAUSING, JobState.CANCELLING),
        recovering_since=job.state_since if state is JobState.RECOVERING else None,
        project=job.project,
    )


def sizes(spec: TrainSpec | PrepareSpec, wanted: int | None) -> tuple[int, ...]:
    """Return the numbers of processes that a job can run with, ascending; one if a user has named one."""
    if isinstance(spec, PrepareSpec):
        return (1,)
    return (wanted,) if wanted is not None else tuple(spec.sizes)


def _turn(job_id: str, plan: Schedule, projects: Mapping[str, str]) -> Turn:
    waiting, other = plan.waits.get(job_id), plan.preempts.get(job_id)
    if other is not None and projects[other] != projects[job_id]:
        other = "a job of higher priority in another project"  # whose id is nobody's business here
    return Turn(
        workers=plan.starts.get(job_id, plan.resizes.get(job_id)),
        make_way_for=other,
        stranded=job_id in plan.stranded,
        wait=waiting.message if waiting is not None else "",
    )


def line_order(job: JobRow) -> tuple[int, bool, datetime, str]:
    """Return what the waiting are ordered by, as the schedule orders them."""
    recovering = job.state == JobState.RECOVERING
    return -job.known_spec.priority, not recovering, job.queued_at or job.created_at, job.id


def queue_entry(job: JobRow, position: int) -> QueueEntry:
    spec = job.known_spec
    return QueueEntry(
        position=position,
        job_id=job.id,
        name=job.name,
        priority=spec.priority,
        state=JobState(job.state),
        needs=needs(spec, sizes(spec, job.workers_wanted)),
        message=job.conditions[0]["message"] if job.conditions else job.message,
        since=job.queued_at or job.created_at,
    )
