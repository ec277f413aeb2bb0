"""Who may do what: each route says the role that it needs, a key has one, and its member bounds it."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.errors import Unauthorized
from api.tenants import KeyRequest, NewApiKey, Role
from service import auth
from service.app import make_api
from service.audit import OPERATOR
from service.auth import authenticate, create_key
from service.keyed import keyed_router
from service.tenants import Tenants
from tests.fakes import ACCEPTED, job_id, new_store, row
from tests.unit.service.in_process import BODY, Service, problem

PATHS = make_api(0).openapi()["paths"]
NEEDED = {
    (method.upper(), path): Role(operation["x-role"])
    for path, methods in PATHS.items()
    for method, operation in methods.items()
    if path.startswith("/v1/")
}
ADMINS_READ = {("GET", f"/v1/project/{what}") for what in ("keys", "members", "audit")}


def client(service: Service, role: Role) -> TestClient:
    made = create_key(service.tenants, KeyRequest(name="k", role=role))
    return TestClient(service.app, headers={"Authorization": f"Bearer {made.key}"}, raise_server_exceptions=False)


def test_a_viewer_changes_nothing_and_an_admin_alone_sees_keys() -> None:
    for (method, path), needed in NEEDED.items():
        if (method, path) in ADMINS_READ or (path.startswith("/v1/project") and method != "GET"):
            assert needed is Role.ADMIN
        else:
            assert needed is (Role.VIEWER if method == "GET" else Role.SUBMITTER)


@pytest.mark.parametrize("role", Role)
def test_a_route_is_open_to_the_roles_from_the_one_that_it_needs(service: Service, role: Role) -> None:
    service.store.insert(row(1), ACCEPTED, None)
    asks = client(service, role)
    names = {"job_id": job_id(1), "step": 5, "name": "config.json", "key_id": "key-000000000000", "member": "ada"}
    for (method, path), needed in NEEDED.items():
        before = service.store.get(job_id(1), "default")
        answer = asks.request(method, path.format(**names), json=BODY if method == "POST" else None)
        if role.covers(needed):
            assert answer.status_code not in (401, 403, 500)
        else:
            refused = problem(answer, 403, "forbidden")
            assert f"the role {role}; this needs the role {needed}" in refused["detail"]
            assert service.store.get(job_id(1), "default") == before


def test_the_role_comes_before_the_body(service: Service) -> None:
    broken = client(service, Role.VIEWER).post("/v1/jobs", content=b"{", headers={"Content-Type": "application/json"})
    problem(broken, 403, "forbidden")


def test_a_route_that_says_no_role_does_not_start() -> None:
    router = keyed_router()
    with pytest.raises(TypeError, match="/v1/new says no role"):
        router.get("/new")(lambda: None)


@pytest.fixture
def tenants(tmp_path: Path) -> Iterator[Tenants]:
    store = new_store(tmp_path)
    yield Tenants(store._engine)
    store._engine.dispose()


def make(tenants: Tenants, role: Role = Role.ADMIN, **fields: Any) -> NewApiKey:
    return create_key(tenants, KeyRequest(name="k", role=role, **fields))


def opens(tenants: Tenants, made: NewApiKey) -> Role:
    return authenticate(tenants, f"Bearer {made.key}").role


@pytest.mark.parametrize("keys", Role)
@pytest.mark.parametrize("members", Role)
def test_a_key_never_may_more_than_its_member(tenants: Tenants, keys: Role, members: Role) -> None:
    tenants.put_member("default", "ada", Role.ADMIN, OPERATOR)
    made = make(tenants, keys, member="ada")
    assert opens(tenants, made) is keys
    tenants.put_member("default", "ada", members, OPERATOR)
    now = opens(tenants, made)
    assert keys.covers(now)
    assert members.covers(now)
    assert now in (keys, members)


def test_who_left_and_comes_back_needs_a_new_key(tenants: Tenants) -> None:
    tenants.put_member("default", "ada", Role.ADMIN, OPERATOR)
    made = make(tenants, member="ada")
    tenants.remove_member("default", "ada", OPERATOR)
    tenants.put_member("default", "ada", Role.ADMIN, OPERATOR)
    with pytest.raises(Unauthorized, match="was revoked"):
        opens(tenants, made)


def archive(tenants: Tenants, _: NewApiKey) -> None:
    tenants.archive("default", True, OPERATOR)


def revoke(tenants: Tenants, made: NewApiKey) -> None:
    tenants.revoke_key(made.id, OPERATOR)


@pytest.mark.parametrize(("end", "why"), [(archive, "archived"), (revoke, "revoked")])
def test_a_key_that_was_ended_says_so(tenants: Tenants, end: Callable[[Tenants, NewApiKey], None], why: str) -> None:
    made = make(tenants)
    end(tenants, made)
    with pytest.raises(Unauthorized, match=why):
        opens(tenants, made)


def test_a_key_expires_to_the_second(tenants: Tenants, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tenants, expires_in=3600)
    assert made.expires_at is not None
    at = made.expires_at - timedelta(seconds=1)
    monkeypatch.setattr(auth, "now", lambda: at)
    assert opens(tenants, made) is Role.ADMIN
    at = made.expires_at
    with pytest.raises(Unauthorized, match="expired at"):
        opens(tenants, made)


def test_the_last_use_is_noted_at_most_once_a_minute(tenants: Tenants, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tenants)
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    seen = []
    for seconds in (0, 59, 60, 61, 119, 120):
        monkeypatch.setattr(auth, "now", lambda s=seconds: begin + timedelta(seconds=s))
        opens(tenants, made)
        [(_, key)] = tenants.keys()
        assert key.last_used_at is not None
        seen.append((key.last_used_at - begin).seconds)
    assert seen == [0, 0, 60, 60, 60, 120]


def test_a_key_shows_how_it_begins_and_old_ones_go_on(tenants: Tenants) -> None:
    made = make(tenants)
    mark, prefix, secret = made.key.split("_", 2)
    assert (mark, made.prefix, len(prefix)) == ("lk", f"lk_{prefix}", 8)
    assert len(secret) >= 43
    create_key(tenants, KeyRequest(name="old"), key="lk_" + "x" * 43)
    assert authenticate(tenants, "Bearer lk_" + "x" * 43).project == "default"
