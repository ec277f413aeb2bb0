"""Projects, members and keys over REST and by the operator's commands; and the log of who changed what."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from api.documents import now
from api.tenants import KeyRequest, Quotas, Role
from service.audit import OPERATOR
from service.auth import create_key
from service.cli import app
from service.database import make_engine
from service.tenants import Tenants
from tests.databases import database_url, make_database
from tests.fakes import ACCEPTED, job_id, row
from tests.unit.service.in_process import BODY, Service, problem

pytestmark = pytest.mark.database


def audit(service: Service) -> list[dict[str, Any]]:
    """Return the audit log of the default project, oldest first, since the client's own key was made."""
    entries: list[dict[str, Any]] = service.client.get("/v1/project/audit?limit=200").json()["items"]
    return entries[::-1][1:]


def test_each_change_is_one_row_that_says_who_what_and_in_which_request(service: Service) -> None:
    [(_, key)] = service.tenants.keys()
    made = service.post(BODY).json()["id"]
    service.client.post(f"/v1/jobs/{made}/pause")
    service.client.post(f"/v1/jobs/{made}/resume", json={"workers": 1})
    cancelled = service.client.post(f"/v1/jobs/{made}/cancel", json={"keep_checkpoint": True})
    service.client.post(f"/v1/jobs/{made}/cancel")  # again: nothing changes
    ended = service.ended(2)
    again = service.ask(2, "retry").json()["id"]
    service.client.delete(f"/v1/jobs/{ended}")
    log = audit(service)
    assert [(entry["action"], entry["target"], entry["details"]) for entry in log] == [
        ("job.submit", made, {"name": "first", "kind": "train"}),
        ("job.pause", made, {}),
        ("job.resume", made, {"workers": 1}),
        ("job.cancel", made, {"keep_checkpoint": True}),
        ("job.retry", again, {"name": "first", "kind": "train", "retry_of": ended}),
        ("job.delete", ended, {}),
    ]
    assert {(entry["actor"], entry["member"]) for entry in log} == {(key.id, None)}
    assert log[3]["request_id"] == cancelled.headers["x-request-id"]


def test_what_is_refused_or_asked_twice_is_no_change(service: Service) -> None:
    service.post({**BODY, "steps": 0})
    service.client.post("/v1/jobs?dry_run=true", json=BODY)
    service.client.delete(f"/v1/jobs/{job_id(5)}")
    assert audit(service) == []
    service.post(BODY, key="once")
    service.post(BODY, key="once")
    assert [entry["action"] for entry in audit(service)] == ["job.submit"]


def test_what_is_so_already_is_no_change(service: Service) -> None:
    for role in ("viewer", "viewer", "admin", "admin"):
        assert service.client.put("/v1/project/members/ada", json={"role": role}).json()["role"] == role
    assert [entry["details"] for entry in audit(service)] == [{"role": "viewer"}, {"role": "admin"}]
    service.tenants.archive("another", True, OPERATOR)
    since = service.tenants.project("another").archived_at
    service.tenants.archive("another", True, OPERATOR)
    assert service.tenants.project("another").archived_at == since
    for _ in range(2):
        service.tenants.archive("another", False, OPERATOR)
    log = service.tenants.audit("another", 9, None)
    assert [entry.action for entry in log] == ["project.restore", "project.archive"]


