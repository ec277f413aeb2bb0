"""The bucket over a bad way to a real S3 server: what it gets over, and what it says of what it cannot get over.

Bytes that flip on the way are no business of storage: see the last test.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from api.errors import StorageDenied, StorageUnavailable
from api.storage import Bucket, Timeouts
from tests.faults.proxy import Fault, FaultProxy, fault_proxy
from tests.faults.waiting import wait_until
from tests.servers import BUCKET, S3
from workers.patience import PatientBucket

MANY = Timeouts(connect=5.0, read=10.0, attempts=10)
TWO = Timeouts(connect=5.0, read=10.0, attempts=2)
HASTY = Timeouts(connect=0.3, read=0.3, attempts=2)
"""For a store that does not answer; one that is busy would seem to be away."""
MIB = 2**20


@pytest.fixture(autouse=True)
def _short_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.storage._MULTIPART_BYTES", 4 * MIB)
    monkeypatch.setattr("api.storage._PART_BYTES", MIB)
    monkeypatch.setattr("api.storage._RENEWAL_SECONDS", 0.0)


@pytest.fixture
def proxy(s3_server: S3, storage: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy in front of the server; this process's next `Bucket` goes through it."""
    with fault_proxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        yield proxy


def uploads(bucket: Bucket) -> list[str]:
    """Return the keys of uploads in parts that the store still keeps, visible to nobody who lists objects."""
    found = bucket._client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    return [upload["Key"] for upload in found if upload["Key"].startswith(bucket._root)]


def test_with_a_fifth_of_all_requests_failing_everything_ends_with_the_right_bytes(proxy: FaultProxy) -> None:
    # Keys of the same names each time meet the same faults each time: by chance, one run in a thousand would lose the
    # answer to the end of an upload four times in a row.
    bucket, large = Bucket(f"s3://{BUCKET}/a-fifth", MANY), random.Random(1).randbytes(9 * MIB)

    def work(name: int) -> None:
        for number in range(60):
            key, body = f"{name}/{number:03d}", random.Random(f"{name} {number}").randbytes(number * 40 + 1)
            bucket.put(key, body)
            assert bucket.get(key) == body
            assert bucket.get_range(key, number, 1) == body[number : number + 1]
            assert bucket.size(key) == len(body)
        found = [item.key for item in bucket.objects(f"{name}/")]
        assert found == [f"{name}/{number:03d}" for number in range(60)]
        bucket.delete(found[1:])
        assert [item.key for item in bucket.objects(f"{name}/")] == [f"{name}/000"]

    faults = [
        Fault("error", rate=0.06, seed=1),
        Fault("error", rate=0.02, seed=2, status=503, code="SlowDown"),
        Fault("reset", rate=0.04, seed=3),
        Fault("lost_reply", rate=0.04, seed=4),
        Fault("cut", rate=0.02, seed=5),
        Fault("cut_silent", rate=0.02, seed=6),
        Fault("reset_body", rate=0.02, seed=7),
    ]
    with proxy.faults(*faults), ThreadPoolExecutor(8) as pool:
        workers = [pool.submit(work, name) for name in range(7)]
        for _ in range(8):
            bucket.put("large", large)
            assert bucket.get("large") == large
        for worker in workers:
            worker.result()
    requests, failed = sum(proxy.requests.values()), sum(proxy.counts.values())
    assert requests > 2000
    assert 0.15 < failed / requests < 0.25
    assert set(proxy.counts) == {fault.kind for fault in faults}


BURSTS = [
    Fault("error", times=3),
    Fault("error", times=3, status=503, code="SlowDown"),
    Fault("reset", times=3),
    Fault("lost_reply", times=3),
    Fault("reset_body", times=3),
    Fault("cut", times=3),
    Fault("cut", times=3, share=0),
    Fault("cut_silent", times=3),
    Fault("cut_silent", times=3, share=0),
    Fault("torn", times=3, method="PUT"),
    Fault("delay", times=3, seconds=0.05),
    Fault("slow", times=3, bytes_per_second=64 * MIB),
]


