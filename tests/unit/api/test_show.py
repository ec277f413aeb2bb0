"""What people see: whole at 80 columns, safe against what it shows, plain where there is no terminal."""

import io
import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType

from api import show, words
from api.client import Update
from api.jobs import Checkpoint, Event, Job, MemoryPlan, MetricPoint, PreparePlan, QueueEntry, TrainPlan
from api.spec import TrainSpec, job_spec_adapter

NOW = datetime(2026, 11, 23, 15, tzinfo=UTC)
CLOCK_TIME = f"{NOW.astimezone():%H:%M:%S}"
ID = "job-01h4x5y6z7abcdefghjk"
SPEC = job_spec_adapter.validate_python(
    {"name": "tiny", "data": {"dataset": "words"}, "model": {"size": "10m"}, "resources": {"workers": 2}}
)
PREPARE = job_spec_adapter.validate_python(
    {"kind": "prepare", "name": "p", "dataset": "words", "source": {"type": "python-stdlib"}}
)
ALL_VALUES = {
    "loss": 4.32101,
    "learning_rate": 5.91e-4,
    "grad_norm": 0.98765,
    "tokens_per_second": 12345.6,
    "eval_loss": 3.2,
    "eval_perplexity": 24.53,
    "model_flops_per_second": 3.2e12,
    "utilisation": 0.345,
    "data_wait": 0.001,
    "checkpoint_stall": 0.0,
    "memory_bytes": 3 * 2.0**29,
}
HALF_WAY = {"step": 350, "total_steps": 1000, "values": ALL_VALUES, "eta_seconds": 130.0}


