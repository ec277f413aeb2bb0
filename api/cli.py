"""The command `lockstep`: submit jobs and see what becomes of them.

Exit codes: 0 done (or the job succeeded), 1 the job failed (or a checkpoint is damaged), 2 usage or a bad spec, 3 the
job was cancelled, 4 the control plane or its store did not answer or had an error of its own, 130 Ctrl-C.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel
from rich.console import Console

from . import __version__, lookup, profile, show, show_verification
from .cli_base import Format, Output, open_client, print_answer
from .cli_project import project
from .client import Client, Update
from .commands import Commands
from .documents import now
from .download import FILES, SaveError, all_or_none, bar, choose, refuse_existing
from .errors import ApiError, LockstepError, NotFound
from .jobs import Event, Job, JobState, LogLine, MetricPoint, ModelFile, Rewind
from .specfile import SpecFileError, read_spec
from .words import plain

JOB_FAILED, BAD_REQUEST, JOB_CANCELLED, NO_SERVER, INTERRUPTED = 1, 2, 3, 4, 130
DAMAGED = 1
_END_CODES = {JobState.FAILED: JOB_FAILED, JobState.CANCELLED: JOB_CANCELLED}
_VERDICT_CODES = {"well": 0, "damaged": DAMAGED, "gone": BAD_REQUEST, "unknown": NO_SERVER}


class _Commands(Commands):
    def tell(self, error: Exception) -> int | None:
        if not isinstance(error, LockstepError):
            return None
        _complain(error)
        return _code_of(error)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Submit training jobs to Lockstep and see what becomes of them.",
    epilog="Exit codes: 0 done, 1 job failed, 2 usage or bad spec, 3 job cancelled, 4 no server, 130 Ctrl-C.",
)

JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id, the beginning of it, or the job's name.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")]

app.add_typer(project, name="project")


def main() -> None:
    """Run the console script."""
    app()


def connect() -> Client:
    """Return a client of the control plane that the environment or the profile names. Raises ProfileError."""
    found = profile.load()
    return Client(found.url, found.api_key)


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"lockstep {__version__}")
        raise typer.Exit()
    ctx.obj = ctx.obj or connect


@app.command()
def submit(
    ctx: typer.Context,
    file: Annotated[str, typer.Argument(help="A YAML or JSON file, or - for standard input.")],
    watch: Annotated[bool, typer.Option("--watch", help="Stay until the job has ended.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and submit nothing.")] = False,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Submitting again with the same key returns the first job.")
    ] = None,
    output: Format = Output.TABLE,
) -> None:
    """Submit a job."""
    if watch and dry_run:
        raise typer.BadParameter("--watch and --dry-run exclude each other: a dry run has nothing to watch")
    spec = read_spec(file)
    with open_client(ctx) as client:
        if dry_run:
            plan = client.plan(spec)
            return print_answer(client, output, lambda: show.plan(plan))
        job = client.submit(spec, idempotency_key=idempotency_key)
        if watch:
            if output is Output.TABLE:
                typer.echo(f"{file} → {job.id}")
            return _watch(client, job.id, output)
        return print_answer(client, output, lambda: show.job_detail(job, now()))


@app.command("list")
def list_jobs(
    ctx: typer.Context,
    state: Annotated[
        list[JobState] | None, typer.Option(help="Only jobs in this state; repeat it for any of some.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Only jobs of this name.")] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY[=VALUE]", help="Only jobs with this label; repeat it for all of some."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most jobs to show.")] = 50,
    cursor: Annotated[str | None, typer.Option(help="Where the page before this one said to go on.")] = None,
    output: Format = Output.TABLE,
) -> None:
    """List jobs, newest first."""
    with open_client(ctx) as client:
        page = client.list(state, name, limit, cursor, label)
        print_answer(client, output, lambda: show.job_table(page.items, now()))
    if page.next_cursor and output is Output.TABLE:
        typer.echo(f"There are more: --cursor {plain(page.next_cursor)}", err=True)


@app.command("show")
def show_job(ctx: typer.Context, job_id: JobId, output: Format = Output.TABLE) -> None:
    """Show one job."""
    with _job(ctx, job_id) as (client, job_id):
        job = client.get(job_id)
        print_answer(client, output, lambda: show.job_detail(job, now()))


@app.command()
def watch(ctx: typer.Context, job_id: JobId, output: Format = Output.TABLE) -> None:
    """Watch a job until it has ended; the exit code says how. With -o json: a line for each event, then the job."""
    with _job(ctx, job_id) as (client, job_id):
        _watch(client, job_id, output)


@app.command()
def events(ctx: typer.Context, job_id: JobId, follow: Follow = False, output: Format = Output.TABLE) -> None:
    """Print what happened to a job. With -o json: a line for each event."""
    console = Console()
    with _job(ctx, job_id) as (client, job_id):
        for event in client.stream_events(job_id) if follow else _all_events(client, job_id):
            if output is Output.JSON:
                _print_line(event)
            else:
                console.print(show.event_line(event), soft_wrap=True)


@app.command()
def logs(
    ctx: typer.Context,
    job_id: JobId,
    follow: Follow = False,
    rank: Annotated[int | None, typer.Option(min=0, help="Only this worker's.")] = None,
    output: Format = Output.TABLE,
) -> None:
    """Print what the workers wrote. With -o json: a line for each line."""
    with _job(ctx, job_id) as (client, job_id):
        for line in client.tail(job_id, rank) if follow else _all_lines(client, job_id, rank):
            if output is Output.JSON:
                _print_line(line)
            else:
                typer.echo(_log_line(line, rank))


@app.command()
def metrics(
    ctx: typer.Context,
    job_id: JobId,
    keys: Annotated[str | None, typer.Option(help="Which, with commas between: loss,eval_loss.")] = None,
    from_step: Annotated[int, typer.Option(min=0, help="Leave out what lies before this step.")] = 0,
    max_points: Annotated[int | None, typer.Option(min=1, help="Thin the points out to this number.")] = None,
    follow: Follow = False,
    output: Format = Output.TABLE,
) -> None:
    """Print a job's metrics. With -f, a line for each point and for each return to a checkpoint."""
    if follow and max_points is not None:
        raise typer.BadParameter("--follow and --max-points exclude each other: what is to come cannot be thinned out")
    chosen = None if keys is None else [key for key in keys.split(",") if key]
    with _job(ctx, job_id) as (client, job_id):
        if follow:
            return _follow_metrics(client.stream_metrics(job_id, chosen, from_step), chosen, output)
        page = client.metrics(job_id, chosen, from_step, max_points)
        return print_answer(client, output, lambda: show.metrics_table(page.items, chosen))


