"""A bucket that waits: for how long, after which errors, and what it says meanwhile. The SDK's client is scripted."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from hypothesis import given
from hypothesis import strategies as st

from api import storage
from api.errors import InvalidData, ObjectMissing, StorageDenied, StorageError, StorageUnavailable
from api.storage import Bucket, Timeouts
from workers.patience import Failure, PatientBucket, patient_bucket
from workers.settings import WorkerSettings

ONE_TRY = Timeouts(attempts=1)
AWAY = EndpointConnectionError(endpoint_url="http://nowhere", error=None)


def refusal(code: str, operation: str = "PutObject") -> ClientError:
    return ClientError({"Error": {"Code": code}}, operation)


class Clock:
    """Time that passes by sleeping only; `during` is done in each sleep."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        self.during: Callable[[], object] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)
        self.during()


class Client:
    """An SDK client whose every request meets the next of these errors, the last one for ever; None is a success."""

    def __init__(self, *errors: Exception | None) -> None:
        self.errors = list(errors)
        self.tries = 0

    def put_object(self, **_: Any) -> None:
        self.tries += 1
        error = self.errors.pop(0) if len(self.errors) > 1 else self.errors[0]
        if error is not None:
            raise error

    def head_object(self, **options: Any) -> dict[str, Any]:
        self.put_object()
        return {"ContentLength": 1}


def patient(monkeypatch: pytest.MonkeyPatch, client: Client, **patience: float) -> tuple[PatientBucket, Clock]:
    monkeypatch.setattr(Bucket, "_connect", lambda self: client)
    clock = Clock()
    return PatientBucket(
        "s3://nowhere", timeouts=ONE_TRY, clock=lambda: clock.now, sleep=clock.sleep, **patience
    ), clock


def test_a_request_waits_for_a_store_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(*[AWAY] * 20, None)
    bucket, _ = patient(monkeypatch, client)
    bucket.put("key", b"")
    assert client.tries == 21
    assert bucket.away_since is None


def test_waits_double_up_to_five_seconds_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket, clock = patient(monkeypatch, Client(*[AWAY] * 40, None))
    bucket.put("key", b"")
    most = [min(5.0, 0.5 * 2**n) for n in range(40)]
    assert all(limit / 2 <= slept <= limit for slept, limit in zip(clock.slept, most, strict=True))
    assert len(set(clock.slept)) == 40


