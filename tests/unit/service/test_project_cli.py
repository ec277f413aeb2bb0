"""`lockstep project …` against the application: what an admin sees and does, and what a viewer is told."""

import json
from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from api.cli import app
from api.client import Client
from api.tenants import KeyRequest, Quotas, Role
from service.audit import OPERATOR
from service.auth import create_key
from tests.fakes import ACCEPTED, row
from tests.unit.service.in_process import KEY, Service

Run = Callable[..., Result]


def runner(service: Service, key: str) -> Run:
    def run(words: str, code: int = 0) -> Result:
        def connect() -> Client:
            return Client("http://testserver", key, transport=service.client._transport)

        result = CliRunner(env={"COLUMNS": "160", "FORCE_COLOR": None}).invoke(app, words.split(), obj=connect)
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture
def lockstep(service: Service) -> Run:
    return runner(service, KEY)


def test_what_the_project_uses_stands_beside_what_it_may_use(service: Service, lockstep: Run) -> None:
    service.tenants.set_quotas("default", Quotas(running_workers=4, max_priority=-3), OPERATOR)
    service.store.insert(row(1, state="running", workers=3, attempt=1), ACCEPTED, None)
    lines = [line.split() for line in lockstep("project show").stdout.splitlines()]
    assert lines[0][:2] == ["default", "(admin)"]
    assert ["workers", "running", "3", "4"] in lines
    assert ["priority", "-3"] in lines
    assert ["stored", "not", "measured", "yet"] in lines
    assert json.loads(lockstep("project show -o json").stdout)["use"]["running_workers"] == 3


def test_a_key_is_shown_once_and_works(service: Service, lockstep: Run) -> None:
    lockstep("project set-role ada submitter")
    assert "ada" in lockstep("project members").stdout
    made = lockstep("project create-key laptop --role viewer --member ada --expires-in 90d")
    key, key_id = made.stdout.strip(), made.stderr.split(":")[0]
    assert "set LOCKSTEP_API_KEY to it, and LOCKSTEP_URL to http://testserver\n" in made.stderr
    listed = lockstep("project keys").stdout
    assert key_id in listed
    assert "90d 00h left" in listed
    assert key not in listed
    theirs = runner(service, key)
    assert "(viewer)" in theirs("project show").stdout
    assert "needs the role admin" in theirs("project audit", code=2).stderr
    lockstep(f"project revoke-key {key_id}")
    assert "was revoked" in theirs("project show", code=2).stderr
    lockstep("project remove-member ada")
    lines = lockstep("project audit --limit 3")
    changes = [line.split()[3] for line in lines.stdout.splitlines() if line.startswith("20")]
    assert changes == ["member.remove", "key.revoke", "key.create"]
    assert "--cursor" in lines.stderr


def test_a_role_that_there_is_not_is_told_in_our_words(lockstep: Run) -> None:
    says = lockstep("project create-key laptop --role god", code=2).stderr
    assert "'god' is not one of 'viewer'" in says
    assert "Value error" not in says


def test_a_duration_that_is_none_is_refused_before_anything_is_made(service: Service, lockstep: Run) -> None:
    assert "is no duration" in lockstep("project create-key laptop --expires-in soon", code=2).stderr
    assert len(service.tenants.keys()) == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            "project create-key laptop --expires-in 1s",
            "$.expires_in: a key may last from 60 seconds to 316224000 (3660 days)",
        ),
        ("project create-key laptop --member a/b", "$.member: "),
        (f"project create-key {'x' * 65}", "$.name: "),
        ("project set-role a/b viewer", "nothing at this path"),
        ("project set-role -- -a viewer", "$.path.member: "),
        ("project revoke-key key-1", "$.path.key_id: "),
    ],
)
def test_what_is_given_wrong_is_a_sentence_and_no_traceback(
    service: Service, lockstep: Run, words: str, says: str
) -> None:
    refused = lockstep(words, code=2)
    assert says in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert len(service.tenants.keys()) == 1


def test_a_role_that_is_too_low_is_a_sentence(service: Service) -> None:
    viewer = create_key(service.tenants, KeyRequest(name="v", role=Role.VIEWER))
    service.store.insert(row(1), ACCEPTED, None)
    refused = runner(service, viewer.key)("cancel first", code=2)
    assert "of the role viewer; this needs the role submitter" in refused.stderr
