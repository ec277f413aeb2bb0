"""Data that is damaged, missing or too little ends a run with an outcome that says what and where; never silently."""

import hashlib
import json
import threading
from pathlib import Path

import pytest
import torch

from api.jobs import Reason
from api.storage import Bucket
from tests.training import (
    dataset_layout,
    drop,
    flip_a_bit,
    history_lines,
    make_dataset,
    result_of,
    rewrite,
    segment_names,
    settings_for,
    train_alone,
    train_job,
)
from workers.cache import CacheFolder
from workers.data import TokenSplit, TrainBatches
from workers.settings import WorkerSettings


@pytest.fixture
def settings(storage: str, bucket: Bucket, tmp_path: Path) -> WorkerSettings:
    """A bucket with a dataset, and an empty cache."""
    settings = settings_for(storage, tmp_path / "cache")
    make_dataset(bucket, settings)
    return settings


def failure(bucket: Bucket, settings: WorkerSettings, **changes: object) -> str:
    """Train; return the message of an outcome that no retry can mend."""
    job = train_job("unlucky", **changes)
    result = train_alone(job, bucket, settings)
    assert (result.outcome, result.reason) == ("failed", Reason.INVALID_DATA)
    assert result_of(bucket, job, segment_names(bucket, job)[-1]) == result
    return result.message


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_flipped_bit_in_a_shard_is_found_by_its_digest(bucket: Bucket, settings: WorkerSettings, split: str) -> None:
    shard = dataset_layout().shard(split, 0)
    rewrite(bucket, shard, flip_a_bit)
    message = failure(bucket, settings)
    described = make_dataset(bucket, settings, "again").splits[split].shards[0]
    assert shard in message
    assert described.blocks is not None
    assert described.blocks[0] in message
    assert "prepare the dataset again" in message


def test_no_step_is_taken_with_damaged_data(bucket: Bucket, settings: WorkerSettings) -> None:
    for index in range(3):
        rewrite(bucket, dataset_layout().shard("train", index), flip_a_bit)
    job = train_job("unlucky")
    assert train_alone(job, bucket, settings).step == 0
    assert history_lines(bucket, job) == []


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_missing_shard_is_named(bucket: Bucket, settings: WorkerSettings, split: str) -> None:
    shard = dataset_layout().shard(split, 0)
    drop(bucket, shard)
    assert f"{shard} does not exist" in failure(bucket, settings)


def test_a_shard_cut_short_is_named(bucket: Bucket, settings: WorkerSettings) -> None:
    shard = dataset_layout().shard("train", 1)
    rewrite(bucket, shard, lambda body: body[:-2])
    assert shard in failure(bucket, settings)


def test_a_dataset_without_its_document_is_none(bucket: Bucket, settings: WorkerSettings) -> None:
    drop(bucket, dataset_layout().document)
    assert "dataset words@v1 has no dataset.json" in failure(bucket, settings)


def test_a_missing_tokenizer_is_named(bucket: Bucket, settings: WorkerSettings) -> None:
    drop(bucket, dataset_layout().tokenizer)
    assert f"{dataset_layout().tokenizer} does not exist" in failure(bucket, settings)


def test_another_tokenizer_than_the_dataset_was_made_with_is_refused(bucket: Bucket, settings: WorkerSettings) -> None:
    key = dataset_layout().tokenizer
    rewrite(bucket, key, lambda body: body.replace(b'"a"', b'"A"'))
    message = failure(bucket, settings)
    assert f"{key} is not what dataset.json says: sha256" in message
    assert "prepare the dataset again" in message


def test_a_dataset_of_before_tokenizers_were_hashed_still_trains(bucket: Bucket, settings: WorkerSettings) -> None:
    def older(body: bytes) -> bytes:
        return json.dumps({k: v for k, v in json.loads(body).items() if k != "tokenizer_sha256"}).encode()

    rewrite(bucket, dataset_layout().document, older)
    assert train_alone(train_job("old"), bucket, settings).outcome == "succeeded"
    rewrite(bucket, dataset_layout().tokenizer, lambda body: body[:-1])
    assert "is no tokenizer" in failure(bucket, settings)


def test_a_dataset_document_that_is_none_is_named(bucket: Bucket, settings: WorkerSettings) -> None:
    rewrite(bucket, dataset_layout().document, lambda body: body[:-1])
    assert f"{dataset_layout().document} is not a valid DatasetDocument" in failure(bucket, settings)