@pytest.mark.parametrize(
    ("error", "kind", "patience"), [(AWAY, StorageUnavailable, 60), ("ExpiredToken", StorageDenied, 20)]
)
def test_patience_ends_with_the_last_error(
    error: Exception | str, kind: type[StorageError], patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(refusal(error) if isinstance(error, str) else error)
    bucket, clock = patient(monkeypatch, client, patience=60, denied_patience=20)
    with pytest.raises(kind, match="nowhere/key"):
        bucket.put("key", b"")
    assert clock.now == 1000 + patience
    assert bucket.away_since == 1000


@pytest.mark.parametrize(
    ("environment", "error", "patience"),
    [
        ({}, AWAY, 3600),
        ({}, refusal("ExpiredToken"), 300),
        ({"LOCKSTEP_STORAGE_PATIENCE": "40"}, AWAY, 40),
        ({"LOCKSTEP_DENIED_PATIENCE": "20.5"}, refusal("ExpiredToken"), 20.5),
        ({"LOCKSTEP_DENIED_PATIENCE": "7000"}, refusal("ExpiredToken"), 3600),
    ],
)
def test_a_workers_patience_is_what_its_environment_says(
    environment: dict[str, str], error: Exception, patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCKSTEP_STORAGE_PATIENCE", "LOCKSTEP_DENIED_PATIENCE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"LOCKSTEP_STORAGE": "s3://nowhere", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Bucket, "_connect", lambda self: Client(error))
    monkeypatch.setattr(storage, "sleep", lambda seconds: None)  # between the tries of one request
    clock = Clock()
    bucket = patient_bucket(WorkerSettings(), lambda: clock.now, clock.sleep)
    with pytest.raises(StorageError, match="nowhere/key"):
        bucket.put("key", b"")
    assert clock.now == pytest.approx(1000 + patience)


def test_a_refusal_at_the_end_of_an_outage_has_its_own_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(AWAY)
    bucket, clock = patient(monkeypatch, client, patience=3600, denied_patience=300)

    def change() -> None:
        if clock.now > 3000:
            client.errors = [refusal("ExpiredToken")]
        if clock.now > 3200:
            client.errors = [None]

    clock.during = change
    bucket.put("key", b"")
    assert 3200 < clock.now < 3210


@pytest.mark.parametrize(("code", "kind"), [("NoSuchKey", ObjectMissing), ("InvalidRange", InvalidData)])
def test_an_answer_is_raised_at_once_and_shows_that_the_store_is_there(
    code: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(AWAY, AWAY, refusal(code))
    bucket, _ = patient(monkeypatch, client)
    with pytest.raises(kind):
        bucket.put("key", b"")
    assert client.tries == 3
    assert bucket.away_since is None


def test_away_since_is_when_the_first_failing_request_began(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket, clock = patient(monkeypatch, Client(None, *[AWAY] * 9, None))
    bucket.put("key", b"")
    assert bucket.away_since is None
    clock.now = 2000.0
    seen = []
    clock.during = lambda: seen.append(bucket.away_since)
    bucket.put("key", b"")
    assert seen == [2000.0] * 9


def test_a_request_that_succeeds_shows_all_that_the_store_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket, clock = patient(monkeypatch, Client(AWAY, AWAY, None, AWAY, None))
    seen = []

    def another_thread() -> None:
        if len(clock.slept) == 2:
            seen.append(bucket.away_since)
            bucket.put("another", b"")
            seen.append(bucket.away_since)

    clock.during = another_thread
    bucket.put("key", b"")
    assert seen == [1000.0, None]


def test_the_log_has_one_line_for_the_beginning_and_one_for_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lockstep.workers")
    bucket, clock = patient(monkeypatch, Client(*[AWAY] * 30, None))
    bucket.put("key", b"")
    waiting, over = caplog.messages
    assert waiting.startswith("waiting for the store: the store did not answer for s3://nowhere/key")
    assert over == f"the store answers again, after {clock.now - 1000:.0f} s"


def test_one_key_that_is_refused_among_many_that_are_not_fills_no_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lockstep.workers")
    client = Client(refusal("AccessDenied"))
    bucket, clock = patient(monkeypatch, client)

    def others_go_on() -> None:
        client.errors = [None]
        bucket.put("another", b"")
        client.errors = [refusal("AccessDenied")]

    clock.during = others_go_on
    with pytest.raises(StorageDenied):
        bucket.put("key", b"")
    assert len(caplog.messages) == 2


def test_without_patience_nothing_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bucket, clock = patient(monkeypatch, Client(AWAY), patience=0)
    with pytest.raises(StorageUnavailable):
        bucket.put("key", b"")
    assert (clock.slept, caplog.messages) == ([], [])


def test_who_is_told_to_give_up_raises_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket, clock = patient(monkeypatch, Client(AWAY))
    clock.during = lambda: bucket.give_up() if len(clock.slept) == 3 else None
    with pytest.raises(StorageUnavailable):
        bucket.put("key", b"")
    assert len(clock.slept) == 3
    with pytest.raises(StorageUnavailable):
        bucket.put("key", b"")
    assert len(clock.slept) == 3


@pytest.mark.parametrize(
    ("error", "answers"),
    [
        (None, True),
        (refusal("404", "HeadObject"), True),
        (AWAY, False),
        (refusal("403"), False),
        (refusal("503"), False),
    ],
)
def test_a_store_answers_if_it_does_what_it_is_asked(
    error: Exception | None, answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, clock = patient(monkeypatch, Client(error))
    assert bucket.answers() is answers
    assert (clock.slept, bucket.away_since) == ([], None)


@given(st.lists(st.tuples(st.sampled_from([StorageUnavailable, StorageDenied]), st.integers(1, 20)), min_size=1))
def test_all_failure_counts_against_one_patience_and_refusals_without_a_break_against_the_other(
    tries: list[tuple[type[StorageError], int]],
) -> None:
    now, refused, failure = 0, 0, Failure(0)
    for kind, seconds in tries:
        failure.note(kind(), now)
        now += seconds
        refused = refused + seconds if kind is StorageDenied else 0
        assert failure.left(now, 100, 30) == min(100 - now, 30 - refused if refused else 100)
