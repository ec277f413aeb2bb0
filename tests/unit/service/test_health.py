"""A probe does not wait for what hangs, and a revoked key is not brought back."""

import threading
from pathlib import Path

import pytest
from fastapi import Response

from api.errors import Unauthorized
from service import health
from service.audit import OPERATOR
from service.auth import KeyRevoked, authenticate, ensure_key
from service.tenants import Tenants
from tests.fakes import new_store


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


def test_a_revoked_bootstrap_key_is_refused_in_words(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    tenants = Tenants(store._engine)
    path = tmp_path / "api_key"
    path.write_text("lk_secret\n")
    ensure_key(tenants, path)
    ensure_key(tenants, path)  # again is harmless
    ((_, row),) = tenants.keys()
    tenants.revoke_key(row.id, OPERATOR)
    with pytest.raises(KeyRevoked, match="delete the file"):
        ensure_key(tenants, path)
    with pytest.raises(Unauthorized):
        authenticate(tenants, "Bearer lk_secret")
    store._engine.dispose()
