"""The bucket, as both control plane and workers use it. Imported by those two only, never by the client.

It stands here because both sides must agree on its switches (see docs/adr/0001): signature version, no optional
checksums (stores that lack them fail range reads), path-style addresses, bounded retries, errors in our own tree.
Only put, get, ranged get, list, delete and multipart uploads are used; no conditional write, no metadata, no ETag
semantics.

All tries are made here, none by the SDK: its own draw on a quota that an outage uses up, after which a single error
fails a request, and cover neither a body that breaks off nor an answer that cannot be parsed. Every request may be
repeated: a put replaces an object by the same bytes, and what is deleted stays deleted. Whether the bytes are right is
not decided here: a bit that flips on the way arrives flipped, and who reads compares hashes.
"""

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import ceil, inf
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
import botocore.exceptions as sdk
from botocore.config import Config
from botocore.parsers import ResponseParserError
from pydantic import BaseModel, ValidationError
from urllib3.exceptions import HTTPError

from .content import Content
from .errors import InvalidData, LockstepError, ObjectMissing, StorageDenied, StorageError, StorageUnavailable

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

DocumentT = TypeVar("DocumentT", bound=BaseModel)
T = TypeVar("T")

_MULTIPART_BYTES = 64 * 2**20
_PART_BYTES = 16 * 2**20
_MOST_PARTS = 10_000
_PARTS_AT_ONCE = 4
_UPLOADS = 4
_FINISH_SECONDS = 300.0
"""How long a store may be silent while it makes one object of an upload's parts."""
_RENEWAL_SECONDS = 1.0
"""A new client takes 0.1 s of a processor: not for each of many refusals that new credentials would not help."""

#: Without a body each of these would pass for a success: an empty folder, everything deleted.
_HAVE_BODIES = {"ListObjectsV2", "DeleteObjects", "CreateMultipartUpload", "CompleteMultipartUpload"}
_MISSING = {"NoSuchKey", "NotFound"}
_BEYOND = {"InvalidRange", "416"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "RequestTimeTooSkewed"}
_DENIED = _EXPIRED | {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AllAccessDisabled", "401", "403"}
_SLOW_DOWN = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "429"}
_MANGLED = {"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"}
_NOT_A_STORE = {"", "404"}
_PASSING = _SLOW_DOWN | _MANGLED | _NOT_A_STORE
_PASSING |= {"InternalError", "ServiceUnavailable", "RequestTimeout", "OperationAborted"}

_NO_CREDENTIALS = (sdk.NoCredentialsError, sdk.PartialCredentialsError, sdk.CredentialRetrievalError)
_NO_ANSWER = (sdk.HTTPClientError, sdk.ConnectionError, sdk.IncompleteReadError, HTTPError, OSError)
_NONSENSE = (ResponseParserError, ValueError, KeyError)
"""What the SDK raises over an answer that is not one of an S3 store, or has parts missing."""


@dataclass(frozen=True)
class Timeouts:
    """Seconds, and the number of tries of one request."""

    connect: float = 5.0
    read: float = 60.0
    """Of silence, not of the whole answer."""
    attempts: int = 6
    total: float = inf
    """So long after the first try no other one begins."""


@dataclass(frozen=True)
class ObjectInfo:
    key: str
    size: int


