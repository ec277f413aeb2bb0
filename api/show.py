"""What people see of the API's answers: pure functions from an answer to something that rich can print.

Text that came from elsewhere (names, messages, logs) is shown as text: never as markup, and without control
characters. All views fit a terminal of 80 columns.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from .cells import right as _right
from .cells import table as _table
from .cells import text as _text
from .client import Update
from .jobs import Checkpoint, Event, Job, JobState, MetricPoint, PreparePlan, QueueEntry, Rewind, TrainPlan
from .prepare_spec import PrepareSpec
from .spec import ResourceSpec, TrainSpec
from .words import duration, figure, short, size

QUIET_SECONDS = 15.0
"""Least time between two lines of progress where there is no terminal to redraw one."""

_STATE_STYLES = {
    JobState.QUEUED: "dim",
    JobState.STARTING: "cyan",
    JobState.RUNNING: "blue",
    JobState.RECOVERING: "yellow",
    JobState.PAUSING: "yellow",
    JobState.PAUSED: "yellow",
    JobState.CANCELLING: "yellow",
    JobState.SUCCEEDED: "green",
    JobState.FAILED: "red",
    JobState.CANCELLED: "magenta",
}
_EVENT_STYLES = {"evaluation": "magenta", "checkpoint": "cyan"} | dict.fromkeys(
    ("condition", "fallback", "rewind"), "yellow"
)
_HEADINGS = {
    "learning_rate": "lr",
    "grad_norm": "grad norm",
    "tokens_per_second": "tok/s",
    "eval_loss": "eval loss",
    "eval_perplexity": "eval ppl",
    "model_flops_per_second": "FLOP/s",
    "utilisation": "MFU",
    "data_wait": "data wait",
    "checkpoint_stall": "stall",
    "memory_bytes": "memory",
}
_MEMORY = (
    ("weights", "weights", ""),
    ("gradients", "gradients", ""),
    ("optimizer", "optimizer", ""),
    ("certain", "at least", "bold"),
    ("ddp_buckets", "DDP buckets", ""),
    ("partial_sums", "partial sums", ""),
    ("activations", "activations", ""),
    ("data", "data read ahead", ""),
    ("snapshot", "snapshot", ""),
    ("total", "expected", "bold"),
)
"""The parts of a memory plan, with what each is called."""
_USUAL_KEYS = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "eval_loss", "eval_perplexity")


def job_table(jobs: Sequence[Job], now: datetime) -> Table:
    """One line for each job, with its labels if any job of these has some; ids are always whole."""
    # Only the name's column may be narrowed; labels are cut to the room that is left.
    identity = Column("ID", no_wrap=True), Column("NAME"), Column("STATE", no_wrap=True)
    labelled = [Column("LABELS", no_wrap=True, ratio=1)] if any(job.labels for job in jobs) else []
    table = _table(*identity, *map(_right, ("DONE", "LOSS", "AGE")), *labelled)
    table.expand = bool(labelled)
    for job in jobs:
        table.add_row(
            _text(job.id, "dim" if job.state.ended else ""),
            _text(job.name, "bold"),
            _state(job.state),
            _text(_percent(job)),
            _text(figure("loss", job.progress.values.get("loss"))),
            _text(duration((now - job.created_at).total_seconds()), "dim"),
            *([_text(_labels(job), "dim")] if labelled else []),
        )
    return table


def queue_table(entries: Sequence[QueueEntry], now: datetime) -> Table:
    """The line: one row for each waiting job, who is next first."""
    identity = _right("#"), Column("ID", no_wrap=True), Column("NAME")
    table = _table(*identity, _right("PRIORITY"), _right("WAITS"), Column("WHY"))
    for entry in entries:
        table.add_row(
            _text(str(entry.position), "dim"),
            _text(entry.job_id),
            _text(entry.name, "bold"),
            _text(str(entry.priority)),
            _text(duration((now - entry.since).total_seconds()), "dim"),
            _text(entry.message),
        )
    return table


def job_detail(job: Job, now: datetime) -> Panel:
    """All about one job: where it is, how it got there, what it made."""
    grid = _grid()
    reason = f" ({job.reason.value.replace('_', ' ')})" if job.reason else ""
    grid.add_row("State", Text.assemble(_state(job.state), reason))
    if job.message:
        grid.add_row("", _text(job.message))
    for condition in job.conditions:
        grid.add_row("Condition", _text(f"{condition.message} (since {_when(condition.since)})", "yellow"))
    grid.add_row("Progress", _progress(job))
    if figures := _figures(job):
        grid.add_row("Newest", _text(figures))
    grid.add_row("Attempts", _text(str(job.attempt)))
    for label, value in _origin(job).items():
        grid.add_row(label, _text(value))
    for label, at in (("Submitted", job.created_at), ("Started", job.started_at), ("Ended", job.ended_at)):
        if at is not None:
            grid.add_row(label, Text.assemble(_when(at), (f"  {_ago(at, now)}", "dim")))
    for label, url in (("Ray", job.links.ray), ("Grafana", job.links.grafana)) if job.links is not None else ():
        if url is not None:
            grid.add_row(label, _text(url))
    for warning in job.warnings:
        grid.add_row("Warning", _text(warning, "yellow"))
    body: list[RenderableType] = [grid]
    if job.result:
        body += [Text(), result(job.result)]
    return _panel(job.name, Group(*body), subtitle=job.id)


def result(values: Mapping[str, Any]) -> RenderableType:
    """What a job made: short values as a list, texts (a sample) as they stand, below it."""
    grid = _grid()
    texts: list[RenderableType] = []
    for key, value in values.items():
        if isinstance(value, str) and ("\n" in value or len(value) > 60):
            texts += [Text(), _text(_heading(key).capitalize(), "dim")]
            texts += [_text(line.expandtabs(4)) for line in value.splitlines()]
        else:
            grid.add_row(_text(_heading(key).capitalize()), _text(_value(key, value)))
    return Group(grid, *texts)


def plan(plan: TrainPlan | PreparePlan) -> Panel:
    """What a job would need and do."""
    grid = _grid()
    if isinstance(plan, TrainPlan):
        _add_training(grid, plan)
    elif isinstance(plan.spec, PrepareSpec):
        grid.add_row("Dataset", _text(plan.spec.dataset))
        grid.add_row("Source", _text(plan.spec.source.type))
        grid.add_row("Tokenizer", _text(f"{plan.spec.tokenizer.type}, {plan.spec.tokenizer.vocab_size:,} tokens"))
    for warning in plan.warnings:
        grid.add_row("Warning", _text(warning, "yellow"))
    return _panel(plan.spec.name, grid, subtitle="plan: nothing was submitted")


def metrics_table(points: Sequence[MetricPoint], keys: Sequence[str] | None = None) -> RenderableType:
    """One line for each point; `keys` chooses the columns, else the usual ones that have values.

    More columns than a narrow terminal holds go into further tables below.
    """
    present = {key for point in points for key in point.values}
    chosen = list(keys) if keys else [key for key in _USUAL_KEYS if key in present]
    tables = [_metrics(points, chosen[i : i + 6]) for i in range(0, max(1, len(chosen)), 6)]
    return Group(*(part for table in tables for part in (Text(), table))) if len(tables) > 1 else tables[0]


def metric_line(point: MetricPoint, keys: Sequence[str] | None = None) -> Text:
    """One point on one line; `keys` chooses the figures, else the usual ones that it has."""
    figures = [f"{_heading(k)} {figure(k, point.values[k])}" for k in keys or _USUAL_KEYS if k in point.values]
    return _text("  ".join([f"step {point.step:,}", *figures]))


def rewind_line(rewind: Rewind) -> Text:
    return _text(f"back to step {rewind.step:,}: the points after it are void, others follow", "yellow")


def _metrics(points: Sequence[MetricPoint], keys: Sequence[str]) -> Table:
    table = _table(_right("STEP"), *(_right(_heading(key).upper()) for key in keys))
    for point in points:
        table.add_row(_text(f"{point.step:,}", "bold"), *(_text(figure(key, point.values.get(key))) for key in keys))
    return table


def checkpoints_table(checkpoints: Sequence[Checkpoint], now: datetime) -> Table:
    numbers = map(_right, ("STEP", "SIZE", "PARTS", "EVAL LOSS"))
    table = _table(*numbers, Column("SEGMENT", no_wrap=True), _right("AGE"))
    for checkpoint in checkpoints:
        table.add_row(
            _text(f"{checkpoint.step:,}", "bold"),
            _text(size(checkpoint.size)),
            _text(str(checkpoint.parts)),
            _text(figure("eval_loss", checkpoint.metrics.get("eval_loss"))),
            _text(checkpoint.segment, "dim"),
            _text(duration((now - checkpoint.created_at).total_seconds()), "dim"),
        )
    return table


def watch(
    console: Console,
    updates: Iterable[Update],
    clock: Callable[[], float] = time.monotonic,
    *,
    with_result: bool = True,
) -> Job | None:
    """Show a live run: events as they happen and, below them, one line of progress. Return the job's last state.

    Without a terminal there are only plain lines, those of progress at least QUIET_SECONDS apart.
    """
    live = console.is_terminal and not console.is_dumb_terminal
    job: Job | None = None
    with _live_line(console) if live else _plain_lines(console, clock) as show_progress:
        for update in updates:
            job = update.job
            show_progress(job)
            for event in update.events:
                console.print(_event_row(event) if live else event_line(event), soft_wrap=not live)
    if with_result and job and job.result:
        console.print(Group(Text(), result(job.result)))
    return job


@contextmanager
def _live_line(console: Console) -> Iterator[Callable[[Job], None]]:
    progress = Progress(
        TextColumn("[{task.fields[style]}]{task.description}"),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
        TextColumn("{task.fields[steps]}", markup=False),
        TextColumn("{task.fields[figures]}", markup=False),
        TextColumn("{task.fields[left]}", markup=False, style="dim"),
        console=console,
        expand=True,
    )
    task = progress.add_task("", total=None, style="dim", steps="", figures="", left="")

    def show(job: Job) -> None:
        progress.update(
            task,
            description=job.state.value,
            style=_STATE_STYLES[job.state],
            completed=job.progress.step,
            total=job.progress.total_steps,
            steps=_steps(job),
            figures=_figures(job),
            left=_left(job),
        )

    with progress:
        yield show


@contextmanager
def _plain_lines(console: Console, clock: Callable[[], float]) -> Iterator[Callable[[Job], None]]:
    shown_at, shown_step = clock(), 0

    def show(job: Job) -> None:
        nonlocal shown_at, shown_step
        due = job.state.ended or clock() - shown_at >= QUIET_SECONDS
        if not due or job.progress.step == shown_step:
            return
        shown_at, shown_step = clock(), job.progress.step
        parts = (_steps(job), _percent(job), _figures(job), _left(job))
        console.print(_text(f"{'':10}{'progress':12}{'  '.join(filter(None, parts))}"), soft_wrap=True)

    yield show


def _event_row(event: Event) -> Table:
    row = Table.grid(Column(width=8), Column(width=10), Column(overflow="fold"), padding=(0, 2, 0, 0))
    row.add_row(_text(f"{event.at.astimezone():%H:%M:%S}", "dim"), _event_type(event), _text(event.message))
    return row


def event_line(event: Event) -> Text:
    """One event on one line."""
    return _text(f"{event.at.astimezone():%H:%M:%S}  {_event_type(event).plain:10}  {event.message}")


def _event_type(event: Event) -> Text:
    return _state(event.state) if event.state else _text(event.type, _EVENT_STYLES.get(event.type, ""))


def _add_training(grid: Table, plan: TrainPlan) -> None:
    memory = plan.memory_per_worker
    if isinstance(plan.spec, TrainSpec):
        model, resources = plan.spec.model, plan.spec.resources
        grid.add_row("Model", _text(f"{model.layers} layers, width {model.width:,}, {model.heads} heads"))
        devices = f"{resources.cpus} CPU" + (f", {resources.gpus} GPU" if resources.gpus else "")
        grid.add_row("Workers", _text(f"{_workers(resources)} × {devices}"))
        grid.add_row("Dataset", _text(f"{plan.spec.data.dataset.partition('@')[0]}@{plan.dataset_version}"))
        grid.add_row("Arithmetic", _text(_arithmetic(plan.spec)))
        grid.add_row("Schedule", _text(_schedule(plan.spec)))
    grid.add_row("Parameters", _text(f"{plan.parameters:,}"))
    grid.add_row("Steps", _text(f"{plan.steps:,} of {plan.tokens_per_step:,} tokens"))
    grid.add_row("Tokens", _text(f"{plan.tokens:,} ({plan.epochs:.3g} epochs)"))
    kept = _kept(plan.spec) if isinstance(plan.spec, TrainSpec) else ""
    grid.add_row("Checkpoint", _text(f"{size(plan.checkpoint_size)}{kept}"))
    parts = Table.grid(Column(), Column(justify="right"), padding=(0, 2, 0, 0))
    for name, label, style in _MEMORY:
        if count := getattr(memory, name):
            parts.add_row(_text(label, style), _text(size(count), style))
    grid.add_row("Memory", _text("on each worker, beside Python and its libraries", "dim"))
    grid.add_row("", parts)


def _arithmetic(spec: TrainSpec) -> str:
    return ", ".join(
        [
            spec.precision,
            *(["compiled"] if spec.compile else []),
            *(["the same bits at every power of two of workers"] if spec.determinism == "elastic" else []),
        ]
    )


def _schedule(spec: TrainSpec) -> str:
    schedule, peak = spec.schedule, f"{spec.optimizer.learning_rate:g}"
    if schedule.floor is None:
        return f"{schedule.type} at {peak}"
    tail = f" in the last {schedule.decay_fraction:.0%} of the run" if schedule.decay_fraction is not None else ""
    return f"{schedule.type}, from {peak} to {schedule.floor:.0%} of it{tail}"


def _kept(spec: TrainSpec) -> str:
    """Return when a checkpoint is written and which ones stay."""
    last, best = spec.checkpoint.keep_last, spec.checkpoint.keep_best
    wanted = [f"the last {last or 1}", *([f"the best {best}"] if best else [])]
    stay = f"; {' and '.join(wanted)} stay" if last or best else ""
    return f", every {spec.checkpoint.every:,} steps{stay}"


def _origin(job: Job) -> dict[str, str]:
    """Return what the job was asked to be and by whom."""
    spec = job.spec
    name = spec.dataset if isinstance(spec, PrepareSpec) else spec.data.dataset.partition("@")[0]
    rows = {
        "Kind": spec.kind,
        "Dataset": f"{name}@{job.dataset_version}" if job.dataset_version else name,
        "Owner": f"{job.owner} in {job.project}",
    }
    if job.labels:
        rows["Labels"] = _labels(job)
    return rows


def _labels(job: Job) -> str:
    return ", ".join(f"{key}={value}" for key, value in job.labels.items())


def _progress(job: Job) -> RenderableType:
    if not job.progress.total_steps:
        return _text(_steps(job))
    done = ProgressBar(total=job.progress.total_steps, completed=job.progress.step, width=20)
    row = Table.grid(padding=(0, 2, 0, 0))
    row.add_row(done, _text(_percent(job)), _text(_steps(job)), _text(_left(job), "dim"))
    return row


def _steps(job: Job) -> str:
    step, total = job.progress.step, job.progress.total_steps
    write = short if max(step, total or 0) >= 100_000 else "{:,}".format
    return f"{write(step)}/{write(total)}" if total else write(step)


def _percent(job: Job) -> str:
    total = job.progress.total_steps
    # Down, so that 100% means the end.
    return f"{min(100, job.progress.step * 100 // total)}%" if total else ""


def _figures(job: Job) -> str:
    values = job.progress.values
    written = {key: figure(key, values[key]) for key in _USUAL_KEYS if key in values}
    patterns = {"loss": "loss {}", "learning_rate": "lr {}", "tokens_per_second": "{} tok/s"}
    return "  ".join(pattern.format(written[key]) for key, pattern in patterns.items() if key in written)


def _left(job: Job) -> str:
    eta = job.progress.eta_seconds
    return f"{duration(eta)} left" if eta is not None and not job.state.ended else ""


def _value(key: str, value: Any) -> str:
    if isinstance(value, float):
        return figure(key, value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)


def _heading(key: str) -> str:
    return _HEADINGS.get(key, key.replace("_", " "))


def _state(state: JobState) -> Text:
    return Text(state.value, _STATE_STYLES[state])


def _workers(resources: ResourceSpec) -> str:
    least, most = resources.least, resources.most
    return str(most) if least == most else f"{least} to {most}"


def _when(at: datetime) -> str:
    return f"{at.astimezone():%Y-%m-%d %H:%M:%S}"


def _ago(at: datetime, now: datetime) -> str:
    return f"{duration((now - at).total_seconds())} ago"


def _grid() -> Table:
    return Table.grid(Column(style="dim", min_width=10), Column(overflow="fold"), padding=(0, 2, 0, 0))


def _panel(title: str, body: RenderableType, subtitle: str) -> Panel:
    name, note = _text(title, "bold"), _text(subtitle, "dim")
    return Panel(body, title=name, title_align="left", subtitle=note, subtitle_align="right", border_style="dim")