@pytest.fixture(autouse=True)
def _capable_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the outcome not depend on the terminal that the tests are started from."""
    monkeypatch.setenv("TERM", "xterm")


def job(**fields: Any) -> Job:
    usual: dict[str, Any] = {
        "id": ID,
        "name": "tiny",
        "project": "default",
        "owner": "ana",
        "labels": {"team": "lm"},
        "state": "running",
        "reason": None,
        "message": "Training on 2 workers.",
        "attempt": 1,
        "conditions": [],
        "progress": HALF_WAY,
        "result": {},
        "spec": SPEC,
        "dataset_version": "job-v1",
        "created_at": NOW - timedelta(minutes=5),
        "started_at": NOW - timedelta(minutes=4),
        "ended_at": None,
    }
    return Job.model_validate(usual | fields)


def event(seq: int, type: str, message: str, **fields: Any) -> Event:
    return Event.model_validate({"seq": seq, "at": NOW, "type": type, "message": message} | fields)


def points(count: int = 2) -> list[MetricPoint]:
    return [MetricPoint(segment="s", line=i, step=i * 1000, at=NOW, values=ALL_VALUES) for i in range(count)]


def train_plan() -> TrainPlan:
    mib = 2**20
    return TrainPlan(
        spec=SPEC,
        dataset_version="job-v1",
        parameters=10_651_392,
        steps=1000,
        tokens_per_step=8192,
        tokens=8_192_000,
        epochs=2.31234,
        memory_per_worker=MemoryPlan(
            weights=40 * mib,
            gradients=40 * mib,
            optimizer=80 * mib,
            ddp_buckets=41 * mib,
            activations=500 * mib,
            data=3 * mib,
            snapshot=240 * mib,
        ),
        checkpoint_size=120 * mib,
        submission={},
        warnings=["A warning of many words, " * 6],
    )


def checkpoint() -> Checkpoint:
    metrics = {"eval_loss": 3.3}
    return Checkpoint(
        step=400, segment="1-0-abcd", prefix="p", size=5 * 2**20, parts=2, metrics=metrics, created_at=NOW
    )


def entry(**fields: Any) -> QueueEntry:
    usual: dict[str, Any] = {
        "position": 1,
        "job_id": ID,
        "name": "tiny",
        "priority": 0,
        "state": "queued",
        "needs": "2 to 8 × 4 CPU + 1 GPU",
        "message": "needs at least 2 × 4 CPU + 1 GPU, 3 CPU + 0 GPU free; holds a reservation; 2 jobs ahead",
        "since": NOW - timedelta(minutes=5),
    }
    return QueueEntry.model_validate(usual | fields)


def printed(view: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False, color_system=None)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def watched(updates: Iterable[Update], clock: Iterable[float] = (), *, width: int = 80, terminal: bool = False) -> str:
    """Return what `watch` writes; the clock gives these readings, then stands still."""
    readings = iter(clock)
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    show.watch(console, updates, clock=lambda: next(readings, 0.0))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def final_line(updates: Iterable[Update], width: int = 80) -> str:
    """Return what the terminal's live line says in the end."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", watched(updates, width=width, terminal=True))
    return text.replace("\r", "\n").rstrip().splitlines()[-1]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (2**20 - 1, "1.0 MiB"), (2**50, "1024 TiB")],
)
def test_sizes_are_in_binary_units(count: int, text: str) -> None:
    assert words.size(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (1000, "1.0k"), (12345, "12.3k"), (999_999, "1.0M"), (3.2e12, "3.2T")]
)
def test_counts_are_shortened(count: float, text: str) -> None:
    assert words.short(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0s"), (0.4, "0s"), (59.6, "1m 00s"), (185, "3m 05s"), (3600, "1h 00m"), (90_000, "1d 01h")],
)
def test_durations_have_their_two_largest_units(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


def test_figures_suit_their_kind_and_stand_bad_numbers() -> None:
    written = [words.figure(key, value) for key, value in ALL_VALUES.items()]
    assert written == [
        "4.3210", "5.9e-04", "0.9877", "12.3k", "3.2000", "24.53", "3.2T", "34.5%", "0.001", "0", "1.5 GiB"
    ]  # fmt: skip
    for key in ALL_VALUES:
        for bad in (float("nan"), float("inf")):
            assert re.search("nan|inf", words.figure(key, bad))


VIEWS: list[RenderableType] = [
    show.job_table([job(name="a" * 47, state="cancelling"), job(progress={})], NOW),
    show.job_detail(
        job(
            labels={f"label-{i}": "v" * 40 for i in range(16)},
            message="A long message of very many words. " * 6,
            conditions=[{"type": "waiting", "message": "Waiting for a GPU. " * 9, "since": NOW}],
            warnings=["unbroken" * 30],
            result={"sample": "word " * 60, "eval_loss": 3.1},
            progress=HALF_WAY | {"step": 999_999_999, "total_steps": 10**9, "eta_seconds": 10**7},
        ),
        NOW,
    ),
    show.plan(train_plan()),
    show.plan(PreparePlan(spec=PREPARE, submission={}, warnings=["w " * 99])),
    show.metrics_table(points()),
    show.metrics_table(points(), list(ALL_VALUES)),
    show.metrics_table([]),
    show.checkpoints_table([checkpoint()], NOW),
    show.queue_table([entry(), entry(position=200, name="a" * 47, priority=-100, message="unbroken" * 20)], NOW),
    show.queue_table([], NOW),
]


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_fits_eighty_columns(view: RenderableType) -> None:
    assert all(cell_len(line) <= 80 for line in printed(view).splitlines())


def test_the_job_table_keeps_ids_and_figures_whole_and_shortens_names() -> None:
    row = printed(show.job_table([job(name="a" * 47, state="cancelling", labels={})], NOW)).splitlines()[2]
    assert row.split() == [ID, "a" * (len(row.split()[1]) - 1) + "…", "cancelling", "35%", "4.3210", "5m", "00s"]
    assert "a" * 47 in printed(show.job_table([job(name="a" * 47)], NOW), width=120)
    assert len(printed(show.job_table([job(name="a-" * 23 + "a")], NOW)).splitlines()) == 3


def test_the_job_table_has_a_column_of_labels_if_any_job_has_some() -> None:
    assert "LABELS" not in printed(show.job_table([job(labels={}), job(labels={})], NOW))
    labels = {"team": "lm", "example.com/sweep": "a b"}
    header, _, bare, labelled = printed(show.job_table([job(labels={}), job(labels=labels)], NOW), 110).splitlines()
    assert header.endswith("LABELS".ljust(len(header) - header.index("LABELS")))
    assert bare.split() == [ID, "tiny", "running", "35%", "4.3210", "5m", "00s"]
    assert labelled.rstrip().endswith("5m 00s  team=lm, example.com/sweep=a b")
    cut = printed(show.job_table([job(labels={f"key-{i}": "v" * 40 for i in range(16)})], NOW)).splitlines()
    assert len(cut) == 3
    assert cut[2].startswith(f"{ID}  tiny  running   35%  4.3210  5m 00s  key-0=v")


def test_the_queue_keeps_ids_whole_and_says_why_each_job_waits() -> None:
    entries = [entry(), entry(position=2, job_id=ID[:-1] + "x", name="a" * 47, priority=-7, message="b " * 30)]
    lines = printed(show.queue_table(entries, NOW)).splitlines()
    assert lines[0].split() == ["#", "ID", "NAME", "PRIORITY", "WAITS", "WHY"]
    assert lines[2].split()[:6] == ["1", ID, "tiny", "0", "5m", "00s"]
    assert any(ID[:-1] + "x" in line and "-7" in line for line in lines)
    text = " ".join(word for line in lines[2:] for word in line.split()[-4:])
    for word in ("reservation;", "2", "jobs", "ahead"):
        assert word in text
    wide = printed(show.queue_table(entries, NOW), width=200)
    assert entries[0].message in wide


def test_the_plan_of_a_job_of_flexible_size_says_its_range() -> None:
    made = train_plan()
    fields = {"batch": {"micro_size": 2}, "resources": {"workers": {"min": 2, "max": 8}, "gpus": 1}}
    spec = TrainSpec.model_validate({**made.spec.model_dump(exclude_unset=True), **fields})
    assert "2 to 8 × 1 CPU, 1 GPU" in printed(show.plan(made.model_copy(update={"spec": spec})))


def test_every_metric_asked_for_is_shown_in_full_at_eighty_columns() -> None:
    text = printed(show.metrics_table(points(), list(ALL_VALUES)))
    assert "…" not in text
    for key, value in ALL_VALUES.items():
        assert words.figure(key, value) in text


def test_metrics_show_the_usual_keys_that_are_there_and_gaps_as_nothing() -> None:
    sparse = [MetricPoint(segment="s", line=0, step=10, at=NOW, values={"loss": 1.0}), *points(1)]
    header, _, first, _ = printed(show.metrics_table(sparse)).splitlines()
    assert header.split() == ["STEP", "LOSS", "LR", "GRAD", "NORM", "TOK/S", "EVAL", "LOSS", "EVAL", "PPL"]
    assert first.split() == ["10", "1.0000"]


def test_the_pages_of_operators_are_shown_to_who_is_told_of_them() -> None:
    links = {"ray": "https://ray.example/#/jobs/x-1", "grafana": None}
    text = printed(show.job_detail(job(links=links), NOW))
    assert re.search(r"Ray +https://ray\.example/#/jobs/x-1", text)
    assert "Grafana" not in text
    assert "Ray" not in printed(show.job_detail(job(), NOW))


def test_the_detail_says_state_reason_message_condition_and_times() -> None:
    condition = {"type": "ray_unreachable", "message": "Ray does not answer.", "since": NOW}
    text = printed(show.job_detail(job(state="failed", reason="out_of_memory", conditions=[condition]), NOW))
    for part in ("failed (out of memory)", "Training on 2 workers.", "Ray does not answer.", "35%", "350/1,000"):
        assert part in text
    for part in ("words@job-v1", "team=lm", "ana in default", "5m 00s ago", ID):
        assert part in text
    assert "Ended" not in text


def test_a_result_shows_numbers_as_such_and_a_sample_as_it_was_written() -> None:
    made = {
        "eval_loss": 3.123456,
        "steps": 1000,
        "sample": "def f():\n\treturn [1]",
        "dataset": {"words": 1},
        "ok": True,
    }
    lines = [line.rstrip() for line in printed(show.result(made)).splitlines()]
    assert lines == [
        "Eval loss   3.1235", "Steps       1,000", 'Dataset     {"words": 1}', "Ok          true",
        "", "Sample", "def f():", "    return [1]",
    ]  # fmt: skip


def test_the_plan_shows_memory_by_part_what_is_certain_and_what_is_expected() -> None:
    text = printed(show.plan(train_plan()))
    for part in ("10,651,392", "1,000 of 8,192 tokens", "8,192,000 (2.31 epochs)", "2 × 1 CPU", "120 MiB"):
        assert part in text
    assert re.search(r"weights +40.0 MiB", text)
    assert re.search(r"at least +160 MiB", text)
    assert re.search(r"activations +500 MiB", text)
    assert re.search(r"snapshot +240 MiB", text)
    assert re.search(r"expected +944 MiB", text)
    assert "partial sums" not in text, "there are none"
    assert "A warning" in text


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, ["Arithmetic fp32", "Schedule cosine, from 0.0006 to 10% of it", "120 MiB, every 200 steps"]),
        (
            {
                "precision": "bf16",
                "compile": True,
                "determinism": "elastic",
                "batch": {"micro_size": 8},
                "schedule": {"type": "wsd"},
                "evaluate": {"every": 50},
                "checkpoint": {"every": 50, "keep_best": 2},
            },
            [
                "Arithmetic bf16, compiled, the same bits at every power of two of workers",
                "Schedule wsd, from 0.0006 to 10% of it in the last 20% of the run",
                "120 MiB, every 50 steps; the last 1 and the best 2 stay",
            ],
        ),
        ({"schedule": {"type": "constant"}}, ["Schedule constant at 0.0006"]),
    ],
)
def test_the_plan_shows_how_it_would_be_trained(changes: dict[str, Any], rows: list[str]) -> None:
    made = train_plan()
    spec = TrainSpec.model_validate({**made.spec.model_dump(exclude_unset=True), **changes})
    text = " ".join(printed(show.plan(made.model_copy(update={"spec": spec}))).split())
    for row in rows:
        assert row in text