class Bucket:
    """Objects below one root, `s3://bucket/prefix`. Keys are relative to it. Safe to use from many threads.

    Endpoint, region and credentials come from the AWS SDK's own environment variables and files, and are looked up
    again when the store refuses them. Every method raises ObjectMissing, StorageDenied or StorageUnavailable, with the
    key in the message.
    """

    def __init__(self, url: str, timeouts: Timeouts = Timeouts()) -> None:
        name, _, prefix = url.removeprefix("s3://").partition("/")
        if not url.startswith("s3://") or not name:
            raise ValueError(f"storage must look like s3://bucket/prefix, not {url!r}")
        self.url = url.rstrip("/")
        self._name = name
        self._root = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._timeouts = timeouts
        self._renewing, self._renewed_at = threading.Lock(), -inf
        self._client = self._connect()

    def get(self, key: str) -> bytes:
        """Return the whole object."""
        return self._request(key, partial(self._get, key))

    def _get(self, key: str, client: "S3Client") -> bytes:
        answer = client.get_object(**self._address(key))
        body = answer["Body"].read()
        # Without Content-Length nothing tells an end from a break.
        size = answer["ContentLength"] if "ContentLength" in answer else self._size(key, client)
        if len(body) != size:
            raise sdk.IncompleteReadError(actual_bytes=len(body), expected_bytes=size)
        return body

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return `length` bytes from `start`; a shorter answer is an error, whatever the store's status says."""
        return self._request(key, partial(self._get_range, key, start, length)) if length else b""

    def _get_range(self, key: str, start: int, length: int, client: "S3Client") -> bytes:
        answer = client.get_object(**self._address(key), Range=f"bytes={start}-{start + length - 1}")
        body = answer["Body"].read()
        if len(body) == length and answer["ContentRange"].startswith(f"bytes {start}-"):
            return body
        if self._size(key, client) >= start + length:
            raise sdk.IncompleteReadError(actual_bytes=len(body), expected_bytes=length)
        raise InvalidData(
            f"{self._where(key)} gave {len(body)} bytes at {start} where {length} were asked for; "
            "the object is shorter than its description says"
        )

    def put(self, key: str, body: bytes) -> None:
        """Write the whole object; it is visible only when complete."""
        self.put_views(key, [memoryview(body)])

    def put_views(self, key: str, views: Sequence[memoryview]) -> None:
        """Write the object made of these bytes one after another, without a copy of them all; otherwise like `put`.

        The views must be contiguous, and stay as they are until this returns.
        """
        content = Content(views)
        if content.size < _MULTIPART_BYTES:
            return self._request(key, partial(self._put_whole, key, content))
        for _ in range(_UPLOADS):
            with suppress(_UploadGone):
                return self._put_parts(key, content)
        raise StorageUnavailable(f"the store lost the upload of {self._where(key)} {_UPLOADS} times; see its log")

    def _put_whole(self, key: str, content: Content, client: "S3Client") -> None:
        body: Any = content.file()  # a new one for each try: the SDK sends from where a file stands
        client.put_object(**self._address(key), Body=body)

    def _put_parts(self, key: str, content: Content) -> None:
        """Upload in parts, some at once. On an error the store is told to forget them; nobody ever sees them."""
        upload = self._request(key, lambda client: client.create_multipart_upload(**self._address(key))["UploadId"])
        try:
            starts = range(0, content.size, max(_PART_BYTES, ceil(content.size / _MOST_PARTS)))
            with ThreadPoolExecutor(_PARTS_AT_ONCE, "upload") as pool:
                parts = list(pool.map(partial(self._put_part, key, upload, content, starts), range(len(starts))))
            self._request(
                key,
                lambda client: client.complete_multipart_upload(
                    **self._address(key), UploadId=upload, MultipartUpload={"Parts": parts}
                ),
            )
        except Exception:
            with suppress(StorageError):
                self._tried(key, lambda client: client.abort_multipart_upload(**self._address(key), UploadId=upload))
            raise

    def _put_part(self, key: str, upload: str, content: Content, starts: range, index: int) -> "CompletedPartTypeDef":
        def ask(client: "S3Client") -> str:
            body: Any = content.file(starts[index], starts[index] + starts.step)
            part = client.upload_part(**self._address(key), UploadId=upload, PartNumber=index + 1, Body=body)
            return part["ETag"]

        return {"PartNumber": index + 1, "ETag": self._request(key, ask)}

    def size(self, key: str) -> int:
        """Return the object's size in bytes."""
        return self._request(key, partial(self._size, key))

    def _size(self, key: str, client: "S3Client") -> int:
        return client.head_object(**self._address(key))["ContentLength"]

    def objects(self, prefix: str) -> list[ObjectInfo]:
        """Return every object below `prefix`, by key."""
        return self._objects(prefix, "")

    def files(self, prefix: str) -> list[ObjectInfo]:
        """Return the objects directly below `prefix`, which ends in a slash, by key."""
        return self._objects(prefix, "/")

    def _objects(self, prefix: str, delimiter: str) -> list[ObjectInfo]:
        """List each object once: a store may give one twice that is written at that moment (seen with rclone)."""
        pages = self._pages(prefix, delimiter)
        sizes = {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", [])}
        return [ObjectInfo(key.removeprefix(self._root), size) for key, size in sizes.items()]

    def folders(self, prefix: str) -> list[str]:
        """Return the names of the folders directly below `prefix`, which ends in a slash."""
        start = len(self._root) + len(prefix)
        pages = self._pages(prefix, "/")
        names = (item["Prefix"][start:].rstrip("/") for page in pages for item in page.get("CommonPrefixes", []))
        return list(dict.fromkeys(names))

    def delete(self, keys: list[str]) -> None:
        """Delete objects; those that are not there count as deleted."""
        for start in range(0, len(keys), 1000):
            names = keys[start : start + 1000]
            self._request(names[0], partial(self._delete, names))

    def _delete(self, names: list[str], client: "S3Client") -> None:
        answer = client.delete_objects(
            Bucket=self._name, Delete={"Objects": [{"Key": self._root + name} for name in names], "Quiet": True}
        )
        failed = [error for error in answer.get("Errors", []) if error.get("Code") not in _MISSING]
        if failed:
            raise sdk.ClientError({"Error": {"Code": failed[0].get("Code", "")}}, "DeleteObjects")

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
        place: dict[str, Any] = {}
        while True:
            page, place = self._request(prefix, partial(self._page, prefix, delimiter, place))
            yield page
            if not place:
                return

    def _page(
        self, prefix: str, delimiter: str, place: dict[str, Any], client: "S3Client"
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return a page of a listing and how to ask for the next one, nothing if it is the last."""
        where: dict[str, Any] = {"Bucket": self._name, "Prefix": self._root + prefix, "Delimiter": delimiter}
        page = client.list_objects_v2(**where, **place)
        following = {"ContinuationToken": page["NextContinuationToken"]} if page["IsTruncated"] else {}
        if following and following == place:
            raise ValueError("the page after this one is this one")
        return dict(page), following

    def _address(self, key: str) -> dict[str, Any]:
        return {"Bucket": self._name, "Key": self._root + key}

    def _where(self, key: str) -> str:
        return f"{self.url}/{key}"

    def _request(self, key: str, action: "Callable[[S3Client], T]") -> T:
        """Carry out one request of any method above; all of them pass here."""
        return self._tried(key, action)

    def _tried(self, key: str, action: "Callable[[S3Client], T]") -> T:
        """Try a request until it ends otherwise than by an error that may pass, or the timeouts are used up."""
        tries, renewed, begin = 0, False, monotonic()
        while True:
            client = self._client
            try:
                return action(client)
            except (sdk.ClientError, sdk.BotoCoreError, *_NO_ANSWER, *_NONSENSE) as error:
                translated, passes = self._translate(error, key), may_pass(error)
                if isinstance(translated, StorageDenied) and not renewed:
                    renewed = True
                    self._renew(client)
                    continue
                tries += 1
                if not passes or tries >= self._timeouts.attempts or monotonic() - begin > self._timeouts.total:
                    raise translated from error
                pause = backoff(tries, _code(error) in _SLOW_DOWN)
            sleep(pause * random.random())  # spreads retries, hides nothing  # nosec B311

    def _connect(self) -> "S3Client":
        # A session of its own: the SDK's shared one keeps the first credentials that it finds in a process.
        client = boto3.session.Session().client(
            "s3",
            config=Config(
                signature_version="s3v4",
                connect_timeout=self._timeouts.connect,
                read_timeout=self._timeouts.read,
                retries={"mode": "standard", "total_max_attempts": 1},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                max_pool_connections=32,
                s3={"addressing_style": "path"},
            ),
        )
        client.meta.events.register("before-parse.s3", _check_whole)
        client.meta.events.register("before-call.s3.CompleteMultipartUpload", _allow_time)
        return client

    def _renew(self, refused: "S3Client") -> None:
        """Replace a client whose credentials were refused, unless another thread has done so.

        The SDK refreshes what its providers call temporary; files and environment it reads once.
        """
        with self._renewing, suppress(sdk.BotoCoreError):  # a file may be half written: then the refusal stands
            if self._client is refused and monotonic() - self._renewed_at > _RENEWAL_SECONDS:
                self._renewed_at = monotonic()
                self._client = self._connect()

    def _translate(self, error: Exception, key: str) -> LockstepError:
        where, kind = self._where(key), type(error).__name__
        if isinstance(error, sdk.ClientError):
            return self._refusal(_code(error), where)
        if isinstance(error, _NO_CREDENTIALS):
            return StorageDenied(f"there are no credentials for {where} ({kind}); check the AWS credentials")
        if isinstance(error, sdk.IncompleteReadError):
            actual, expected = error.kwargs["actual_bytes"], error.kwargs["expected_bytes"]
            return StorageUnavailable(f"{where} came cut short: {actual} of {expected} bytes")
        if isinstance(error, _NONSENSE):
            return StorageUnavailable(
                f"the answer for {where} is not one of an S3 store ({kind}); check AWS_ENDPOINT_URL_S3"
            )
        return StorageUnavailable(
            f"the store did not answer for {where} ({kind}); check AWS_ENDPOINT_URL_S3 and that the store is up"
        )

    def _refusal(self, code: str, where: str) -> LockstepError:
        if code in _MISSING:
            return ObjectMissing(f"{where} does not exist")
        if code in _BEYOND:
            return InvalidData(f"{where} is shorter than its description says: nothing is there to read")
        if code in _DENIED:
            return StorageDenied(
                f"the store refused access to {where} ({code}); check the AWS credentials and the policy"
            )
        if code == "NoSuchBucket":
            return StorageUnavailable(f"the bucket of {self.url} does not exist; create it")
        if code == "NoSuchUpload":
            return _UploadGone(f"the store does not know the upload of {where}")
        return StorageUnavailable(f"the store answered {code or 'an error'} for {where}")


class _UploadGone(StorageError):
    """An upload in parts is unknown: completed by a request whose answer was lost, or lost with the store's memory."""


def may_pass(error: Exception) -> bool:
    """Return whether the same request may succeed a moment later."""
    if isinstance(error, sdk.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or _code(error) in _PASSING
    return isinstance(error, (*_NO_ANSWER, *_NONSENSE))


def backoff(tries: int, slow_down: bool) -> float:
    """Return the most seconds to wait after so many tries: doubling, and longer for a store that asks for it."""
    return min(5.0, (0.5 if slow_down else 0.1) * 2.0 ** (tries - 1))


def _code(error: Exception) -> str:
    """Return the store's word for an error. Without a body it is the status: after HEAD, 404 means NotFound; after all
    else it does not come from a store, but from whatever answers in its place."""
    if not isinstance(error, sdk.ClientError):
        return ""
    code = str(error.response.get("Error", {}).get("Code", ""))
    return "NotFound" if code == "404" and error.operation_name == "HeadObject" else code


def _check_whole(operation_model: Any, response_dict: dict[str, Any], **_: Any) -> None:
    """Refuse an answer that lacks its end, or its whole body; of answers that it parses the SDK counts no bytes."""
    body = response_dict["body"]
    if not isinstance(body, bytes) or operation_model.http["method"] == "HEAD":
        return  # a streamed body is counted by who reads it
    expected = int(response_dict["headers"].get("content-length", len(body)))
    if response_dict["status_code"] == 200 and operation_model.name in _HAVE_BODIES:
        expected = max(expected, 1)
    if len(body) < expected:
        raise sdk.IncompleteReadError(actual_bytes=len(body), expected_bytes=expected)


def _allow_time(context: dict[str, Any], **_: Any) -> None:
    context["read_timeout"] = _FINISH_SECONDS
