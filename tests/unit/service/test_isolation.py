"""Two projects in one control plane: whatever route one tenant takes to what is the other's, there is nothing there."""

from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient

from api.layout import DatasetLayout
from api.tenants import KeyRequest, NewApiKey, Role
from service.app import make_api
from service.audit import OPERATOR
from service.auth import create_key
from tests.fakes import ACCEPTED, dataset, job_id, row
from tests.unit.service.in_process import BODY, Service, problem

pytestmark = pytest.mark.database

THEIRS, ENDED, NOWHERE = job_id(1), job_id(2), job_id(9)
"""Jobs of the project `default`, a live one and one that ended, and an id that nobody has."""
STREAM = {"Accept": "text/event-stream"}
Case = dict[str, Any]

#: Every route that names something, with what is sent along. A new one without a line here fails the walk below.
NAMED: dict[tuple[str, str], list[Case]] = {
    ("GET", "/v1/jobs/{job_id}"): [{}],
    ("DELETE", "/v1/jobs/{job_id}"): [{}],
    ("POST", "/v1/jobs/{job_id}/cancel"): [{}, {"json": {"keep_checkpoint": True}}],
    ("POST", "/v1/jobs/{job_id}/pause"): [{}],
    ("POST", "/v1/jobs/{job_id}/resume"): [{}, {"json": {"workers": 2}}],
    ("POST", "/v1/jobs/{job_id}/retry"): [{}],
    ("GET", "/v1/jobs/{job_id}/events"): [{}, {"headers": STREAM}],
    ("GET", "/v1/jobs/{job_id}/metrics"): [{}, {"headers": STREAM}],
    ("GET", "/v1/jobs/{job_id}/logs"): [{}, {"headers": STREAM}],
    ("GET", "/v1/jobs/{job_id}/checkpoints"): [{}],
    ("DELETE", "/v1/jobs/{job_id}/checkpoints/{step}"): [{}],
    ("GET", "/v1/jobs/{job_id}/checkpoints/{step}/files/{name}"): [{}],
    ("GET", "/v1/jobs/{job_id}/verification"): [{}, {"params": {"step": 5}}],
    ("DELETE", "/v1/project/keys/{key_id}"): [{}],
    ("DELETE", "/v1/project/members/{member}"): [{}],
}
#: Routes that name nothing: what they hold is the caller's own. Each has a test of its own below.
UNNAMED = {
    ("GET", "/v1/jobs"),
    ("POST", "/v1/jobs"),
    ("GET", "/v1/queue"),
    ("GET", "/v1/project"),
    ("GET", "/v1/project/keys"),
    ("POST", "/v1/project/keys"),
    ("GET", "/v1/project/members"),
    ("PUT", "/v1/project/members/{member}"),
    ("GET", "/v1/project/audit"),
}


class Two:
    """The project `default` with jobs, a dataset, a member; and the client of an admin of another project."""

    def __init__(self, service: Service) -> None:
        self.service, self.owner = service, service.client
        service.store.insert(row(1, state="running", attempt=1), ACCEPTED, None)
        service.store.insert(row(2, state="failed"), ACCEPTED, None)
        service.store.insert(row(3), ACCEPTED, None)
        service.tenants.put_member("default", "ada", Role.SUBMITTER, OPERATOR)
        service.tenants.create_project("other", OPERATOR)
        self.key = self.make_key("other")
        self.stranger = self.client(self.key)

    def make_key(self, project: str) -> NewApiKey:
        return create_key(self.service.tenants, KeyRequest(name="k", role=Role.ADMIN), project)

    def client(self, key: NewApiKey) -> TestClient:
        headers = {"Authorization": f"Bearer {key.key}"}
        return TestClient(self.service.app, headers=headers, raise_server_exceptions=False)


@pytest.fixture
def two(service: Service) -> Two:
    return Two(service)


def test_every_route_is_walked() -> None:
    paths = make_api(0).openapi()["paths"]
    every = {(method.upper(), path) for path, methods in paths.items() for method in methods if path.startswith("/v1")}
    assert every == set(NAMED) | UNNAMED


def ask(client: TestClient, route: tuple[str, str], case: Case, names: dict[str, str]) -> httpx2.Response:
    method, path = route
    return client.request(method, path.format(step=5, name="config.json", **names), **case)


def without_names(answer: httpx2.Response, names: dict[str, str]) -> dict[str, Any]:
    """Return an answer's body without what differs from request to request: ids."""
    body: dict[str, Any] = answer.json()
    body.pop("request_id")
    for name in names.values():
        body["detail"] = body["detail"].replace(name, "…")
    return body


