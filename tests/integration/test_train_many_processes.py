"""Several workers in processes of their own, joined by gloo: the same numbers as one, and the same bits after a crash.

Each scenario starts its processes once and does all that it needs in them: starting is what costs time.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

import workers.train
from api.documents import CheckpointRef, DatasetDocument, JobDocument, Manifest
from api.spec import ModelSpec
from api.storage import Bucket
from tests.training import (
    dataset_layout,
    events,
    flip_a_bit,
    history_lines,
    layout_of,
    make_dataset,
    rewrite,
    run_ranks,
    segment_names,
    settings_for,
    train_alone,
    train_job,
)
from workers.data import TokenSplit
from workers.evaluate import evaluate
from workers.model import Transformer
from workers.restore import read_checkpoint
from workers.run import Run
from workers.seeds import dropout_seed
from workers.session import Session
from workers.settings import WorkerSettings
from workers.snapshot import State
from workers.train import train

#: Some megabytes of parameters: DDP cuts its gradients into several buckets, and cuts anew after its first backward.
LARGE: dict[str, Any] = {
    "model": {"layers": 3, "width": 128, "heads": 2, "dropout": 0.1},
    "batch": {"global_size": 6, "micro_size": 1},
    "data": {"dataset": "words", "sequence_length": 16},
    "sample": None,
}
#: Eight micro-batches: a tree of three levels, however many of its leaves a worker has.
ELASTIC: dict[str, Any] = {**LARGE, "batch": {"global_size": 8, "micro_size": 1}, "determinism": "elastic"}


class Crash(Exception):
    """Stands for the death of the whole worker group."""


@pytest.fixture
def settings(storage: str, bucket: Bucket, tmp_path: Path) -> WorkerSettings:
    settings = settings_for(storage, tmp_path / "cache")
    make_dataset(bucket, settings)
    return settings


def job_for(job_id: str, world_size: int) -> JobDocument:
    return train_job(job_id, **LARGE, resources={"workers": world_size})


def crash_at(step: int) -> pytest.MonkeyPatch:
    """Let every rank's next run die after a step, once its checkpoints are written."""
    patch, original = pytest.MonkeyPatch(), workers.train.next_batch

    def next_batch(run: Run) -> object:
        if run.step == step:
            run.writer.wait()
            raise Crash
        return original(run)

    patch.setattr(workers.train, "next_batch", next_batch)
    return patch


def evaluations(session: Session, bucket: Bucket, settings: WorkerSettings) -> list[str]:
    """Return eval losses to the bit: of all sequences, of a number that leaves ranks idle and a batch half full."""
    dataset = bucket.get_document(dataset_layout().document, DatasetDocument)
    split = TokenSplit(bucket, dataset_layout(), dataset, "eval", settings.cache)
    torch.manual_seed(dropout_seed(1, 0, 0))
    model = Transformer(ModelSpec(layers=2, width=32, heads=2, dropout=0.5), dataset.vocab_size, 32)
    losses = [
        evaluate(model, split, sequences, 4, session, check=lambda fault: None, moved=lambda: None).hex()
        for sequences in (None, 37, 3)
    ]
    split.cache.close()
    return losses


def three_ranks(session: Session, storage: str, cache: str) -> list[str]:
    """Evaluate; train undisturbed; train until a crash after the second checkpoint, and resume."""
    bucket, settings = Bucket(storage), settings_for(storage, Path(cache))
    losses = evaluations(session, bucket, settings)
    train(job_for("undisturbed", 3), session, bucket, settings)
    crashed = job_for("crashed", 3)
    patch = crash_at(10)
    with pytest.raises(Crash):
        train(crashed, session, bucket, settings)
    patch.undo()
    session.gather(True)
    resumed = Session(attempt=1, restart=1, rank=session.rank, world_size=session.world_size)
    train(crashed, resumed, bucket, settings)
    return losses


def two_ranks(session: Session, storage: str, cache: str) -> dict[str, Any]:
    """Evaluate; train; then train with a shard that only the first rank finds damaged."""
    bucket, settings = Bucket(storage), settings_for(storage, Path(cache))
    losses = evaluations(session, bucket, settings)
    train(job_for("two", 2), session, bucket, settings)
    session.gather(True)
    if session.leads:
        for index in range(3):
            rewrite(bucket, dataset_layout().shard("train", index), flip_a_bit)
    session.gather(True)
    own_cache = settings_for(storage, Path(cache) if session.rank else Path(cache) / "cold")
    result = train(job_for("damaged", 2), session, bucket, own_cache)
    return {"losses": losses, "result": result.model_dump(mode="json", exclude={"created_at"})}


