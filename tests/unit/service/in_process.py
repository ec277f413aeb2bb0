"""The application in this process, on a bucket and a Ray in memory, for the tests of the API."""

import re
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from api.layout import DatasetLayout
from api.tenants import KeyRequest, Role
from service import app as app_module
from service.auth import create_key
from service.store import Store
from service.tenants import Tenants
from tests.fakes import ACCEPTED, FakeRay, MemoryBucket, dataset, job_id, new_store, row, settings_for

KEY = "lk_test"
AUTH = {"Authorization": f"Bearer {KEY}"}
BODY: dict[str, Any] = {"name": "first", "data": {"dataset": "words"}, "model": {"size": "1m"}, "steps": 10}


class Service:
    """The application; no lifespan, so no reconciler runs."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.bucket, self.ray = folder, MemoryBucket(), FakeRay()
        patch.setattr(app_module, "Bucket", lambda *_: self.bucket)
        patch.setattr(app_module, "RayBackend", lambda *_: self.ray.backend())
        new_store(folder)._engine.dispose()
        self.app: FastAPI = app_module.create_app(settings_for(folder))
        self.store: Store = self.app.state.store
        self.tenants: Tenants = self.app.state.tenants
        create_key(self.tenants, KeyRequest(name="test", role=Role.ADMIN), key=KEY)
        self.bucket.put_document(DatasetLayout("default", "words", "v1").document, dataset())
        self.client = TestClient(self.app, headers=AUTH, raise_server_exceptions=False)

    def post(self, body: Any, key: str | None = None, query: str = "") -> httpx2.Response:
        headers = {"Idempotency-Key": key} if key else {}
        return self.client.post(f"/v1/jobs{query}", json=body, headers=headers)

    def ask(self, number: int, what: str, body: Any = None, key: str | None = None) -> httpx2.Response:
        """Post what a user wants of a job."""
        headers = {"Idempotency-Key": key} if key else {}
        return self.client.post(f"/v1/jobs/{job_id(number)}/{what}", json=body, headers=headers)

    def ended(self, number: int = 1) -> str:
        self.store.insert(row(number, state="failed"), ACCEPTED, None)
        return job_id(number)


def problem(response: httpx2.Response, status: int, name: str) -> dict[str, Any]:
    """Check that an answer is a problem in our shape, in one sentence, and return it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert set(body) == {"type", "title", "status", "detail", "request_id", "errors"}
    assert (body["type"], body["status"]) == (f"urn:lockstep:problem:{name}", status)
    assert re.fullmatch(r"[0-9a-f]{16}", body["request_id"])
    assert response.headers.get_list("x-request-id") == [body["request_id"]]
    for sentence in (body["detail"], *(fault["message"] for fault in body["errors"])):
        assert 10 < len(sentence) < 400
        assert "\n" not in sentence
        assert not re.search(r"Traceback|pydantic|\.py\b|function-|Error\(", sentence)
    return body
