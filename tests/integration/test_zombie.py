"""A frozen attempt that wakes after its successor has finished changes nothing that anyone reads."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from api.documents import JobDocument
from api.spec import TrainSpec
from api.storage import Bucket
from tests.integration.served import Served, until
from tests.training import layout_of, make_dataset, manifests, result_of, segment_names, settings_for, train_job
from workers.restore import newest_valid, read_segments
from workers.settings import WorkerSettings

ROOT = Path(__file__).parents[2]
JOB = "job-01h4x5y6z7abcdefghjk"
STEPS = 240


@pytest.fixture
def settings(storage: str, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorkerSettings:
    settings = settings_for(storage, tmp_path / "cache")
    monkeypatch.setenv("LOCKSTEP_CACHE", str(settings.cache))
    monkeypatch.setenv("LOCKSTEP_STREAM_INTERVAL", "0.1")
    make_dataset(bucket, settings)
    return settings


def start(job: JobDocument, folder: Path) -> psutil.Popen:
    """Start an attempt in a process of its own, which nobody tells to stop."""
    path = folder / "job.json"
    path.write_text(job.model_dump_json())
    command = [sys.executable, "-m", "workers.local", str(path)]
    return psutil.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def all_that_is_read(served: Served, job: JobDocument, folder: Path) -> dict[str, Any]:
    """Return what users see of a job, and where a resume or a fork of it would begin."""
    assert served.download(job.id, folder).exit_code == 0
    end = served.client.get(job.id)
    return {
        "job": end.model_dump(),
        "events": served.client.events(job.id).items,
        "curve": served.client.metrics(job.id).items,
        "checkpoints": served.client.checkpoints(job.id).items,
        "export": {path.name: path.read_bytes() for path in folder.iterdir()},
        "next start": newest_valid(served.bucket, layout_of(job), read_segments(served.bucket, layout_of(job)))[
            0
        ].point,
        "history": segment_names(served.bucket, job),
    }


def test_what_a_zombie_writes_is_read_by_nobody(
    served: Served, bucket: Bucket, settings: WorkerSettings, tmp_path: Path
) -> None:
    evaluate, checkpoint = {"every": 100, "sequences": 4}, {"every": 20}
    job = train_job(JOB, steps=STEPS, evaluate=evaluate, checkpoint=checkpoint, sample=None)
    assert isinstance(job.spec, TrainSpec)
    old = start(job, tmp_path)
    try:
        until(lambda: [step for _, step in manifests(bucket, job) if step >= 40], 60)
        old.suspend()
        left = max(step for _, step in manifests(bucket, job))
        assert left < STEPS, "it still has something to do when it wakes"
        assert start(job, tmp_path).wait(120) == 0
        first, second = segment_names(bucket, job)
        served.accept(job.spec, job.id, second, STEPS)
        before = all_that_is_read(served, job, tmp_path / "before")

        old.resume()
        assert old.wait(120) == 0
    finally:
        if old.poll() is None:
            old.kill()
    assert (first, STEPS) in manifests(bucket, job), "it went on to its own end, and wrote all that it had to write"
    assert result_of(bucket, job, first).outcome == "succeeded"
    assert all_that_is_read(served, job, tmp_path / "after") == before