@app.command()
def checkpoints(
    ctx: typer.Context,
    words: Annotated[list[str], typer.Argument(metavar="JOB | verify JOB", help="The job, by id or by name.")],
    step: Annotated[int | None, typer.Option(min=0, help="Verify only the checkpoint of this step.")] = None,
    output: Format = Output.TABLE,
) -> None:
    """List a job's checkpoints, or verify them: let the control plane read every byte; 0 only if all are well."""
    match words:
        case [job_id] if step is None:  # also of a job that is called `verify`
            _list_checkpoints(ctx, job_id, output)
        case ["verify", job_id]:
            _verify(ctx, job_id, step, output)
        case _:
            raise typer.BadParameter("write `checkpoints JOB`, or `checkpoints verify JOB` with or without --step")


def _list_checkpoints(ctx: typer.Context, job_id: str, output: Output) -> None:
    with _job(ctx, job_id) as (client, job_id):
        page = client.checkpoints(job_id)
        print_answer(client, output, lambda: show.checkpoints_table(page.items, now()))


def _verify(ctx: typer.Context, job_id: str, step: int | None, output: Output) -> None:
    with _job(ctx, job_id) as (client, job_id):
        with show_verification.bar(Console(stderr=True)) as progress:
            found = client.verify(job_id, step, progress)
        print_answer(client, output, lambda: show_verification.verification(found))
    raise typer.Exit(_VERDICT_CODES[found.verdict])


