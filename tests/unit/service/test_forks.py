"""Jobs that begin at a checkpoint of another: which one, what must fit, and that it stays until they have ended."""

from datetime import timedelta
from typing import Any

import pytest

from api.documents import CheckpointRef, Manifest, SegmentDocument
from api.errors import Conflict
from api.jobs import ENDED
from api.layout import DatasetLayout, JobLayout
from service.reconciler import job_document
from service.retention import Retention
from service.rows import JobRow
from tests.checkpoints import ref
from tests.fakes import ACCEPTED, T0, dataset, job_id, leases_of, prepare_spec, row, settings_for, train_spec
from tests.unit.service.in_process import BODY, Service, problem

pytestmark = pytest.mark.database

FROM = {"init": {"from_job": job_id(1)}}
DATASETS = [("words", "v1", 2048), ("words", "v2", 2048), ("others", "v1", 4096), ("twins", "v1", 2048)]


def source(service: Service, *places: str, **fields: Any) -> JobRow:
    """Insert job 1, a job that has run, with checkpoints such as `1-0-a@4`."""
    job = row(1, fields.pop("spec", None), **{"state": "running", "attempt": 1, **fields})
    assert service.store.insert(job, ACCEPTED, None) is None
    for place in places:
        write(service, ref(place))
    for name, version, vocab_size in DATASETS:
        document = dataset(vocab_size=vocab_size).model_copy(update={"name": name, "version": version})
        service.bucket.put_document(DatasetLayout("default", name, version).document, document)
    return job


def write(service: Service, at: CheckpointRef, number: int = 1, origin: CheckpointRef | None = None) -> None:
    layout = JobLayout("default", job_id(number)).segment(at.segment)
    fields = {"job_id": job_id(number), "segment": at.segment, "world_size": 1, "created_at": T0}
    if layout.document not in service.bucket.content:
        begun = SegmentDocument.model_validate({**fields, "from": origin, "fingerprint": None})
        service.bucket.put_document(layout.document, begun)
    manifest = Manifest.model_validate({**fields, "step": at.step, "parts": [], "metrics": {}})
    service.bucket.put_document(layout.checkpoint(at.step).manifest, manifest)


def forked(service: Service, **fields: Any) -> JobRow:
    """Submit a fork of job 1 and return its row."""
    answer = service.post({**BODY, **FROM, **fields})
    assert answer.status_code == 201, answer.text
    found = service.store.get(answer.json()["id"], "default")
    assert found is not None
    return found


def refused(service: Service, **fields: Any) -> list[tuple[str, str]]:
    """Submit a fork that is refused, also by a dry run; return its faults, by path."""
    before = service.store.live()
    dry = problem(service.post({**BODY, **FROM, **fields}, query="?dry_run=true"), 422, "invalid")
    found = problem(service.post({**BODY, **FROM, **fields}), 422, "invalid")
    assert found["errors"] == dry["errors"]
    assert service.store.live() == before
    return [(fault["path"], fault["message"]) for fault in found["errors"]]


@pytest.mark.parametrize(("init", "step"), [({}, 8), ({"step": 8}, 8), ({"step": 4}, 4), ({"step": None}, 8)])
def test_a_fork_begins_at_the_newest_checkpoint_or_at_the_one_it_names(
    service: Service, init: dict[str, Any], step: int
) -> None:
    source(service, "1-0-a@4", "1-0-a@8")
    job = forked(service, init={"from_job": job_id(1), **init})
    origin = CheckpointRef(segment="1-0-a", step=step, job_id=job_id(1))
    assert job.init == origin.model_dump()
    assert job_document(job, job.parsed_spec).init == origin, "which is what the workers read"
    answer = service.client.get(f"/v1/jobs/{job.id}").json()
    assert answer["init"] == {"job_id": job_id(1), "step": step}
    plan = service.post({**BODY, "init": {"from_job": job_id(1), **init}}, query="?dry_run=true").json()
    assert (plan["begins_at"], plan["steps"]) == (step, 10)
    assert service.post(BODY, query="?dry_run=true").json()["begins_at"] == 0


