"""The database: its schema, and connections to it."""

import json
import logging
import os
from math import isfinite
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import DataError, IntegrityError

from api.errors import LockstepError

logger = logging.getLogger("lockstep.service")

REFUSED = (DataError, IntegrityError)
"""What a database says that answers and does not take a row: the trouble of that row alone."""


def migrate(database_url: str, revision: str = "head") -> None:
    """Bring the schema up to date, or to a revision; an empty database gets everything.

    A schema newer than this release knows is left as it is: each one serves the release before it, too, so that a
    release can be taken back, and old and new replicas can work side by side while they are replaced.
    """
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["url"] = database_url
    _make_file(database_url)
    if _is_known(config, database_url):
        command.upgrade(config, revision)


def _is_known(config: Config, database_url: str) -> bool:
    """Whether the schema of a database is one that this release can have made or can bring up to date."""
    revision = schema(database_url)
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if revision is None or revision in known:
        return True
    logger.warning("the database has schema %s of a newer release; it is left as it is", revision)
    return False


def schema(database_url: str) -> str | None:
    """Return the revision of a database's schema, None if it has none."""
    engine = make_engine(database_url)
    try:
        with engine.begin() as connection:
            return MigrationContext.configure(connection).get_current_revision()
    finally:
        engine.dispose()


def sqlite_path(database_url: str) -> Path | None:
    """Return the file of an embedded database, None for another one or one in memory."""
    url = sa.make_url(database_url)
    named = url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")
    return Path(str(url.database)).absolute() if named else None


def refuse_missing(database_url: str) -> None:
    """LockstepError if the file of an embedded database is not there, for who would work on an empty one by mistake."""
    path = sqlite_path(database_url)
    if path is not None and not path.exists():
        raise LockstepError(
            f"there is no database {path}; set LOCKSTEP_DATABASE_URL to the one that is served, or make this one: "
            "lockstep-server migrate"
        )


def _make_file(database_url: str) -> None:
    """Make the file of an embedded database that is not there, for its owner only: it will hold hashes of keys.

    What SQLite itself would make, everybody may read. It gives the mode to the files beside it, too.
    """
    path = sqlite_path(database_url)
    if path is None or path.exists():
        return
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise LockstepError(f"{path} cannot be made: {error.strerror}; check LOCKSTEP_DATABASE_URL") from error


def make_engine(database_url: str) -> sa.Engine:
    """Return an engine for SQLite or PostgreSQL, each set up to lose nothing and to wait for nobody for ever."""
    url = sa.make_url(database_url)
    if url.get_backend_name() == "postgresql":
        options = f"{_POSTGRES_OPTIONS} {url.query.get('options', '')}"
        patience = {name: value for name, value in _POSTGRES_PATIENCE.items() if name not in url.query}
        # A connection that the server has closed meanwhile is noticed before it is used.
        return sa.create_engine(
            url.set(drivername="postgresql+psycopg"),
            connect_args={**patience, "options": options, "application_name": "lockstep"},
            pool_pre_ping=True,
            json_serializer=_dumps,
            hide_parameters=True,  # an error goes to the log, and parameters hold hashes of keys
            pool_size=10,
            max_overflow=30,
        )
    engine = sa.create_engine(url, json_serializer=_dumps, hide_parameters=True)
    sa.event.listen(engine, "connect", _configure_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


_POSTGRES_OPTIONS = " ".join(
    f"-c {setting}"
    for setting in (
        "timezone=UTC",
        "synchronous_commit=on",  # what is acknowledged is on disk, whatever the server's own default
        "statement_timeout=30s",
        "lock_timeout=10s",
        "idle_in_transaction_session_timeout=60s",
    )
)


_POSTGRES_PATIENCE = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,  # milliseconds
}
"""A server whose machine is gone says nothing, and its own time limits went with it: by the system's defaults, whoever
waits for it would for a quarter of an hour, or for two hours. In seconds; a URL may name others."""


def _dumps(value: Any) -> str:
    """Write JSON without NaN and infinities, which PostgreSQL refuses and a worker's event may hold."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value))


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if isfinite(value) else None
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list():
            return [_finite(item) for item in value]
    return value


def _configure_sqlite(connection: Any, _record: Any) -> None:
    # We begin transactions ourselves: the driver's own way starts them too late to be serialised.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    # A writer takes its lock at once, so that what it reads first is still true when it writes; readers take none.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
