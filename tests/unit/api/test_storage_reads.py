"""A body that breaks off while it is read is read again, and one that is not whole is never taken for whole."""

from collections.abc import Callable
from typing import Any

import pytest

from api.errors import InvalidData, StorageUnavailable
from api.storage import Bucket, Timeouts


class Body:
    def __init__(self, read: Callable[[], bytes]) -> None:
        self.read = read


def broken() -> bytes:
    raise ConnectionResetError("reset")


def bucket_with(bodies: list[Callable[[], bytes]], size: int, monkeypatch: pytest.MonkeyPatch, **answer: Any) -> Bucket:
    """A bucket whose answers have these bodies, one after the other, and say what `answer` says."""

    class Client:
        def get_object(self, **_: Any) -> dict[str, Any]:
            return {"Body": Body(bodies.pop(0)), **answer}

        def head_object(self, **_: Any) -> dict[str, Any]:
            return {"ContentLength": size}

    monkeypatch.setattr(Bucket, "_connect", lambda self: Client())
    monkeypatch.setattr("api.storage.sleep", lambda seconds: None)
    return Bucket("s3://nowhere", Timeouts(attempts=3))


def test_a_body_that_breaks_off_or_is_short_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bucket_with([broken, lambda: b"ab", lambda: b"abc"], 3, monkeypatch, ContentLength=3)
    assert whole.get("key") == b"abc"
    part = bucket_with([broken, lambda: b"a", lambda: b"bc"], 3, monkeypatch, ContentRange="bytes 1-2/3")
    assert part.get_range("key", 1, 2) == b"bc"


def test_bodies_that_always_break_off_are_an_outage_not_bad_data(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageUnavailable, match="nowhere/key"):
        bucket_with([broken] * 3, 3, monkeypatch).get("key")
    with pytest.raises(StorageUnavailable, match="1 of 2 bytes"):
        bucket_with([lambda: b"a"] * 3, 3, monkeypatch).get_range("key", 1, 2)


def test_an_object_that_is_shorter_than_described_is_bad_data(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidData, match="shorter than its description"):
        bucket_with([lambda: b"a"] * 3, 2, monkeypatch).get_range("key", 1, 2)


def test_a_body_of_unknown_length_is_whole_if_it_is_as_long_as_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bucket_with([lambda: b"ab", lambda: b"abc"], 3, monkeypatch).get("key") == b"abc"


@pytest.mark.parametrize("answer", [{}, {"ContentRange": "bytes 0-1/3"}])
def test_other_bytes_than_those_asked_for_are_not_taken_for_them(
    answer: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageUnavailable):
        bucket_with([lambda: b"ab"] * 3, 3, monkeypatch, **answer).get_range("key", 1, 2)


def test_nothing_is_asked_for_no_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bucket_with([], 3, monkeypatch).get_range("key", 1, 0) == b""
