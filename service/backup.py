"""Backup and restore of the embedded database. A backup is one file, an SQLite database by itself.

It is made by SQLite's online backup, so the control plane goes on meanwhile, and holds what was committed when it
began. A restore is made ready beside the database, brought up to what the bucket tells, and only then put in its place;
the database of before stays under another name.
"""

import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from alembic.script import ScriptDirectory

from api.errors import LockstepError
from api.storage import Bucket
from api.words import counted
from service.database import make_engine, migrate, refuse_missing, sqlite_path
from service.in_use import DatabaseInUse, alone
from service.rebuild import Outcome, rebuild
from service.store import Store

_USE_PG_DUMP = (
    "this is for the embedded database; PostgreSQL has tools of its own: pg_dump and pg_restore, and after a restore "
    "`lockstep-server rebuild`"
)
_BUSY_SECONDS = 5.0
_MAGIC = b"SQLite format 3\0"


class BackupError(LockstepError):
    """Why there is no backup, or why it cannot be restored."""


@dataclass(frozen=True)
class Contents:
    """What a sound database holds."""

    revision: str
    jobs: int


def backup(database_url: str, to: Path, overwrite: bool) -> Contents:
    """Write a checked backup to a file, whole or not at all. The database may be in use."""
    source = _embedded(database_url)
    refuse_missing(database_url)
    _refuse_its_own(source, to)
    if os.path.exists(to) and not os.path.isfile(to):
        raise BackupError(f"{to} is a folder or a device; name a file")
    if os.path.exists(to) and not overwrite:
        raise BackupError(f"{to} exists; choose another name, or pass --force to replace it")
    with _beside(to) as temporary:
        try:
            _copy(source, temporary)
            contents = check(temporary)
            _put(temporary, to, overwrite)
        except (OSError, sqlite3.Error) as error:
            raise BackupError(f"the backup of {source} to {to} failed: {error}") from error
    return contents


def _refuse_its_own(source: Path, to: Path) -> None:
    """BackupError where a backup would replace the database, which goes on in a file that nobody finds any more."""
    for file in (f"{source}{ending}" for ending in ("", "-wal", "-shm", "-journal", ".lock")):
        linked = os.path.exists(file) and os.path.exists(to) and os.path.samefile(file, to)
        if linked or os.path.realpath(file) == os.path.realpath(to):
            raise BackupError(f"{to} is the database itself, or belongs to it; choose another name for the backup")


def restore(
    database_url: str, backup_file: Path, bucket: Bucket | None, at: datetime, say: Callable[[str], None]
) -> tuple[Path | None, Outcome | None]:
    """Put a backup in the place of the database, brought up to what the bucket tells.

    Returns where the database of before is now, if there was one, and what the bucket told. None for the bucket leaves
    that for later.
    """
    target = _embedded(database_url)
    contents = check(backup_file)
    if contents.revision not in known_revisions():
        raise BackupError(
            f"{backup_file} is of schema {contents.revision}, which this version does not know; use the newer one"
        )
    say(f"{backup_file}: sound, {counted(contents.jobs, 'job')}, schema {contents.revision}")
    with alone(database_url), _beside(target) as temporary:
        try:
            _copy(backup_file, temporary)
            outcome = _bring_up(temporary, bucket, at, say)
            aside = _set_aside(target, at)
            os.replace(temporary, target)
            _sync(target.parent)
        except (OSError, sqlite3.Error) as error:
            raise BackupError(f"the restore of {target} from {backup_file} failed: {error}") from error
    return aside, outcome