@app.command()
def download(
    ctx: typer.Context,
    job_id: JobId,
    step: Annotated[int | None, typer.Option(min=0, help="The checkpoint of this step, not the newest.")] = None,
    best: Annotated[bool, typer.Option("--best", help="The checkpoint of lowest eval loss.")] = False,
    to: Annotated[Path | None, typer.Option(help="The folder to write to. Default: NAME-step-N, here.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
) -> None:
    """Download a checkpoint as a folder that other libraries load, and print the files' paths."""
    if step is not None and best:
        raise typer.BadParameter("--step and --best exclude each other: each chooses the checkpoint")
    with _job(ctx, job_id) as (client, job_id):
        chosen = choose(client.checkpoints(job_id).items, step, best)
        folder = to or Path(f"{client.get(job_id).name}-step-{chosen.step}")
        if not force:
            refuse_existing(folder)
        with all_or_none(folder) as place:
            saved = [name for name in FILES if _saved(client, job_id, chosen.step, name, place / name)]
        for name in saved:
            typer.echo(folder / name)


def _saved(client: Client, job_id: str, step: int, name: ModelFile, to: Path) -> bool:
    """Download a file; False if it is one of a tokenizer and there is none."""
    try:
        with bar(Console(stderr=True), name) as progress:
            client.download(job_id, step, name, to, progress)
    except NotFound as error:
        if not name.startswith("tokenizer"):
            raise
        if name == "tokenizer.json":  # and not a second time for its config
            typer.echo(f"No tokenizer: {plain(str(error))}", err=True)
        return False
    return True


@app.command()
def cancel(
    ctx: typer.Context,
    job_id: JobId,
    keep_checkpoint: Annotated[bool, typer.Option("--keep-checkpoint", help="Write a checkpoint before.")] = False,
    output: Format = Output.TABLE,
) -> None:
    """Stop a job."""
    with _job(ctx, job_id, only=True) as (client, job_id):
        job = client.cancel(job_id, keep_checkpoint)
        _answer_request(client, job, output, "Cancellation requested. It stops within a step")


@app.command()
def pause(ctx: typer.Context, job_id: JobId, output: Format = Output.TABLE) -> None:
    """Let a training write a checkpoint and let go of its workers, until it is resumed."""
    with _job(ctx, job_id, only=True) as (client, job_id):
        _answer_request(client, client.pause(job_id), output, "Pause requested. It writes a checkpoint first")


@app.command()
def resume(
    ctx: typer.Context,
    job_id: JobId,
    workers: Annotated[int | None, typer.Option(min=1, help="Go on with this many workers.")] = None,
    output: Format = Output.TABLE,
) -> None:
    """Let a paused job go on."""
    with _job(ctx, job_id, only=True) as (client, job_id):
        _answer_request(client, client.resume(job_id, workers), output, "Resumed. It waits for its turn")


@app.command()
def retry(ctx: typer.Context, job_id: JobId, output: Format = Output.TABLE) -> None:
    """Submit a failed or cancelled job once more: a new job that goes on from its newest checkpoint."""
    with _job(ctx, job_id, only=True) as (client, job_id):
        job = client.retry(job_id)
        print_answer(client, output, lambda: show.job_detail(job, now()))


@app.command()
def queue(ctx: typer.Context, output: Format = Output.TABLE) -> None:
    """Show the jobs that wait for their turn, and why."""
    with open_client(ctx) as client:
        page = client.queue()
        print_answer(client, output, lambda: show.queue_table(page.items, now()))


def _answer_request(client: Client, job: Job, output: Output, sentence: str) -> None:
    """Say that a request was taken, or show the job if it has ended already."""
    if output is Output.TABLE and not job.state.ended:
        typer.echo(f"{sentence}: lockstep watch {job.id}")
    else:
        print_answer(client, output, lambda: show.job_detail(job, now()))


@app.command()
def delete(
    ctx: typer.Context,
    job_id: JobId,
    checkpoint: Annotated[int | None, typer.Option(min=0, help="Only the checkpoint of this step.")] = None,
    output: Format = Output.TABLE,
) -> None:
    """Delete an ended job with everything it wrote, or one checkpoint of it."""
    with _job(ctx, job_id, only=True) as (client, job_id):
        if checkpoint is None:
            client.delete(job_id)
        else:
            client.delete_checkpoint(job_id, checkpoint)
        what = job_id if checkpoint is None else f"the checkpoint of {job_id} at step {checkpoint}"
        print_answer(client, output, lambda: plain(f"Deleted {what}."))


@contextmanager
def _job(ctx: typer.Context, text: str, only: bool = False) -> Iterator[tuple[Client, str]]:
    """Connect and find the job that a text means; of several of one name the newest, or with `only` none."""
    with open_client(ctx) as client:
        found = lookup.find_jobs(client, text)
        job_id = lookup.only(text, found) if only else found[0]
        if len(found) > 1:
            typer.echo(f"{plain(text)}: the newest of several, {job_id}. Before it: {', '.join(found[1:])}", err=True)
        yield client, job_id


def _watch(client: Client, job_id: str, output: Output) -> None:
    try:
        updates = client.follow(job_id)
        job = _print_events(updates) if output is Output.JSON else show.watch(Console(), updates)
    except KeyboardInterrupt:
        typer.echo(f"The job goes on without you. To stop it: lockstep cancel {plain(job_id)}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    raise typer.Exit(_END_CODES.get(job.state, 0) if job else 0)


def _print_events(updates: Iterator[Update]) -> Job | None:
    job = None
    for update in updates:
        job = update.job
        for event in update.events:
            _print_line(event)
    if job:
        _print_line(job)
    return job


def _follow_metrics(items: Iterator[MetricPoint | Rewind], keys: list[str] | None, output: Output) -> None:
    console = Console()
    for item in items:
        if output is Output.JSON:
            text = item.model_dump_json()
            typer.echo(f'{{"rewind":{text}}}' if isinstance(item, Rewind) else text)
        else:
            line = show.rewind_line(item) if isinstance(item, Rewind) else show.metric_line(item, keys)
            console.print(line, soft_wrap=True)


def _all_events(client: Client, job_id: str) -> Iterator[Event]:
    after = 0
    while True:
        page = client.events(job_id, after)
        yield from page.items
        if not page.next_cursor:
            return
        after = page.items[-1].seq


def _print_line(answer: BaseModel) -> None:
    typer.echo(answer.model_dump_json())


def _all_lines(client: Client, job_id: str, rank: int | None) -> Iterator[LogLine]:
    cursor = None
    while True:
        page = client.logs(job_id, rank, cursor)
        yield from page.items
        if not (cursor := page.next_cursor):
            return


def _log_line(line: LogLine, rank: int | None) -> str:
    text = plain(line.text.expandtabs())
    return text if rank is not None else f"[{line.rank}] {text}"


def _complain(error: LockstepError) -> None:
    typer.echo(plain(str(error)), err=True)
    if isinstance(error, ApiError):
        for fault in error.errors[1:] and error.errors:  # a single fault is the message itself
            typer.echo(f"  {plain(fault.path)}: {plain(fault.message)}", err=True)
        if error.request_id and _code_of(error) == NO_SERVER:
            typer.echo(f"  request {plain(error.request_id)}", err=True)


def _code_of(error: LockstepError) -> int:
    """Tell what the user can mend (2) from what the server must (4)."""
    own = isinstance(error, (SpecFileError, SaveError, profile.ProfileError))
    refused = isinstance(error, ApiError) and 400 <= error.status < 500
    return BAD_REQUEST if own or refused else NO_SERVER
