"""Listings of a store that says something twice."""

from collections.abc import Iterator
from typing import Any

from api.storage import Bucket, ObjectInfo


class Stammering(Bucket):
    """A store that lists an object and a folder twice, as one does that are written at that moment."""

    def _pages(self, prefix: str, delimiter: str) -> Iterator[Any]:
        one, two = ({"Key": f"root/{prefix}{name}", "Size": 3} for name in "ab")
        folder = {"Prefix": f"root/{prefix}c/"}
        yield {"Contents": [one, one, two], "CommonPrefixes": [folder]}
        yield {"Contents": [two], "CommonPrefixes": [folder]}


def test_what_a_store_lists_twice_is_there_once() -> None:
    bucket = Stammering("s3://bucket/root")
    assert bucket.objects("x/") == [ObjectInfo("x/a", 3), ObjectInfo("x/b", 3)]
    assert bucket.folders("x/") == ["c"]