def test_done_is_rounded_down_so_that_all_means_all() -> None:
    assert "99%" in printed(show.job_table([job(progress={"step": 9999, "total_steps": 10_000})], NOW))


HOSTILE = "\x1b[2J\x1b]0;owned\x07[bold]x[/bold][/]\r\x9b31m\u202e"
HOSTILE_RESULT = {HOSTILE: f"{HOSTILE}\n", f"{HOSTILE} again": 1}


@pytest.mark.parametrize(
    "view",
    [
        show.job_table([job(name=HOSTILE)], NOW),
        show.job_detail(
            job(name=HOSTILE, message=HOSTILE, owner=HOSTILE, warnings=[HOSTILE], result=HOSTILE_RESULT), NOW
        ),
        show.metrics_table(points(1), [HOSTILE]),
        show.queue_table([entry(name=HOSTILE, message=HOSTILE)], NOW),
        show.checkpoints_table([checkpoint().model_copy(update={"segment": HOSTILE})], NOW),
    ],
)
def test_text_from_elsewhere_is_neither_markup_nor_control(view: RenderableType) -> None:
    text = printed(view, width=200)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert "[bold]x[/bold][/]" in text.lower()


def run() -> list[Update]:
    """Return a short life: queued, running, lost and recovering, done."""
    return [
        Update(
            job(state="queued", progress={}),
            (event(1, "state", "Accepted.", state="queued"), event(2, "condition", "Waiting for\n2 CPUs. " * 8)),
        ),
        Update(job(), (event(3, "state", "Training.", state="running"), event(4, "checkpoint", "Saved step 200."))),
        Update(job(progress=HALF_WAY | {"step": 360}), ()),
        Update(
            job(state="succeeded", progress={"step": 1000, "total_steps": 1000}, result={"eval_loss": 3.0}),
            (event(5, "state", "Finished.", state="succeeded"),),
        ),
    ]