def test_a_token_outside_the_vocabulary_is_refused(bucket: Bucket, settings: WorkerSettings) -> None:
    document = dataset_layout().document
    rewrite(bucket, document, lambda body: body.replace(b'"vocab_size":17', b'"vocab_size":16'))
    message = failure(bucket, settings)
    assert "a token with the id 16 in the train split of words@v1 lies outside the vocabulary of 16" in message


@pytest.mark.parametrize(("split", "length"), [("eval", 6000), ("train", 60_000)])
def test_a_split_without_one_whole_sequence_is_refused(
    bucket: Bucket, settings: WorkerSettings, split: str, length: int
) -> None:
    data = {"dataset": "words", "sequence_length": length}
    message = failure(bucket, settings, data=data, model={"layers": 1, "width": 8, "heads": 1})
    assert f"holds no sequence of {length} tokens" in message


def test_a_cache_file_that_was_damaged_is_fetched_again(bucket: Bucket, settings: WorkerSettings) -> None:
    first = train_alone(train_job("first"), bucket, settings)
    cached = [path for path in settings.cache.iterdir() if len(path.name) == 64]
    assert len(cached) == 4
    for path in cached:
        path.write_bytes(flip_a_bit(path.read_bytes()))
    second = train_alone(train_job("second"), bucket, settings)
    assert second.values["eval_loss"] == first.values["eval_loss"]
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in cached)


def test_a_warm_cache_needs_no_shard(bucket: Bucket, settings: WorkerSettings) -> None:
    train_alone(train_job("first", steps=20), bucket, settings)
    for index in range(3):
        drop(bucket, dataset_layout().shard("train", index))
    assert train_alone(train_job("second"), bucket, settings).outcome == "succeeded"


def batches_of(bucket: Bucket, settings: WorkerSettings, micros: range, first_batch: int = 1) -> TrainBatches:
    dataset = make_dataset(bucket, settings)
    return TrainBatches(
        TokenSplit(bucket, dataset_layout(), dataset, "train", settings.cache),
        sequence_length=32,
        seed=5,
        global_size=12,
        micro_size=2,
        micro_range=micros,
        first_batch=first_batch,
    )


def test_a_reader_that_dies_tells_the_training_thread(
    bucket: Bucket, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(CacheFolder, "add", broken)
    batches = batches_of(bucket, settings, range(6))
    with pytest.raises(OSError, match="Input/output error"):
        batches.next()
    batches.close()


def test_a_reader_has_ended_when_its_batches_are_closed(bucket: Bucket, settings: WorkerSettings) -> None:
    """Whether it waits for a free place or has one: a thread left inside torch aborts an interpreter that ends."""
    for taken in (0, 20):
        batches = batches_of(bucket, settings, range(6))
        for _ in range(taken):
            batches.next()
        batches.close()
        assert "batches" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_the_ranks_micro_batches_are_together_the_global_batch(
    bucket: Bucket, settings: WorkerSettings, world_size: int
) -> None:
    each = 6 // world_size
    alone = batches_of(bucket, settings, range(6))
    ranks = [batches_of(bucket, settings, range(r * each, (r + 1) * each)) for r in range(world_size)]
    for _ in range(3):
        together = [micro for rank in ranks for micro in rank.next().micro_batches]
        assert all(torch.equal(a[0], b[0]) for a, b in zip(alone.next().micro_batches, together, strict=True))
    for batches in (alone, *ranks):
        batches.close()


def test_targets_are_the_next_tokens_and_a_later_start_reads_the_same_batches(
    bucket: Bucket, settings: WorkerSettings
) -> None:
    early, late = batches_of(bucket, settings, range(6)), batches_of(bucket, settings, range(6), first_batch=3)
    from_the_start = [early.next() for _ in range(4)]
    for tokens_BT, targets_BT in from_the_start[0].micro_batches:
        assert tokens_BT.shape == targets_BT.shape == (2, 32)
        assert torch.equal(tokens_BT[:, 1:], targets_BT[:, :-1])
    for expected in from_the_start[2:]:
        assert all(
            torch.equal(a[0], b[0]) for a, b in zip(late.next().micro_batches, expected.micro_batches, strict=True)
        )
    early.close()
    late.close()
