"""What a project's quotas refuse at submission, in numbers, and how much it is found to store."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from api.documents import now
from api.errors import Conflict, NotFound, QuotaExceeded, StorageUnavailable
from api.storage import ObjectInfo
from api.tenants import KeyRequest, Quotas, Role
from service.audit import OPERATOR
from service.auth import create_key
from service.leases import Leases
from service.rows import IdempotencyRecord
from service.store import Store
from service.tenants import Tenants
from service.usage import Usage
from tests.databases import on_postgres
from tests.fakes import ACCEPTED, T0, MemoryBucket, job_id, leases_of, new_store, row, settings_for
from tests.unit.service.in_process import BODY, Service, problem

pytestmark = pytest.mark.database


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = new_store(tmp_path)
    yield made
    made._engine.dispose()


def limit(store: Store, **quotas: int) -> None:
    Tenants(store._engine).set_quotas("default", Quotas(**quotas), OPERATOR)


def test_one_job_more_than_may_wait_is_refused(store: Store) -> None:
    limit(store, queued_jobs=2)
    store.insert(row(1, state="running"), ACCEPTED, None)
    store.insert(row(2), ACCEPTED, None)
    store.insert(row(3), ACCEPTED, None)
    with pytest.raises(QuotaExceeded, match="may have 2 jobs waiting at once and has 2; wait"):
        store.insert(row(4), ACCEPTED, None)
    assert [job.id for job in store.live()] == [job_id(1), job_id(2), job_id(3)]
    assert store.insert(row(5, project="another"), ACCEPTED, None) is None
    assert store.apply(store.live()[1], {"state": "running"}) is not None
    assert store.insert(row(4), ACCEPTED, None) is None


def test_many_at_once_get_no_more_than_the_quota(store: Store) -> None:
    limit(store, queued_jobs=3)
    refused = []

    def submit(number: int) -> None:
        try:
            store.insert(row(number), ACCEPTED, None)
        except QuotaExceeded:
            refused.append(number)

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(refused), len(store.live())) == (5, 3)


def paused(store: Store, number: int, **fields: Any) -> None:
    store.insert(row(number, state="paused", pause_requested=1, **fields), ACCEPTED, None)


def resume(store: Store, number: int) -> bool:
    return store.request_resume(job_id(number), None, T0)


def test_nobody_gets_round_the_quota_by_pausing_and_resuming(store: Store) -> None:
    limit(store, queued_jobs=2)
    for number in (1, 2, 3):
        paused(store, number)
    store.insert(row(4), ACCEPTED, None)
    paused(store, 5, project="another")
    assert resume(store, 1)
    before = store.everything()
    with pytest.raises(QuotaExceeded, match="may have 2 jobs waiting at once and has 2; wait"):
        resume(store, 2)
    assert store.everything() == before
    with pytest.raises(QuotaExceeded):
        store.insert(row(6), ACCEPTED, None)
    assert resume(store, 5), "another project's line is its own"
    assert not resume(store, 1), "there is no pause to end"
    assert store.apply(store.live()[3], {"state": "running"}) is not None
    assert resume(store, 2)


def test_who_resumes_before_the_pause_is_complete_counts_too(store: Store) -> None:
    """One that is pausing goes to the line once it has stopped; one that only was to pause runs on."""
    limit(store, queued_jobs=1)
    for number, state, why in ((1, "pausing", "user_paused"), (2, "pausing", "user_paused"), (3, "running", None)):
        store.insert(row(number, state=state, pause_requested=1, stop_reason=why), ACCEPTED, None)
    assert resume(store, 1)
    with pytest.raises(QuotaExceeded):
        resume(store, 2)


def test_many_resumed_at_once_get_no_more_than_the_quota(store: Store) -> None:
    limit(store, queued_jobs=3)
    for number in range(1, 9):
        paused(store, number)
    refused = []

    def again(number: int) -> None:
        try:
            resume(store, number)
        except QuotaExceeded:
            refused.append(number)

    with ThreadPoolExecutor(8) as users:
        list(users.map(again, range(1, 9)))
    assert (len(refused), sum(job.pause_requested == 0 for job in store.live())) == (5, 3)


def test_a_resume_beyond_the_quota_is_a_429(service: Service) -> None:
    quotas(service, queued_jobs=1)
    paused(service.store, 1)
    service.store.insert(row(2), ACCEPTED, None)
    refused = problem(service.ask(1, "resume"), 429, "quota-exceeded")
    assert refused["detail"].endswith("wait until some have started, or cancel some")
    assert service.client.get(f"/v1/jobs/{job_id(1)}").json()["state"] == "paused"
    project = service.client.get("/v1/project/audit").json()["items"]
    assert "job.resume" not in [entry["action"] for entry in project]


def test_a_day_is_the_24_hours_before_and_deleted_jobs_count(store: Store) -> None:
    limit(store, jobs_per_day=2)
    store.insert(row(9, created_at=T0, project="another"), ACCEPTED, None)
    store.insert(row(1, created_at=T0, state="failed", deleted_at=T0), ACCEPTED, None)
    store.insert(row(2, created_at=T0 + timedelta(hours=1)), ACCEPTED, None)
    late = T0 + timedelta(hours=23, minutes=59, seconds=30)
    with pytest.raises(QuotaExceeded, match="may submit 2 jobs in 24 hours and has; the next one from 20") as refused:
        store.insert(row(3, created_at=late), ACCEPTED, None)
    assert refused.value.retry_after == 30
    assert store.insert(row(3, created_at=T0 + timedelta(days=1)), ACCEPTED, None) is None


def test_a_request_that_was_accepted_before_is_answered_at_the_quota_too(store: Store) -> None:
    limit(store, queued_jobs=1)
    record = IdempotencyRecord("key-1", "once", "a" * 64)
    store.insert(row(1), ACCEPTED, record)
    replay = store.insert(row(2), ACCEPTED, record)
    assert replay is not None
    assert replay.job.id == job_id(1)


def test_a_project_that_stores_too_much_submits_nothing(store: Store) -> None:
    limit(store, stored_bytes=2**30)
    tenants = Tenants(store._engine)
    assert store.insert(row(1), ACCEPTED, None) is None, "nothing was measured yet"
    tenants.note_use("default", 3 * 2**30, T0)
    with pytest.raises(QuotaExceeded, match=r"may store 1\.0 GiB and had 3\.0 GiB when it was measured at 20"):
        store.insert(row(2), ACCEPTED, None)
    tenants.note_use("default", 2**30, T0)
    assert store.insert(row(2), ACCEPTED, None) is None


def test_nothing_is_submitted_to_an_archived_project_or_to_none(store: Store) -> None:
    Tenants(store._engine).archive("another", True, OPERATOR)
    with pytest.raises(Conflict, match="is archived"):
        store.insert(row(1, project="another"), ACCEPTED, None)
    with pytest.raises(NotFound, match="no project nowhere"):
        store.insert(row(1, project="nowhere"), ACCEPTED, None)
    assert store.live() == []


def quotas(service: Service, **values: int) -> None:
    service.tenants.set_quotas("default", Quotas(**values), OPERATOR)


def test_over_rest_a_quota_is_a_429_that_says_when(service: Service) -> None:
    quotas(service, jobs_per_day=1)
    assert service.post(BODY, "first").status_code == 201
    refused = service.post(BODY, "second")
    assert "may submit 1 jobs in 24 hours" in problem(refused, 429, "quota-exceeded")["detail"]
    assert 86_000 < int(refused.headers["retry-after"]) <= 86_400
    assert service.post(BODY, "first").status_code == 200
    project = service.client.get("/v1/project").json()
    assert (project["quotas"]["jobs_per_day"], project["use"]["jobs_per_day"]) == (1, 1)


@pytest.mark.parametrize("query", ["", "?dry_run=true"])
@pytest.mark.parametrize(
    ("limits", "fields", "path", "says"),
    [
        ({"max_priority": 5}, {"priority": 6}, "$.priority", "a priority of 5 at most, not 6"),
        ({"running_workers": 1}, {"resources": {"workers": 2}}, "$.resources", "2 × 1 CPU, but project default may "
         "have 1 workers at once"),
        ({"running_cpus": 3}, {"resources": {"workers": 2, "cpus": 2}}, "$.resources", "may have 3 CPU at once"),
        ({"running_gpus": 0}, {"resources": {"workers": 1, "gpus": 1}}, "$.resources", "may have 0 GPU at once"),
    ],
)  # fmt: skip
def test_what_can_never_run_is_refused_with_its_place_in_the_spec(
    service: Service, query: str, limits: dict[str, int], fields: dict[str, Any], path: str, says: str
) -> None:
    quotas(service, **limits)
    found = problem(service.post({**BODY, **fields}, query=query), 422, "invalid")
    assert found["errors"][0]["path"] == path
    assert says in found["detail"]
    assert service.store.live() == []


def test_what_just_fits_is_accepted(service: Service) -> None:
    quotas(service, max_priority=6, running_workers=1, running_cpus=1, running_gpus=0)
    assert service.post({**BODY, "priority": 6}).status_code == 201
    flexible = {"workers": {"min": 1, "max": 4}}
    assert service.post({**BODY, "resources": flexible}).status_code == 201, "it runs with what the quota leaves"


def test_nobody_resumes_with_more_workers_than_the_quota_could_ever_allow(service: Service) -> None:
    quotas(service, running_workers=2)
    service.store.insert(row(1, state="paused", pause_requested=1), ACCEPTED, None)
    found = problem(service.ask(1, "resume", {"workers": 4}), 422, "invalid")
    assert found["errors"][0]["path"] == "$.workers"
    assert "needs 4 × 1 CPU, but project default may have 2 workers at once" in found["detail"]
    assert service.ask(1, "resume", {"workers": 2}).status_code == 202


class Counting(MemoryBucket):
    """Counts listings; `down`: it does not answer."""

    def __init__(self) -> None:
        super().__init__()
        self.listed: list[str] = []
        self.down = False

    def objects(self, prefix: str) -> list[ObjectInfo]:
        self.listed.append(prefix)
        if self.down:
            raise StorageUnavailable("down")
        return super().objects(prefix)


def test_what_a_project_stores_is_measured_once_in_an_interval(store: Store, tmp_path: Path) -> None:
    bucket, tenants = Counting(), Tenants(store._engine)
    usage = Usage(tenants, bucket, settings_for(tmp_path, usage_interval=60), leases_of(store))
    bucket.put("default/jobs/j/a", b"12345")
    bucket.put("default/datasets/d", b"123")
    bucket.put("another/jobs/j/a", b"1")
    bucket.put("default-not/a", b"1234567")
    at = now()
    usage.run(at)
    assert {p.name: p.used_bytes for p in tenants.projects()} == {"another": 1, "default": 8}
    bucket.put("default/more", b"1")
    usage.run(at + timedelta(seconds=59))
    assert tenants.project("default").used_bytes == 8
    bucket.down = True
    usage.run(at + timedelta(seconds=60))
    assert (tenants.project("default").used_bytes, tenants.project("default").measured_at) == (8, at)
    bucket.down = False
    usage.run(at + timedelta(seconds=60))
    assert tenants.project("default").used_bytes == 9


def test_of_two_control_planes_one_lists_what_is_stored(store: Store, tmp_path: Path) -> None:
    """And the other one goes on where the first stopped, or died, without listing again what was listed."""
    bucket, tenants, settings = Counting(), Tenants(store._engine), settings_for(tmp_path)

    class Dying(Counting):
        """The second control plane begins in the middle of the first one's listing; its lease has run out."""

        def objects(self, prefix: str) -> list[ObjectInfo]:
            found = super().objects(prefix)
            if prefix == "another/":
                tenants.note_use("another", 0, at)
                second.run(at)
            return found

    at = now()
    second = Usage(tenants, bucket, settings, leases_of(store))
    first = Usage(tenants, dying := Dying(), settings, leases_of(store))
    first.run(at)
    assert (dying.listed, bucket.listed) == (["another/"], ["default/"])
    first.run(at)
    assert (dying.listed, bucket.listed) == (["another/"], ["default/"])


