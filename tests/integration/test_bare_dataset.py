"""A folder of token shards in the format of llm.c trains as it is, and its bytes are held to what was first read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from api.datasets import find_dataset
from api.documents import CheckpointRef, JobDocument
from api.errors import InvalidData
from api.jobs import Reason
from api.layout import DatasetLayout
from api.prepare_spec import TokenizerSpec
from api.storage import Bucket
from tests.training import (
    PROJECT,
    history_lines,
    layout_of,
    result_of,
    run_ranks,
    segment_names,
    settings_for,
    train_alone,
    train_job,
)
from workers.restore import read_checkpoint
from workers.session import Session
from workers.settings import WorkerSettings
from workers.snapshot import State
from workers.tokens import describe_shard, train_tokenizer
from workers.train import train

VOCABULARY = 60
FOLDER = f"{PROJECT}/datasets/web/"
SHARDS = {"web_train_000001.bin": 6000, "web_train_000002.bin": 5000, "web_val_000000.bin": 3000}


def llm_c_shard(tokens: np.ndarray[Any, Any], announced: int | None = None) -> bytes:
    """Return a shard as llm.c's own scripts write it, uint16."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens) if announced is None else announced
    return header.tobytes() + tokens.astype("<u2").tobytes()


def some_tokens(seed: int, count: int) -> np.ndarray[Any, Any]:
    """Return tokens that a model can learn something from: each is likely the one before it plus one."""
    chance = np.random.default_rng(seed)
    return np.cumsum(1 + (chance.random(count) < 0.1)) % VOCABULARY


@pytest.fixture
def settings(storage: str, bucket: Bucket, tmp_path: Path) -> WorkerSettings:
    for seed, (name, count) in enumerate(SHARDS.items()):
        bucket.put(FOLDER + name, llm_c_shard(some_tokens(seed, count)))
    return settings_for(storage, tmp_path / "cache")


def bare_job(bucket: Bucket, job_id: str, vocab_size: int = VOCABULARY, **changes: Any) -> JobDocument:
    """Return a job as it is accepted: with the version of this moment."""
    spec = {
        "data": {"dataset": "web", "sequence_length": 32},
        "model": {"layers": 2, "width": 16, "heads": 2, "vocab_size": vocab_size},
        **changes,
    }
    version = find_dataset(bucket, PROJECT, "web", vocab_size).version
    return train_job(job_id, **spec).model_copy(update={"dataset_version": version})


def last_state(bucket: Bucket, job: JobDocument) -> State:
    point = CheckpointRef(segment=segment_names(bucket, job)[-1], step=12)
    return read_checkpoint(bucket, layout_of(job), point).state


def flip(bucket: Bucket, name: str, at: int) -> None:
    body = bytearray(bucket.get(FOLDER + name))
    body[at] ^= 1
    bucket.put(FOLDER + name, bytes(body))


def failure(bucket: Bucket, settings: WorkerSettings, job: JobDocument) -> str:
    result = train_alone(job, bucket, settings)
    assert (result.outcome, result.reason) == ("failed", Reason.INVALID_DATA)
    assert result_of(bucket, job, segment_names(bucket, job)[-1]) == result
    return result.message


def two_ranks(session: Session, storage: str, cache: str, job: str) -> str:
    """Each rank with a cold cache of its own, so that both read and record each block; return what came of it."""
    settings = settings_for(storage, Path(cache) / str(session.rank))
    result = train(JobDocument.model_validate_json(job), session, Bucket(storage), settings)
    return f"{result.outcome}: {result.message}"


def test_a_bare_folder_trains_in_one_process_and_its_result_says_what_it_can(
    bucket: Bucket, settings: WorkerSettings
) -> None:
    job = bare_job(bucket, "bare", steps=60, evaluate={"every": 20, "sequences": 30})
    result = train_alone(job, bucket, settings)
    assert (result.outcome, result.step) == ("succeeded", 60)
    assert result.values.keys() == {"eval_loss", "eval_perplexity", "checkpoint"}
    assert result.values["eval_loss"] < np.log(VOCABULARY) - 1
    layout = DatasetLayout(PROJECT, "web", job.dataset_version or "")
    records = [item.key.removeprefix(f"{layout.prefix}blocks/") for item in bucket.objects(layout.prefix)]
    assert [record.split("/")[:2] for record in records] == [[name, "000000"] for name in SHARDS]
    assert [item.key.removeprefix(FOLDER) for item in bucket.files(FOLDER)] == list(SHARDS)