@pytest.mark.parametrize("route", NAMED, ids=" ".join)
def test_what_is_anothers_is_answered_like_what_does_not_exist(two: Two, route: tuple[str, str]) -> None:
    [(_, key)] = two.service.tenants.keys("default")
    theirs = {"job_id": ENDED if route[0] == "DELETE" or "retry" in route[1] else THEIRS}
    theirs |= {"key_id": key.id, "member": "ada"}
    nowhere = {"job_id": NOWHERE, "key_id": "key-000000000000", "member": "nobody"}
    for case in NAMED[route]:
        before = [two.service.store.get(job, "default") for job in (THEIRS, ENDED)]
        answer = ask(two.stranger, route, case, theirs)
        problem(answer, 404, "not-found")
        assert without_names(answer, theirs) == without_names(ask(two.stranger, route, case, nowhere), nowhere)
        assert [two.service.store.get(job, "default") for job in (THEIRS, ENDED)] == before
    own = ask(two.owner, route, NAMED[route][0], theirs)
    assert own.status_code != 404 or without_names(own, theirs) != without_names(answer, theirs), "a case of nothing"


def test_lists_hold_nothing_of_another_project(two: Two) -> None:
    for path in ("/v1/jobs", "/v1/jobs?state=running", "/v1/queue", "/v1/project/members"):
        assert two.owner.get(path).json()["items"] != []
        assert two.stranger.get(path).json()["items"] == []
    [own] = two.stranger.get("/v1/project/keys").json()["items"]
    assert own["id"] == two.key.id
    assert two.stranger.get("/v1/project").json()["name"] == "other"
    actions = [entry["action"] for entry in two.stranger.get("/v1/project/audit").json()["items"]]
    assert actions == ["key.create", "project.create"]


def test_a_member_of_the_same_name_is_another_one(two: Two) -> None:
    assert two.stranger.put("/v1/project/members/ada", json={"role": "admin"}).json()["role"] == "admin"
    [ada] = two.service.tenants.members("default")
    assert ada.role is Role.SUBMITTER
    theirs = create_key(two.service.tenants, KeyRequest(name="k", role=Role.ADMIN, member="ada"))
    assert two.client(theirs).get("/v1/project").json()["role"] == "submitter"
    assert two.stranger.delete("/v1/project/members/ada").status_code == 204
    assert two.client(theirs).get("/v1/project").json()["role"] == "submitter"


def test_a_new_key_opens_the_project_of_the_one_that_made_it(two: Two) -> None:
    made = two.stranger.post("/v1/project/keys", json={"name": "new", "role": "admin"})
    assert two.client(NewApiKey(**made.json())).get("/v1/project").json()["name"] == "other"


def test_a_dataset_of_another_project_is_not_found(two: Two) -> None:
    assert two.owner.post("/v1/jobs", json=BODY).status_code == 201
    refused = problem(two.stranger.post("/v1/jobs", json=BODY), 422, "invalid")
    assert refused["errors"][0]["path"] == "$.data.dataset"
    nowhere = {**BODY, "data": {"dataset": "nowords"}}
    assert two.stranger.post("/v1/jobs", json=nowhere).json()["detail"].replace("nowords", "words") == refused["detail"]


def test_no_job_begins_at_a_checkpoint_of_another_project(two: Two) -> None:
    two.service.bucket.put_document(DatasetLayout("other", "words", "v1").document, dataset())
    for query in ("", "?dry_run=true"):
        details = []
        for source in (ENDED, NOWHERE):
            answer = two.stranger.post(f"/v1/jobs{query}", json={**BODY, "init": {"from_job": source}})
            refused = problem(answer, 422, "invalid")
            assert refused["errors"][0]["path"] == "$.init.from_job"
            details.append(refused["detail"].replace(source, "…"))
        assert details[0] == details[1]


def test_an_idempotency_key_means_nothing_in_another_project(two: Two) -> None:
    two.service.bucket.put_document(DatasetLayout("other", "words", "v1").document, dataset())
    keyed = {"Idempotency-Key": "nightly"}
    mine, theirs = (client.post("/v1/jobs", json=BODY, headers=keyed) for client in (two.stranger, two.owner))
    assert (mine.status_code, theirs.status_code) == (201, 201)
    assert mine.json()["id"] != theirs.json()["id"]
    assert (mine.json()["project"], theirs.json()["project"]) == ("other", "default")


def test_each_project_writes_below_its_own_name(two: Two) -> None:
    two.service.bucket.put_document(DatasetLayout("other", "words", "v1").document, dataset())
    plan = two.stranger.post("/v1/jobs?dry_run=true", json=BODY).json()
    assert "other" in str(plan["submission"])
    assert "default" not in str(plan["submission"])
