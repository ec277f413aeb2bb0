"""Downloading a checkpoint: which one, into which files, and the bar meanwhile.

A file appears under its name only when it is complete, and in a folder all of them or none; what breaks off leaves
nothing.
"""

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import httpx2
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from .errors import LockstepError, NotFound, Unreachable
from .jobs import Checkpoint, ModelFile

FILES: tuple[ModelFile, ...] = get_args(ModelFile)
ShowProgress = Callable[[int, int], None]
"""Called with the bytes so far, and of the whole file."""


class SaveError(LockstepError):
    """A file cannot be written, or is there already."""


def choose(checkpoints: Sequence[Checkpoint], step: int | None, best: bool) -> Checkpoint:
    """Return the checkpoint of a step, or the one of lowest eval loss, or the newest. Raises NotFound.

    `checkpoints` are those of one job, oldest first.
    """
    if step is not None:
        candidates = [c for c in checkpoints if c.step == step]
    elif best:
        candidates = [c for c in checkpoints if "eval_loss" in c.metrics]
        candidates.sort(key=lambda c: (-c.metrics["eval_loss"], c.step))  # the last one is the best
    else:
        candidates = list(checkpoints)
    if not candidates:
        which = f"of step {step}" if step is not None else "with an evaluation" if best else "yet"
        raise NotFound(f"The job has no checkpoint {which}; `lockstep checkpoints` lists those that it has.")
    return candidates[-1]


def refuse_existing(folder: Path) -> None:
    """Raise SaveError if one of the files is in the folder already."""
    for name in FILES:
        if (folder / name).exists():
            raise SaveError(
                f"{folder / name} is there already; choose another folder by --to, or replace it by --force."
            )


@contextmanager
def all_or_none(folder: Path) -> Iterator[Path]:
    """Yield a place for files that appear in `folder` once all are there. Raises SaveError.

    The place is within the folder, which may be all of a volume that is there to write to.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".download-", dir=folder) as place:
            yield Path(place)
            for file in sorted(Path(place).iterdir()):
                file.replace(folder / file.name)
    except OSError as error:
        raise SaveError(f"{folder} cannot be written to: {error.strerror}.") from error
    finally:
        if is_new:
            with suppress(OSError):  # it holds the files
                folder.rmdir()


def save(response: httpx2.Response, to: Path, progress: ShowProgress | None) -> None:
    """Write the body of an answer to a file. Raises SaveError, and Unreachable if the body is not whole."""
    part = to.with_name(f"{to.name}.{uuid.uuid4().hex[:8]}.part")
    announced, received = int(response.headers.get("content-length", -1)), 0
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with part.open("xb") as file:
            for piece in response.iter_raw():
                file.write(piece)
                received += len(piece)
                if progress is not None:
                    progress(received, announced)
        if received != announced:
            raise _broken_off(to, received, announced)
        part.replace(to)
    except OSError as error:
        raise SaveError(f"{to} cannot be written: {error.strerror}.") from error
    except httpx2.RequestError as error:
        raise _broken_off(to, received, announced) from error
    finally:
        part.unlink(missing_ok=True)


def _broken_off(to: Path, received: int, announced: int) -> Unreachable:
    return Unreachable(
        f"{to.name} broke off after {received:,} of {announced:,} bytes, and nothing was kept. Try again; if it always "
        "does, the checkpoint may be damaged: the log of the control plane tells, and another step may be whole."
    )


@contextmanager
def bar(console: Console, name: str) -> Iterator[ShowProgress]:
    """Show how far a download is, and nothing of it afterwards; nothing at all without a terminal."""
    view = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = view.add_task(name, total=None)
    with view:
        yield lambda received, total: view.update(task, completed=received, total=total)