def test_two_ranks_train_a_bare_folder_as_one_does_and_record_each_block_once(
    bucket: Bucket, settings: WorkerSettings, tmp_path: Path
) -> None:
    alone = bare_job(bucket, "alone")
    both = bare_job(bucket, "both", resources={"workers": 2})
    arguments = (settings.storage, str(tmp_path / "caches"), both.model_dump_json())
    assert run_ranks(2, tmp_path / "two", two_ranks, *arguments) == ["succeeded: trained 12 steps"] * 2
    layout = DatasetLayout(PROJECT, "web", both.dataset_version or "")
    assert len(bucket.objects(layout.prefix)) == len(SHARDS)
    train_alone(alone, bucket, settings)
    of_one, of_two = history_lines(bucket, alone), history_lines(bucket, both)
    assert [step for step, _ in of_one] == [step for step, _ in of_two]
    for (_, ours), (_, theirs) in zip(of_one, of_two, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_folder_gives_the_same_bits_as_a_prepared_dataset_of_the_same_shards(
    bucket: Bucket, settings: WorkerSettings
) -> None:
    """The order of the data knows nothing of where the description came from."""
    bare = bare_job(bucket, "bare")
    described = find_dataset(bucket, PROJECT, "web", VOCABULARY)
    layout = DatasetLayout(PROJECT, "copied", "v1")
    document = json.loads(described.model_dump_json())
    document |= {"name": "copied", "version": "v1", "tokenizer": "characters", "unigram_loss": 3.0}
    for split, part in document["splits"].items():
        for shard in part["shards"]:
            body = bucket.get(FOLDER + shard["name"])
            bucket.put(layout.shard_file(split, shard["name"]), body)
            shard["blocks"] = describe_shard(shard["name"], body, shard["tokens"]).blocks
    bucket.put(layout.tokenizer, train_tokenizer(TokenizerSpec(type="characters"), ["ab"]).to_str().encode())
    bucket.put(layout.document, json.dumps(document).encode())
    copied = train_job(
        "copied", data={"dataset": "copied", "sequence_length": 32},
        model={"layers": 2, "width": 16, "heads": 2}, sample=None,
    )  # fmt: skip
    train_alone(bare, bucket, settings)
    train_alone(copied, bucket, settings)
    one, other = last_state(bucket, bare), last_state(bucket, copied)
    assert [name for name in one if not one[name].equal(other[name])] == []


@pytest.mark.parametrize("name", ["web_train_000002.bin", "web_val_000000.bin"])
def test_a_flipped_byte_after_the_first_read_is_found_at_the_second(
    bucket: Bucket, settings: WorkerSettings, tmp_path: Path, name: str
) -> None:
    assert train_alone(bare_job(bucket, "first"), bucket, settings).outcome == "succeeded"
    flip(bucket, name, 1100)
    message = failure(bucket, settings_for(settings.storage, tmp_path / "cold"), bare_job(bucket, "second"))
    assert f"block 0 of {FOLDER}{name} is not what it was when it was first read" in message


def test_a_folder_that_has_changed_since_the_job_was_accepted_ends_it(bucket: Bucket, settings: WorkerSettings) -> None:
    job = bare_job(bucket, "late")
    bucket.put(f"{FOLDER}web_train_000003.bin", llm_c_shard(some_tokens(9, 100)))
    message = failure(bucket, settings, job)
    assert f"the shards of web@{job.dataset_version} have changed" in message
    assert "submit a new job for the new ones" in message


def test_a_shard_that_is_gone_or_cut_short_ends_the_job(bucket: Bucket, settings: WorkerSettings) -> None:
    job, later = bare_job(bucket, "gone"), bare_job(bucket, "short")
    whole = bucket.get(f"{FOLDER}web_train_000002.bin")
    bucket.delete([f"{FOLDER}web_train_000002.bin"])
    assert "have changed" in failure(bucket, settings, job)
    bucket.put(f"{FOLDER}web_train_000002.bin", whole[:-2])
    assert "web_train_000002.bin announces 5000 tokens of uint16" in failure(bucket, settings, later)


def test_a_token_outside_the_vocabulary_ends_the_job_with_both_numbers(
    bucket: Bucket, settings: WorkerSettings
) -> None:
    tokens = some_tokens(7, 3000)
    tokens[:] = np.where(np.arange(3000) % 32 == 5, 59, tokens % 50)
    bucket.put(f"{FOLDER}web_train_000001.bin", llm_c_shard(tokens))
    bucket.put(f"{FOLDER}web_train_000002.bin", llm_c_shard(tokens))
    message = failure(bucket, settings, bare_job(bucket, "narrow", vocab_size=59))
    assert message.startswith("a token with the id 59 in the train split of web@bare-")
    assert "lies outside the vocabulary of 59" in message


def test_a_header_that_disagrees_with_the_size_is_refused_before_any_job(
    bucket: Bucket, settings: WorkerSettings
) -> None:
    bucket.put(f"{FOLDER}web_train_000003.bin", llm_c_shard(some_tokens(9, 100), announced=99))
    with pytest.raises(
        InvalidData, match=r"web_train_000003\.bin announces 99 tokens of uint16, which take 1222 bytes"
    ):
        bare_job(bucket, "never")