@pytest.mark.skipif(not on_postgres(), reason="an embedded database has one control plane")
def test_who_does_not_hold_the_lease_lists_nothing(store: Store, tmp_path: Path) -> None:
    bucket, settings = Counting(), settings_for(tmp_path)
    Leases(store._engine, seconds=60).hold("usage")
    Usage(Tenants(store._engine), bucket, settings, Leases(store._engine, seconds=60)).run(now())
    assert bucket.listed == []


@pytest.mark.parametrize("ask", ["/v1/project", "/v1/queue"])
def test_a_question_about_one_project_reads_no_row_of_another(service: Service, ask: str) -> None:
    service.store.insert(row(1), ACCEPTED, None)
    service.store.insert(row(2, project="another"), ACCEPTED, None)
    loaded: list[str] = []

    def note(_: Any, __: Any, statement: str, *rest: Any) -> None:
        loaded.append(statement)

    sa.event.listen(service.store._engine, "before_cursor_execute", note)
    assert service.client.get(ask).status_code == 200
    assert [sql for sql in loaded if "FROM jobs" in sql and "jobs.project =" not in sql] == []
    assert [job.id for job in service.store.live("default")] == [job_id(1)]


def test_the_quotas_of_one_project_are_read_alone(service: Service) -> None:
    quotas(service, running_gpus=3)
    service.tenants.set_quotas("another", Quotas(running_gpus=5), OPERATOR)
    assert service.store.quotas("default") == {"default": Quotas(running_gpus=3)}
    loaded: list[str] = []

    def note(_: Any, __: Any, statement: str, *rest: Any) -> None:
        loaded.append(statement)

    sa.event.listen(service.store._engine, "before_cursor_execute", note)
    assert service.post(BODY, query="?dry_run=true").status_code == 200
    assert [sql for sql in loaded if "FROM projects" in sql and "projects.name =" not in sql] == []


