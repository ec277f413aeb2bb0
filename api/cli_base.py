"""What the groups of commands share: a client for one command, and an answer as a table or as JSON."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console, RenderableType

from .client import Client


class Output(StrEnum):
    TABLE = "table"
    JSON = "json"


Format = Annotated[Output, typer.Option("--output", "-o", help="A table for people, the API's JSON for programs.")]
Connect = Callable[[], Client]


@contextmanager
def open_client(ctx: typer.Context) -> Iterator[Client]:
    make: Connect = ctx.obj
    with make() as client:
        yield client


def print_answer(client: Client, output: Output, view: Callable[[], RenderableType]) -> None:
    """Print the newest answer, byte for byte, or the view of it."""
    if output is Output.TABLE:
        Console().print(view(), markup=False, highlight=False)
    elif client.last_answer:
        typer.echo(client.last_answer.decode().rstrip("\n"))
