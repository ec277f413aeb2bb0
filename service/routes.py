"""The routes: parse, call the use case, return. Every one under /v1 needs an API key."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Header, Path, Query, Request, Response
from fastapi.security import HTTPBearer

from api.errors import BadRequest, Conflict, InvalidSpec, NotFound, TooLarge, Unauthorized, Unavailable
from api.jobs import Checkpoint, Event, Job, JobState, LogLine, MetricPoint, Page, PreparePlan, TrainPlan
from api.names import JOB_ID
from api.spec import JobSpec
from service.auth import Principal, authenticate
from service.jobs import Jobs
from service.problems import problem_responses

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


def principal(request: Request) -> Principal:
    """Who asks; 401 if nobody we know."""
    return authenticate(request.app.state.store, request.headers.get("authorization"))


def jobs(request: Request) -> Jobs:
    found: Jobs = request.app.state.jobs
    return found


async def parsed_body(request: Request) -> Any:
    """The body before defaults were filled in: what idempotency compares."""
    if "json" not in request.headers.get("content-type", "") or not await request.body():
        raise BadRequest("send the job spec as a JSON body, with `Content-Type: application/json`")
    return await request.json()


Who = Annotated[Principal, Depends(principal)]
UseCases = Annotated[Jobs, Depends(jobs)]
JobId = Annotated[str, Path(pattern=JOB_ID.pattern, description="A job's id", examples=["job-01m9zq1x0p5w6f3k2v8n"])]
Limit = Annotated[int, Query(ge=1, le=200, description="Most items of a page")]

router = APIRouter(
    prefix="/v1",
    dependencies=[Depends(principal), Depends(HTTPBearer(auto_error=False, description="An API key"))],
    responses=problem_responses(Unauthorized, InvalidSpec, Unavailable),
)


@router.post(
    "/jobs",
    status_code=201,
    response_model=Job | TrainPlan | PreparePlan,
    responses={
        200: {"model": Job | TrainPlan | PreparePlan, "description": "The same job again, or with dry_run the plan"},
        **problem_responses(BadRequest, TooLarge),
    },
    tags=["jobs"],
)
def submit(
    who: Who,
    use: UseCases,
    response: Response,
    spec: Annotated[JobSpec, Body(openapi_examples=EXAMPLES)],
    body: Annotated[Any, Depends(parsed_body)],
    dry_run: Annotated[bool, Query(description="Return the plan and store nothing")] = False,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> Any:
    """Submit a job. It is accepted once this answers 201, and never lost after that.

    With an `Idempotency-Key`, sending the same body again returns the same job (200); another body is refused (422).
    """
    if dry_run:
        response.status_code = 200
        return use.plan(who, spec)
    job, new = use.submit(who, spec, body, idempotency_key)
    response.status_code = 201 if new else 200
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return job


@router.get("/jobs", tags=["jobs"])
def list_jobs(
    who: Who,
    use: UseCases,
    state: Annotated[JobState | None, Query(description="Only jobs in this state")] = None,
    name: Annotated[str | None, Query(max_length=64, description="Only jobs of this name")] = None,
    limit: Limit = 50,
    cursor: Annotated[str | None, Query(pattern=JOB_ID.pattern, description="`next_cursor` of the page before")] = None,
) -> Page[Job]:
    """List jobs, newest first."""
    return use.page(who, state.value if state else None, name, limit, cursor)


@router.get("/jobs/{job_id}", responses=problem_responses(NotFound), tags=["jobs"])
def get_job(who: Who, use: UseCases, job_id: JobId) -> Job:
    """Show a job: state, progress, what it waits for, how it ended."""
    return use.get(who, job_id)


@router.post("/jobs/{job_id}/cancel", status_code=202, responses=problem_responses(NotFound, Conflict), tags=["jobs"])
def cancel_job(who: Who, use: UseCases, job_id: JobId) -> Job:
    """Ask a job to stop. It stops within one step; asking again is harmless."""
    return use.cancel(who, job_id)


@router.delete("/jobs/{job_id}", status_code=204, responses=problem_responses(NotFound, Conflict), tags=["jobs"])
def delete_job(who: Who, use: UseCases, job_id: JobId) -> None:
    """Delete an ended job and all that its run wrote. A dataset that it prepared stays."""
    use.delete(who, job_id)


@router.get("/jobs/{job_id}/events", responses=problem_responses(NotFound), tags=["runs"])
def list_events(
    who: Who,
    use: UseCases,
    job_id: JobId,
    after: Annotated[int, Query(ge=0, le=2**53, description="Only events with a higher number")] = 0,
    limit: Limit = 200,
) -> Page[Event]:
    """List what happened to a job, in order."""
    return use.events(who, job_id, after, limit)


@router.get("/jobs/{job_id}/metrics", responses=problem_responses(NotFound), tags=["runs"])
def list_metrics(
    who: Who,
    use: UseCases,
    job_id: JobId,
    keys: Annotated[str | None, Query(max_length=512, description="Only these values: names, comma-separated")] = None,
    from_step: Annotated[int, Query(ge=0, le=2**53, description="Only from this step on")] = 0,
    max_points: Annotated[int | None, Query(ge=1, le=100_000, description="Thin evenly to this many")] = None,
) -> Page[MetricPoint]:
    """The curve of a job along its history: no gap and no duplicate, whatever was restarted."""
    return use.metrics(who, job_id, keys.split(",") if keys else None, from_step, max_points)


@router.get("/jobs/{job_id}/checkpoints", responses=problem_responses(NotFound), tags=["runs"])
def list_checkpoints(who: Who, use: UseCases, job_id: JobId) -> Page[Checkpoint]:
    """List the complete and verified checkpoints of a job, oldest first."""
    return use.checkpoints(who, job_id)


@router.delete(
    "/jobs/{job_id}/checkpoints/{step}",
    status_code=204,
    responses=problem_responses(NotFound, Conflict),
    tags=["runs"],
)
def delete_checkpoint(
    who: Who,
    use: UseCases,
    job_id: JobId,
    step: Annotated[int, Path(ge=0, le=2**53, description="The checkpoint's step")],
) -> None:
    """Delete one checkpoint of an ended job."""
    use.delete_checkpoint(who, job_id, step)


@router.get("/jobs/{job_id}/logs", responses=problem_responses(NotFound), tags=["runs"])
def list_logs(
    who: Who,
    use: UseCases,
    job_id: JobId,
    rank: Annotated[int | None, Query(ge=0, le=2**31, description="Only this worker")] = None,
    cursor: Annotated[str | None, Query(max_length=65_536, description="`next_cursor` of the page before")] = None,
) -> Page[LogLine]:
    """The workers' own logs, by segment and rank; an empty page means that nothing has been added."""
    return use.logs(who, job_id, rank, cursor)
