"""The bucket against a real S3 server over HTTP: what it does, and how it fails."""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from api.documents import ControlDocument
from api.errors import InvalidData, ObjectMissing, StorageDenied, StorageUnavailable
from api.storage import Bucket, ObjectInfo, Timeouts
from tests.servers import S3, s3_server, use_store

QUICK = Timeouts(connect=0.5, read=2.0, attempts=2)


def test_what_is_put_is_what_is_got(bucket: Bucket) -> None:
    bucket.put("a/b", b"twelve bytes")
    assert bucket.get("a/b") == b"twelve bytes"
    assert bucket.size("a/b") == 12


def test_put_replaces_the_whole_object(bucket: Bucket) -> None:
    bucket.put("a", b"a long first version")
    bucket.put("a", b"short")
    assert bucket.get("a") == b"short"


def test_empty_objects_and_odd_keys_survive(bucket: Bucket) -> None:
    for key in ("empty", "with space", "ünïcode/–/ключ", "a+b&c=d%20e"):
        bucket.put(key, b"")
        assert bucket.get(key) == b""
    assert {item.key for item in bucket.objects("")} == {"empty", "with space", "ünïcode/–/ключ", "a+b&c=d%20e"}


def test_a_range_is_exactly_the_bytes_asked_for(bucket: Bucket) -> None:
    body = random.Random(0).randbytes(100_000)
    bucket.put("a", body)
    assert bucket.get_range("a", 0, 10) == body[:10]
    assert bucket.get_range("a", 65_535, 1000) == body[65_535:66_535]
    assert bucket.get_range("a", 99_999, 1) == body[-1:]


def test_a_range_that_reaches_past_the_end_is_invalid_data(bucket: Bucket) -> None:
    bucket.put("a", b"0123456789")
    with pytest.raises(InvalidData, match="gave 4 bytes at 6 where 8 were asked for"):
        bucket.get_range("a", 6, 8)


def test_a_range_that_begins_past_the_end_is_invalid_data(bucket: Bucket) -> None:
    bucket.put("a", b"0123456789")
    with pytest.raises(InvalidData, match="/a "):
        bucket.get_range("a", 20, 8)


def test_objects_are_listed_below_a_prefix_by_key_with_their_sizes(bucket: Bucket) -> None:
    for key, size in {"x/b": 2, "x/a/c": 3, "x/a/d": 4, "y/e": 5}.items():
        bucket.put(key, bytes(size))
    assert bucket.objects("x/") == [ObjectInfo("x/a/c", 3), ObjectInfo("x/a/d", 4), ObjectInfo("x/b", 2)]
    assert bucket.objects("z/") == []


def test_folders_are_those_directly_below(bucket: Bucket) -> None:
    for key in ("x/a/1", "x/a/2/3", "x/b/4", "x/file"):
        bucket.put(key, b"")
    assert sorted(bucket.folders("x/")) == ["a", "b"]
    assert bucket.folders("x/b/") == []
    assert bucket.folders("nothing/") == []


def test_listing_and_deleting_go_beyond_one_page_of_a_thousand(bucket: Bucket) -> None:
    keys = [f"many/{i:05d}/object" for i in range(1100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: bucket.put(key, b""), keys))
    assert [item.key for item in bucket.objects("many/")] == keys
    assert bucket.folders("many/") == [f"{i:05d}" for i in range(1100)]
    bucket.delete(keys)
    assert bucket.objects("many/") == []


def test_deleting_what_is_not_there_is_no_error(bucket: Bucket) -> None:
    bucket.put("a", b"")
    bucket.delete(["a", "never-was"])
    bucket.delete([])
    assert bucket.objects("") == []


def test_a_large_object_goes_in_parts_and_comes_back_whole(bucket: Bucket) -> None:
    body = random.Random(1).randbytes(70 * 2**20)
    bucket.put("large", body)
    assert bucket.size("large") == len(body)
    assert bucket.get("large") == body
    assert bucket.get_range("large", 64 * 2**20 - 5, 10) == body[64 * 2**20 - 5 : 64 * 2**20 + 5]


def test_documents_go_there_and_back_and_a_missing_one_is_none(bucket: Bucket) -> None:
    assert bucket.find_document("control.json", ControlDocument) is None
    bucket.put_document("control.json", ControlDocument(wish="cancel"))
    assert bucket.find_document("control.json", ControlDocument) == ControlDocument(wish="cancel")


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b'{"wish": "run"', b'{"wish": "dance"}', b"[]"])
def test_bytes_that_are_not_the_document_are_invalid_data(bucket: Bucket, body: bytes) -> None:
    bucket.put("control.json", body)
    with pytest.raises(InvalidData, match=r"control\.json is not a valid ControlDocument"):
        bucket.get_document("control.json", ControlDocument)


def test_a_missing_object_is_named(bucket: Bucket) -> None:
    for attempt in (
        lambda: bucket.get("some/key"),
        lambda: bucket.size("some/key"),
        lambda: bucket.get_range("some/key", 0, 1),
    ):
        with pytest.raises(ObjectMissing, match=r"/some/key does not exist"):
            attempt()


def test_a_wrong_secret_is_denied_by_name_with_what_to_do(
    s3_server: S3, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_store(replace(s3_server, secret_key="x" * 40), monkeypatch)
    stranger = Bucket(storage)
    for attempt in (
        lambda: stranger.get("some/key"),
        lambda: stranger.size("some/key"),
        lambda: stranger.put("some/key", b""),
        lambda: stranger.put("some/key", bytes(64 * 2**20)),
        lambda: stranger.objects("some/key"),
        lambda: stranger.delete(["some/key"]),
    ):
        with pytest.raises(StorageDenied, match=r"refused access to .*/some/key .*check the AWS credentials"):
            attempt()


def test_an_unknown_access_key_is_denied(s3_server: S3, storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_store(replace(s3_server, access_key="SOMEBODYELSE12345678"), monkeypatch)
    with pytest.raises(StorageDenied):
        Bucket(storage).get("some/key")


def test_a_bucket_that_does_not_exist_says_so(storage: str) -> None:
    elsewhere = Bucket("s3://no-such-bucket/prefix")
    for attempt in (
        lambda: elsewhere.get("some/key"),
        lambda: elsewhere.put("some/key", b""),
        lambda: elsewhere.objects(""),
    ):
        with pytest.raises(StorageUnavailable, match=r"bucket of s3://no-such-bucket/prefix does not exist; create it"):
            attempt()


def test_a_store_that_is_gone_is_unavailable_and_soon_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(tmp_path / "s3") as server:
        use_store(server, monkeypatch)
        gone = Bucket("s3://lockstep", QUICK)
        gone.put("some/key", b"here")
    for attempt in (
        lambda: gone.get("some/key"),
        lambda: gone.put("some/key", b""),
        lambda: gone.put("some/key", bytes(64 * 2**20)),
        lambda: gone.objects("some/key"),
    ):
        with pytest.raises(StorageUnavailable, match=r"did not answer for .*/some/key .*AWS_ENDPOINT_URL_S3"):
            attempt()


@pytest.mark.parametrize("url", ["lockstep/prefix", "http://lockstep", "s3://", "s3:///prefix"])
def test_a_storage_that_is_no_s3_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="must look like s3://bucket/prefix"):
        Bucket(url)