# Keys and members


def test_a_project_has_so_many_keys_that_are_valid_and_an_operator_has_more(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.quotas.KEYS", 3)
    ids = [service.client.post("/v1/project/keys", json={"name": "k", "expires_in": 60}).json()["id"] for _ in range(2)]
    refused = service.client.post("/v1/project/keys", json={"name": "k"})
    words = "project default has 3 keys that are valid, and 3 is the most; revoke some"
    assert problem(refused, 429, "quota-exceeded")["detail"] == words
    create_key(service.tenants, KeyRequest(name="mine"), operator=True)
    service.client.delete(f"/v1/project/keys/{ids[0]}").raise_for_status()
    assert service.client.post("/v1/project/keys", json={"name": "k"}).status_code == 201
    monkeypatch.setattr("service.tenants.now", lambda: now() + timedelta(minutes=2))  # the other one has expired
    assert service.client.post("/v1/project/keys", json={"name": "k"}).status_code == 201
    problem(service.client.post("/v1/project/keys", json={"name": "k"}), 429, "quota-exceeded")
    service.tenants.create_project("other", OPERATOR)
    create_key(service.tenants, KeyRequest(name="theirs"), "other")


def test_many_keys_that_are_made_at_once_are_no_more_than_the_most(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.quotas.KEYS", 4)

    def make(_: int) -> bool:
        try:
            create_key(service.tenants, KeyRequest(name="k"))
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(make, range(8))) == 3


def test_the_list_of_keys_has_all_that_are_valid_and_the_newest_of_the_others(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.project_routes._ENDED_KEYS", 2)
    for number in range(6):
        made = create_key(service.tenants, KeyRequest(name=f"{number}"))
        if number not in (0, 4):
            service.tenants.revoke_key(made.id, OPERATOR)
    listed = service.client.get("/v1/project/keys").json()["items"]
    assert [key["name"] for key in listed] == ["test", "0", "3", "4", "5"]
    assert len(service.tenants.keys()) == 7, "an operator sees all"


def test_a_project_has_so_many_members(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.quotas.MEMBERS", 2)
    put = {
        name: service.client.put(f"/v1/project/members/{name}", json={"role": Role.VIEWER})
        for name in ("ada", "bob", "eve")
    }
    assert [put[name].status_code for name in ("ada", "bob")] == [200, 200]
    words = "project default has 2 members, and 2 is the most; remove some"
    assert problem(put["eve"], 429, "quota-exceeded")["detail"] == words
    assert service.client.put("/v1/project/members/ada", json={"role": "admin"}).json()["role"] == "admin"