def check(file: Path) -> Contents:
    """Return what a database file holds; BackupError unless it is a sound one of ours, of whatever schema."""
    if not file.is_file():
        raise BackupError(f"there is no file {file}")
    try:
        with closing(_open(file)) as connection:
            trouble = [row[0] for row in connection.execute("PRAGMA integrity_check(5)") if row[0] != "ok"]
            trouble += [f"a row of {row[0]} points nowhere" for row in connection.execute("PRAGMA foreign_key_check")]
            (revision,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
            (jobs,) = connection.execute("SELECT count(*) FROM jobs").fetchone()
    except (sqlite3.Error, TypeError) as error:
        raise BackupError(f"{file} is not a database of ours, or damaged: {error}") from error
    if trouble:
        raise BackupError(f"{file} is damaged: {'; '.join(trouble[:5])}")
    return Contents(revision, jobs)


def known_revisions() -> set[str]:
    scripts = ScriptDirectory(str(Path(__file__).parent / "migrations"))
    return {script.revision for script in scripts.walk_revisions()}


def _embedded(database_url: str) -> Path:
    path = sqlite_path(database_url)
    if path is None:
        raise BackupError(_USE_PG_DUMP)
    return path


def _open(file: Path) -> sqlite3.Connection:
    """Open a database that is there; SQLite itself would make an empty one."""
    return sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True, timeout=_BUSY_SECONDS)


@contextmanager
def _beside(file: Path) -> Iterator[Path]:
    """Give the name of an empty file of the same folder, for its owner only; nothing of it is left behind."""
    try:
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    except OSError as error:
        raise BackupError(f"{file.parent} cannot be written: {error.strerror}") from error
    os.close(handle)
    try:
        yield Path(name)
    finally:
        for ending in ("", "-wal", "-shm", "-journal"):
            Path(f"{name}{ending}").unlink(missing_ok=True)


def _copy(source: Path, to: Path) -> None:
    """Copy a database as of one moment; all pages in one step, which holds up no writer."""
    with closing(_open(source)) as ours, closing(_open(to)) as theirs:
        ours.backup(theirs)
        _close_log(theirs)


def _close_log(connection: sqlite3.Connection) -> None:
    """Leave no write-ahead log, so that one file is all of the database. OperationalError while others have it open."""
    (mode,) = connection.execute("PRAGMA journal_mode=DELETE").fetchone()
    if mode != "delete":
        raise sqlite3.OperationalError(f"its journal mode stays {mode}")


def _put(temporary: Path, to: Path, overwrite: bool) -> None:
    _sync(temporary)
    if overwrite:
        os.replace(temporary, to)
    else:
        os.link(temporary, to)  # refuses what has come there meanwhile
    _sync(to.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _bring_up(file: Path, bucket: Bucket | None, at: datetime, say: Callable[[str], None]) -> Outcome | None:
    """Migrate a database, and rebuild it where a bucket is given."""
    url = f"sqlite:///{file}"
    migrate(url)
    engine = make_engine(url)
    try:
        outcome = rebuild(Store(engine), bucket, at, say) if bucket is not None else None
    finally:
        engine.dispose()
    with closing(_open(file)) as connection:
        _close_log(connection)
    _sync(file)
    return outcome


def _beginning(file: Path) -> bytes:
    with open(file, "rb") as opened:
        return opened.read(len(_MAGIC))


def _set_aside(target: Path, at: datetime) -> Path | None:
    """Give the database another name, if there is one; DatabaseInUse if anybody has it open."""
    if not target.exists():
        return None
    aside = target.with_name(f"{target.name}.before-restore-{at:%Y%m%dT%H%M%SZ}")
    try:
        if _beginning(target) == _MAGIC:  # else SQLite would delete the log of what is damaged
            with closing(_open(target)) as connection:
                _close_log(connection)
    except sqlite3.OperationalError as error:
        raise DatabaseInUse(f"the database {target} is in use ({error}); stop whatever has it open") from error
    except sqlite3.DatabaseError:
        pass  # too damaged to be asked; its log, if there is one, goes with it
    for ending in ("", "-wal", "-shm"):
        if (file := Path(f"{target}{ending}")).exists():
            os.rename(file, f"{aside}{ending}")
    return aside