def test_only_checkpoints_on_the_history_of_the_source_can_be_begun_at(service: Service) -> None:
    """What an old worker group wrote past the point where the history left it is nobody's."""
    source(service, "1-0-a@4", "1-0-a@8", state="failed", history_end={"segment": "1-0-a", "step": 6})
    assert forked(service).init == CheckpointRef(segment="1-0-a", step=4, job_id=job_id(1)).model_dump()
    assert refused(service, init={"from_job": job_id(1), "step": 8}) == [
        ("$.init.step", f"job {job_id(1)} has no checkpoint of step 8; the newest are 4")]  # fmt: skip


def test_a_source_that_is_not_there_or_has_written_nothing_is_refused_by_name(service: Service) -> None:
    assert refused(service) == [("$.init.from_job", f"there is no job {job_id(1)}")]
    source(service)
    assert refused(service) == [("$.init.from_job", f"job {job_id(1)} has no checkpoint")]
    service.store.insert(row(2, project="another"), ACCEPTED, None)
    write(service, ref("1-0-a@4"), 2)
    assert refused(service, init={"from_job": job_id(2)}) == [("$.init.from_job", f"there is no job {job_id(2)}")]
    service.store.insert(row(3, prepare_spec(), state="succeeded"), ACCEPTED, None)
    assert refused(service, init={"from_job": job_id(3)}) == [("$.init.from_job", f"job {job_id(3)} has no checkpoint")]


@pytest.mark.parametrize(
    ("init", "path"),
    [
        ({"from_job": "job-1"}, "$.init.from_job"),
        ({"from_job": "../x"}, "$.init.from_job"),
        ({"from_job": job_id(1), "step": 0}, "$.init.step"),
        ({"from_job": job_id(1), "step": "4"}, "$.init.step"),
        ({"step": 4}, "$.init.from_job"),
        ({"from_job": job_id(1), "segment": "1-0-a"}, "$.init.segment"),
    ],
)
def test_an_init_that_names_no_checkpoint_is_refused(service: Service, init: dict[str, Any], path: str) -> None:
    source(service, "1-0-a@4")
    assert [where for where, _ in refused(service, init=init)] == [path]


FITS: list[dict[str, Any]] = [
    {"steps": 5},
    {"steps": 99, "seed": 7, "optimizer": {"learning_rate": 0.1}, "schedule": {"type": "constant"}},
    {"batch": {"global_size": 64}, "resources": {"workers": 2}, "precision": "bf16", "determinism": "default"},
    {"data": {"dataset": "words", "sequence_length": 64}},
    {"data": {"dataset": "words@v2"}},
    {"data": {"dataset": "twins"}},
    {"model": {"layers": 4, "width": 128, "heads": 4}},
    {"model": {"size": "1m", "dropout": 0.5, "vocab_size": 2048}},
]


@pytest.mark.parametrize("fields", FITS)
def test_a_fork_may_train_otherwise_on_other_data_of_the_same_vocabulary(
    service: Service, fields: dict[str, Any]
) -> None:
    source(service, "1-0-a@4")
    assert forked(service, **fields).init is not None


MODEL = "the checkpoint to begin at has"
MISFITS: list[tuple[dict[str, Any], list[tuple[str, str]]]] = [
    ({"model": {"size": "3m"}}, [("$.model.layers", f"{MODEL} layers 4, not 6"),
     ("$.model.width", f"{MODEL} width 128, not 192"), ("$.model.heads", f"{MODEL} heads 4, not 6"),
     ("$.model.kv_heads", f"{MODEL} kv_heads 4, not 6"), ("$.model.ffn_width", f"{MODEL} ffn_width 344, not 512")]),
    ({"model": {"size": "1m", "bias": True}}, [("$.model.bias", f"{MODEL} bias False, not True")]),
    ({"model": {"size": "1m", "norm": "layer"}}, [("$.model.norm", f"{MODEL} norm rms, not layer")]),
    ({"data": {"dataset": "others"}}, [("$.data.dataset", f"{MODEL} a vocabulary of 2048, this dataset has 4096")]),
    ({"steps": 4}, [("$.steps", "the checkpoint to begin at is of step 4; a run of 4 steps has ended before")]),
    ({"steps": 3, "model": {"size": "1m", "tied_embeddings": False}},
     [("$.model.tied_embeddings", f"{MODEL} tied_embeddings True, not False"),
      ("$.steps", "the checkpoint to begin at is of step 4; a run of 3 steps has ended before")]),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "faults"), MISFITS)