@pytest.mark.parametrize("burst", BURSTS, ids=lambda fault: f"{fault.kind} {fault.status} {fault.share}")
def test_a_burst_of_one_kind_is_got_over_by_every_operation(
    burst: Fault, proxy: FaultProxy, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.storage.backoff", lambda tries, slow_down: 0.01)
    bucket, body = Bucket(storage, MANY), random.Random(2).randbytes(2 * MIB)
    steps: list[Callable[[], object]] = [
        lambda: bucket.put("small", body[:1000]),
        lambda: bucket.put("medium", body),
        lambda: bucket.get("small") == body[:1000],
        lambda: bucket.get("medium") == body,
        lambda: bucket.get_range("medium", MIB, 1000) == body[MIB : MIB + 1000],
        lambda: bucket.size("medium") == len(body),
        lambda: [item.size for item in bucket.objects("")] == [len(body), 1000],
        lambda: bucket.delete(["small"]),
        lambda: [item.key for item in bucket.files("")] == ["medium"],
    ]
    for step in steps:
        with proxy.faults(burst):
            assert step() in (None, True)
    assert proxy.counts[burst.kind] >= 3


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["cut", "cut_silent", "reset_body"])
def test_what_always_comes_cut_short_is_never_taken_for_the_whole(
    kind: Any, share: float, proxy: FaultProxy, storage: str
) -> None:
    bucket = Bucket(storage, TWO)
    bucket.put("a", bytes(range(200)))
    with proxy.faults(Fault(kind, share=share)):
        for ask in (
            lambda: bucket.get("a"),
            lambda: bucket.get_range("a", 50, 100),
            lambda: bucket.objects(""),
            lambda: bucket.folders(""),
        ):
            with pytest.raises(StorageUnavailable):
                ask()


@pytest.mark.parametrize("status", [500, 502, 503])
def test_errors_without_an_end_are_an_outage(status: int, proxy: FaultProxy, storage: str) -> None:
    bucket = Bucket(storage, TWO)
    with proxy.faults(Fault("error", status=status)):
        for ask in (lambda: bucket.get("a"), lambda: bucket.put("a", b""), lambda: bucket.delete(["a"])):
            with pytest.raises(StorageUnavailable, match=r"the store answered InternalError for .*/a"):
                ask()
    assert proxy.counts["error"] == 6


@pytest.mark.parametrize("target", ["uploads", "partNumber=2", "uploadId"], ids=["begin", "part", "end"])
def test_a_lost_reply_in_an_upload_by_parts_loses_nothing(target: str, proxy: FaultProxy, storage: str) -> None:
    bucket, body = Bucket(storage, MANY), random.Random(3).randbytes(5 * MIB)
    method = "PUT" if target.startswith("part") else "POST"
    with proxy.faults(Fault("lost_reply", times=1, target=target, method=method)):
        bucket.put("large", body)
    assert proxy.counts["lost_reply"] == 1
    assert bucket.get("large") == body


def test_an_upload_with_a_part_that_never_arrives_leaves_nothing(proxy: FaultProxy, storage: str) -> None:
    bucket = Bucket(storage, TWO)
    bucket.put("large", b"the version before")
    with (
        proxy.faults(Fault("error", target="partNumber=3")),
        pytest.raises(StorageUnavailable, match=r"InternalError for .*/large"),
    ):
        bucket.put("large", bytes(5 * MIB))
    assert bucket.get("large") == b"the version before"
    assert uploads(bucket) == []


def test_views_are_put_one_after_another_and_again_from_their_beginning(proxy: FaultProxy, storage: str) -> None:
    bucket, body = Bucket(storage, MANY), random.Random(4).randbytes(6 * MIB)
    for size in (0, 1000, 3 * MIB, len(body)):
        edges = sorted({0, size, *(random.Random(5).randrange(size + 1) for _ in range(50))})
        views = [memoryview(body)[start:stop] for start, stop in pairwise(edges)]
        with proxy.faults(Fault("torn", times=2, method="PUT"), Fault("lost_reply", times=1, method="PUT")):
            bucket.put_views("a", views)
        assert bucket.get("a") == body[:size]
    assert proxy.counts["torn"] == 8


