"""Folders of bare token shards through the API: planned by their headers, refused with the field that is wrong."""

import struct
from typing import Any

import pytest

from service.plan import plan_train
from tests.fakes import MemoryBucket, dataset, train_spec
from tests.unit.service.in_process import BODY, Service, problem

FOLDER = "default/datasets/web/"


def put_shard(
    bucket: MemoryBucket, name: str, tokens: int, announced: int | None = None, dtype: str = "uint16"
) -> None:
    magic, version, item = (20240520, 1, 2) if dtype == "uint16" else (20240801, 7, 4)
    header = struct.pack("<256i", magic, version, tokens if announced is None else announced, *[0] * 253)
    bucket.put(FOLDER + name, header + bytes(tokens * item))


def body(**changes: Any) -> dict[str, Any]:
    model = {"size": "1m", "vocab_size": 50304}
    return {**BODY, "data": {"dataset": "web", "sequence_length": 100}, "model": model, **changes}


def fault(service: Service, path: str, **changes: Any) -> str:
    """Post, which must be refused for one field and store nothing; return the sentence."""
    for query in ("", "?dry_run=true"):
        [found] = problem(service.post(body(**changes), query=query), 422, "invalid")["errors"]
        assert found["path"] == path
    assert service.store.live() == []
    return str(found["message"])


@pytest.fixture
def web(service: Service) -> Service:
    put_shard(service.bucket, "fineweb_train_000001.bin", 10_001)
    put_shard(service.bucket, "fineweb_train_000002.bin", 20_001)
    put_shard(service.bucket, "fineweb_val_000000.bin", 5_001)
    return service


def test_a_bare_folder_is_planned_and_pinned(web: Service) -> None:
    plan = web.post(body(steps=None), query="?dry_run=true").json()
    assert plan["steps"] == round(300 / 32)
    assert plan["dataset_version"].startswith("bare-")
    job = web.post(body())
    assert (job.status_code, job.json()["dataset_version"]) == (201, plan["dataset_version"])
    pinned = body(data={"dataset": f"web@{plan['dataset_version']}", "sequence_length": 100})
    assert web.post(pinned).json()["dataset_version"] == plan["dataset_version"]


def test_submitting_reads_headers_and_no_blocks_and_writes_nothing(
    web: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, before = [], dict(web.bucket.content)

    def get_range(key: str, start: int, length: int) -> bytes:
        reads.append((key.removeprefix(FOLDER), start, length))
        return MemoryBucket.get_range(web.bucket, key, start, length)

    monkeypatch.setattr(web.bucket, "get_range", get_range)
    assert web.post(body()).status_code == 201
    assert sorted(reads) == [
        (name, 0, 1024) for name in ("fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin")
    ]
    assert web.bucket.content == before


def test_the_vocabulary_is_required(web: Service) -> None:
    message = fault(web, "$.model.vocab_size", model={"size": "1m"})
    assert "give the vocab_size of the tokenizer that made them" in message


def test_a_vocabulary_beyond_the_dtype_is_refused_and_the_largest_is_taken(web: Service) -> None:
    message = fault(web, "$.model.vocab_size", model={"size": "1m", "vocab_size": 65537})
    assert "uint16, which has 65536 values; a vocabulary of 65537" in message
    assert web.post(body(model={"size": "1m", "vocab_size": 65536})).status_code == 201


def test_a_large_vocabulary_is_taken_where_the_shards_are_uint32(service: Service) -> None:
    for name in ("a_train.bin", "a_val.bin"):
        put_shard(service.bucket, name, 5001, dtype="uint32")
    assert service.post(body(model={"size": "1m", "vocab_size": 65537})).status_code == 201


def test_a_header_that_disagrees_with_the_size_is_refused_at_submission(web: Service) -> None:
    put_shard(web.bucket, "fineweb_train_000003.bin", 100, announced=101)
    assert "fineweb_train_000003.bin announces 101 tokens" in fault(web, "$.data.dataset")


def test_a_folder_without_an_eval_shard_is_refused(web: Service) -> None:
    web.bucket.delete([f"{FOLDER}fineweb_val_000000.bin"])
    assert "no shard for the eval split" in fault(web, "$.data.dataset")


def test_a_folder_that_has_changed_since_it_was_pinned_is_refused(web: Service) -> None:
    pinned = web.post(body(), query="?dry_run=true").json()["dataset_version"]
    put_shard(web.bucket, "fineweb_train_000003.bin", 100)
    data = {"dataset": f"web@{pinned}", "sequence_length": 100}
    assert f"the shards of web@{pinned} have changed" in fault(web, "$.data.dataset", data=data)


def test_a_split_too_short_for_one_sequence_is_refused(web: Service) -> None:
    data = {"dataset": "web", "sequence_length": 5001}
    assert "no shard of the eval split holds a sequence of 5001" in fault(web, "$.data.sequence_length", data=data)


def test_a_store_that_does_not_answer_is_no_fault_of_the_spec(web: Service) -> None:
    web.bucket.reachable = False
    problem(web.post(body()), 503, "unavailable")


@pytest.mark.parametrize(
    ("changes", "told"), [({}, False), ({"sample": None}, False), ({"sample": {"prompt": "Once"}}, True)]
)
def test_a_sample_that_was_asked_for_and_cannot_be_made_is_a_warning(
    web: Service, changes: dict[str, Any], told: bool
) -> None:
    warnings = web.post(body(**changes)).json()["warnings"]
    assert any("no sample is generated" in warning for warning in warnings) is told


def test_a_sample_of_a_prepared_dataset_is_no_matter_for_a_warning() -> None:
    plan = plan_train(train_spec(sample={"prompt": "Once"}), dataset(), None, {})
    assert not any("sample" in warning for warning in plan.warnings)