def test_a_fork_that_the_checkpoint_does_not_fit_is_refused_with_all_its_faults(
    service: Service, fields: dict[str, Any], faults: list[tuple[str, str]]
) -> None:
    source(service, "1-0-a@4")
    assert refused(service, **fields) == faults


def test_learned_positions_are_for_sequences_of_one_length(service: Service) -> None:
    learned = {"size": "1m", "positions": "learned"}
    source(service, "1-0-a@4", spec=train_spec(model=learned))
    assert forked(service, model=learned).init is not None
    found = refused(service, model=learned, data={"dataset": "words", "sequence_length": 64})
    assert found == [
        ("$.data.sequence_length", "learned positions of the checkpoint are for sequences of 256 tokens")]  # fmt: skip


def test_a_source_whose_dataset_is_gone_is_refused_and_not_an_outage(service: Service) -> None:
    source(service, "1-0-a@4", dataset_version="v0")
    [(path, message)] = refused(service)
    assert path == "$.init.from_job"
    assert message.startswith(f"the vocabulary of job {job_id(1)} is not known any more: ")


def pinned(service: Service) -> set[CheckpointRef]:
    return service.store.pinned(job_id(1), T0 + timedelta(days=36_500))


def keeping_one(service: Service, *places: str) -> Retention:
    """Insert a source of which only the newest checkpoint is to stay; return who sees to that."""
    source(service, *places, spec=train_spec(checkpoint={"every": 4, "keep_last": 1}))
    return Retention(service.store, service.bucket, settings_for(service.folder), leases_of(service.store))


def passes(retention: Retention) -> None:
    for hours in range(1, 4):
        retention.run(T0 + timedelta(hours=hours))


def steps(service: Service, number: int = 1) -> list[int]:
    page = service.client.get(f"/v1/jobs/{job_id(number)}/checkpoints").json()
    return [checkpoint["step"] for checkpoint in page["items"]]


@pytest.mark.parametrize("ended", sorted(ENDED))
def test_what_a_fork_begins_at_stays_from_its_acceptance_to_its_end(service: Service, ended: str) -> None:
    retention = keeping_one(service, "1-0-a@2", "1-0-a@4", "1-0-a@8")
    job = forked(service, init={"from_job": job_id(1), "step": 4})
    assert pinned(service) == {ref("1-0-a@4")}
    passes(retention)
    assert steps(service) == [4, 8]
    running = service.store.apply(job, {"state": "running"})
    assert running is not None
    passes(retention)
    assert steps(service) == [4, 8], "however long it runs"
    assert service.store.apply(running, {"state": ended}) is not None
    assert pinned(service) == set()
    passes(retention)
    assert steps(service) == [8]


def test_of_two_forks_of_one_checkpoint_the_last_lets_it_go(service: Service) -> None:
    retention = keeping_one(service, "1-0-a@4", "1-0-a@8")
    init = {"from_job": job_id(1), "step": 4}
    one, two = forked(service, init=init), forked(service, init=init)
    assert service.store.apply(one, {"state": "cancelled"}) is not None
    passes(retention)
    assert steps(service) == [4, 8]
    assert service.store.apply(two, {"state": "cancelled"}) is not None
    passes(retention)
    assert steps(service) == [8]


def test_a_dry_run_and_a_refusal_keep_nothing(service: Service) -> None:
    source(service, "1-0-a@4")
    service.post({**BODY, **FROM}, query="?dry_run=true")
    refused(service, steps=4)
    assert pinned(service) == set()


def test_a_fork_that_is_sent_again_with_its_key_keeps_one_pin(service: Service) -> None:
    source(service, "1-0-a@4")
    first, again = (service.post({**BODY, **FROM}, key="once") for _ in range(2))
    assert (first.status_code, again.status_code) == (201, 200)
    job = service.store.get(first.json()["id"], "default")
    assert job is not None
    assert service.store.apply(job, {"state": "failed"}) is not None
    assert pinned(service) == set()


