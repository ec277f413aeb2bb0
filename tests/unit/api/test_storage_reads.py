"""A body that breaks off while it is read is read again; the SDK retries only the request."""

from collections.abc import Callable
from typing import Any

import pytest

from api.errors import InvalidData, StorageUnavailable
from api.storage import Bucket


class Body:
    def __init__(self, read: Callable[[], bytes]) -> None:
        self.read = read


def broken() -> bytes:
    raise ConnectionResetError("reset")


def bucket_with(bodies: list[Callable[[], bytes]], size: int, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket whose answers have these bodies, one after the other."""
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = Bucket("s3://nowhere")

    class Client:
        def get_object(self, **_: Any) -> dict[str, Any]:
            return {"Body": Body(bodies.pop(0)), "ContentLength": size}

        def head_object(self, **_: Any) -> dict[str, Any]:
            return {"ContentLength": size}

    monkeypatch.setattr(bucket, "_client", Client())
    return bucket


def test_a_body_that_breaks_off_or_is_short_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bucket_with([broken, lambda: b"ab", lambda: b"abc"], 3, monkeypatch).get("key") == b"abc"
    assert bucket_with([broken, lambda: b"a", lambda: b"bc"], 3, monkeypatch).get_range("key", 1, 2) == b"bc"


def test_bodies_that_always_break_off_are_an_outage_not_bad_data(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageUnavailable, match="nowhere/key"):
        bucket_with([broken] * 3, 3, monkeypatch).get("key")
    with pytest.raises(StorageUnavailable, match="1 of 2 bytes"):
        bucket_with([lambda: b"a"] * 3, 3, monkeypatch).get_range("key", 1, 2)


def test_an_object_that_is_shorter_than_described_is_bad_data(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidData, match="shorter than its description"):
        bucket_with([lambda: b"a"] * 3, 2, monkeypatch).get_range("key", 1, 2)
