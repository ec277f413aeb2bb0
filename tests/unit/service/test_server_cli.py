"""`lockstep-server` where it is set up wrongly: one sentence, no traceback, and no database that nobody wanted."""

import logging
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service import up as up_module
from service.cli import app

Run = Callable[..., str]


@contextmanager
def own_log() -> Iterator[None]:
    """Keep to itself where a control plane in this process sends its log."""
    root = logging.getLogger()
    handlers, root.handlers, level = root.handlers, [], root.level
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)


@pytest.fixture
def lockstep_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`lockstep-server` in a folder of its own, with a bucket and the default database: get what it prints."""
    for name in list(os.environ):
        if name.startswith("LOCKSTEP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LOCKSTEP_STORAGE", "s3://memory/root")
    monkeypatch.chdir(tmp_path)

    def run(words: str, code: int = 0) -> str:
        with own_log():
            result = CliRunner(env={"COLUMNS": "160", "FORCE_COLOR": None}).invoke(app, words.split())
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return result.output

    return run


EVERY = ("serve", "migrate", "backup to.db", "restore from.db", "rebuild", "keys list")


@pytest.mark.parametrize("command", EVERY)
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("LOCKSTEP_STORAGE", None, "set LOCKSTEP_STORAGE to s3://bucket/prefix"),
        ("LOCKSTEP_STORAGE", "/tmp/foo", "set LOCKSTEP_STORAGE to s3://bucket/prefix"),
        ("LOCKSTEP_DATABASE_URL", "foo", "set LOCKSTEP_DATABASE_URL to sqlite:///file or postgresql://user@host"),
        ("LOCKSTEP_DATABASE_URL", "mysql://u:canary@db/x", "set LOCKSTEP_DATABASE_URL to sqlite:///file or"),
        ("LOCKSTEP_DATABASE_URL", "postgresql://host:canary/x", "LOCKSTEP_DATABASE_URL is no URL; in its password"),
        ("LOCKSTEP_DATABASE_URL_PATH", "/nonexistent", "LOCKSTEP_DATABASE_URL_PATH names a file that cannot be read"),
        ("LOCKSTEP_PORT", "abc", "LOCKSTEP_PORT: input should be a valid integer"),
        ("LOCKSTEP_PORT", "99999", "LOCKSTEP_PORT: input should be less than or equal to 65535"),
        ("LOCKSTEP_METRICS_PORT", "8700", "LOCKSTEP_METRICS_PORT must be another port"),
        ("LOCKSTEP_ADDABLE_NODES", "{", "the settings cannot be read: error parsing value for field"),
    ],
)
def test_a_wrong_setting_is_one_sentence_and_nothing_is_made(
    lockstep_server: Run, monkeypatch: pytest.MonkeyPatch, command: str, name: str, value: str | None, says: str
) -> None:
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    output = lockstep_server(command, code=1)
    assert output.startswith(says)
    assert output.count("\n") == 1
    assert "canary" not in output
    assert os.listdir() == []


@pytest.mark.parametrize("command", ["serve", "migrate", "rebuild", "keys list"])
@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sqlite:////nonexistent/lockstep.db", "/nonexistent/lockstep.db"),
        ("sqlite:///text", "the database failed; see LOCKSTEP_DATABASE_URL: file is not a database"),
        ("postgresql://u:canary@/x?host=/nonexistent", "the database failed; see LOCKSTEP_DATABASE_URL: connection "),
    ],
)
def test_a_database_that_cannot_be_opened_is_one_sentence(
    lockstep_server: Run, monkeypatch: pytest.MonkeyPatch, command: str, url: str, says: str
) -> None:
    Path("text").write_text("no database at all " * 1000)
    monkeypatch.setenv("LOCKSTEP_DATABASE_URL", url)
    output = lockstep_server(command, code=1)
    assert says in output
    assert "LOCKSTEP_DATABASE_URL" in output
    assert output.count("\n") == 1
    assert "canary" not in output


@pytest.mark.parametrize(
    "command", ["keys create --name lost", "keys list", "projects list", "members list", "backup to.db"]
)
def test_who_works_on_a_database_makes_none_by_mistake(lockstep_server: Run, tmp_path: Path, command: str) -> None:
    output = lockstep_server(command, code=1)
    assert output.startswith(f"there is no database {tmp_path}/lockstep.db; set LOCKSTEP_DATABASE_URL to the one that")
    assert output.count("\n") == 1
    assert os.listdir() == []


def test_a_database_is_made_for_its_owner_only_and_its_schema_is_told(lockstep_server: Run, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        output = lockstep_server("migrate")
    finally:
        os.umask(before)
    assert output.startswith(f"{tmp_path}/lockstep.db has schema 00")
    assert stat.S_IMODE((tmp_path / "lockstep.db").stat().st_mode) == 0o600, "it holds hashes of keys"
    assert lockstep_server("migrate") == output


def test_a_role_that_there_is_not_is_told_in_our_words(lockstep_server: Run) -> None:
    output = lockstep_server("keys create --name k --role god", code=2)
    assert "'god' is not one of 'viewer'" in output
    assert "Value error" not in output


def test_the_clients_install_says_which_one_is_needed(lockstep_server: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "service.settings", raising=False)
    monkeypatch.setitem(sys.modules, "pydantic_settings", None)
    output = lockstep_server("migrate", code=1)
    assert "pydantic_settings is not installed: pip install '.[service]'" in output
    assert output.count("\n") == 1


@pytest.mark.parametrize("option", ["--port", "--dashboard-port", "--s3-port", "--metrics-port"])
def test_a_port_that_there_is_not_is_a_wrong_option(lockstep_server: Run, option: str) -> None:
    assert "should be less than or equal to 65535" in lockstep_server(f"up {option} 99999", code=2)


def test_up_says_that_another_database_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = up_module.other_database(tmp_path / ".lockstep", {"LOCKSTEP_DATABASE_URL": "postgresql://u:canary@db/x"})
    assert told is not None
    assert told.startswith(f"LOCKSTEP_DATABASE_URL is not used: `up` keeps its own database, {tmp_path}/.lockstep/lock")
    assert "canary" not in told
    told = up_module.other_database(tmp_path / ".lockstep", {"LOCKSTEP_DATABASE_URL_PATH": "/etc/url"})
    assert told is not None
    assert told.startswith("LOCKSTEP_DATABASE_URL_PATH is not used")
    for ours in ({}, {"LOCKSTEP_DATABASE_URL": "sqlite:///.lockstep/lockstep.db"}):
        assert up_module.other_database(tmp_path / ".lockstep", ours) is None
