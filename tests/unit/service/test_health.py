"""A probe does not wait for what hangs, and a revoked key is not brought back."""

import threading
from pathlib import Path

import pytest
from fastapi import Response

from api.errors import LockstepError, Unauthorized
from api.tenants import Role
from service import health
from service.app import create_app
from service.audit import OPERATOR
from service.auth import authenticate, ensure_key
from service.rows import StoredKey
from service.tenants import Tenants
from tests.fakes import settings_for
from tests.lines import Lines
from tests.unit.service.in_process import Service


def test_a_bucket_that_hangs_is_degraded_within_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(health, "_PATIENCE", 0.05)
    response = Response()
    try:
        seen = health.readyz(response, {"database": lambda: None, "bucket": release.wait, "ray": lambda: None})
    finally:
        release.set()
    assert (seen.ready, response.status_code) == (True, 200)
    assert {name: check.status for name, check in seen.checks.items()} == {
        "database": "ok",
        "bucket": "degraded",
        "ray": "ok",
    }


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "api_key"
    path.write_text("lk_secret\n")
    return path


def start(service: Service, key_file: Path) -> None:
    """Start one more control plane on the same database."""
    app = create_app(settings_for(service.folder, bootstrap_key_path=key_file))
    app.state.store._engine.dispose()


@pytest.mark.database
def test_a_bootstrap_key_that_was_ended_stays_ended_and_stops_nothing(
    service: Service, key_file: Path, lines: Lines
) -> None:
    ensure_key(service.tenants, key_file)
    ensure_key(service.tenants, key_file)  # again is harmless
    assert lines.written == []
    who = authenticate(service.tenants, "Bearer lk_secret")
    assert (who.project, who.role, who.operator) == ("default", Role.ADMIN, True)
    service.tenants.archive("default", True, OPERATOR)
    start(service, key_file)
    assert f"the bootstrap key in {key_file} is of project default, which is archived" in lines.written[-1]
    service.tenants.revoke_key(who.key_id, OPERATOR)
    start(service, key_file)
    assert f"the bootstrap key in {key_file} was revoked, so it opens nothing" in lines.written[-1]
    with pytest.raises(Unauthorized):
        authenticate(service.tenants, "Bearer lk_secret")


@pytest.mark.parametrize(("content", "says"), [(" \n", "is empty; put an API key into it"), (None, "cannot be read")])
def test_a_bootstrap_key_that_cannot_be_had_makes_no_other_one(
    service: Service, key_file: Path, content: str | None, says: str
) -> None:
    key_file.unlink() if content is None else key_file.write_text(content)
    with pytest.raises(LockstepError, match=says):
        ensure_key(service.tenants, key_file)
    assert [key.name for _, key in service.tenants.keys("default")] == ["test"]


@pytest.mark.database
def test_two_replicas_that_start_together_make_one_bootstrap_key(service: Service, key_file: Path) -> None:
    class Slow(Tenants):
        """Another replica makes the key after this one has looked for it."""

        asked = 0

        def find_key(self, sha256: str) -> StoredKey | None:
            found, self.asked = super().find_key(sha256), self.asked + 1
            if self.asked == 1:
                ensure_key(service.tenants, key_file)
            return found

    ensure_key(Slow(service.store._engine), key_file)
    made = service.tenants.keys("default")
    assert [key.name for _, key in made] == ["test", "bootstrap"]
    assert authenticate(service.tenants, "Bearer lk_secret").operator