def test_a_store_that_makes_an_object_of_its_parts_may_take_its_time(proxy: FaultProxy, storage: str) -> None:
    bucket, body = Bucket(storage, Timeouts(connect=2.0, read=2.0, attempts=4)), random.Random(7).randbytes(5 * MIB)
    with proxy.faults(Fault("delay", seconds=3.0, method="POST", target="uploadId")):
        bucket.put("a", body)
    assert proxy.counts["delay"] == 1
    assert bucket.get("a") == body


def test_silence_is_bounded_by_the_timeouts(proxy: FaultProxy, storage: str) -> None:
    bucket = Bucket(storage, HASTY)
    with proxy.faults(Fault("black_hole")):
        for ask in (
            lambda: bucket.get("a"),
            lambda: bucket.put("a", bytes(2 * MIB)),
            lambda: bucket.objects(""),
            lambda: bucket.delete(["a"]),
        ):
            begin = time.monotonic()
            with pytest.raises(StorageUnavailable, match="did not answer"):
                ask()
            assert time.monotonic() - begin < 4.0


def test_no_try_begins_after_the_total_time(proxy: FaultProxy, storage: str) -> None:
    bucket = Bucket(storage, Timeouts(connect=0.5, read=0.5, attempts=6, total=0.1))
    with proxy.faults(Fault("black_hole")), pytest.raises(StorageUnavailable):
        bucket.get("a")
    assert proxy.counts["black_hole"] == 1


def test_a_run_waits_for_a_store_that_is_away_and_goes_on(
    proxy: FaultProxy, storage: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lockstep.workers")
    waiters = set()

    def sleep(seconds: float) -> None:
        waiters.add(threading.get_ident())
        time.sleep(0.05)

    bucket = PatientBucket(storage, timeouts=TWO, sleep=sleep)
    bucket.put("before", b"before")
    assert bucket.answers()
    proxy.leave()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(bucket.put, f"during/{n}", b"during") for n in range(3)]
        waiting.append(pool.submit(bucket.put, "during/large", bytes(5 * MIB)))
        wait_until(lambda: len(waiters) == 4)
        assert bucket.away_since is not None
        assert not bucket.answers()
        assert not any(future.done() for future in waiting)
        proxy.come_back()
        for future in waiting:
            future.result(timeout=20)
    assert bucket.away_since is None
    assert bucket.answers()
    assert {item.key: item.size for item in bucket.objects("during/")} == {
        "during/0": 6,
        "during/1": 6,
        "during/2": 6,
        "during/large": 5 * MIB,
    }
    assert [message.split(":")[0].split(",")[0] for message in caplog.messages] == [
        "waiting for the store",
        "the store answers again",
    ]


def test_an_upload_goes_on_after_an_outage_in_its_middle(proxy: FaultProxy, storage: str) -> None:
    bucket, body = PatientBucket(storage, timeouts=TWO), random.Random(8).randbytes(9 * MIB)
    with proxy.faults(Fault("black_hole", target="partNumber=4")), ThreadPoolExecutor(1) as pool:
        upload = pool.submit(bucket.put, "large", body)
        wait_until(lambda: proxy.counts["black_hole"] > 0)
        proxy.leave()
        wait_until(lambda: bucket.away_since is not None)
        proxy.set()
        proxy.come_back()
        upload.result(timeout=20)
    assert bucket.get("large") == body
    assert uploads(bucket) == []


def test_silence_is_noticed_and_told_from_a_store_that_answers(proxy: FaultProxy, storage: str) -> None:
    bucket = PatientBucket(storage, patience=0.1, timeouts=HASTY)
    with proxy.faults(Fault("black_hole")):
        begin = time.monotonic()
        assert not bucket.answers()
        assert time.monotonic() - begin < 6.0
        with pytest.raises(StorageUnavailable):
            bucket.get("a")
        assert bucket.away_since is not None
    assert bucket.answers()


