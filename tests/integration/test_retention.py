"""Retention of real checkpoints in a real store: what stays is enough to go on as if nothing had been deleted."""

import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from api.documents import JobDocument, now
from api.spec import TrainSpec
from api.storage import Bucket
from service.retention import Retention
from service.store import Store
from tests.fakes import ACCEPTED, T0, leases_of, new_store, row
from tests.fakes import settings_for as service_settings
from tests.integration.test_train_one_process import assert_same_bits, crash, state_at
from tests.training import (
    history_lines,
    layout_of,
    make_dataset,
    manifests,
    segment_names,
    settings_for,
    train_alone,
    train_job,
)
from workers.settings import WorkerSettings


@pytest.fixture
def settings(storage: str, bucket: Bucket, tmp_path: Path) -> WorkerSettings:
    """A bucket with a dataset, and an empty cache."""
    settings = settings_for(storage, tmp_path / "cache")
    make_dataset(bucket, settings)
    return settings


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = new_store(tmp_path)
    yield made
    made._engine.dispose()


def accept(store: Store, job: JobDocument) -> None:
    assert isinstance(job.spec, TrainSpec)
    store.insert(row(1, job.spec, id=job.id, state="running", attempt=1), ACCEPTED, None)


def change(store: Store, job: JobDocument, **changes: Any) -> None:
    found = store.get(job.id, job.project)
    assert found is not None
    assert store.apply(found, changes) is not None


def retain(store: Store, bucket: Bucket, folder: Path) -> None:
    """Let retention come to its end: each pass is longer after the one before than the grace."""
    retention = Retention(store, bucket, service_settings(folder), leases_of(store))
    for hours in range(4):
        retention.run(T0 + timedelta(hours=hours))


def steps(bucket: Bucket, job: JobDocument) -> list[int]:
    return [step for _, step in manifests(bucket, job)]


def leftovers(bucket: Bucket, job: JobDocument) -> set[str]:
    """Return the folders of checkpoints that hold anything but have no manifest."""
    keys = [item.key for item in bucket.objects(layout_of(job).segments) if "/step-" in item.key]
    complete = {key.rpartition("/")[0] for key in keys if key.endswith("/manifest.json")}
    return {key.rpartition("/")[0] for key in keys} - complete


def test_a_run_goes_on_from_what_retention_left_and_ends_the_same(
    bucket: Bucket, settings: WorkerSettings, store: Store, tmp_path: Path
) -> None:
    whole = train_job("whole", steps=24)
    train_alone(whole, bucket, settings)
    job = train_job("kept", steps=24, checkpoint={"every": 4, "keep_last": 2, "keep_best": 1})
    accept(store, job)
    first = crash(job, bucket, settings, step=18)
    bucket.put(layout_of(job).segment(first).checkpoint(20).part(0, 1), b"half of it")
    assert steps(bucket, job) == [4, 8, 12, 16]
    retain(store, bucket, tmp_path)
    losses = {step: values["eval_loss"] for step, values in history_lines(bucket, job) if "eval_loss" in values}
    best = min((4, 8, 12, 16), key=lambda step: (losses[step], -step))
    assert steps(bucket, job) == sorted({12, 16, best})
    assert len(leftovers(bucket, job)) == 1, "it might still be being written"

    train_alone(job, bucket, settings, restart=1)
    last = segment_names(bucket, job)[-1]
    change(store, job, state="succeeded", history_end={"segment": last, "step": 24})
    retain(store, bucket, tmp_path)
    (whole_segment,) = segment_names(bucket, whole)
    assert_same_bits(state_at(bucket, job, last, 24), state_at(bucket, whole, whole_segment, 24))
    assert history_lines(bucket, job) == history_lines(bucket, whole)
    losses = {step: values["eval_loss"] for step, values in history_lines(bucket, job) if "eval_loss" in values}
    assert {step for _, step in manifests(bucket, job)} >= {16, 20, 24}, "the two newest, and where it went on"
    assert set(steps(bucket, job)) <= {16, 20, 24, best, min(losses, key=lambda step: (losses[step], -step))}
    assert not leftovers(bucket, job)
    assert store.retained() == []


def test_retention_without_a_pause_harms_no_run(
    bucket: Bucket, settings: WorkerSettings, store: Store, tmp_path: Path
) -> None:
    """It looks and deletes as often as it can, with no grace to speak of, while the run writes and is evaluated."""
    job = train_job("busy", steps=30, checkpoint={"every": 2, "keep_last": 1}, evaluate={"every": 30, "sequences": 10})
    accept(store, job)
    clocks = {"start_deadline": 0.0, "retention_grace": 1e-6, "retention_interval": 1e-6}
    retention = Retention(store, bucket, service_settings(tmp_path, **clocks), leases_of(store))
    ended: list[str] = []

    def train() -> None:
        crash(job, bucket, settings, step=15)
        ended.append(train_alone(job, bucket, settings, restart=1).outcome)

    run = threading.Thread(target=train)
    run.start()
    while run.is_alive():
        retention.run(now())
    run.join()
    assert ended == ["succeeded"]
    for _ in range(3):
        retention.run(now())
    first, last = segment_names(bucket, job)
    assert manifests(bucket, job) == [(first, 14), (last, 30)]
    assert len([e for e in store.events(job.id, after=0, limit=99) if e.type == "retention"]) == 13