def test_without_a_terminal_watch_writes_plain_lines() -> None:
    text = watched(run(), [0.0, *[20.0] * 99])
    assert not re.search(r"[\x00-\x09\x0b-\x1f━]", text)
    lines = text.splitlines()
    assert lines[0] == f"{CLOCK_TIME}  queued      Accepted."
    assert lines[1] == f"{CLOCK_TIME}  condition   " + "Waiting for 2 CPUs. " * 8
    progress = "          progress    350/1,000  35%  loss 4.3210  lr 5.9e-04  12.3k tok/s  2m 10s left"
    assert lines[2:5] == [
        progress, f"{CLOCK_TIME}  running     Training.", f"{CLOCK_TIME}  checkpoint  Saved step 200."
    ]  # fmt: skip
    assert lines[5:7] == ["          progress    1,000/1,000  100%", f"{CLOCK_TIME}  succeeded   Finished."]
    assert lines[-1].split() == ["Eval", "loss", "3.0000"]


def test_without_a_terminal_progress_comes_only_now_and_then() -> None:
    updates = [Update(job(progress=HALF_WAY | {"step": step}), ()) for step in range(1, 101)]
    seconds = iter(range(100))
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    now = [0.0]

    def each() -> Iterable[Update]:
        for update in updates:
            now[0] = next(seconds)
            yield update

    show.watch(console, each(), clock=lambda: now[0])
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count("progress") == 6