EXPIRED = Fault("error", status=403, code="ExpiredToken", access_key="OLDKEY")


@pytest.fixture
def rotate(s3_server: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have credentials in a file only, written by the function returned; they begin by being old."""
    file = tmp_path / "credentials"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))

    def write(access_key: str) -> None:
        partial = file.with_suffix(".partial")
        partial.write_text(f"[default]\naws_access_key_id={access_key}\naws_secret_access_key={s3_server.secret_key}\n")
        partial.rename(file)

    write("OLDKEY")
    return write


def test_expired_credentials_are_read_anew_from_their_file(
    proxy: FaultProxy, storage: str, s3_server: S3, rotate: Callable[[str], None]
) -> None:
    bucket = Bucket(storage, TWO)
    with proxy.faults(EXPIRED):
        with pytest.raises(StorageDenied, match=r"ExpiredToken"):
            bucket.put("a", b"old")
        rotate(s3_server.access_key)
        old, refusals = bucket._client, proxy.counts["error"]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: bucket.put(f"{n}", b"new"), range(8)))
        assert bucket._client is not old
        assert proxy.counts["error"] - refusals <= 8
    assert len(bucket.objects("")) == 8


def test_expired_credentials_are_read_anew_from_the_environment(
    proxy: FaultProxy, storage: str, s3_server: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "OLDKEY")
    bucket = Bucket(storage, TWO)
    with proxy.faults(EXPIRED):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key)
        bucket.put("large", bytes(5 * MIB))
        assert bucket.size("large") == 5 * MIB


def test_refusals_that_new_credentials_do_not_help_make_no_client_each(
    proxy: FaultProxy, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.storage._RENEWAL_SECONDS", 60.0)
    bucket, clients = Bucket(storage, TWO), set()
    with proxy.faults(Fault("error", status=403, code="AccessDenied")):
        for _ in range(20):
            with pytest.raises(StorageDenied, match=r"AccessDenied"):
                bucket.get("a")
            clients.add(bucket._client)
    assert len(clients) == 1
    assert proxy.requests["GET"] == 40


def test_a_file_of_credentials_that_is_half_written_leaves_the_refusal_as_it_is(
    proxy: FaultProxy, storage: str, rotate: Callable[[str], None], tmp_path: Path
) -> None:
    bucket = Bucket(storage, TWO)
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id=NEWKEY\n")
    with proxy.faults(EXPIRED), pytest.raises(StorageDenied, match="check the AWS credentials"):
        bucket.get("a")
    (tmp_path / "credentials").write_text("[defau")
    with proxy.faults(EXPIRED), pytest.raises(StorageDenied, match="check the AWS credentials"):
        bucket.get("a")


def test_a_run_waits_for_credentials_that_are_to_be_rotated(
    proxy: FaultProxy, storage: str, s3_server: S3, rotate: Callable[[str], None]
) -> None:
    bucket = PatientBucket(storage, timeouts=TWO)
    with proxy.faults(EXPIRED), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(bucket.put, "a", b"new")
        wait_until(lambda: bucket.away_since is not None)
        rotate(s3_server.access_key)
        waiting.result(timeout=20)
    assert bucket.get("a") == b"new"


def test_a_bit_that_flips_on_the_way_arrives_flipped_so_who_reads_must_compare_hashes(
    proxy: FaultProxy, storage: str
) -> None:
    bucket, body = Bucket(storage, TWO), bytes(1001)
    flipped = body[:500] + b"\x01" + body[501:]
    bucket.put("a", body)
    with proxy.faults(Fault("flip", method="GET")):
        assert bucket.get("a") == flipped
    with proxy.faults(Fault("flip", method="PUT")):
        bucket.put("a", body)
    assert bucket.get("a") == flipped
