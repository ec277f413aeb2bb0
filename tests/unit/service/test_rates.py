"""How often a key may ask, how many streams it may hold, and how large and deep a request may be."""

import asyncio
import json

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from api.client import Client
from api.errors import BadRequest, RateLimited
from api.tenants import KeyRequest, NewApiKey, Role
from service import download
from service.audit import OPERATOR
from service.auth import create_key
from service.bounds import DEPTH, HEAD_BYTES, refuse_depth
from service.rates import Level, Limiter, Rate, take
from service.sse import Streams
from tests.unit.service.in_process import AUTH, BODY, Service, problem
from tests.unit.service.test_live import Connection, Script, allowed, item


def bearer(key: NewApiKey) -> dict[str, str]:
    return {"Authorization": f"Bearer {key.key}"}


TWO_A_SECOND = Rate(per_second=2.0, burst=5)


@given(st.lists(st.floats(0, 3), min_size=1, max_size=60))
def test_no_time_has_more_requests_than_the_burst_and_the_rate(pauses: list[float]) -> None:
    level: Level | None = None
    now, granted = 0.0, []
    for pause in pauses:
        now += pause
        level, verdict = take(level, TWO_A_SECOND, now)
        assert 0 <= verdict.remaining < 5
        assert verdict.allowed or verdict.wait == 1
        if verdict.allowed:
            granted.append(now)
    for at, first in enumerate(granted):
        for count, last in enumerate(granted[at:], 1):
            assert count <= 5 + 2 * (last - first) + 1e-6


def test_who_waits_as_told_is_let_in() -> None:
    level: Level | None = None
    for _ in range(5):
        level, verdict = take(level, TWO_A_SECOND, 0.0)
        assert verdict.allowed
    level, refused = take(level, TWO_A_SECOND, 0.0)
    assert (refused.allowed, refused.remaining, refused.wait, refused.reset) == (False, 0, 1, 3)
    level, verdict = take(level, TWO_A_SECOND, float(refused.wait))
    assert verdict.allowed
    level, verdict = take(level, TWO_A_SECOND, 1000.0)
    assert verdict.remaining == 4, "a long pause saves no more than the burst"


def test_every_answer_says_how_many_more_may_follow(service: Service) -> None:
    service.app.state.rates = Limiter(Rate(1.0, 3), clock=lambda: 0.0)
    seen = []
    for path, status in (("/v1/jobs", 200), ("/v1/jobs/x", 422), ("/v1/project", 200), ("/v1/jobs", 429)):
        answer = service.client.get(path)
        assert answer.status_code == status
        seen.append(tuple(answer.headers[f"ratelimit-{name}"] for name in ("limit", "remaining", "reset")))
    assert seen == [("3", "2", "1"), ("3", "1", "2"), ("3", "0", "3"), ("3", "0", "3")]
    assert problem(answer, 429, "rate-limited")["detail"] == "too many requests with this API key; wait 1 s"
    assert answer.headers["retry-after"] == "1"


def test_one_key_does_not_slow_another(service: Service) -> None:
    service.app.state.rates = Limiter(Rate(1.0, 1), clock=lambda: 0.0)
    assert [service.client.get("/v1/jobs").status_code for _ in range(2)] == [200, 429]
    other = create_key(service.tenants, KeyRequest(name="other", role=Role.VIEWER))
    assert service.client.get("/v1/jobs", headers={"Authorization": f"Bearer {other.key}"}).status_code == 200


def test_guesses_are_slowed_by_address_and_those_with_a_key_there_are_not(service: Service) -> None:
    service.app.state.strangers = Limiter(Rate(1.0, 2), clock=lambda: 0.0)
    guess = TestClient(service.app, headers={"Authorization": "Bearer guess"})
    assert [guess.get("/v1/jobs").status_code for _ in range(3)] == [401, 401, 429]
    assert "without a valid key from testclient" in problem(guess.get("/v1/jobs"), 429, "rate-limited")["detail"]
    assert service.client.get("/v1/jobs").status_code == 200


def test_old_buckets_are_forgotten_and_those_in_use_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.rates._MOST", 2)
    limiter = Limiter(Rate(1.0, 1), clock=lambda: 0.0)
    for name in ("a", "b", "a", "c"):
        limiter.take(name)
    assert not limiter.take("a").allowed
    assert limiter.take("b").allowed


def test_the_client_waits_as_long_as_it_is_told(service: Service) -> None:
    clock = 0.0

    def sleep(seconds: float) -> None:
        nonlocal clock
        clock += seconds

    service.app.state.rates = Limiter(Rate(0.5, 1), clock=lambda: clock)
    transport = service.client._transport
    with Client("http://testserver", AUTH["Authorization"][7:], transport=transport, sleep=sleep,
                clock=lambda: clock) as client:  # fmt: skip
        client.list()
        client.list()
        assert clock == 2.0
        service.app.state.rates = Limiter(Rate(0.01, 1), clock=lambda: clock)
        client.list()
        with pytest.raises(RateLimited) as refused:
            client.list()
    assert refused.value.retry_after == 100


