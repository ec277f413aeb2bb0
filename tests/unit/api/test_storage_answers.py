"""Answers that are not what a store says: whatever comes, an error of ours or the truth."""

import io
from collections.abc import Callable
from math import inf
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse
from botocore.compat import HTTPHeaders
from hypothesis import given
from hypothesis import strategies as st
from urllib3 import HTTPResponse

from api.errors import ObjectMissing, StorageDenied, StorageUnavailable
from api.storage import Bucket, ObjectInfo, Timeouts, backoff

LISTING = b"""<?xml version="1.0" encoding="UTF-8"?>
<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>nowhere</Name><Prefix>a/</Prefix>
<KeyCount>1</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated><Contents><Key>a/b</Key>
<LastModified>2026-11-23T10:00:00.000Z</LastModified><Size>12</Size></Contents></ListBucketResult>"""
REFUSAL = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>no</Message></Error>"


def bucket_with(respond: Callable[[Any], tuple[int, dict[str, str], bytes]]) -> Bucket:
    """A bucket that gets these answers: status, headers and body for a request."""

    def answer(request: Any, **_: Any) -> Any:
        status, headers, body = respond(request)
        raw = HTTPResponse(io.BytesIO(body), headers, status, preload_content=False, enforce_content_length=False)
        return AWSResponse(request.url, status, HTTPHeaders.from_dict(headers), raw)

    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            monkeypatch.setenv(name, "us-east-1")
        bucket = Bucket("s3://nowhere", Timeouts(attempts=1))
    bucket._client.meta.events.register("before-send.s3", answer)
    bucket._renewed_at = inf  # never again: a new client would ask a network
    return bucket


def saying(status: int, body: bytes, **headers: str) -> Bucket:
    return bucket_with(lambda request: (status, headers, body))


def test_a_listing_is_read() -> None:
    assert saying(200, LISTING).objects("a/") == [ObjectInfo("a/b", 12)]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        LISTING[: len(LISTING) // 2],
        LISTING.replace(b"<IsTruncated>false</IsTruncated>", b""),
        LISTING.replace(b"false", b"true"),
        LISTING.replace(b"12", b"1x"),
        b"<html><body>Welcome to this network</body></html>",
        b"\xff\xfe",
    ],
    ids=["empty", "half", "end unknown", "no way on", "no number", "a page for people", "no text"],
)
def test_what_is_no_whole_listing_is_an_outage_not_an_empty_folder(body: bytes) -> None:
    with pytest.raises(StorageUnavailable):
        saying(200, body).objects("a/")


def test_a_listing_shorter_than_announced_is_an_outage_even_if_it_can_be_parsed() -> None:
    with pytest.raises(StorageUnavailable, match=f"{len(LISTING)} of {len(LISTING) + 9} bytes"):
        saying(200, LISTING, **{"Content-Length": str(len(LISTING) + 9)}).objects("a/")


def test_a_listing_that_goes_in_circles_ends() -> None:
    more = LISTING.replace(
        b"false</IsTruncated>", b"true</IsTruncated><NextContinuationToken>x</NextContinuationToken>"
    )
    with pytest.raises(StorageUnavailable):
        saying(200, more).objects("a/")


@given(st.integers(0, len(LISTING)), st.binary(max_size=40), st.integers(0, 40))
def test_a_garbled_listing_ends_in_a_listing_or_in_an_error_of_ours(at: int, garbage: bytes, removed: int) -> None:
    GARBLED[0] = LISTING[:at] + garbage + LISTING[at + removed :]
    try:
        found = GARBLED_BUCKET.objects("a/")
    except StorageUnavailable:
        return
    assert len(found) <= 1


GARBLED = [LISTING]
GARBLED_BUCKET = bucket_with(lambda request: (200, {}, GARBLED[0]))


def test_deleting_is_not_done_before_the_store_says_so() -> None:
    saying(200, b"<DeleteResult/>").delete(["a"])
    for body in (b"", b"<DeleteResult>"):
        with pytest.raises(StorageUnavailable):
            saying(200, body).delete(["a"])


def test_an_object_that_could_not_be_deleted_is_an_error_unless_it_was_not_there() -> None:
    refusal = b"<DeleteResult><Error><Key>a</Key><Code>%s</Code></Error></DeleteResult>"
    saying(200, refusal % b"NoSuchKey").delete(["a"])
    with pytest.raises(StorageUnavailable, match="InternalError"):
        saying(200, refusal % b"InternalError").delete(["a"])
    with pytest.raises(StorageDenied, match="AccessDenied"):
        saying(200, refusal % b"AccessDenied").delete(["a"])


def test_only_a_store_can_say_that_an_object_is_missing() -> None:
    with pytest.raises(ObjectMissing):
        saying(404, REFUSAL % b"NoSuchKey").get("a")
    with pytest.raises(ObjectMissing):
        saying(404, b"").size("a")
    for page in (b"", b"<html>default backend</html>"):
        with pytest.raises(StorageUnavailable):
            saying(404, page).get("a")


@pytest.mark.parametrize("code", [b"ExpiredToken", b"InvalidToken", b"AccessDenied", b"RequestTimeTooSkewed"])
def test_refusals_are_told_by_their_names(code: bytes) -> None:
    with pytest.raises(StorageDenied, match=code.decode()):
        saying(403, REFUSAL % code).get("a")


def test_no_credentials_are_a_refusal_not_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with pytest.raises(StorageDenied, match="no credentials for s3://nowhere/a"):
        Bucket("s3://nowhere").get("a")


@pytest.mark.parametrize(
    ("status", "body", "tries"),
    [
        (500, b"", 3),
        (502, b"<html>bad gateway</html>", 3),
        (503, REFUSAL % b"SlowDown", 3),
        (429, b"", 3),
        (400, REFUSAL % b"RequestTimeout", 3),
        (400, REFUSAL % b"BadDigest", 3),
        (404, b"<html>default backend</html>", 3),
        (404, b"", 3),
        (400, REFUSAL % b"InvalidArgument", 1),
        (404, REFUSAL % b"NoSuchBucket", 1),
    ],
)
def test_what_may_pass_is_tried_again_and_nothing_else(
    status: int, body: bytes, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("api.storage.sleep", slept.append)
    bucket = saying(status, body)
    bucket._timeouts = Timeouts(attempts=3)
    with pytest.raises(StorageUnavailable):
        bucket.put("a", b"")
    assert len(slept) == tries - 1


def test_waits_grow_to_a_limit_and_are_longer_for_a_store_that_asks_for_it() -> None:
    assert [backoff(tries, slow_down=False) for tries in (1, 2, 3, 9)] == [0.1, 0.2, 0.4, 5.0]
    assert [backoff(tries, slow_down=True) for tries in (1, 2, 3, 9)] == [0.5, 1.0, 2.0, 5.0]
