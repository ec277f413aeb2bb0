"""What people see of a verification: a bar while it goes on, then a table, and what is damaged below it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Column
from rich.text import Text

from .cells import right, table, text
from .verification import CheckedCheckpoint, Damage, ShowChecking, Verification
from .words import plain, size

_STYLES = {"well": "green", "damaged": "red", "gone": "dim", "unknown": "yellow"}
_NAMES = 3
"""Tensors that are named; there may be hundreds."""


@contextmanager
def bar(console: Console) -> Iterator[ShowChecking]:
    """Show how far it is, and nothing of it afterwards; nothing at all without a terminal."""
    view = Progress(
        TextColumn("step {task.fields[step]:,}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = view.add_task("", total=None, step=0)
    with view:
        yield lambda told: view.update(task, completed=told.checked, total=told.size, step=told.step)


def verification(found: Verification) -> RenderableType:
    if not found.checkpoints:
        return Text("There are no checkpoints.")
    rows = table(*map(right, ("STEP", "PARTS", "SIZE")), Column(text("VERDICT")))
    for checkpoint in found.checkpoints:
        rows.add_row(
            text(f"{checkpoint.step:,}", "bold"),
            text("" if checkpoint.parts is None else str(checkpoint.parts)),
            text("" if checkpoint.size is None else size(checkpoint.size)),
            _verdict(checkpoint),
        )
    lines = [_line(checkpoint, damage) for checkpoint in found.checkpoints for damage in checkpoint.damage]
    return Group(rows, *lines)


def _verdict(checkpoint: CheckedCheckpoint) -> Text:
    return text(checkpoint.verdict, _STYLES[checkpoint.verdict]).append(f": {plain(checkpoint.message)}", "default")


def _line(checkpoint: CheckedCheckpoint, damage: Damage) -> Text:
    words = f"step {checkpoint.step:,}: {damage.name} is {damage.kind}{_names(damage.tensors)}"
    return text(words, "red")


def _names(tensors: Sequence[str]) -> str:
    if not tensors:
        return ""
    more = f" and {len(tensors) - _NAMES} more" if len(tensors) > _NAMES else ""
    return f"; lost: {', '.join(tensors[:_NAMES])}{more}"
