"""Pause, resume, retry, the queue and cancel over the API: who may when, and what is refused in which words."""

from typing import Any

import pytest

from api.documents import CheckpointRef, Manifest, SegmentDocument
from api.jobs import JobState
from api.layout import JobLayout
from service.rows import JobRow
from tests.fakes import ACCEPTED, T0, job_id, prepare_spec, row, train_spec
from tests.unit.service.in_process import Service, problem

EIGHT = {"batch": {"global_size": 16, "micro_size": 2}}
"""A job of eight micro-batches."""


def put(service: Service, number: int = 1, state: str = "queued", **fields: Any) -> JobRow:
    job = row(number, fields.pop("spec", None), state=state, **fields)
    assert service.store.insert(job, ACCEPTED, None) is None
    return job


def stored(service: Service, number: int = 1) -> JobRow:
    found = service.store.get(job_id(number), "default")
    assert found is not None
    return found


def asked(service: Service, number: int = 1) -> list[str]:
    """What users have asked, by the events."""
    return [event.message for event in service.store.events(job_id(number), after=1, limit=99)]


@pytest.mark.parametrize("state", [state for state in JobState if not state.ended])
def test_a_live_training_can_be_paused_in_every_state_and_again(service: Service, state: JobState) -> None:
    put(service, state=state.value)
    for _ in range(2):
        answer = service.ask(1, "pause")
        assert (answer.status_code, answer.json()["id"]) == (202, job_id(1))
    assert stored(service).pause_requested == 1
    assert asked(service) == ["pause requested"]


@pytest.mark.parametrize("state", [state for state in JobState if state.ended])
def test_an_end_cannot_be_paused_or_resumed(service: Service, state: JobState) -> None:
    put(service, state=state.value)
    found = problem(service.ask(1, "pause"), 409, "conflict")
    assert found["detail"] == f"job {job_id(1)} is {state}; it cannot be paused"
    found = problem(service.ask(1, "resume"), 409, "conflict")
    assert found["detail"] == f"job {job_id(1)} is {state}; there is no pause to end"
    assert asked(service) == []


def test_what_is_being_cancelled_can_be_neither_paused_nor_resumed(service: Service) -> None:
    put(service, 1, "running", cancel_requested=1)
    put(service, 2, "paused", pause_requested=1, cancel_requested=1)
    found = problem(service.ask(1, "pause"), 409, "conflict")
    assert found["detail"] == f"job {job_id(1)} is being cancelled; it cannot be paused"
    found = problem(service.ask(2, "resume"), 409, "conflict")
    assert found["detail"] == f"job {job_id(2)} is being cancelled; there is no pause to end"
    assert stored(service, 2).pause_requested == 1


def test_a_preparation_cannot_be_paused(service: Service) -> None:
    put(service, spec=prepare_spec(), state="running")
    found = problem(service.ask(1, "pause"), 409, "conflict")
    assert "is a preparation, which has no checkpoints; cancel it and submit it again" in found["detail"]
    assert stored(service).pause_requested == 0


@pytest.mark.parametrize("state", ["queued", "running", "pausing", "paused"])
def test_what_shall_pause_can_be_resumed_once_and_goes_to_the_end_of_the_line(service: Service, state: str) -> None:
    put(service, state=state, pause_requested=1)
    assert service.ask(1, "resume").status_code == 202
    job = stored(service)
    assert (job.pause_requested, job.workers_wanted, job.state) == (0, None, state)
    assert job.queued_at is not None
    assert job.queued_at > T0
    found = problem(service.ask(1, "resume"), 409, "conflict")
    assert found["detail"] == f"job {job_id(1)} is {state}; there is no pause to end"
    assert asked(service) == ["resume requested"]
    assert service.ask(1, "pause").status_code == 202, "and be paused again"


