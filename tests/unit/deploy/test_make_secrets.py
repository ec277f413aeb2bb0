"""The script that makes the secrets of the compose file."""

import stat
from pathlib import Path

from sqlalchemy import make_url

from service.auth import authenticate, ensure_key
from service.stack import read_credentials
from service.tenants import Tenants
from tests.fakes import new_store
from tests.images import make_secrets


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_only_the_owner_gets_into_the_folder_and_containers_can_read_what_they_are_given(tmp_path: Path) -> None:
    folder = make_secrets(tmp_path / "secrets")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o444}


def test_what_is_there_stays_and_what_is_missing_is_made(tmp_path: Path) -> None:
    folder = make_secrets(tmp_path / "secrets")
    before = texts(folder)
    (folder / "ray_token").unlink()
    after = texts(make_secrets(folder))
    assert after.keys() == before.keys()
    assert after.pop("ray_token") != before.pop("ray_token")
    assert after == before


def test_two_folders_have_nothing_in_common(tmp_path: Path) -> None:
    one, two = (texts(make_secrets(tmp_path / name)) for name in ("one", "two"))
    assert not set(one.values()) & set(two.values())
    assert min(len(text.strip()) for text in one.values()) >= 32


def test_both_ends_of_a_secret_agree(tmp_path: Path) -> None:
    folder = make_secrets(tmp_path / "secrets")
    access, secret = read_credentials(folder / "s3_credentials")
    assert (folder / "s3_auth_key").read_text() == f'"{access},{secret}"\n'
    assert len(access) >= 8, "the store refuses short ones"
    url = make_url((folder / "database_url").read_text().strip())
    assert url.password == (folder / "postgres_password").read_text().strip()
    assert (url.drivername, url.host, url.username, url.database) == ("postgresql", "postgres", "lockstep", "lockstep")


def test_the_api_key_opens_the_api(tmp_path: Path) -> None:
    tenants = Tenants(new_store(tmp_path)._engine)
    key = make_secrets(tmp_path / "secrets") / "api_key"
    ensure_key(tenants, key)
    assert authenticate(tenants, f"Bearer {key.read_text().strip()}")
