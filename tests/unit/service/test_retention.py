"""Retention on a bucket and a database: what it deletes and never deletes, also where it crashes."""

import logging
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from api.documents import CheckpointRef, Manifest, Receipt
from api.errors import Conflict, NotFound
from api.layout import JobLayout
from api.manifest import sealed
from api.spec import TrainSpec
from service.auth import Principal
from service.jobs import Jobs
from service.retention import Folder, Retention
from service.rows import JobRow
from tests.checkpoints import JOB, folder, ref, segment
from tests.fakes import (
    ACCEPTED,
    T0,
    Crash,
    FakeRay,
    MemoryBucket,
    World,
    job_id,
    leases_of,
    new_store,
    prepare_spec,
    row,
    settings_for,
    train_spec,
)
from tests.lines import Lines

pytestmark = pytest.mark.database


class Kept:
    """A job in a bucket and a database, and a control plane that looks after its checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.store, self.bucket = new_store(folder), MemoryBucket()
        self.settings = settings_for(folder, retention_interval=1e-6)  # nobody waits for a lease
        self.now = T0
        self.restart()

    def restart(self) -> None:
        """The control plane comes up again and remembers nothing."""
        self.retention = Retention(self.store, self.bucket, self.settings, leases_of(self.store))

    def add(self, number: int = 1, keep_last: int | None = 1, state: str = "running", **fields: Any) -> JobRow:
        spec: TrainSpec = train_spec(checkpoint={"every": 4, "keep_last": keep_last})
        job = row(number, spec, state=state, attempt=1, **fields)
        self.store.insert(job, ACCEPTED, None)
        return job

    def write(self, *texts: str, number: int = 1) -> None:
        """Write checkpoints and what they stand on."""
        layout = JobLayout("default", job_id(number))
        for found in map(folder, texts):
            at = layout.segment(found.at.segment)
            if at.document not in self.bucket.content:
                self.bucket.put_document(at.document, segment(found.at.segment))
            checkpoint = at.checkpoint(found.at.step)
            self.bucket.put(checkpoint.part(0, 1), b"weights")
            if found.committed:
                self.bucket.put_document(checkpoint.manifest, manifest(found))

    def passes(self, seconds: float = 1000, count: int = 3) -> None:
        for _ in range(count):
            self.now += timedelta(seconds=seconds)
            self.retention.run(self.now)

    def crash_at(self, effect: int) -> list[str]:
        """Let the process die at an effect on the bucket, counted from 0; return where the effects are noted."""
        effects: list[str] = []

        def hook(name: str) -> None:
            effects.append(name)
            if len(effects) == effect + 1:
                raise Crash

        self.bucket.hook = hook
        return effects

    def folders(self, number: int = 1) -> set[str]:
        prefix = JobLayout("default", job_id(number)).segments
        keys = [key.removeprefix(prefix) for key in self.bucket.content if key.startswith(prefix)]
        return {
            key.rpartition("/")[0].replace("/step-", "@").replace("@0000000", "@") for key in keys if "step-" in key
        }

    def job(self, number: int = 1) -> JobRow:
        found = self.store.get(job_id(number), "default")
        assert found is not None
        return found

    def events(self, number: int = 1) -> list[str]:
        found = self.store.events(job_id(number), after=0, limit=100)
        return [event.message for event in found if event.type == "retention"]


def manifest(found: Folder) -> Manifest:
    part = Receipt(rank=0, name="part-00000-of-00001.safetensors", size=7, sha256="0" * 64)
    metrics = {} if found.eval_loss is None else {"eval_loss": found.eval_loss}
    return Manifest(
        job_id=JOB,
        segment=found.at.segment,
        step=found.at.step,
        world_size=1,
        parts=[part],
        metrics=metrics,
        created_at=T0,
    )


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    made = Kept(tmp_path)
    yield made
    made.store._engine.dispose()


def test_surplus_goes_after_the_grace_and_the_user_is_told(kept: Kept) -> None:
    kept.add(keep_last=2)
    kept.write("1-0-a@1", "1-0-a@2", "1-0-a@3", "1-0-a@4?")
    kept.passes(count=1)
    assert [mark.at for mark in kept.store.marks(JOB)] == [ref("1-0-a@1")]
    kept.passes(seconds=899, count=1)
    assert "1-0-a@1" in kept.folders()
    kept.passes(seconds=11, count=1)
    assert kept.folders() == {"1-0-a@2", "1-0-a@3", "1-0-a@4"}
    assert kept.events() == ["step 1: checkpoint deleted (retention: keep_last 2)"]
    assert kept.store.marks(JOB) == []
    kept.write("1-0-a@4")
    kept.passes()
    assert kept.folders() == {"1-0-a@3", "1-0-a@4"}


def test_the_best_stays_by_what_the_manifests_say(kept: Kept) -> None:
    spec = train_spec(checkpoint={"every": 4, "keep_best": 1}, evaluate={"every": 4})
    kept.store.insert(row(1, spec, state="running", attempt=1), ACCEPTED, None)
    kept.write("1-0-a@1=2", "1-0-a@2=1", "1-0-a@3=3", "1-0-a@4=2")
    kept.passes()
    assert kept.folders() == {"1-0-a@2", "1-0-a@4"}


def test_leftovers_go_even_where_all_checkpoints_stay_once_the_job_has_ended(kept: Kept) -> None:
    kept.add(keep_last=None)
    kept.write("1-0-a@1", "1-0-a@2?")
    kept.bucket.put_document(
        JobLayout("default", JOB).segment("1-1-b").document, segment("1-1-b", "1-0-a@1")
    )  # a worker was lost
    kept.write("1-1-b@2", "1-1-b@3?")
    kept.passes()
    assert kept.folders() == {"1-0-a@1", "1-0-a@2", "1-1-b@2", "1-1-b@3"}, "it is not worth a look before"
    end = CheckpointRef(segment="1-1-b", step=2).model_dump()
    assert kept.store.apply(kept.job(), {"state": "succeeded", "history_end": end}) is not None
    kept.passes()
    assert kept.folders() == {"1-0-a@1", "1-1-b@2"}
    assert kept.events() == [], "it never was a checkpoint"


def test_nothing_goes_while_an_attempt_starts_however_old_the_marks_are(kept: Kept) -> None:
    kept.add()
    kept.write("1-0-a@1", "1-0-a@2")
    kept.passes(count=1)
    assert kept.store.apply(kept.job(), {"state": "starting", "attempt": 2}) is not None
    kept.passes()
    assert kept.folders() == {"1-0-a@1", "1-0-a@2"}


def test_an_attempt_that_begins_between_look_and_deletion_stops_it(kept: Kept) -> None:
    stale = kept.add()
    assert kept.store.apply(stale, {"state": "recovering"}) is not None
    assert not kept.store.doom(stale, ref("1-0-a@1"), T0)
    assert kept.store.apply(kept.job(), {"state": "running", "attempt": 2}) is not None
    assert not kept.store.doom(stale, ref("1-0-a@1"), T0)
    assert kept.store.marks(JOB) == []
    assert kept.store.doom(kept.job(), ref("1-0-a@1"), T0)


def test_a_pin_keeps_a_checkpoint_until_it_is_let_go_of_or_ends(kept: Kept) -> None:
    kept.add()
    kept.write("1-0-a@1", "1-0-a@2", "1-0-a@3")
    kept.passes(count=1)
    one = kept.store.pin(JOB, ref("1-0-a@1"), "download", kept.now, kept.now + timedelta(hours=9))
    assert one is not None
    two = kept.store.pin(JOB, ref("1-0-a@2"), "download", kept.now, kept.now + timedelta(hours=1))
    assert two is not None
    kept.passes()
    assert kept.folders() == {"1-0-a@1", "1-0-a@2", "1-0-a@3"}
    kept.passes(seconds=1200)
    assert kept.folders() == {"1-0-a@1", "1-0-a@3"}
    kept.store.hold(one, kept.now + timedelta(hours=9))
    kept.passes(seconds=10_000)
    assert "1-0-a@1" in kept.folders()
    kept.store.unpin(one)
    kept.passes()
    assert kept.folders() == {"1-0-a@3"}


def test_a_pin_that_comes_between_look_and_deletion_stops_it_and_a_doomed_one_takes_none(kept: Kept) -> None:
    job = kept.add()
    at = ref("1-0-a@1")
    pin = kept.store.pin(JOB, at, "download", T0, T0 + timedelta(hours=1))
    assert pin is not None
    assert not kept.store.doom(job, at, T0)
    kept.store.unpin(pin)
    assert kept.store.doom(job, at, T0)
    assert kept.store.pin(JOB, at, "download", T0, T0 + timedelta(hours=1)) is None
    assert kept.store.pin(JOB, ref("1-0-a@2"), "download", T0, T0 + timedelta(hours=1)) is not None


def test_the_manifest_goes_first_and_alone(kept: Kept) -> None:
    kept.add()
    kept.write("1-0-a@1", "1-0-a@2")
    states: list[tuple[bool, bool]] = []
    checkpoint = JobLayout("default", JOB).segment("1-0-a").checkpoint(1)

    def watch(effect: str) -> None:
        if "delete" in effect:
            states.append((checkpoint.manifest in kept.bucket.content, checkpoint.part(0, 1) in kept.bucket.content))

    kept.bucket.hook = watch
    kept.passes()
    assert states == [(True, True), (False, True), (False, True), (False, False)]


@pytest.mark.parametrize("effect", range(9))
def test_a_crash_at_any_point_changes_nothing_in_the_end(kept: Kept, effect: int) -> None:
    kept.add()
    kept.write("1-0-a@1", "1-0-a@2", "1-0-a@3")
    effects = kept.crash_at(effect)
    try:
        kept.passes()
        assert len(effects) == 8 == effect, "every effect has its crash"
    except Crash:
        kept.restart()
        kept.passes()
    assert kept.folders() == {"1-0-a@3"}
    assert kept.events() == [f"step {step}: checkpoint deleted (retention: keep_last 1)" for step in (1, 2)]
    assert kept.store.marks(JOB) == []


def test_a_job_that_ended_is_looked_at_until_it_is_in_order(kept: Kept) -> None:
    kept.add(state="failed", history_end={"segment": "1-0-a", "step": 2})
    kept.write("1-0-a@1", "1-0-a@2", "1-0-a@3?")
    kept.passes(count=2)
    assert kept.job().retention == "active"
    kept.passes(count=1)
    assert kept.folders() == {"1-0-a@2"}
    assert kept.job().retention == "settled"
    assert kept.store.retained() == []


def test_a_preparation_and_a_deleted_job_are_not_looked_at(kept: Kept) -> None:
    kept.store.insert(row(1, prepare_spec(), state="running"), ACCEPTED, None)
    kept.add(2, state="failed")
    kept.write("1-0-a@1", "1-0-a@2", number=2)
    assert kept.store.apply(kept.job(2), {"deleted_at": T0}) is not None
    assert kept.store.retained() == []
    kept.passes()
    assert kept.folders(2) == {"1-0-a@1", "1-0-a@2"}


def loosely_sealed(stored: bytes) -> bytes:
    """Return a manifest of which one figure was altered after it was sealed."""
    return sealed(Manifest.model_validate_json(stored)).replace(b'"step":3', b'"step":7')


@pytest.mark.parametrize("damage", [lambda stored: b'{"schema_version": 2}', loosely_sealed])
def test_a_manifest_that_cannot_be_read_is_neither_counted_nor_deleted(
    kept: Kept, damage: Callable[[bytes], bytes]
) -> None:
    kept.add()
    kept.write("1-0-a@1", "1-0-a@2", "1-0-a@3")
    manifest = JobLayout("default", JOB).segment("1-0-a").checkpoint(3).manifest
    kept.bucket.put(manifest, damage(kept.bucket.get(manifest)))
    kept.passes()
    assert kept.folders() == {"1-0-a@2", "1-0-a@3"}


def test_the_trouble_of_one_job_stops_no_other(kept: Kept, lines: Lines) -> None:
    for number in (1, 2, 3):
        kept.add(number)
        kept.write("1-0-a@1", "1-0-a@2", number=number)
    kept.bucket.put(JobLayout("default", job_id(1)).segment("1-0-a").document, b"{")
    broken = {**kept.job(2).spec, "steps": "many"}
    assert kept.store.apply(kept.job(2), {"spec": broken}) is not None
    kept.passes()
    assert [kept.folders(number) for number in (1, 2, 3)] == [{"1-0-a@1", "1-0-a@2"}] * 2 + [{"1-0-a@2"}]
    assert {line["job"] for line in lines.objects} == {job_id(1), job_id(2)}
    assert all("its checkpoints are left as they are" in line["message"] for line in lines.objects)


def test_a_folder_that_no_database_could_mark_stops_no_other(kept: Kept) -> None:
    kept.add(1, keep_last=None, state="succeeded")
    kept.add(2)
    kept.write("1-0-a@4", number=1)
    kept.bucket.put(JobLayout("default", job_id(1)).segments + "1-0-a/step-99999999999999999999/part", b"")
    kept.write("1-0-a@4", "1-0-a@8", number=2)
    kept.passes()
    assert kept.folders(2) == {"1-0-a@8"}


def test_a_bucket_that_does_not_answer_is_asked_once_in_a_pass(kept: Kept, caplog: pytest.LogCaptureFixture) -> None:
    """Each question takes its timeout, and the reconciler waits meanwhile."""
    for number in (1, 2, 3):
        kept.add(number)
        kept.write("1-0-a@1", "1-0-a@2", number=number)
    kept.bucket.reachable = False
    with caplog.at_level(logging.WARNING):
        kept.passes(count=1)
    assert len(caplog.messages) == 1
    kept.bucket.reachable = True
    kept.passes()
    assert [kept.folders(number) for number in (1, 2, 3)] == [{"1-0-a@2"}] * 3


WHO = Principal("key-1", "default")


def use_cases(kept: Kept) -> Jobs:
    return Jobs(kept.store, kept.bucket, FakeRay().backend(), kept.settings)


def test_a_user_deletes_a_checkpoint_of_an_ended_job(kept: Kept) -> None:
    kept.add(keep_last=None)
    kept.write("1-0-a@1", "1-0-a@2")
    jobs = use_cases(kept)
    with pytest.raises(Conflict, match="only a checkpoint of an ended job can be deleted"):
        jobs.delete_checkpoint(WHO, JOB, 1)
    assert kept.store.apply(kept.job(), {"state": "succeeded"}) is not None
    with pytest.raises(NotFound):
        jobs.delete_checkpoint(WHO, JOB, 3)
    jobs.delete_checkpoint(WHO, JOB, 2)
    assert kept.folders() == {"1-0-a@1"}
    assert kept.events() == ["step 2: checkpoint deleted (on request)"]
    with pytest.raises(NotFound):
        jobs.delete_checkpoint(WHO, JOB, 2)
    assert kept.store.marks(JOB) == []


def test_a_download_holds_off_the_users_own_deletion(kept: Kept) -> None:
    kept.add(state="succeeded")
    kept.write("1-0-a@1")
    far = T0 + timedelta(days=36_500)  # the use case goes by the clock
    pin = kept.store.pin(JOB, ref("1-0-a@1"), "download", T0, far)
    assert pin is not None
    with pytest.raises(Conflict, match="is being downloaded"):
        use_cases(kept).delete_checkpoint(WHO, JOB, 1)
    kept.store.unpin(pin)
    use_cases(kept).delete_checkpoint(WHO, JOB, 1)
    assert kept.folders() == set()


@pytest.mark.parametrize("settled", ["active", "settled"])
@pytest.mark.parametrize("effect", range(4))
def test_retention_ends_a_users_deletion_that_a_crash_cut_off(kept: Kept, effect: int, settled: str) -> None:
    kept.add(keep_last=None, state="succeeded", retention=settled)
    kept.write("1-0-a@1", "1-0-a@2")
    kept.crash_at(effect)
    with pytest.raises(Crash):
        use_cases(kept).delete_checkpoint(WHO, JOB, 2)
    kept.passes()
    assert kept.folders() == {"1-0-a@1"}
    assert kept.events() == ["step 2: checkpoint deleted (on request)"]
    assert kept.store.retained() == []


def test_the_objects_of_a_deleted_job_wait_for_its_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, monkeypatch)
    job = row(1, state="failed")
    world.store.insert(job, ACCEPTED, None)
    world.bucket.put(f"{world.layout().prefix}job.json", b"{}")
    pin = world.store.pin(JOB, ref("1-0-a@1"), "download", world.now, world.now + timedelta(hours=1))
    assert pin is not None
    assert world.store.apply(job, {"deleted_at": world.now}) is not None
    world.passes(3)
    assert world.bucket.content
    world.store.unpin(pin)
    world.passes()
    assert not world.bucket.content
    world.store._engine.dispose()
