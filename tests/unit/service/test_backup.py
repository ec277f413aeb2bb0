"""Backup and restore of the embedded database: whole or not at all, of what was committed, beside whoever works."""

import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from api.errors import LockstepError
from service.backup import BackupError, Contents, backup, check, known_revisions, restore
from service.database import make_engine, migrate
from service.in_use import DatabaseInUse, alone, serving
from service.rows import JobRow
from service.store import Store
from tests.fakes import ACCEPTED, MemoryBucket, job_id, new_store, row

AT = datetime(2026, 11, 28, 9, 30, 5, tzinfo=UTC)
HEAD = max(known_revisions())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = new_store(tmp_path)
    yield made
    made._engine.dispose()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'lockstep.db'}"


def jobs_of(database: Path) -> list[JobRow]:
    engine = make_engine(f"sqlite:///{database}")
    try:
        return Store(engine).everything()
    finally:
        engine.dispose()


def put_back(url: str, file: Path) -> Path | None:
    return restore(url, file, MemoryBucket(), AT, lambda line: None)[0]


def files(folder: Path) -> set[str]:
    """Return what lies in a folder, but for the lock, which stays."""
    return {name for name in os.listdir(folder) if not name.endswith(".lock")}


def test_a_backup_holds_what_was_committed_while_the_control_plane_goes_on(
    store: Store, url: str, tmp_path: Path
) -> None:
    store.insert(row(1), ACCEPTED, None)
    to = tmp_path / "saved"
    with serving(url), store._writer.begin() as connection:
        connection.execute(sa.text("UPDATE jobs SET message = 'not committed'"))
        assert backup(url, to, overwrite=False) == Contents(HEAD, 1)
    store.insert(row(2), ACCEPTED, None)
    assert stat.S_IMODE(to.stat().st_mode) == 0o600, "it holds hashes of keys"
    assert files(tmp_path) - {"lockstep.db", "lockstep.db-wal", "lockstep.db-shm"} == {"saved"}
    assert jobs_of(to) == [row(1)]


