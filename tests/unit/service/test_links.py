"""An operator is told where to look on, nobody else is, and nobody where nothing is configured."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from api.jobs import Links
from api.tenants import KeyRequest, Role
from service.auth import Principal, create_key
from service.jobs import Jobs
from service.links import links
from service.settings import Settings
from tests.fakes import ACCEPTED, job_id, row, settings_for
from tests.unit.service.in_process import BODY, Service

RAY, GRAFANA = "https://ray.example", "http://example/grafana/"


OPERATOR = Principal("key-1", "default", Role.VIEWER, operator=True)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_for(tmp_path, ray_dashboard_url=RAY, grafana_url=GRAFANA)


def test_an_operator_is_shown_the_pages_of_the_present_attempt(settings: Settings) -> None:
    assert links(OPERATOR, row(1, attempt=2), settings) == Links(
        ray=f"https://ray.example/#/jobs/{job_id(1)}-2",
        grafana=f"http://example/grafana/d/lockstep-job?var-job={job_id(1)}",
    )


def test_before_the_first_attempt_ray_has_no_page(settings: Settings) -> None:
    found = links(OPERATOR, row(1), settings)
    assert found is not None
    assert found.ray is None
    assert found.grafana is not None


@pytest.mark.parametrize("role", Role)
def test_a_member_is_shown_none(settings: Settings, role: Role) -> None:
    assert links(Principal("key-1", "default", role), row(1, attempt=2), settings) is None


def test_without_addresses_there_are_none(tmp_path: Path) -> None:
    assert links(OPERATOR, row(1, attempt=2), settings_for(tmp_path)) is None


@pytest.mark.parametrize("address", ["ray.example", "javascript:alert(1)", "ftp://ray"])
def test_an_address_that_is_none_of_the_web_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(ValidationError, match="begins with http"):
        settings_for(tmp_path, grafana_url=address)


def test_every_answer_about_a_job_has_them(service: Service, settings: Settings) -> None:
    service.store.insert(row(1, attempt=1), ACCEPTED, None)
    jobs = Jobs(service.store, service.bucket, service.ray.backend(), settings)
    service.app.state.jobs = jobs
    assert service.client.get(f"/v1/jobs/{job_id(1)}").json()["links"] is None
    made = create_key(service.tenants, KeyRequest(name="operator"), operator=True)
    service.client.headers["Authorization"] = f"Bearer {made.key}"
    one, listed = service.client.get(f"/v1/jobs/{job_id(1)}").json(), service.client.get("/v1/jobs").json()
    assert one["links"]["ray"] == f"{RAY}/#/jobs/{job_id(1)}-1"
    assert listed["items"][0]["links"] == one["links"]
    new, again = service.post(BODY, "once").json(), service.post(BODY, "once").json()
    assert new["links"]["grafana"].endswith(new["id"])
    assert again["links"] == new["links"]


def test_no_key_that_a_tenant_makes_is_an_operators(service: Service) -> None:
    service.client.headers["Authorization"] = (
        f"Bearer {create_key(service.tenants, KeyRequest(name='o', role=Role.ADMIN), operator=True).key}"
    )
    refused = service.client.post("/v1/project/keys", json={"name": "k", "operator": True})
    assert refused.status_code == 422
    assert service.client.post("/v1/project/keys", json={"name": "k"}).json()["operator"] is False
    assert [key["operator"] for key in service.client.get("/v1/project/keys").json()["items"]] == [False, True, False]