@pytest.mark.parametrize("lost", ["bucket", "checkpoint", "source"])
def test_a_fork_that_was_accepted_is_answered_whatever_is_lost_since(service: Service, lost: str) -> None:
    job = source(service, "1-0-a@4", state="failed")
    first = service.post({**BODY, **FROM}, key="once")
    assert first.status_code == 201
    if lost == "bucket":
        service.bucket.reachable = False
    elif lost == "checkpoint":
        service.bucket.delete([item.key for item in service.bucket.objects(JobLayout("default", job.id).prefix)])
    else:
        assert service.store.apply(job, {"deleted_at": T0}) is not None
    again = service.post({**BODY, **FROM}, key="once")
    assert (again.status_code, again.json()) == (200, first.json())


def test_a_checkpoint_that_is_just_being_deleted_is_refused_and_no_job_is_made(service: Service) -> None:
    job = source(service, "1-0-a@4")
    assert service.store.doom(job, ref("1-0-a@4"), T0)
    found = problem(service.post({**BODY, **FROM}, key="once"), 409, "conflict")
    assert "step 4" in found["detail"]
    assert "choose another" in found["detail"]
    assert [live.id for live in service.store.live()] == [job_id(1)]
    assert pinned(service) == set()
    write(service, ref("1-0-a@8"))
    assert service.post({**BODY, **FROM}, key="once").status_code == 201, "the key is still free"


def test_a_job_that_was_deleted_a_moment_ago_is_not_begun_at(service: Service) -> None:
    """Between the look at its checkpoints and the acceptance: its objects may be gone by then."""
    job = source(service, "1-0-a@4", state="failed")
    assert service.store.apply(job, {"deleted_at": T0}) is not None
    origin = CheckpointRef(segment="1-0-a", step=4, job_id=job_id(1))
    with pytest.raises(Conflict, match="just being deleted"):
        service.store.insert(row(2, init=origin.model_dump()), ACCEPTED, None)
    assert service.store.live() == []


def test_a_user_cannot_delete_what_a_live_fork_began_at(service: Service) -> None:
    source(service, "1-0-a@4", state="failed", history_end={"segment": "1-0-a", "step": 9})
    job = forked(service)
    found = problem(service.client.delete(f"/v1/jobs/{job_id(1)}/checkpoints/4"), 409, "conflict")
    assert "a live job began at it" in found["detail"]
    assert service.store.apply(job, {"state": "cancelled"}) is not None
    assert service.client.delete(f"/v1/jobs/{job_id(1)}/checkpoints/4").status_code == 204


def test_retention_looks_after_a_fork_as_after_any_job(service: Service) -> None:
    """Its first segment points into another job, which says nothing about what it has itself."""
    retention = keeping_one(service, "1-0-a@4")
    fork = row(2, train_spec(checkpoint={"every": 4, "keep_last": 1}), state="running", attempt=1)
    service.store.insert(fork, ACCEPTED, None)
    origin = CheckpointRef(segment="1-0-a", step=4, job_id=job_id(1))
    for step in (8, 12, 16):
        write(service, CheckpointRef(segment="1-0-b", step=step), 2, origin)
    assert steps(service, 2) == [8, 12, 16]
    passes(retention)
    assert (steps(service, 2), steps(service)) == ([16], [4])


def test_a_fork_can_be_forked(service: Service) -> None:
    source(service, "1-0-a@4")
    origin = CheckpointRef(segment="1-0-a", step=4, job_id=job_id(1))
    service.store.insert(row(2, state="running", attempt=1, init=origin.model_dump()), ACCEPTED, None)
    assert refused(service, init={"from_job": job_id(2)}) == [("$.init.from_job", f"job {job_id(2)} has no checkpoint")]
    write(service, ref("1-0-b@8"), 2, origin)
    assert (
        forked(service, init={"from_job": job_id(2)}).init
        == CheckpointRef(segment="1-0-b", step=8, job_id=job_id(2)).model_dump()
    )