def elastic_job(job_id: str, world_size: int) -> JobDocument:
    return train_job(job_id, **ELASTIC, resources={"workers": world_size})


def elastic_ranks(session: Session, storage: str, cache: str, attempt: int, crash_step: int | None) -> None:
    """Go on with the elastic job at this world size, to its end or to a crash."""
    bucket, settings = Bucket(storage), settings_for(storage, Path(cache))
    own = Session(attempt, restart=0, rank=session.rank, world_size=session.world_size)
    if crash_step is None:
        train(elastic_job("elastic", session.world_size), own, bucket, settings)
        return
    patch = crash_at(crash_step)
    with pytest.raises(Crash):
        train(elastic_job("elastic", session.world_size), own, bucket, settings)
    patch.undo()


def last_state(bucket: Bucket, job_id: str) -> State:
    job = job_for(job_id, 1)
    point = CheckpointRef(segment=segment_names(bucket, job)[-1], step=12)
    return read_checkpoint(bucket, layout_of(job), point).state


def test_three_workers_count_as_one_and_resume_to_the_bit(
    bucket: Bucket, settings: WorkerSettings, tmp_path: Path
) -> None:
    answers = run_ranks(3, tmp_path / "three", three_ranks, settings.storage, str(settings.cache))
    assert answers == [evaluations(Session(attempt=1, restart=0), bucket, settings)] * 3

    assert (8, "resumed") in events(bucket, job_for("crashed", 3), segment_names(bucket, job_for("crashed", 3))[-1])
    assert history_lines(bucket, job_for("crashed", 3)) == history_lines(bucket, job_for("undisturbed", 3))
    undisturbed, crashed = last_state(bucket, "undisturbed"), last_state(bucket, "crashed")
    assert set(undisturbed) == set(crashed)
    assert [name for name in undisturbed if not undisturbed[name].equal(crashed[name])] == []

    train_alone(job_for("alone", 1), bucket, settings)
    assert_same_training(history_lines(bucket, job_for("alone", 1)), history_lines(bucket, job_for("undisturbed", 3)))


def test_two_workers_write_a_fair_share_each_and_fail_together(
    bucket: Bucket, settings: WorkerSettings, tmp_path: Path
) -> None:
    first, second = run_ranks(2, tmp_path / "two", two_ranks, settings.storage, str(settings.cache))
    expected = evaluations(Session(attempt=1, restart=0), bucket, settings)
    assert (first["losses"], second["losses"]) == (expected, expected)

    job = job_for("two", 2)
    checkpoint = layout_of(job).segment(segment_names(bucket, job)[-1]).checkpoint(12)
    sizes = [part.size for part in bucket.get_document(checkpoint.manifest, Manifest).parts]
    assert len(sizes) == 2
    assert abs(sizes[0] - sizes[1]) < 0.1 * sum(sizes)
    assert sum(sizes) > 5 * 2**20

    assert first["result"] == second["result"]
    assert (first["result"]["outcome"], first["result"]["reason"]) == ("failed", "invalid_data")
    assert dataset_layout().shard("train", 0).rpartition("/")[0] in first["result"]["message"]


def test_an_elastic_run_has_the_bits_of_one_worker_at_every_world_size(
    bucket: Bucket, settings: WorkerSettings, tmp_path: Path
) -> None:
    """One worker, then four, then two, each going on where the one before crashed."""
    train_alone(elastic_job("steady", 1), bucket, settings)
    patch = crash_at(6)
    with pytest.raises(Crash):
        train_alone(elastic_job("elastic", 1), bucket, settings)
    patch.undo()
    where = (settings.storage, str(settings.cache))
    run_ranks(4, tmp_path / "four", elastic_ranks, *where, 2, 10)
    run_ranks(2, tmp_path / "two", elastic_ranks, *where, 3, None)

    job = elastic_job("elastic", 1)
    spans = segment_names(bucket, job)
    assert [events(bucket, job, segment)[0] for segment in spans[1:]] == [(4, "resumed"), (8, "resumed")]
    assert history_lines(bucket, job) == history_lines(bucket, elastic_job("steady", 1))
    steady, elastic = last_state(bucket, "steady"), last_state(bucket, "elastic")
    assert set(steady) == set(elastic)
    assert [name for name in steady if not steady[name].equal(elastic[name])] == []


def assert_same_training(one: list[tuple[int, dict[str, Any]]], other: list[tuple[int, dict[str, Any]]]) -> None:
    """Compare metric lines within floating-point tolerance: sums over ranks are taken in another order."""
    assert [step for step, _ in one] == [step for step, _ in other]
    for (_, ours), (_, theirs) in zip(one, other, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
