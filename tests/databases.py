"""An empty database for a test: SQLite in its folder, or with `pytest --postgres` a schema of a real PostgreSQL."""

import hashlib
import os
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import sqlalchemy as sa
from alembic.config import Config
from alembic.script import ScriptDirectory

import service.database
from api.documents import now
from service.database import make_engine, migrate
from service.tables import metadata, projects

SERVER = "LOCKSTEP_TEST_POSTGRES"
"""The variable that names the server, where the run has one."""

_opened: list[sa.Engine] = []


def opened(url: str) -> sa.Engine:
    """Return an engine that the test need not close itself."""
    engine = make_engine(url)
    _opened.append(engine)
    return engine


def close_all() -> None:
    while _opened:
        _opened.pop().dispose()


def on_postgres() -> bool:
    return SERVER in os.environ


def database_url(folder: Path) -> str:
    """Return where the database of a test is that keeps its files in this folder."""
    if on_postgres():
        return f"{os.environ[SERVER]}&options=-csearch_path%3D{_schema(folder)}"
    return f"sqlite:///{folder / 'lockstep.db'}"


def make_database(folder: Path) -> str:
    """Make the folder's database, with the newest schema and two projects and nothing else; return its URL."""
    url = database_url(folder)
    if on_postgres():
        make_schema(folder)
        engine = make_engine(url)
        with engine.begin() as connection:  # as the migrations would, which take longer than most tests
            metadata.create_all(connection)
            connection.execute(sa.text("CREATE TABLE alembic_version (version_num VARCHAR(32) PRIMARY KEY)"))
            connection.execute(sa.text("INSERT INTO alembic_version VALUES (:head)"), {"head": _head()})
            for name in ("default", "another"):
                connection.execute(projects.insert().values(name=name, created_at=now()))
        engine.dispose()
    else:
        (folder / "lockstep.db").write_bytes(_empty_file())
    return url


def make_schema(folder: Path) -> None:
    """Make the folder's schema on the PostgreSQL server, with no table in it; whatever it held is gone."""
    engine = make_engine(os.environ[SERVER])
    with engine.begin() as connection:
        connection.execute(sa.text(f"DROP SCHEMA IF EXISTS {_schema(folder)} CASCADE"))
        connection.execute(sa.text(f"CREATE SCHEMA {_schema(folder)}"))
    engine.dispose()


def _schema(folder: Path) -> str:
    return f"test_{hashlib.sha256(os.fsencode(folder)).hexdigest()[:20]}"


@cache
def _head() -> str | None:
    config = Config()
    config.set_main_option("script_location", str(Path(service.database.__file__).parent / "migrations"))
    return ScriptDirectory.from_config(config).get_current_head()


@cache
def _empty_file() -> bytes:
    """A migrated SQLite database with a second project, made once."""
    with TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/empty.db"
        migrate(url)
        engine = make_engine(url)
        with engine.begin() as connection:
            connection.execute(projects.insert().values(name="another", created_at=now()))
        engine.dispose()
        return Path(folder, "empty.db").read_bytes()
