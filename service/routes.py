"""The routes: parse, call the use case, return. Every one under /v1 needs an API key."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import Body, Depends, Header, Path, Query, Request, Response
from pydantic import Field

from api.errors import BadRequest, Conflict, NotFound, QuotaExceeded, TooLarge
from api.jobs import (
    CancelRequest,
    Checkpoint,
    Event,
    Job,
    JobState,
    LogLine,
    MetricPoint,
    ModelFile,
    Page,
    PreparePlan,
    QueueEntry,
    ResumeRequest,
    TrainPlan,
)
from api.names import JOB_ID, Name
from api.spec import JobSpec
from api.spec_base import LabelFilter
from service.download import LINES, Download, Lines, Place
from service.jobs import Jobs
from service.keyed import SUBMITTER, VIEWER, Limit, Who, keyed_router, principal, who
from service.live import EVENT_ID, METRIC_ID, Feed
from service.problems import problem_responses
from service.rates import Places
from service.rows import JobFilter
from service.sse import Streams, refuse_parameter, stream_description, wants_stream

EXAMPLES = {
    "shortest": {
        "summary": "A name, a dataset and a model size",
        "value": {"name": "first", "data": {"dataset": "stdlib"}, "model": {"size": "3m"}},
    },
    "prepare": {
        "summary": "A dataset from the Python standard library's own sources",
        "value": {
            "kind": "prepare",
            "name": "stdlib",
            "dataset": "stdlib",
            "source": {"type": "python-stdlib"},
            "tokenizer": {"type": "bpe", "vocab_size": 2048},
        },
    },
    "train": {
        "summary": "Two workers, 250 steps",
        "value": {
            "name": "stdlib-gpt",
            "data": {"dataset": "stdlib", "sequence_length": 128},
            "model": {"size": "3m"},
            "batch": {"global_size": 16, "micro_size": 8},
            "steps": 250,
            "resources": {"workers": 2},
        },
    },
}


def jobs(request: Request) -> Jobs:
    found: Jobs = request.app.state.jobs
    return found


async def parsed_body(request: Request) -> Any:
    """The body before defaults were filled in: what idempotency compares."""
    if "json" not in request.headers.get("content-type", "") or not await request.body():
        raise BadRequest("send the job spec as a JSON body, with `Content-Type: application/json`")
    return await request.json()


def streams_wanted(request: Request) -> bool:
    """Whether a live stream shall be the answer, and not the list as it is."""
    return wants_stream(",".join(request.headers.getlist("accept")))


def stream(request: Request, feed: Feed, reads_bucket: bool = True) -> Response:
    """Answer with a live stream, for as long as the key is valid."""
    streams: Streams = request.app.state.streams
    found = who(request)
    return streams.answer(feed, partial(principal, request), reads_bucket, found.key_id, found.project)


def place(request: Request) -> Place:
    """Return the place of an answer that is long, among those of its project."""
    places: Places = request.app.state.long_answers
    return places.one(who(request).project)


def key_and_value(label: str) -> tuple[str, str | None]:
    """Split the filter `key=value`; one without a sign stands for any value."""
    key, sign, value = label.partition("=")
    return key, value if sign else None


UseCases = Annotated[Jobs, Depends(jobs)]
LastEventId = Header(alias="Last-Event-ID", description="Of a live stream: the `id` of the message that came last")
JobId = Annotated[str, Path(pattern=JOB_ID.pattern, description="A job's id", examples=["job-01m9zq1x0p5w6f3k2v8n"])]
Step = Annotated[int, Path(ge=0, le=2**53, description="The checkpoint's step")]
IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=255)]

router = keyed_router()


@router.post(
    "/jobs",
    status_code=201,
    response_model=Job | TrainPlan | PreparePlan,
    responses={
        200: {"model": Job | TrainPlan | PreparePlan, "description": "The same job again, or with dry_run the plan"},
        **problem_responses(BadRequest, TooLarge, QuotaExceeded),
    },
    tags=["jobs"],
    openapi_extra=SUBMITTER,
)
def submit(
    who: Who,
    use: UseCases,
    response: Response,
    spec: Annotated[JobSpec, Body(openapi_examples=EXAMPLES)],
    body: Annotated[Any, Depends(parsed_body)],
    dry_run: Annotated[bool, Query(description="Return the plan and store nothing")] = False,
    idempotency_key: IdempotencyKey = None,
) -> Any:
    """Submit a job. It is accepted once this answers 201, and never lost after that.

    With an `Idempotency-Key`, sending the same body again returns the same job (200); another body is refused (422).
    """
    if dry_run:
        response.status_code = 200
        return use.plan(who, spec)
    return accepted(response, *use.submit(who, spec, body, idempotency_key))


def accepted(response: Response, job: Job, new: bool) -> Job:
    """Answer with a job that was accepted, now or when the same was sent before."""
    response.status_code = 201 if new else 200
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return job


@router.get("/jobs", tags=["jobs"], openapi_extra=VIEWER)
def list_jobs(
    who: Who,
    use: UseCases,
    state: Annotated[Sequence[JobState], Query(description="Only jobs in this state; repeat it for any of some")] = (),
    name: Annotated[Name | None, Query(description="Only jobs of this name")] = None,
    label: Annotated[
        Sequence[LabelFilter],
        Query(max_length=16, description="`key=value`, or `key` for any value; repeat it for jobs with all of them"),
    ] = (),
    limit: Limit = 50,
    cursor: Annotated[str | None, Query(pattern=JOB_ID.pattern, description="`next_cursor` of the page before")] = None,
) -> Page[Job]:
    """List jobs, newest first."""
    return use.page(who, JobFilter(state, name, [key_and_value(text) for text in label]), limit, cursor)


@router.get("/jobs/{job_id}", responses=problem_responses(NotFound), tags=["jobs"], openapi_extra=VIEWER)
def get_job(who: Who, use: UseCases, job_id: JobId) -> Job:
    """Show a job: state, progress, what it waits for, how it ended."""
    return use.get(who, job_id)


@router.post(
    "/jobs/{job_id}/cancel",
    status_code=202,
    responses=problem_responses(BadRequest, NotFound, Conflict, TooLarge),
    tags=["jobs"],
    openapi_extra=SUBMITTER,
)
def cancel_job(who: Who, use: UseCases, job_id: JobId, how: CancelRequest | None = None) -> Job:
    """Ask a job to stop. It stops within one step; asking again is harmless.

    With `keep_checkpoint` it writes a checkpoint first, at which another job can begin.
    """
    return use.cancel(who, job_id, how is not None and how.keep_checkpoint)


@router.post(
    "/jobs/{job_id}/pause",
    status_code=202,
    responses=problem_responses(NotFound, Conflict),
    tags=["jobs"],
    openapi_extra=SUBMITTER,
)
def pause_job(who: Who, use: UseCases, job_id: JobId) -> Job:
    """Ask a training to write a checkpoint and let go of its workers; asking again is harmless."""
    return use.pause(who, job_id)


@router.post(
    "/jobs/{job_id}/resume",
    status_code=202,
    responses=problem_responses(BadRequest, NotFound, Conflict, TooLarge, QuotaExceeded),
    tags=["jobs"],
    openapi_extra=SUBMITTER,
)
def resume_job(who: Who, use: UseCases, job_id: JobId, how: ResumeRequest | None = None) -> Job:
    """Put a paused job back into the line, with the same number of workers or another one."""
    return use.resume(who, job_id, how.workers if how is not None else None)


@router.post(
    "/jobs/{job_id}/retry",
    status_code=201,
    responses={
        200: {"model": Job, "description": "The same job again"},
        **problem_responses(NotFound, Conflict, QuotaExceeded),
    },
    tags=["jobs"],
    openapi_extra=SUBMITTER,
)
def retry_job(
    who: Who, use: UseCases, response: Response, job_id: JobId, idempotency_key: IdempotencyKey = None
) -> Job:
    """Submit a job that failed or was cancelled once more: a new job that goes on from its newest checkpoint."""
    return accepted(response, *use.retry(who, job_id, idempotency_key))


@router.get("/queue", tags=["jobs"], openapi_extra=VIEWER)
def show_queue(who: Who, use: UseCases) -> Page[QueueEntry]:
    """Show the jobs that wait for their turn, who is next first, and why each one waits."""
    return use.queue(who)


@router.delete(
    "/jobs/{job_id}",
    status_code=204,
    responses=problem_responses(NotFound, Conflict),
    tags=["jobs"],
    openapi_extra=SUBMITTER,
)
def delete_job(who: Who, use: UseCases, job_id: JobId) -> None:
    """Delete an ended job and all that its run wrote. A dataset that it prepared stays."""
    use.delete(who, job_id)


@router.get(
    "/jobs/{job_id}/events",
    response_model=Page[Event],
    responses={**stream_description("events"), **problem_responses(NotFound)},
    tags=["runs"],
    openapi_extra=VIEWER,
)
def list_events(
    request: Request,
    who: Who,
    use: UseCases,
    job_id: JobId,
    after: Annotated[int, Query(ge=0, le=2**53, description="Only events with a higher number")] = 0,
    limit: Limit = 200,
    last_event_id: Annotated[str | None, LastEventId, Field(pattern=EVENT_ID)] = None,
) -> Any:
    """List what happened to a job, in order; or follow it, by `Accept: text/event-stream`.

    A live stream begins after `after`, or after `Last-Event-ID`; it has no `limit`.
    """
    if streams_wanted(request):
        refuse_parameter(request, "limit")
        last = after if last_event_id is None else int(last_event_id)
        return stream(request, use.follow_events(who, job_id, last), reads_bucket=False)
    return use.events(who, job_id, after, limit)


@router.get(
    "/jobs/{job_id}/metrics",
    response_model=Page[MetricPoint],
    responses={
        **stream_description("points, and a message `rewind` where the run went back to a checkpoint,"),
        **problem_responses(NotFound),
    },
    tags=["runs"],
    openapi_extra=VIEWER,
)
def list_metrics(
    request: Request,
    who: Who,
    use: UseCases,
    job_id: JobId,
    keys: Annotated[str | None, Query(max_length=512, description="Only these values: names, comma-separated")] = None,
    from_step: Annotated[int, Query(ge=0, le=2**53, description="Only from this step on")] = 0,
    max_points: Annotated[int | None, Query(ge=1, le=100_000, description="Thin evenly to this many")] = None,
    last_event_id: Annotated[str | None, LastEventId, Field(pattern=METRIC_ID)] = None,
) -> Any:
    """The curve of a job along its history: no gap and no duplicate, whatever was restarted; or the same live.

    In a live stream (`Accept: text/event-stream`) a message `rewind` says beyond which step to forget all points:
    others follow in their place. It has no `max_points`.
    """
    chosen = keys.split(",") if keys else None
    if streams_wanted(request):
        refuse_parameter(request, "max_points")
        return stream(request, use.follow_metrics(who, job_id, chosen, from_step, last_event_id))
    return use.metrics(who, job_id, chosen, from_step, max_points)


@router.get("/jobs/{job_id}/checkpoints", responses=problem_responses(NotFound), tags=["runs"], openapi_extra=VIEWER)
def list_checkpoints(who: Who, use: UseCases, job_id: JobId) -> Page[Checkpoint]:
    """List the complete and verified checkpoints of a job, oldest first."""
    return use.checkpoints(who, job_id)


@router.delete(
    "/jobs/{job_id}/checkpoints/{step}",
    status_code=204,
    responses=problem_responses(NotFound, Conflict),
    tags=["runs"],
    openapi_extra=SUBMITTER,
)
def delete_checkpoint(who: Who, use: UseCases, job_id: JobId, step: Step) -> None:
    """Delete one checkpoint of an ended job, unless it is being downloaded, or a job that has not ended began at it."""
    use.delete_checkpoint(who, job_id, step)


@router.get(
    "/jobs/{job_id}/checkpoints/{step}/files/{name}",
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
        **problem_responses(NotFound, Conflict),
    },
    tags=["runs"],
    openapi_extra=VIEWER,
)
def download_file(request: Request, who: Who, use: UseCases, job_id: JobId, step: Step, name: ModelFile) -> Response:
    """Download a checkpoint, a file at a time. In one folder, they are a model that other libraries load.

    Weights are verified while they are sent; where they are damaged, the answer breaks off short of its length.
    """
    return Download(use.download(who, job_id, step, name), name, partial(principal, request), place(request))


@router.get(
    "/jobs/{job_id}/verification",
    response_class=Response,
    responses={**LINES, **problem_responses(NotFound)},
    tags=["runs"],
    openapi_extra=VIEWER,
)
def verify_checkpoints(
    request: Request,
    who: Who,
    use: UseCases,
    job_id: JobId,
    step: Annotated[int | None, Query(ge=0, le=2**53, description="Only the checkpoint of this step")] = None,
) -> Response:
    """Read every byte of a job's checkpoints and compare it with what was written.

    The verdict says of each checkpoint whether it is `well`, `damaged` (which objects are missing, short or altered,
    and which tensors of the model in them), `gone` (deleted meanwhile), or `unknown`, since the store did not answer.
    """
    return Lines(use.verify(who, job_id, step), partial(principal, request), place(request))


@router.get(
    "/jobs/{job_id}/logs",
    response_model=Page[LogLine],
    responses={**stream_description("lines"), **problem_responses(NotFound)},
    tags=["runs"],
    openapi_extra=VIEWER,
)
def list_logs(
    request: Request,
    who: Who,
    use: UseCases,
    job_id: JobId,
    rank: Annotated[int | None, Query(ge=0, le=2**31, description="Only this worker")] = None,
    cursor: Annotated[str | None, Query(max_length=65_536, description="`next_cursor` of the page before")] = None,
    last_event_id: Annotated[str | None, LastEventId, Field(max_length=65_536)] = None,
) -> Any:
    """The workers' own logs, by segment and rank; an empty page means that nothing has been added.

    With `Accept: text/event-stream`, the same lines as they come, those of the ranks interleaved, from `cursor` or
    `Last-Event-ID` on: both are cursors.
    """
    if streams_wanted(request):
        return stream(request, use.follow_logs(who, job_id, rank, cursor if last_event_id is None else last_event_id))
    return use.logs(who, job_id, rank, cursor)