def test_a_job_is_resumed_with_a_number_of_workers_until_it_is_resumed_without(service: Service) -> None:
    put(service, spec=train_spec(**EIGHT), state="paused", pause_requested=1)
    assert service.ask(1, "resume", {"workers": 4}).status_code == 202
    assert (stored(service).workers_wanted, asked(service)) == (4, ["resume requested with 4 workers"])
    service.ask(1, "pause")
    assert service.ask(1, "resume", {}).status_code == 202
    assert stored(service).workers_wanted is None


@pytest.mark.parametrize(
    ("fields", "workers", "words"),
    [
        ({}, 3, "3 workers: they must divide its 8 micro-batches; 2 or 4 would do"),
        ({}, 16, "16 workers: they must divide its 8 micro-batches; 8 would do"),
        ({"batch": {"global_size": 12, "micro_size": 2}}, 4,
         "4 workers: they must divide its 6 micro-batches; 3 or 6 would do"),
        ({"determinism": "elastic"}, 3,
         "3 workers: they must divide its 8 micro-batches and be a power of two; 2 or 4 would do"),
        ({"batch": {"global_size": 2 * 8_388_593, "micro_size": 1}, "resources": {"workers": 1}}, 3,
         "they must divide its 16777186 micro-batches; 2 would do"),  # 8388593, too, but nobody may ask for that
        ({"resources": {"cpus": 3}}, 4, "needs 4 × 3 CPU, but the whole cluster has 8 CPU"),
    ],
)  # fmt: skip
def test_a_number_of_workers_that_cannot_run_the_job_is_refused_with_one_that_can(
    service: Service, fields: dict[str, Any], workers: int, words: str
) -> None:
    put(service, spec=train_spec(**{**EIGHT, **fields}), state="paused", pause_requested=1)
    found = problem(service.ask(1, "resume", {"workers": workers}), 422, "invalid")
    assert words in found["detail"]
    assert [fault["path"] for fault in found["errors"]] == ["$.workers"]
    assert stored(service).pause_requested == 1


def test_while_ray_does_not_answer_only_the_division_is_known(service: Service) -> None:
    put(service, spec=train_spec(**EIGHT, resources={"cpus": 3}), state="paused", pause_requested=1)
    service.ray.reachable = False
    problem(service.ask(1, "resume", {"workers": 3}), 422, "invalid")
    assert service.ask(1, "resume", {"workers": 4}).status_code == 202


@pytest.mark.parametrize(
    ("what", "body", "path"),
    [
        ("resume", {"workers": 0}, "$.workers"),
        ("resume", {"workers": "2"}, "$.workers"),
        ("resume", {"workers": 2.0}, "$.workers"),
        ("resume", {"worker": 2}, "$.worker"),
        ("resume", [2], "$"),
        ("cancel", {"keep_checkpoint": 1}, "$.keep_checkpoint"),
        ("cancel", {"keep_checkpoint": "yes"}, "$.keep_checkpoint"),
        ("cancel", {"keep_checkpoints": True}, "$.keep_checkpoints"),
        ("cancel", "now", "$"),
    ],
)
def test_a_body_that_is_not_understood_asks_for_nothing(service: Service, what: str, body: Any, path: str) -> None:
    put(service, state="running", pause_requested=1)
    found = problem(service.ask(1, what, body), 422, "invalid")
    assert found["errors"][0]["path"] == path
    assert (stored(service).cancel_requested, stored(service).pause_requested) == (0, 1)


