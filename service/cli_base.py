"""What the commands of `lockstep-server` share: an error that we know is one sentence, and exit code 1."""

import sys
from typing import NoReturn

import typer

from api.commands import Commands
from api.errors import LockstepError
from api.words import plain


class ServerCommands(Commands):
    def tell(self, error: Exception) -> int | None:
        if (why := _sentence(error)) is None:
            return None
        print(plain(why), file=sys.stderr)
        return 1


def give_up(why: str) -> NoReturn:
    print(plain(why), file=sys.stderr)
    raise typer.Exit(1)


def _sentence(error: Exception) -> str | None:
    """Say what happened, if that is an operator's to mend; None for an error that nobody expected."""
    if isinstance(error, LockstepError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] not in ("api", "service"):
        return (
            f"lockstep-server needs more than the client does, and {error.name} is not installed: "
            "pip install '.[service]', or '.[local]' for a whole stack on this machine"
        )
    if type(error).__module__ == "sqlalchemy.exc":  # by name, since a client alone has no SQLAlchemy
        return f"the database failed; see LOCKSTEP_DATABASE_URL: {getattr(error, 'orig', None) or error}"
    return None
