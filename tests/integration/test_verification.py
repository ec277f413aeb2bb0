"""`lockstep checkpoints verify` through the real application and a real store, on what a real training has written."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from api.cli import app as cli
from api.client import Client
from api.documents import JobDocument
from api.layout import CheckpointLayout
from api.spec import TrainSpec
from api.storage import Bucket
from tests.integration.served import KEY, Served
from tests.training import (
    drop,
    flip_a_bit,
    layout_of,
    make_dataset,
    rewrite,
    segment_names,
    settings_for,
    train_alone,
    train_job,
)

JOB = "job-01h4x5y6z7abcdefghjk"


@pytest.fixture
def trained(bucket: Bucket, storage: str, tmp_path: Path) -> JobDocument:
    """A job that was trained, with checkpoints at 4, 8 and 12."""
    settings = settings_for(storage, tmp_path / "cache")
    make_dataset(bucket, settings)
    job = train_job(JOB)
    assert train_alone(job, bucket, settings).outcome == "succeeded"
    return job


@pytest.fixture
def url(trained: JobDocument, served: Served) -> Iterator[str]:
    """A control plane that knows the job; nothing is pinned when it is done."""
    assert isinstance(trained.spec, TrainSpec)
    served.accept(trained.spec, JOB, segment_names(served.bucket, trained)[-1], 12)
    yield served.url
    assert not served.pinned(JOB)


def verify(url: str, *arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "400"}).invoke(
        cli, ["checkpoints", "verify", JOB, *arguments], obj=lambda: Client(url, KEY)
    )


def test_what_a_training_wrote_is_well_until_a_byte_of_it_is_not(
    trained: JobDocument, url: str, bucket: Bucket
) -> None:
    result = verify(url)
    assert result.exit_code == 0, result.output
    rows = [line.split()[:5] for line in result.stdout.splitlines()[2:]]
    assert [(line[0], line[1], line[4]) for line in rows] == [(step, "1", "well:") for step in ("4", "8", "12")]

    (segment,) = segment_names(bucket, trained)
    at = layout_of(trained).segment(segment).checkpoint(8)
    for damage, (name, kind) in DAMAGES.items():
        whole = {item.key: bucket.get(item.key) for item in bucket.objects(at.prefix)}
        damage(bucket, at)
        result = verify(url, "-o", "json")
        assert result.exit_code == 1, result.output
        assert told(result, 8) == ("damaged", [(name, kind)])
        assert told(result, 4) == told(result, 12) == ("well", [])
        assert verify(url, "--step", "8").exit_code == 1
        assert verify(url, "--step", "12").exit_code == 0
        for key, body in whole.items():
            bucket.put(key, body)
    assert verify(url).exit_code == 0


PART = "part-00000-of-00001.safetensors"
DAMAGES: dict[Callable[[Bucket, CheckpointLayout], None], tuple[str, str]] = {
    lambda bucket, at: rewrite(bucket, at.part(0, 1), flip_a_bit): (PART, "altered"),
    lambda bucket, at: rewrite(bucket, at.part(0, 1), lambda body: body[:-1]): (PART, "short"),
    lambda bucket, at: rewrite(bucket, at.part(0, 1), lambda body: b""): (PART, "short"),
    lambda bucket, at: rewrite(bucket, at.part(0, 1), lambda body: body + b"x"): (PART, "altered"),
    lambda bucket, at: drop(bucket, at.part(0, 1)): (PART, "missing"),
    lambda bucket, at: rewrite(bucket, at.manifest, flip_a_bit): ("manifest.json", "altered"),
}


def told(result: Result, step: int) -> tuple[str, list[tuple[str, str]]]:
    """Return the verdict on a checkpoint, and what is wrong with which object."""
    found: list[dict[str, Any]] = json.loads(result.stdout)["checkpoints"]
    checkpoint = next(one for one in found if one["step"] == step)
    return checkpoint["verdict"], [(damage["name"], damage["kind"]) for damage in checkpoint["damage"]]