def test_a_cancel_that_finds_the_job_just_cancelled_is_harmless(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(service, state="running")
    ask = service.store.request_cancel

    def late(*given: Any) -> bool:
        assert service.store.apply(stored(service), {"state": "cancelled"}) is not None
        return ask(*given)

    monkeypatch.setattr(service.store, "request_cancel", late)
    answer = service.ask(1, "cancel")
    assert (answer.status_code, answer.json()["state"]) == (202, "cancelled")


@pytest.mark.parametrize(("body", "kept"), [(None, 0), ({}, 0), ({"keep_checkpoint": False}, 0),
    ({"keep_checkpoint": True}, 1)])  # fmt: skip
def test_a_cancel_says_whether_a_checkpoint_is_kept_and_the_first_one_counts(
    service: Service, body: Any, kept: int
) -> None:
    put(service, state="running")
    assert service.ask(1, "cancel", body).status_code == 202
    assert (stored(service).cancel_requested, stored(service).keep_checkpoint) == (1, kept)
    assert service.ask(1, "cancel", {"keep_checkpoint": not kept}).status_code == 202
    assert stored(service).keep_checkpoint == kept
    assert asked(service) == ["cancellation requested"]


def checkpoint(service: Service, number: int, step: int, segment: str = "1-0-a") -> CheckpointRef:
    """Write a checkpoint, and the segment that it is of."""
    layout = JobLayout("default", job_id(number)).segment(segment)
    fields = {"job_id": job_id(number), "segment": segment, "world_size": 1, "created_at": T0}
    begun = SegmentDocument.model_validate({**fields, "from": None, "fingerprint": None})
    service.bucket.put_document(layout.document, begun)
    manifest = Manifest.model_validate({**fields, "step": step, "parts": [], "metrics": {}})
    service.bucket.put_document(layout.checkpoint(step).manifest, manifest)
    return CheckpointRef(segment=segment, step=step, job_id=job_id(number))


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_retry_is_a_new_job_that_goes_on_from_the_newest_checkpoint(service: Service, state: str) -> None:
    source = put(service, state=state, spec=train_spec(steps=10, seed=5), labels={"team": "lm"}, attempt=1)
    for step in (4, 8):
        checkpoint(service, 1, step)
    answer = service.ask(1, "retry")
    made = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (201, f"/v1/jobs/{made['id']}")
    assert made["id"] != source.id
    assert (made["state"], made["init"]) == ("queued", {"job_id": source.id, "step": 8})
    assert made["spec"]["init"] == {"from_job": source.id, "step": 8}
    assert {**made["spec"], "init": None} == source.spec
    assert stored(service).state == state, "an end is never left"


def test_a_retry_without_a_checkpoint_begins_anew(service: Service) -> None:
    put(service, state="failed")
    made = service.ask(1, "retry").json()
    assert (made["init"], made["spec"]["init"]) == (None, None)


def test_a_retry_of_a_fork_that_wrote_nothing_begins_where_that_began(service: Service) -> None:
    """There, and not at what its source has written since."""
    put(service, 1, "running", attempt=1)
    origin = checkpoint(service, 1, 4)
    forked = train_spec(init={"from_job": job_id(1)})
    put(service, 2, "failed", spec=forked, init=origin.model_dump())
    checkpoint(service, 1, 8)
    assert service.ask(2, "retry").json()["init"] == {"job_id": job_id(1), "step": 4}


def test_a_retry_of_a_preparation_prepares_once_more(service: Service) -> None:
    put(service, state="failed", spec=prepare_spec())
    made = service.ask(1, "retry").json()
    assert (made["spec"]["kind"], made["init"], made["state"]) == ("prepare", None, "queued")


def test_a_retry_with_a_key_makes_one_job(service: Service) -> None:
    put(service, state="failed")
    put(service, 2, state="failed")
    first, again = (service.ask(1, "retry", key="once") for _ in range(2))
    assert (first.status_code, again.status_code) == (201, 200)
    assert (again.json(), again.headers["location"]) == (first.json(), first.headers["location"])
    assert len(service.store.live()) == 1
    found = problem(service.ask(2, "retry", key="once"), 422, "idempotency-mismatch")
    assert first.json()["id"] in found["detail"]
    assert service.ask(1, "retry", key="twice").status_code == 201
    assert service.ask(1, "retry").status_code == 201
    assert len(service.store.live()) == 3


def lose(service: Service, what: str) -> None:
    """Take away what a retry of job 1 stands on, once it was accepted."""
    match what:
        case "bucket":
            service.bucket.reachable = False
        case "Ray":
            service.ray.reachable = False
        case "checkpoints":
            service.bucket.delete([item.key for item in service.bucket.objects(JobLayout("default", job_id(1)).prefix)])
        case "dataset":
            service.bucket.delete([item.key for item in service.bucket.objects("default/datasets/")])
        case "job":
            assert service.client.delete(f"/v1/jobs/{job_id(1)}").status_code == 204


@pytest.mark.parametrize("kind", ["training", "preparation"])
@pytest.mark.parametrize("lost", ["bucket", "Ray", "checkpoints", "dataset", "job"])
def test_a_retry_that_was_accepted_is_answered_whatever_is_lost_since(service: Service, kind: str, lost: str) -> None:
    put(service, state="failed", attempt=1, spec=prepare_spec() if kind == "preparation" else None)
    checkpoint(service, 1, 4)
    first = service.ask(1, "retry", key="once")
    assert first.status_code == 201
    lose(service, lost)
    again = service.ask(1, "retry", key="once")
    assert (again.status_code, again.json()) == (200, first.json())
    assert len(service.store.live()) == 1


@pytest.mark.parametrize("state", ["queued", "running", "paused", "succeeded"])
def test_only_what_failed_or_was_cancelled_can_be_retried(service: Service, state: str) -> None:
    put(service, state=state)
    found = problem(service.ask(1, "retry"), 409, "conflict")
    assert found["detail"] == f"job {job_id(1)} is {state}; only one that failed or was cancelled can be retried"


def test_a_run_that_ended_at_its_last_step_cannot_be_retried(service: Service) -> None:
    put(service, state="failed", attempt=1)
    checkpoint(service, 1, 10)
    assert problem(service.ask(1, "retry"), 422, "invalid")["errors"][0]["path"] == "$.steps"


def test_the_queue_is_the_line_of_the_waiting_who_is_next_first(service: Service) -> None:
    put(service, 1)
    put(service, 2, spec=train_spec(priority=7, resources={"cpus": 2}))
    put(service, 3, "recovering", message="Ray lost it")
    put(service, 4, "running")
    put(service, 5, "paused", pause_requested=1)
    put(service, 6, project="another")
    waiting = {"type": "waiting", "message": "needs 1 × 1 CPU, 0 CPU free", "since": T0.isoformat()}
    put(service, 7, conditions=[waiting])
    put(service, 8, "failed")
    answer = service.client.get("/v1/queue")
    assert (answer.status_code, answer.json()["next_cursor"]) == (200, None)
    items = answer.json()["items"]
    assert [(item["position"], item["job_id"]) for item in items] == [
        (position, job_id(number)) for position, number in enumerate((2, 3, 1, 7), 1)]  # fmt: skip
    assert (items[0]["priority"], items[0]["needs"]) == (7, "1 × 2 CPU")
    assert [item["message"] for item in items[1:]] == ["Ray lost it", "accepted", "needs 1 × 1 CPU, 0 CPU free"]
    problem(service.client.get("/v1/queue?limit=5"), 422, "invalid")


def test_an_answer_tells_the_size_of_the_present_attempt(service: Service) -> None:
    put(service, 1, "running", workers=4)
    put(service, 2)
    assert [service.client.get(f"/v1/jobs/{job_id(n)}").json()["workers"] for n in (1, 2)] == [4, None]


def test_jobs_of_a_newer_release_are_shown_as_far_as_they_are_known(service: Service) -> None:
    """As after a release was taken back, or while replicas of both work side by side."""
    for number, state in ((1, "running"), (2, "queued")):
        put(service, number, state)
        known = stored(service, number)
        assert service.store.apply(known, {"spec": {**known.spec, "of_tomorrow": 1}}) is not None
    put(service, 3)
    assert service.client.get(f"/v1/jobs/{job_id(1)}").json()["spec"] == known.spec
    assert [job["id"] for job in service.client.get("/v1/jobs").json()["items"]] == [job_id(n) for n in (3, 2, 1)]
    assert [job["job_id"] for job in service.client.get("/v1/queue").json()["items"]] == [job_id(2), job_id(3)]
