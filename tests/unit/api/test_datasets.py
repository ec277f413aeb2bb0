"""Datasets are found by name or version; a bare folder is described by its listing and headers, or refused."""

import re
import struct
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.datasets import describe_bare, find_dataset
from api.documents import DatasetDocument
from api.errors import InvalidData, InvalidSpec, ObjectMissing
from api.layout import DatasetLayout
from tests.fakes import MemoryBucket, dataset

FOLDER = "default/datasets/words/"
MAGIC = {"uint16": (20240520, 1, 2), "uint32": (20240801, 7, 4)}


def shard(tokens: int, dtype: str = "uint16") -> bytes:
    """Return a shard as llm.c writes it: 256 int32 with magic, version and count in front, then the tokens."""
    magic, version, item = MAGIC[dtype]
    return struct.pack("<256i", magic, version, tokens, *[0] * 253) + b"\1\0" * (tokens * item // 2)


def folder(**files: bytes) -> MemoryBucket:
    """Return a bucket with such a folder; without files, one shard for each split."""
    bucket = MemoryBucket()
    for name, body in (files or {"w_train_1": shard(500), "w_train_0": shard(300), "w_val_0": shard(70)}).items():
        bucket.put(f"{FOLDER}{name}.bin", body)
    return bucket


def describe(bucket: MemoryBucket) -> DatasetDocument:
    return describe_bare(bucket, "default", "words", 1000)


def find(bucket: MemoryBucket, ref: str = "words", vocab_size: int | None = 1000) -> DatasetDocument:
    return find_dataset(bucket, "default", ref, vocab_size)


def test_a_prepared_dataset_is_found_by_name_or_version_and_must_be_whole() -> None:
    bucket = MemoryBucket()
    with pytest.raises(ObjectMissing, match="there is no dataset words; prepare one first"):
        find(bucket)
    bucket.put(DatasetLayout("default", "words", "v9").shard("train", 0), b"x")
    with pytest.raises(ObjectMissing, match=r"words has no dataset\.json: its preparation has not finished"):
        find(bucket)
    for version in ("v1", "v2"):
        document = dataset().model_copy(update={"version": version})
        bucket.put_document(DatasetLayout("default", "words", version).document, document)
    assert find(bucket).version == "v2"
    assert find(bucket, "words@v1").version == "v1"
    with pytest.raises(ObjectMissing):
        find_dataset(bucket, "other", "words", None)
    bucket.put(DatasetLayout("default", "words", "v3").document, b'{"name": "words"}')
    with pytest.raises(InvalidData, match=r"dataset\.json is not a valid DatasetDocument"):
        find(bucket)


def test_a_document_of_before_tokenizers_were_hashed_is_read() -> None:
    bucket, layout = MemoryBucket(), DatasetLayout("default", "words", "v1")
    bucket.put(layout.document, dataset().model_dump_json(exclude={"tokenizer_sha256"}).encode())
    assert find(bucket) == dataset()


def test_a_bare_folder_is_described_by_its_names_sizes_and_headers() -> None:
    found = find(folder())
    assert (found.name, found.tokenizer, found.dtype, found.vocab_size) == ("words", "none", "uint16", 1000)
    assert (found.unigram_loss, found.tokenizer_sha256) == (None, None)
    train, held_out = found.splits["train"], found.splits["eval"]
    assert [(s.name, s.size, s.tokens, s.blocks) for s in train.shards] == [
        ("w_train_0.bin", 1624, 300, None), ("w_train_1.bin", 2024, 500, None)]  # fmt: skip
    assert (train.tokens, held_out.tokens) == (800, 70)
    assert (train.documents, train.text_bytes) == (None, None)


def test_shards_of_uint32_are_read_by_their_own_magic() -> None:
    found = find(folder(a_train=shard(50, "uint32"), a_val=shard(9, "uint32")))
    assert (found.dtype, found.splits["train"].tokens) == ("uint32", 50)


def test_the_version_follows_from_the_listing_and_pins_it() -> None:
    bucket = folder()
    version = find(bucket).version
    assert re.fullmatch(r"bare-[0-9a-f]{12}", version)
    assert find(bucket, f"words@{version}").version == version
    assert find(bucket, vocab_size=77).version == version
    bucket.put(f"{FOLDER}notes.txt", b"ours")
    bucket.put(f"{FOLDER}other.bin", b"ignored")
    bucket.put(f"{DatasetLayout('default', 'words', version).block_records('w_val_0.bin')}000000/x.json", b"{}")
    assert find(bucket).version == version


@pytest.mark.parametrize(
    "change",
    [{"w_train_2": shard(10)}, {"w_val_0": shard(71)}, {"w_train_0": None, "w_train_3": shard(300)},
     {"w_train_1": None}],
)  # fmt: skip
def test_another_listing_is_another_version_and_a_pinned_one_is_refused(change: dict[str, bytes | None]) -> None:
    bucket = folder()
    before = find(bucket).version
    for name, body in change.items():
        if body is None:
            bucket.delete([f"{FOLDER}{name}.bin"])
        else:
            bucket.put(f"{FOLDER}{name}.bin", body)
    after = find(bucket).version
    assert after != before
    with pytest.raises(InvalidData, match=f"the shards of words@{before} have changed.*the folder is {after} now"):
        find(bucket, f"words@{before}")


def test_the_same_counts_in_the_other_dtype_are_another_version() -> None:
    small = folder(a_train=shard(0), a_val=shard(0))
    large = folder(a_train=shard(0, "uint32"), a_val=shard(0, "uint32"))
    assert find(small).version != find(large).version


def test_a_pinned_folder_that_is_gone_is_missing() -> None:
    with pytest.raises(ObjectMissing, match=r"there are no token shards in default/datasets/words/"):
        find(MemoryBucket(), "words@bare-0123456789ab")


def test_a_bare_folder_needs_the_vocabulary_and_a_prepared_one_does_not() -> None:
    with pytest.raises(InvalidSpec, match="do not say how many tokens their vocabulary has") as caught:
        find(folder(), vocab_size=None)
    assert [fault.path for fault in caught.value.errors] == ["$.model.vocab_size"]
    bucket = MemoryBucket()
    bucket.put_document(DatasetLayout("default", "words", "v1").document, dataset())
    assert find(bucket, vocab_size=None).vocab_size == 2048


def test_a_folder_that_is_both_is_refused_by_name_and_taken_by_version() -> None:
    bucket = folder()
    bare = find(bucket).version
    bucket.put(DatasetLayout("default", "words", "job-1").shard("train", 0), b"not finished yet")
    assert find(bucket).version == bare
    document = dataset().model_copy(update={"version": "job-1"})
    bucket.put_document(DatasetLayout("default", "words", "job-1").document, document)
    with pytest.raises(InvalidData, match=r"both prepared versions and \.bin files of its own; pin .*words@job-1"):
        find(bucket)
    assert find(bucket, "words@job-1").tokenizer == "bpe"
    assert find(bucket, f"words@{bare}").tokenizer == "none"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a_val": shard(5)}, r"no shard for the train split: none of its 1 \.bin files has `train` in its name"),
        ({"a_train": shard(5)}, r"no shard for the eval split: none of its 1 \.bin files has `val` in its name"),
        ({"a": shard(5)}, r"no shard for the train split"),
        ({"a_val": shard(5), "interval_train": shard(5)}, r"interval_train\.bin has both `train` and `val`"),
        ({"a_val": shard(5), "a_train": shard(5, "uint32")},
         r"two kinds: .*a_val\.bin is uint16 and .*a_train\.bin is uint32"),
        ({"a_val": shard(5), "a_train": b""}, r"a_train\.bin has 0 bytes, fewer than the header"),
        ({"a_val": shard(5), "a_train": shard(5)[:1023]}, r"a_train\.bin has 1023 bytes, fewer than the header"),
        ({"a_val": shard(5), "a_train": shard(500)[:-2]},
         r"a_train\.bin announces 500 tokens of uint16, which take 2024 bytes, but it has 2022"),
        ({"a_val": shard(5), "a_train": shard(500) + b"x"}, r"which take 2024 bytes, but it has 2025"),
        ({"a_val": shard(5), "a_train": struct.pack("<256i", 20240520, 1, -1, *[0] * 253)}, r"announces -1 tokens"),
        ({"a_val": shard(5), "a_train": struct.pack("<256i", 20240520, 7, 0, *[0] * 253)},
         r"a_train\.bin is no token shard: its header begins with magic 20240520, version 7"),
        ({"a_val": shard(5), "a_train": b"\x93NUMPY" + b" " * 2000}, r"a_train\.bin is no token shard"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_trained_on_is_refused_by_name(files: dict[str, bytes], words: str) -> None:
    with pytest.raises(InvalidData, match=words):
        describe(folder(**files))


@given(st.binary(max_size=1100))
def test_no_bytes_are_taken_for_a_shard_unless_they_are_one(body: bytes) -> None:
    with pytest.raises(InvalidData, match=r"a_train\.bin"):
        describe(folder(a_val=shard(5), a_train=body))


@given(st.integers(0, 600), st.sampled_from(["uint16", "uint32"]))
def test_every_whole_shard_is_taken(tokens: int, dtype: str) -> None:
    found = describe(folder(a_val=shard(5, dtype), a_train=shard(tokens, dtype)))
    assert found.splits["train"].tokens == tokens


def test_headers_of_many_shards_are_read_at_the_same_time() -> None:
    """Each read waits until four others are under way."""

    class Slow(MemoryBucket):
        together = threading.Barrier(5, timeout=30)

        def get_range(self, key: str, start: int, length: int) -> bytes:
            assert (start, length) == (0, 1024)
            self.together.wait()
            return super().get_range(key, start, length)

    bucket = Slow()
    bucket.content = folder(**{f"a_train_{i}": shard(i) for i in range(9)}, a_val=shard(7)).content
    assert [s.tokens for s in describe(bucket).splits["train"].shards] == list(range(9))
