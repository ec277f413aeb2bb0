"""A probe does not wait for what hangs and tells no details, and a revoked key is not brought back."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi import Response

from api.errors import LockstepError, StorageError, Unauthorized
from api.tenants import Role
from service import health
from service.app import create_app
from service.audit import OPERATOR
from service.auth import authenticate, ensure_key
from service.health import Dependencies
from service.rows import StoredKey
from service.tenants import Tenants
from tests.fakes import settings_for
from tests.lines import Lines
from tests.unit.service.in_process import Service


def ready(every: Dependencies) -> tuple[int, dict[str, str]]:
    """Ask /readyz; return the status, and what it says of each."""
    response = Response()
    seen = asyncio.run(health.readyz(response, every))
    return response.status_code, {name: check.status for name, check in seen.checks.items()}


def test_what_hangs_is_degraded_within_the_patience_and_looked_at_once(
    monkeypatch: pytest.MonkeyPatch, lines: Lines
) -> None:
    release, begun = threading.Event(), []

    def hang() -> None:
        begun.append(threading.current_thread())
        release.wait()

    monkeypatch.setattr(health, "_PATIENCE", 0.05)
    monkeypatch.setattr(health, "_FRESH", 0.0)
    every = Dependencies({"database": lambda: None, "bucket": hang, "ray": hang})
    try:
        for _ in range(3):
            assert ready(every) == (200, {"database": "ok", "bucket": "degraded", "ray": "degraded"})
        assert every.seen()["bucket"].trouble == "no answer within 0.05 s"
        assert len(begun) == 2
        monkeypatch.setattr(health, "_STUCK", 0.0)
        every = Dependencies({"database": hang})
        assert [ready(every)[0] for _ in range(2)] == [503, 503]
        assert len(begun) == 4, "what is stuck keeps no other look away for ever"
    finally:
        release.set()
    assert [line["message"] for line in lines.objects] == [
        f"{name} is degraded: no answer within 0.05 s" for name in ("bucket", "ray", "database")
    ]


def test_those_who_ask_within_a_second_share_a_look() -> None:
    clock, looks = [100.0], []
    every = Dependencies({"database": lambda: looks.append("database"), "ray": lambda: None}, clock=lambda: clock[0])
    for _ in range(3):
        assert ready(every)[0] == 200
        every.seen()
    assert len(looks) == 1
    clock[0] += 0.9
    every.seen()
    assert len(looks) == 1
    clock[0] += 0.1
    every.seen()
    assert len(looks) == 2


def test_a_stranger_is_told_no_details_and_the_log_is_told_them_once(
    service: Service, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise StorageError("no answer from https://ada@bucket.example")

    monkeypatch.setattr(health, "_FRESH", 0.0)
    check: list[Callable[[], object]] = [fail]
    service.app.state.dependencies = Dependencies({"database": lambda: check[0](), "ray": lambda: None})
    for _ in range(3):
        answer = service.client.get("/readyz", headers={"Authorization": ""})
        assert answer.status_code == 503
        assert answer.json() == {"ready": False, "checks": {"database": {"status": "failed"}, "ray": {"status": "ok"}}}
    check[0] = list
    assert service.client.get("/readyz").json()["ready"]
    assert [line["message"] for line in lines.objects if line["message"] != "answered"] == [
        "database is degraded: no answer from https://ada@bucket.example",
        "database answers again",
    ]


BOOTSTRAP = "lk_just_16_chars"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "api_key"
    path.write_text(f"{BOOTSTRAP}\n")
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
    who = authenticate(service.tenants, f"Bearer {BOOTSTRAP}")
    assert (who.project, who.role, who.operator) == ("default", Role.ADMIN, True)
    service.tenants.archive("default", True, OPERATOR)
    start(service, key_file)
    assert f"the bootstrap key in {key_file} is of project default, which is archived" in lines.written[-1]
    service.tenants.revoke_key(who.key_id, OPERATOR)
    start(service, key_file)
    assert f"the bootstrap key in {key_file} was revoked, so it opens nothing" in lines.written[-1]
    with pytest.raises(Unauthorized):
        authenticate(service.tenants, f"Bearer {BOOTSTRAP}")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (" \n", "is empty; put an API key into it"),
        (None, "cannot be read"),
        (f"{'x' * 15}\n", "has 15 characters and could be guessed; put one of 16 or more into it"),
    ],
)
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
    assert authenticate(service.tenants, f"Bearer {BOOTSTRAP}").operator