def test_a_run_that_stands_still_is_not_repeated() -> None:
    assert watched([Update(job(), ())] * 9, range(0, 900, 20)).count("progress") == 1


@pytest.mark.parametrize("width", [80, 100, 160])
def test_on_a_terminal_progress_is_one_whole_line(width: int) -> None:
    line = final_line([Update(job(), ())], width)
    assert re.sub(r" +", " ", re.sub("[━╸╺]+", "", line)) == (
        "running 350/1,000 loss 4.3210 lr 5.9e-04 12.3k tok/s 2m 10s left"
    )
    assert cell_len(line) <= width


def test_large_numbers_still_fit_the_line_at_eighty_columns() -> None:
    far = {"step": 120_000, "total_steps": 10**6, "values": ALL_VALUES, "eta_seconds": 90_000.0}
    line = final_line([Update(job(state="recovering", progress=far), ())])
    assert "…" not in line
    assert line.endswith("120k/1.0M loss 4.3210  lr 5.9e-04  12.3k tok/s 1d 01h left")


@pytest.mark.parametrize("progress", [{}, {"step": 3}, {"step": 3, "total_steps": 20}, {"total_steps": 0}])
def test_a_run_without_figures_or_total_has_a_line_too(progress: dict[str, Any]) -> None:
    assert final_line([Update(job(progress=progress), ())]).startswith("running")


def test_on_a_terminal_events_stand_above_the_line_and_wrap_under_their_message() -> None:
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", watched(run(), terminal=True))
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", text) if "━" not in line]
    first = next(i for i, line in enumerate(lines) if line.endswith("Accepted."))
    assert re.search(rf"{CLOCK_TIME}  condition   Waiting for 2 CPUs\.", lines[first + 1])
    assert lines[first + 2].startswith(" " * 22)
    assert all(cell_len(line) <= 80 for line in lines)


def test_a_terminal_that_cannot_redraw_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in watched(run(), terminal=True)


def test_watch_returns_the_last_state_of_the_job() -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    last = show.watch(console, run())
    assert last is not None
    assert last.state == "succeeded"
    assert show.watch(console, []) is None


@pytest.mark.parametrize(("count", "text"), [(0, "0 jobs"), (1, "1 job"), (2, "2 jobs"), (12_000, "12,000 jobs")])
def test_one_thing_is_not_several(count: int, text: str) -> None:
    assert words.counted(count, "job") == text
