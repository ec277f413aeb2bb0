"""The ways of the throughput benchmark in a few steps, so that they cannot rot; no verdict on their speed."""

from pathlib import Path

import pytest
import yaml

from api.spec import ClipSpec, TrainSpec
from api.storage import Bucket
from tests.bench import plain_torch as peer
from tests.bench.handwritten import EXAMPLE
from tests.bench.ways import job_document, our_loop, script, spec
from tests.training import dataset_layout, make_dataset, settings_for


@pytest.fixture
def shard(storage: str, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A token shard of the prepared dataset, as a file."""
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))
    make_dataset(bucket, settings_for(storage, tmp_path / "cache"))
    path = tmp_path / "shard.bin"
    path.write_bytes(bucket.get(dataset_layout().shard("train", 0)))
    return path


def test_every_way_trains_and_the_two_peers_train_the_same_model(shard: Path, storage: str, bucket: Bucket) -> None:
    changes = {"data": {"dataset": "words", "sequence_length": 128}, "log_every": 2}
    job = job_document("short", spec(4, 1, **changes), "v1")
    assert our_loop(bucket, storage, job, skip=2) > 0
    ours, theirs = (script(name, shard, steps=4, skip=2) for name in ("handwritten", "plain_torch"))
    assert ours["tokens_per_second"] > 0
    assert theirs["tokens_per_second"] > 0
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert ours["parameters"] == theirs["parameters"]


def test_the_peer_has_the_examples_figures() -> None:
    example = TrainSpec.model_validate(yaml.safe_load(EXAMPLE.read_text()))
    model, optimizer, schedule = example.model, example.optimizer, example.schedule
    assert (model.layers, model.width, model.heads, model.ffn_width) == (peer.LAYERS, peer.WIDTH, peer.HEADS, peer.FFN)
    assert (example.data.sequence_length, example.micro_batch, example.batch.global_size) == (
        peer.T,
        peer.B,
        2 * peer.B,
    )
    assert (optimizer.learning_rate, optimizer.betas, optimizer.weight_decay) == (
        peer.LEARNING_RATE,
        peer.BETAS,
        peer.DECAY,
    )
    assert (schedule.type, schedule.warmup_steps, schedule.floor) == ("cosine", peer.WARMUP, peer.FLOOR)
    assert (example.clip, model.dropout) == (ClipSpec(threshold=peer.CLIP), 0.0)
