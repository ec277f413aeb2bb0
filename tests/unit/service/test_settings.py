"""The database's URL may lie in a file, so that its password is in no environment."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import Settings, WrongSettings, read_settings


@pytest.fixture(autouse=True)
def storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_STORAGE", "s3://bucket")


def test_the_database_url_is_read_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "url").write_text("postgresql://user:secret@host/db\n")
    monkeypatch.setenv("LOCKSTEP_DATABASE_URL_PATH", str(tmp_path / "url"))
    assert Settings().database_url == "postgresql://user:secret@host/db"


def test_two_database_urls_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "url").write_text("postgresql://one")
    monkeypatch.setenv("LOCKSTEP_DATABASE_URL_PATH", str(tmp_path / "url"))
    monkeypatch.setenv("LOCKSTEP_DATABASE_URL", "postgresql://two")
    with pytest.raises(ValidationError, match="LOCKSTEP_DATABASE_URL or LOCKSTEP_DATABASE_URL_PATH, not both"):
        Settings()


def test_what_is_refused_is_not_repeated_for_it_may_hold_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_STORAGE", "https://user:secret@host")
    with pytest.raises(ValidationError, match="LOCKSTEP_STORAGE") as raised:
        Settings()
    assert "secret" not in str(raised.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_DATABASE_URL_PATH", str(tmp_path / "none"))
    with pytest.raises(ValidationError, match=f"LOCKSTEP_DATABASE_URL_PATH .*{tmp_path / 'none'}"):
        Settings()


def test_a_file_that_is_no_text_is_told_and_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "url").write_bytes(b"\xff\xfe")
    monkeypatch.setenv("LOCKSTEP_DATABASE_URL_PATH", str(tmp_path / "url"))
    with pytest.raises(WrongSettings, match=r"^LOCKSTEP_DATABASE_URL_PATH names a file that cannot be read: 'utf-8'"):
        read_settings()
