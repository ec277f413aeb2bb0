"""Who works on a database: control planes share it, and whoever replaces or rebuilds it must be alone."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa

from api.errors import LockstepError
from service.database import make_engine, sqlite_path

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""What a file system says that knows no locks."""


class DatabaseInUse(LockstepError):
    """Somebody else works on the database."""


@contextmanager
def serving(database_url: str) -> Iterator[None]:
    """Serve from the database; DatabaseInUse while somebody restores or rebuilds it, or serves from the same SQLite.

    The system itself lets go of the lock when the process ends, however it does.
    """
    with _locked(database_url, "has a control plane already, or is just being restored or rebuilt"):
        yield


@contextmanager
def alone(database_url: str) -> Iterator[None]:
    """Be the only one to work on the database; DatabaseInUse if a control plane does."""
    with _locked(database_url, "is in use by a control plane; stop that first"):
        if sqlite_path(database_url) is None:
            _refuse_other_connections(database_url)
        yield


@contextmanager
def _locked(database_url: str, otherwise: str) -> Iterator[None]:
    path = sqlite_path(database_url)
    if path is None:
        yield
        return
    try:
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise LockstepError(f"{path}.lock cannot be opened: {error.strerror}; check LOCKSTEP_DATABASE_URL") from error
    with open(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DatabaseInUse(f"the database {path} {otherwise}") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield


def _refuse_other_connections(database_url: str) -> None:
    """Whoever is connected as we are may be a control plane; others, such as who makes dumps, have names of their own.

    One look: it does not keep away who comes later.
    """
    engine = make_engine(database_url)
    try:
        if engine.dialect.name != "postgresql":
            return
        with engine.begin() as connection:
            others = connection.execute(
                sa.text(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                    " AND usename = current_user AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
                )
            ).scalar_one()
    finally:
        engine.dispose()
    if others:
        raise DatabaseInUse(f"{others} other connections to the database are open; stop every control plane first")
