"""The bucket, as both control plane and workers use it. Imported by those two only, never by the client.

It stands here because both sides must agree on its switches (see docs/adr/0001): signature version, no optional
checksums (stores that lack them fail range reads), path-style addresses, bounded retries, errors in our own tree.
Only put, get, ranged get, list and delete are used; no conditional write, no metadata, no ETag semantics.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from pydantic import BaseModel, ValidationError

from .errors import InvalidData, ObjectMissing, StorageDenied, StorageUnavailable

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

DocumentT = TypeVar("DocumentT", bound=BaseModel)

_MULTIPART_BYTES = 64 * 2**20
_READS = 3
_MISSING = {"NoSuchKey", "NotFound", "404"}
_BEYOND = {"InvalidRange", "416"}
_DENIED = {
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "AllAccessDisabled",
    "401",
    "403",
}


@dataclass(frozen=True)
class Timeouts:
    """Seconds, and the number of tries of one request."""

    connect: float = 5.0
    read: float = 60.0
    attempts: int = 6


@dataclass(frozen=True)
class ObjectInfo:
    key: str
    size: int


class Bucket:
    """Objects below one root, `s3://bucket/prefix`. Keys are relative to it. Safe to use from many threads.

    Endpoint, region and credentials come from the AWS SDK's own environment variables and files. Every method
    raises ObjectMissing, StorageDenied or StorageUnavailable, with the key in the message.
    """

    def __init__(self, url: str, timeouts: Timeouts = Timeouts()) -> None:
        name, _, prefix = url.removeprefix("s3://").partition("/")
        if not url.startswith("s3://") or not name:
            raise ValueError(f"storage must look like s3://bucket/prefix, not {url!r}")
        self.url = url.rstrip("/")
        self._name = name
        self._root = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        # A session of its own: the SDK's shared one keeps the first credentials that it finds in a process.
        self._client: S3Client = boto3.session.Session().client(
            "s3",
            config=Config(
                signature_version="s3v4",
                connect_timeout=timeouts.connect,
                read_timeout=timeouts.read,
                retries={"mode": "standard", "total_max_attempts": timeouts.attempts},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                max_pool_connections=32,
                s3={"addressing_style": "path"},
            ),
        )

    def get(self, key: str) -> bytes:
        """Return the whole object."""
        body, announced = self._read(key)
        if len(body) != announced:
            raise StorageUnavailable(f"{self._where(key)} came cut short: {len(body)} of {announced} bytes")
        return body

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return `length` bytes from `start`; a shorter answer is an error, whatever the store's status says."""
        body, _ = self._read(key, wanted=(start, length))
        if len(body) == length:
            return body
        if self.size(key) >= start + length:
            raise StorageUnavailable(f"{self._where(key)} came cut short: {len(body)} of {length} bytes at {start}")
        raise InvalidData(
            f"{self._where(key)} gave {len(body)} bytes at {start} where {length} were asked for; "
            "the object is shorter than its description says"
        )

    def _read(self, key: str, wanted: tuple[int, int] | None = None) -> tuple[bytes, int]:
        """Return a body and the length that it should have.

        The SDK retries a request, but not a body that breaks off while it is read; so that is done here.
        """
        ask = partial(self._client.get_object, Bucket=self._name, Key=self._root + key)
        if wanted is not None:
            ask = partial(ask, Range=f"bytes={wanted[0]}-{sum(wanted) - 1}")
        tries = 0
        while True:
            tries += 1
            with self._translated(key):
                answer = ask()
                expected = wanted[1] if wanted is not None else answer["ContentLength"]
                try:
                    body = answer["Body"].read()
                except (BotoCoreError, HTTPClientError, OSError):
                    if tries == _READS:
                        raise
                    continue
            if len(body) == expected or tries == _READS:
                return body, expected

    def put(self, key: str, body: bytes) -> None:
        """Write the whole object; it is visible only when complete."""
        with self._translated(key):
            if len(body) < _MULTIPART_BYTES:
                self._client.put_object(Bucket=self._name, Key=self._root + key, Body=body)
            else:
                self._client.upload_fileobj(io.BytesIO(body), self._name, self._root + key)

    def size(self, key: str) -> int:
        """Return the object's size in bytes."""
        with self._translated(key):
            return self._client.head_object(Bucket=self._name, Key=self._root + key)["ContentLength"]

    def objects(self, prefix: str) -> list[ObjectInfo]:
        """Return every object below `prefix`, by key."""
        return [
            ObjectInfo(item["Key"].removeprefix(self._root), item["Size"])
            for page in self._pages(prefix, "")
            for item in page.get("Contents", [])
        ]

    def files(self, prefix: str) -> list[ObjectInfo]:
        """Return the objects directly below `prefix`, which ends in a slash, by key."""
        return [
            ObjectInfo(item["Key"].removeprefix(self._root), item["Size"])
            for page in self._pages(prefix, "/")
            for item in page.get("Contents", [])
        ]

    def folders(self, prefix: str) -> list[str]:
        """Return the names of the folders directly below `prefix`, which ends in a slash."""
        start = len(self._root) + len(prefix)
        return [
            item["Prefix"][start:].rstrip("/")
            for page in self._pages(prefix, "/")
            for item in page.get("CommonPrefixes", [])
        ]

    def delete(self, keys: list[str]) -> None:
        """Delete objects; those that are not there count as deleted."""
        for start in range(0, len(keys), 1000):
            names = keys[start : start + 1000]
            with self._translated(names[0]):
                answer = self._client.delete_objects(
                    Bucket=self._name,
                    Delete={"Objects": [{"Key": self._root + name} for name in names], "Quiet": True},
                )
            if failed := answer.get("Errors", []):
                raise StorageUnavailable(f"{len(failed)} of {len(names)} objects could not be deleted: {failed[0]}")

    def get_document(self, key: str, kind: type[DocumentT]) -> DocumentT:
        """Return a JSON object of the given kind; InvalidData if the bytes are not one."""
        body = self.get(key)
        try:
            return kind.model_validate_json(body)
        except ValidationError as error:
            first = error.errors()[0]
            raise InvalidData(
                f"{self._where(key)} is not a valid {kind.__name__}: {first['msg']} at {first['loc']}"
            ) from error

    def find_document(self, key: str, kind: type[DocumentT]) -> DocumentT | None:
        """Return a JSON object, or None if there is none."""
        try:
            return self.get_document(key, kind)
        except ObjectMissing:
            return None

    def put_document(self, key: str, document: BaseModel) -> None:
        self.put(key, document.model_dump_json().encode())

    def _pages(self, prefix: str, delimiter: str) -> Iterator[dict[str, Any]]:
        with self._translated(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._name, Prefix=self._root + prefix, Delimiter=delimiter
            )
            yield from (dict(page) for page in pages)

    def _where(self, key: str) -> str:
        return f"{self.url}/{key}"

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            where = self._where(key)
            if code in _MISSING:
                raise ObjectMissing(f"{where} does not exist") from error
            if code in _BEYOND:
                raise InvalidData(f"{where} is shorter than its description says: nothing is there to read") from error
            if code == "NoSuchBucket":
                raise StorageUnavailable(f"the bucket of {self.url} does not exist; create it") from error
            if code in _DENIED:
                raise StorageDenied(
                    f"the store refused access to {where} ({code}); check the AWS credentials and the policy"
                ) from error
            raise StorageUnavailable(f"the store answered {code or 'an error'} for {where}") from error
        except (BotoCoreError, HTTPClientError, OSError) as error:
            raise StorageUnavailable(
                f"the store did not answer for {self._where(key)} ({type(error).__name__}); "
                "check AWS_ENDPOINT_URL_S3 and that the store is up"
            ) from error
