"""A group of commands in which an error that we know is a sentence and an exit code, never a traceback."""

from typing import Any

import typer
from typer.core import TyperGroup


class Commands(TyperGroup):
    """The base of both programs' groups; `tell` says what to do about an error."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")  # Pydantic's, which Typer passes on
            raise
        except Exception as error:
            if (code := self.tell(error)) is None:
                raise
            raise typer.Exit(code) from error

    def tell(self, error: Exception) -> int | None:
        """Tell an error and return the exit code; None for one that nobody expected."""
        raise NotImplementedError