def test_a_file_that_is_there_is_replaced_only_when_that_is_said(store: Store, url: str, tmp_path: Path) -> None:
    to = tmp_path / "saved"
    to.write_text("mine")
    with pytest.raises(BackupError, match="exists; choose another name, or pass --force"):
        backup(url, to, overwrite=False)
    assert to.read_text() == "mine"
    backup(url, to, overwrite=True)
    assert check(to) == Contents(HEAD, 0)
    (link := tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(BackupError, match="File exists"):
        backup(url, link, overwrite=False)


@pytest.mark.parametrize(
    "name", ["lockstep.db", "lockstep.db-wal", "lockstep.db-shm", "lockstep.db.lock", "link", "same", "way/lockstep.db"]
)
def test_a_backup_never_replaces_the_database_that_it_saves(store: Store, url: str, tmp_path: Path, name: str) -> None:
    """A control plane would go on in a file without a name, and lose all when it ends."""
    database = tmp_path / "lockstep.db"
    (tmp_path / "link").symlink_to(database)
    (tmp_path / "same").hardlink_to(database)
    (tmp_path / "way").symlink_to(tmp_path)
    inode = database.stat().st_ino
    with pytest.raises(BackupError, match="is the database itself, or belongs to it; choose another name"):
        backup(url, tmp_path / name, overwrite=True)
    assert database.stat().st_ino == (tmp_path / "same").stat().st_ino == inode


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_backup_goes_to_a_file_and_nowhere_else(store: Store, url: str, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(BackupError, match=r"folder is a folder or a device; name a file$"):
        backup(url, tmp_path / "folder", overwrite)
    with pytest.raises(BackupError, match="/dev/null is a folder or a device"):
        backup(url, Path("/dev/null"), overwrite)


def test_a_backup_is_one_file_that_can_be_read_where_nothing_can_be_written(
    store: Store, url: str, tmp_path: Path
) -> None:
    """With a write-ahead log it would need another file beside it."""
    backup(url, tmp_path / "saved", overwrite=False)
    with closing(sqlite3.connect(tmp_path / "saved")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_a_backup_of_nothing_is_refused_and_makes_no_database(tmp_path: Path) -> None:
    with pytest.raises(LockstepError, match="there is no database"):
        backup(f"sqlite:///{tmp_path / 'none.db'}", tmp_path / "saved", overwrite=False)
    assert os.listdir(tmp_path) == []


def test_a_damaged_database_makes_no_backup(store: Store, url: str, tmp_path: Path) -> None:
    for number in range(1, 200):
        store.insert(row(number), ACCEPTED, None)
    store._engine.dispose()
    database = tmp_path / "lockstep.db"
    with open(database, "r+b") as file:
        file.seek(database.stat().st_size // 2)
        file.write(b"\xff" * 8192)
    with pytest.raises(BackupError, match="damaged"):
        backup(url, tmp_path / "saved", overwrite=False)
    assert "saved" not in files(tmp_path)
    assert not [name for name in files(tmp_path) if name.startswith(".saved")]


@pytest.mark.parametrize("tool", [backup, lambda url, file, _: put_back(url, file)])
def test_postgresql_is_sent_to_its_own_tools(tmp_path: Path, tool: object) -> None:
    with pytest.raises(BackupError, match="pg_dump and pg_restore"):
        tool("postgresql+psycopg://host/name", tmp_path / "saved", False)  # type: ignore[operator]


def test_a_release_that_was_taken_back_saves_the_schema_of_the_newer_one(
    store: Store, url: str, tmp_path: Path
) -> None:
    with store._writer.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    assert backup(url, tmp_path / "saved", overwrite=False) == Contents("9999", 0)


def test_a_restore_puts_the_backup_in_place_and_keeps_what_was_there(store: Store, url: str, tmp_path: Path) -> None:
    store.insert(row(1), ACCEPTED, None)
    backup(url, tmp_path / "saved", overwrite=False)
    store.insert(row(2), ACCEPTED, None)
    store._engine.dispose()
    aside = put_back(url, tmp_path / "saved")
    assert aside == tmp_path / "lockstep.db.before-restore-20261128T093005Z"
    assert jobs_of(tmp_path / "lockstep.db") == [row(1)]
    assert jobs_of(aside) == [row(1), row(2)], "with what was only in its log"
    assert jobs_of(tmp_path / "saved") == [row(1)]
    assert stat.S_IMODE((tmp_path / "lockstep.db").stat().st_mode) == 0o600
    assert files(tmp_path) == {"lockstep.db", aside.name, "saved"}


def test_a_restore_where_nothing_is_left_needs_nothing(store: Store, url: str, tmp_path: Path) -> None:
    store.insert(row(1), ACCEPTED, None)
    backup(url, tmp_path / "saved", overwrite=False)
    assert put_back(f"sqlite:///{tmp_path / 'other.db'}", tmp_path / "saved") is None
    assert jobs_of(tmp_path / "other.db") == [row(1)]


def test_a_database_that_is_damaged_is_kept_aside_as_it_is(store: Store, url: str, tmp_path: Path) -> None:
    backup(url, tmp_path / "saved", overwrite=False)
    store._engine.dispose()
    (tmp_path / "lockstep.db").write_bytes(b"no database at all " * 1000)
    (tmp_path / "lockstep.db-wal").write_bytes(b"its log")
    aside = put_back(url, tmp_path / "saved")
    assert aside is not None
    assert Path(f"{aside}-wal").read_bytes() == b"its log"
    assert aside.read_bytes() == b"no database at all " * 1000
    assert check(tmp_path / "lockstep.db") == Contents(HEAD, 0)


@pytest.mark.parametrize("how", ["lock", "connection", "bucket"])
def test_a_restore_that_is_refused_leaves_all_as_it_was(store: Store, url: str, tmp_path: Path, how: str) -> None:
    """A control plane serves, something else has the database open, or the bucket does not answer."""
    store.insert(row(1), ACCEPTED, None)
    backup(url, tmp_path / "saved", overwrite=False)
    store.insert(row(2), ACCEPTED, None)
    bucket = MemoryBucket()
    if how == "lock":
        store._engine.dispose()
        with serving(url), pytest.raises(DatabaseInUse, match="in use by a control plane; stop that first"):
            put_back(url, tmp_path / "saved")
    elif how == "connection":
        with pytest.raises(DatabaseInUse, match="stop whatever has it open"):
            put_back(url, tmp_path / "saved")
    else:
        store._engine.dispose()
        bucket.reachable = False
        with pytest.raises(Exception, match="did not answer"):
            restore(url, tmp_path / "saved", bucket, AT, lambda line: None)
    assert jobs_of(tmp_path / "lockstep.db") == [row(1), row(2)]
    assert not [name for name in files(tmp_path) if name.startswith(".") or "before-restore" in name]


def test_an_older_backup_comes_back_with_the_newest_schema(url: str, tmp_path: Path) -> None:
    old = tmp_path / "old"
    migrate(f"sqlite:///{old}", "0001")
    assert check(old).revision == "0001"
    put_back(url, old)
    assert check(tmp_path / "lockstep.db").revision == HEAD
    assert check(old).revision == "0001", "the backup itself stays as it is"


@pytest.mark.parametrize(
    ("what", "words"),
    [("missing", "there is no file"), ("text", "not a database of ours"), ("empty", "not a database of ours"),
     ("foreign", "not a database of ours"), ("newer", "of schema 9999, which this version does not know"),
     ("cut", "damaged")],
)  # fmt: skip
def test_what_is_no_backup_of_ours_is_refused(store: Store, url: str, tmp_path: Path, what: str, words: str) -> None:
    file = tmp_path / "saved"
    for number in range(1, 100):
        store.insert(row(number), ACCEPTED, None)
    if what in ("newer", "cut"):
        backup(url, file, overwrite=False)
    store._engine.dispose()
    if what == "text":
        file.write_text("hello")
    elif what == "empty":
        file.touch()
    elif what in ("foreign", "newer"):
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS alembic_version (version_num)")
            connection.execute("UPDATE alembic_version SET version_num = '9999'")
            connection.commit()
    elif what == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(BackupError, match=words):
        put_back(url, file)
    assert len(jobs_of(tmp_path / "lockstep.db")) == 99


def test_an_embedded_database_has_one_control_plane_and_who_rebuilds_it_is_alone(url: str) -> None:
    with serving(url):
        with pytest.raises(DatabaseInUse, match="has a control plane already"), serving(url):
            pass
        with pytest.raises(DatabaseInUse), alone(url):
            pass
    with alone(url):
        with pytest.raises(DatabaseInUse, match="just being restored or rebuilt"), serving(url):
            pass
        with pytest.raises(DatabaseInUse), alone(url):
            pass
    with alone(url), alone("sqlite://"), serving("sqlite://"):
        pass


def test_the_jobs_that_went_on_since_the_backup_are_as_the_bucket_says(store: Store, url: str, tmp_path: Path) -> None:
    """What else a restore does with a bucket stands in test_rebuild.py and test_lost_databases.py."""
    store.insert(row(1, state="running", attempt=1, ray_session="s"), ACCEPTED, None)
    store.insert(row(2, state="running", attempt=1, ray_session="s"), ACCEPTED, None)
    backup(url, tmp_path / "saved", overwrite=False)
    store._engine.dispose()
    bucket = MemoryBucket()
    bucket.put(f"default/jobs/{job_id(2)}/job.json", b"{")
    _, outcome = restore(url, tmp_path / "saved", bucket, AT, lambda line: None)
    assert outcome is not None
    assert (outcome.gone, list(outcome.damaged)) == ([job_id(1)], [job_id(2)])
    assert [job.state for job in jobs_of(tmp_path / "lockstep.db")] == ["cancelled", "running"]