def test_a_key_that_has_expired_is_listed_so(operator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operator("keys create --name ci --expires-in 1h")
    assert "  expires 20" in operator("keys list")
    later = now() + timedelta(hours=1)
    monkeypatch.setattr("service.cli_tenants.now", lambda: later)
    assert "  expired 20" in operator("keys list")


def test_keys_and_members_over_rest(service: Service) -> None:
    ask = service.client
    refused = problem(ask.post("/v1/project/keys", json={"name": "ci", "member": "ada"}), 422, "invalid")
    assert refused["errors"][0]["path"] == "$.member"
    assert ask.put("/v1/project/members/ada", json={"role": "submitter"}).json()["role"] == "submitter"
    made = ask.post("/v1/project/keys", json={"name": "ci", "member": "ada", "expires_in": 86_400})
    assert made.status_code == 201
    body = made.json()
    listed = ask.get("/v1/project/keys").json()["items"]
    assert [entry["name"] for entry in listed] == ["test", "ci"]
    assert {name: body[name] for name in body if name != "key"} == listed[1]
    assert body["key"].startswith(listed[1]["prefix"])
    assert body["key"] not in json.dumps(listed) + json.dumps(audit(service))
    for _ in range(2):
        assert ask.delete(f"/v1/project/keys/{body['id']}").status_code == 204
    assert ask.delete("/v1/project/members/ada").status_code == 204
    problem(ask.delete("/v1/project/members/ada"), 404, "not-found")
    changes = [(entry["action"], entry["target"]) for entry in audit(service)]
    assert changes == [("member.put", "ada"), ("key.create", body["id"]), ("key.revoke", body["id"]),
                       ("member.remove", "ada")]  # fmt: skip


def test_the_audit_log_comes_in_pages_newest_first(service: Service) -> None:
    for name in "abcde":
        service.tenants.put_member("default", name, Role.VIEWER, OPERATOR)
    seen, cursor = [], ""
    while True:
        page = service.client.get(f"/v1/project/audit?limit=2{cursor}").json()
        seen += [entry["target"] for entry in page["items"]]
        if page["next_cursor"] is None:
            break
        cursor = f"&cursor={page['next_cursor']}"
    assert seen[:5] == list("edcba")
    assert len(seen) == 6


def test_the_project_says_what_it_uses(service: Service) -> None:
    service.store.insert(row(1, state="running", attempt=1, workers=3), ACCEPTED, None)
    service.store.insert(row(2), ACCEPTED, None)
    project = service.client.get("/v1/project").json()
    assert (project["name"], project["role"]) == ("default", "admin")
    use = project["use"]
    assert (use["running_workers"], use["running_cpus"], use["running_gpus"], use["queued_jobs"]) == (3, 3, 0, 1)
    assert set(project["quotas"].values()) == {None}


def test_a_project_with_live_jobs_is_not_archived(service: Service) -> None:
    service.store.insert(row(1), ACCEPTED, None)
    with pytest.raises(Exception, match="1 job of project default must end first"):
        service.tenants.archive("default", True, OPERATOR)
    assert service.client.get("/v1/project").status_code == 200


@pytest.fixture
def operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`lockstep-server` on a database of its own: run it with words, get (exit code, output)."""
    monkeypatch.setenv("LOCKSTEP_DATABASE_URL", make_database(tmp_path))
    monkeypatch.setenv("LOCKSTEP_STORAGE", "s3://memory/root")

    def run(words: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, words.split())
        assert result.exit_code == code, result.output
        return result.output

    return run


def test_an_operator_sets_up_a_project_from_nothing(operator: Any) -> None:
    operator("projects create vision")
    operator("projects quota vision running_gpus=8 max_priority=-5 jobs_per_day=100")
    told = "Project vision has running_gpus=8 max_priority=-5 now.\n"
    assert operator("projects quota vision jobs_per_day=none") == told
    assert "running_gpus=8 max_priority=-5\n" in operator("projects list")
    added = operator("members add ada@example.org --role submitter --project vision")
    assert added == "ada@example.org is submitter in project vision now.\n"
    assert "ada@example.org  submitter" in operator("members list --project vision")
    key = operator("keys create --name laptop --project vision --role admin --member ada@example.org --expires-in 90d")
    secret, key_id = key.split()[0], key.split()[1].rstrip(":")
    listed = operator("keys list --project vision")
    assert key_id in listed
    assert secret not in listed
    assert secret[:11] in listed
    assert "admin operator" not in listed
    operator("keys create --name mine --project vision --operator")
    assert "admin operator  mine" in operator("keys list --project vision")
    assert operator(f"keys revoke {key_id}") == f"Revoked {key_id}.\n"
    assert "revoked" in operator("keys list")
    removed = operator("members remove ada@example.org --project vision")
    assert removed == "Removed ada@example.org from project vision; their keys open nothing any more.\n"
    assert operator("projects archive vision").startswith("Archived vision: its keys open nothing")
    assert "archived" in operator("projects list")
    assert operator("projects restore vision") == "Project vision is open: its keys work.\n"


@pytest.mark.parametrize("words", ["keys create --name k", "members add ada --role viewer"])
def test_nothing_is_made_in_an_archived_project_that_would_open_nothing(operator: Any, words: str) -> None:
    operator("projects create vision")
    operator("projects archive vision")
    says = operator(f"{words} --project vision", code=1)
    assert says.startswith("project vision is archived, so its keys open nothing; first: lockstep-server projects rest")
    assert operator("keys list --project vision") == operator("members list --project vision") == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("projects create Vision", "small letters"),
        (f"projects create {'a' * 48}", "47 at most"),
        ("projects create default", "already"),
        ("projects quota default running_gpus=many", "is no quota"),
        ("projects quota default gpus=8", "is no quota"),
        ("projects quota default running_workers=0", "greater than or equal to 1"),
        ("projects quota default running_workers=2147483648", "running_workers: input should be less than or equal to"),
        ("projects quota default running_gpus=99999999999999999999", "running_gpus: input should be less than or eq"),
        ("projects quota default stored_bytes=9223372036854775808", "stored_bytes: input should be less than or equ"),
        ("projects quota nowhere running_gpus=8", "no project nowhere"),
        ("members add a/b --role viewer", "not allowed"),
        ("members remove ada", "no member ada"),
        ("members list --project nowhere", "no project nowhere"),
        ("keys list --project nowhere", "no project nowhere"),
        ("keys create --name k --project nowhere", "no project nowhere"),
        ("keys create --name k --member ada", "not a member"),
        ("keys create --name k --expires-in soon", "no duration"),
        ("keys create --name k --expires-in 1s", "expires_in: a key may last from 60 seconds to 316224000 (3660 days)"),
        ("keys create --name k --expires-in 999999999d", "expires_in: a key may last from 60 seconds"),
        ("projects archive default", "the bootstrap key, the operator's own, is of it"),
        ("keys revoke key-1", "no key key-1"),
    ],
)
def test_what_an_operator_gets_wrong_is_one_line(operator: Any, words: str, says: str) -> None:
    output = operator(words, code=1)
    assert says in output
    assert output.count("\n") == 1


def test_what_a_tenant_calls_a_key_does_nothing_to_an_operators_terminal(operator: Any, tmp_path: Path) -> None:
    assert operator("keys list") == ""  # migrates
    engine = make_engine(database_url(tmp_path))
    create_key(Tenants(engine), KeyRequest(name="a\x9b2J\u202eb\u2028c"))
    engine.dispose()
    listed = operator("keys list")
    assert listed.removesuffix("\n").isprintable()
    assert listed.endswith("a\N{REPLACEMENT CHARACTER}2J\N{REPLACEMENT CHARACTER}b c\n")


def test_what_an_operator_changes_is_in_the_log(operator: Any, tmp_path: Path) -> None:
    operator("projects create vision")
    operator("projects quota vision running_gpus=8")
    engine = make_engine(database_url(tmp_path))
    newest, first = Tenants(engine).audit("vision", 9, None)
    engine.dispose()
    assert (first.action, first.actor) == ("project.create", "operator")
    assert (newest.action, newest.details) == ("project.quotas", {"quotas": {"running_gpus": 8}})


def test_the_highest_quotas_that_a_database_keeps_are_taken(service: Service) -> None:
    numbers = dict.fromkeys(
        ("running_workers", "running_cpus", "running_gpus", "queued_jobs", "jobs_per_day"), 2**31 - 1
    )
    highest = Quotas(**numbers, stored_bytes=2**63 - 1, max_priority=100)
    service.tenants.set_quotas("default", highest, OPERATOR)
    assert service.tenants.project("default").quotas == highest
    assert service.post(BODY).status_code == 201


def test_a_quota_that_is_not_named_stays_and_only_what_changes_is_told(service: Service) -> None:
    service.tenants.set_quotas("default", Quotas(running_gpus=8, queued_jobs=3), OPERATOR)
    service.tenants.set_quotas("default", Quotas(running_gpus=8, jobs_per_day=5, queued_jobs=None), OPERATOR)
    service.tenants.set_quotas("default", Quotas(jobs_per_day=5), OPERATOR)
    assert service.tenants.project("default").quotas == Quotas(running_gpus=8, jobs_per_day=5)
    assert [entry["details"] for entry in audit(service)] == [
        {"quotas": {"queued_jobs": 3, "running_gpus": 8}},
        {"quotas": {"jobs_per_day": 5, "queued_jobs": None}},
    ]


def test_quotas_that_are_set_at_the_same_time_are_all_kept(service: Service) -> None:
    names = ("running_workers", "running_cpus", "running_gpus", "queued_jobs", "jobs_per_day")

    def change(name: str) -> None:
        service.tenants.set_quotas("default", Quotas(**{name: 7}), OPERATOR)

    with ThreadPoolExecutor(len(names)) as operators:
        list(operators.map(change, names))
    assert service.tenants.project("default").quotas == Quotas(**dict.fromkeys(names, 7))