@pytest.mark.timeout(30)
def test_neither_a_key_nor_a_project_takes_the_streams_of_all() -> None:
    async def scene(streams: Streams) -> None:
        tasks = []

        async def opened(key: str, project: str) -> None:
            connection = Connection()
            answer = streams.answer(Script([item(1)]), allowed, key=key, project=project)
            tasks.append(asyncio.create_task(connection.read(answer)))
            while not connection.pieces and not tasks[-1].done():
                await asyncio.sleep(0)
            if tasks[-1].done():
                tasks.pop().result()

        await opened("a", "one")
        with pytest.raises(RateLimited, match="one API key opens at once, 1, are open") as refused:
            await opened("a", "one")
        assert refused.value.retry_after == 5
        await opened("b", "one")
        with pytest.raises(RateLimited, match="the keys of one project open at once, 2, are open"):
            await opened("c", "one")
        await opened("c", "two")  # the place that it did not get there is not counted
        streams.close()
        await asyncio.gather(*tasks)

    asyncio.run(scene(Streams(interval=3600, keep_alive=3600, limit=9, limit_key=1, limit_project=2)))


def test_the_keys_of_a_project_count_together_too(service: Service) -> None:
    service.app.state.rates = Limiter(Rate(1.0, 2), clock=lambda: 0.0)
    service.app.state.project_rates = Limiter(Rate(1.0, 3), clock=lambda: 0.0)
    second = bearer(create_key(service.tenants, KeyRequest(name="second", role=Role.VIEWER)))
    answers = [service.client.get("/v1/jobs", headers=headers) for headers in (AUTH, AUTH, AUTH, second, second)]
    assert [answer.status_code for answer in answers] == [200, 200, 429, 200, 429]
    assert answers[3].headers["ratelimit-remaining"] == "1", "told is what the key may, as before"
    assert answers[4].headers["ratelimit-limit"] == "3"
    assert "with the keys of this project; wait 1 s" in problem(answers[4], 429, "rate-limited")["detail"]
    service.tenants.create_project("other", OPERATOR)
    other = bearer(create_key(service.tenants, KeyRequest(name="other"), "other"))
    assert service.client.get("/v1/jobs", headers=other).status_code == 200


def test_a_project_may_ask_ten_times_as_often_as_a_key(service: Service) -> None:
    each, together = service.app.state.rates.rate, service.app.state.project_rates.rate
    assert (together.per_second, together.burst) == (10 * each.per_second, 10 * each.burst)


def test_verifications_of_a_project_are_bounded_and_those_of_another_are_not(service: Service) -> None:
    service.app.state.long_answers = places = download.places(1)
    path = f"/v1/jobs/{service.ended()}/verification"
    with places.one("default"):
        refused = service.client.get(path)
    words = "the most downloads and verifications that a project runs at once, 1, are running; wait for one"
    assert problem(refused, 429, "rate-limited")["detail"] == words
    assert refused.headers["retry-after"] == "5"
    with places.one("another"):
        assert [service.client.get(path).status_code for _ in range(3)] == [200] * 3, "each lets go of its place"


def test_a_head_that_is_too_large_is_refused_in_our_words(service: Service) -> None:
    for method, path in (("GET", "/v1/jobs"), ("GET", "/nowhere"), ("GET", "/healthz")):
        answer = service.client.request(method, path, headers={"X-Much": "x" * HEAD_BYTES})
        assert f"{HEAD_BYTES} is the most" in problem(answer, 431, "headers-too-large")["detail"]
    asked = service.client.get(f"/v1/jobs?cursor={'x' * 50_000}", headers={"X-Much": "x" * (HEAD_BYTES - 50_000)})
    problem(asked, 431, "headers-too-large")
    assert service.client.get("/v1/jobs", headers={"X-Much": "x" * (HEAD_BYTES - 2000)}).status_code == 200


@pytest.mark.parametrize(
    ("body", "deep"),
    [
        (b"[" * DEPTH + b"]" * DEPTH, False),
        (b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1), True),
        (b'{"a":' * (DEPTH + 1), True),
        (b"[[]," + b"[]," * 1000 + b"[]]", False),
        (b'["' + b"[" * 1000 + b'"]', False),
        (b'["' + b'\\"[' * 1000 + b'"]', False),
        (b'["\\\\",' + b"[" * DEPTH, True),
        (b'["' + b"\n[" * 1000, False),
    ],
)
def test_depth_is_that_of_brackets_outside_of_texts(body: bytes, deep: bool) -> None:
    if deep:
        with pytest.raises(BadRequest, match=f"more deeply than {DEPTH} levels"):
            refuse_depth(body)
    else:
        refuse_depth(body)


DEEP = '{"a":' * 100 + "1" + "}" * 100
#: Whose bytes `"` hide all brackets behind them: U+2200 in UTF-16.
HIDDEN = '{"\u2200":' + "[" * 100 + "1" + "]" * 100 + "}"


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/project/keys", "/v1/project/members/ada"])
@pytest.mark.parametrize(
    ("body", "says"),
    [
        (DEEP.encode(), f"more deeply than {DEPTH} levels"),
        (HIDDEN.encode("utf-16"), "not in UTF-8"),
        (HIDDEN.encode("utf-16-le"), "NUL bytes"),
        (HIDDEN.encode("utf-16-be"), "NUL bytes"),
        (DEEP.encode("utf-32-le"), "NUL bytes"),
        (json.dumps(BODY).encode("utf-8-sig"), "byte order mark"),
        (json.dumps(BODY | {"name": "ä"}, ensure_ascii=False).encode("latin-1"), "not in UTF-8"),
    ],
)
def test_depth_is_bounded_wherever_a_body_is_read(service: Service, path: str, body: bytes, says: str) -> None:
    method = "PUT" if "members" in path else "POST"
    answer = service.client.request(method, path, content=body, headers={"Content-Type": "application/json"})
    assert says in problem(answer, 400, "bad-request")["detail"]
    assert service.post(BODY).status_code == 201
