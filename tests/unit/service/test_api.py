"""The API in-process: who may ask, what is refused and in which words, and that nothing is stored by a refusal."""

import asyncio
import base64
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient

from api.sse import Parser
from service import health
from service.audit import OPERATOR
from service.keyed import KeyedRoute
from service.live import Feed
from service.sse import Streams
from tests.fakes import ACCEPTED, T0, job_id, row
from tests.unit.service.in_process import AUTH, BODY, KEY, Service, problem


def routes(app: FastAPI) -> list[tuple[str, str]]:
    """Every (method, path) of the application, from OpenAPI, with the ids filled in."""
    found = [
        (method.upper(), path.replace("{job_id}", job_id(1)).replace("{step}", "5").replace("{name}", "config.json"))
        for path, methods in app.openapi()["paths"].items()
        for method in methods
    ]
    assert len(found) >= 16
    return found


def test_every_route_needs_a_key_but_health(service: Service) -> None:
    walked = 0
    for method, path in routes(service.app):
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": f"Basic {KEY}"},
            {"Authorization": KEY},
        ):
            client = TestClient(service.app, headers=headers, raise_server_exceptions=False)
            answer = client.request(method, path, json=BODY if method == "POST" else None)
            if path.startswith("/v1/"):
                problem(answer, 401, "unauthorized")
                assert answer.headers["www-authenticate"] == "Bearer"
                walked += 1
            else:
                assert path in ("/healthz", "/readyz")
                assert answer.status_code == 200
    assert walked >= 40
    assert service.store.live() == []


def test_no_route_hides_from_the_walk(service: Service) -> None:
    """Whatever is routed, documented or not, is one that wants a key, or one of the four that want none."""

    def flat(routes: Iterable[Any]) -> Iterator[Any]:
        for route in routes:
            yield from flat(route.original_router.routes) if hasattr(route, "original_router") else [route]

    found = list(flat(service.app.routes))
    keyed = [route for route in found if isinstance(route, KeyedRoute)]
    assert {route.path for route in found if route not in keyed} == {"/healthz", "/readyz", "/docs", "/openapi.json"}
    assert [route.path for route in keyed if not route.include_in_schema] == []
    assert len(keyed) >= 20
    for path in ("/openapi.json", "/docs"):
        assert KEY not in service.client.get(path).text


def test_a_revoked_key_opens_nothing(service: Service) -> None:
    [(_, key)] = service.tenants.keys()
    assert service.client.get("/v1/jobs").status_code == 200
    service.tenants.revoke_key(key.id, OPERATOR)
    problem(service.client.get("/v1/jobs"), 401, "unauthorized")


def deep(levels: int) -> bytes:
    return b'{"labels":' + b'{"a":' * levels + b"1" + b"}" * levels + b"}"


BAD_BODIES: list[tuple[str, bytes, int, str]] = [
    ("empty", b"", 400, "bad-request"),
    ("not JSON", b"name: first", 400, "bad-request"),
    ("cut off", json.dumps(BODY).encode()[:-1], 400, "bad-request"),
    ("not UTF-8", b'{"name": "\xff"}', 400, "bad-request"),
    ("deep", deep(10_000), 400, "bad-request"),
    ("digits without end", b'{"name": "a", "steps": ' + b"9" * 5000 + b"}", 400, "bad-request"),
    ("a list", b"[1, 2]", 422, "invalid"),
    ("null", b"null", 422, "invalid"),
    ("a number", b"7", 422, "invalid"),
    ("a text", b'"train"', 422, "invalid"),
    ("nothing in it", b"{}", 422, "invalid"),
    ("another kind", b'{"kind": "serve"}', 422, "invalid"),
    ("a kind of kinds", b'{"kind": ["train"]}', 422, "invalid"),
    ("half a surrogate", b'{"\\ud800": 1, "name": "\\ud800"}', 422, "invalid"),
    ("a nest in a label", deep(30), 422, "invalid"),
    ("deeper than any spec", deep(32), 400, "bad-request"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "name"), [b[1:] for b in BAD_BODIES], ids=[b[0] for b in BAD_BODIES])
@pytest.mark.parametrize("key", [None, "once"])
def test_a_body_that_is_no_spec_is_refused(
    service: Service, body: bytes, status: int, name: str, key: str | None
) -> None:
    headers = {"Content-Type": "application/json"} | ({"Idempotency-Key": key} if key else {})
    problem(service.client.post("/v1/jobs", content=body, headers=headers), status, name)
    assert service.store.live() == []


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/octet-stream", ""])
def test_a_body_of_another_content_type_is_refused_by_name(service: Service, kind: str) -> None:
    answer = service.client.post("/v1/jobs", content=json.dumps(BODY).encode(), headers={"Content-Type": kind})
    assert "application/json" in problem(answer, 400, "bad-request")["detail"]
    assert service.store.live() == []


BAD_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"nmae": "x"}, "$.nmae", "unknown field"),
    ({"model": {"size": "1m", "depth": 3}}, "$.model.depth", "unknown field"),
    ({"steps": "10"}, "$.steps", "valid integer"),
    ({"steps": 10.0}, "$.steps", "valid integer"),
    ({"steps": True}, "$.steps", "valid integer"),
    ({"steps": 10**400}, "$.steps", "less than or equal to"),
    ({"steps": -1}, "$.steps", "greater than or equal to 1"),
    ({"epochs": 1.0}, "$", "give steps or epochs, not both"),
    ({"optimizer": {"learning_rate": float("nan")}}, "$.optimizer.learning_rate", "finite number"),
    ({"optimizer": {"learning_rate": float("inf")}}, "$.optimizer.learning_rate", "finite number"),
    ({"seed": 2**63}, "$.seed", "less than or equal to"),
    ({"name": "../etc"}, "$.name", "is not allowed here"),
    ({"name": "a\nb"}, "$.name", "is not allowed here"),
    ({"name": "a\n"}, "$.name", "is not allowed here"),
    ({"name": "a\x00"}, "$.name", "is not allowed here"),
    ({"name": "x" * 48}, "$.name", "at most 47"),
    ({"name": ""}, "$.name", "at least 1"),
    ({"data": {"dataset": "../../other/datasets/words"}}, "$.data.dataset", "is not allowed here"),
    ({"data": {"dataset": "words@../v1"}}, "$.data.dataset", "is not allowed here"),
    ({"data": {"dataset": "words@v2"}}, "$.data.dataset", "dataset words@v2 has no dataset.json"),
    ({"data": {"dataset": "none"}}, "$.data.dataset", "there is no dataset none"),
    ({"labels": {"k": "a\x1bb"}}, "$.labels.k", "is not allowed here"),
    ({"labels": {f"k{i}": "" for i in range(17)}}, "$.labels", "at most 16"),
    ({"precision": "fp8"}, "$.precision", "input should be 'fp32' or 'bf16'"),
    ({"resources": {"cpus": 9}}, "$.resources", "needs 1 × 9 CPU, but the whole cluster has 8 CPU"),
]


@pytest.mark.parametrize(("fields", "path", "words"), BAD_FIELDS)
@pytest.mark.parametrize("query", ["", "?dry_run=true"])
def test_a_bad_field_is_named_with_its_path(
    service: Service, fields: dict[str, Any], path: str, words: str, query: str
) -> None:
    content = json.dumps({**BODY, **fields}).encode()
    answer = service.client.post(f"/v1/jobs{query}", content=content, headers={"Content-Type": "application/json"})
    found = problem(answer, 422, "invalid")
    assert path in [fault["path"] for fault in found["errors"]]
    assert any(words in fault["message"] for fault in found["errors"])
    assert service.store.live() == []


@pytest.mark.parametrize(("announced", "most"), [(10 * 2**20, 0), (None, 5), (100, 5)])
def test_a_body_without_end_is_cut_off_while_it_arrives(service: Service, announced: int | None, most: int) -> None:
    """Spoken in ASGI, so that what the application reads can be counted."""
    pieces, answers = 0, []

    async def receive() -> dict[str, Any]:
        nonlocal pieces
        pieces += 1
        return {"type": "http.request", "body": b" " * 65_536, "more_body": True}

    async def send(message: Any) -> None:
        answers.append(message)

    headers = [(b"host", b"testserver"), (b"content-type", b"application/json")]
    headers += [(b"authorization", AUTH["Authorization"].encode())]
    if announced is not None:
        headers.append((b"content-length", str(announced).encode()))
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"}
    place = {"path": "/v1/jobs", "raw_path": b"/v1/jobs", "query_string": b"", "root_path": "", "headers": headers}
    asyncio.run(service.app({**scope, **place}, receive, send))
    start, body = answers
    assert pieces <= most
    answer = httpx2.Response(start["status"], headers=start["headers"], content=body["body"])
    assert problem(answer, 413, "too-large")["detail"] == "the body is larger than 262144 bytes"
    assert service.store.live() == []


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/jobs?cursor=x", "$.query.cursor"),
        ("/v1/jobs?cursor=../job", "$.query.cursor"),
        ("/v1/jobs?limit=0", "$.query.limit"),
        ("/v1/jobs?limit=201", "$.query.limit"),
        ("/v1/jobs?limit=x", "$.query.limit"),
        ("/v1/jobs?state=lost", "$.query.state[0]"),
        ("/v1/jobs/job-1", "$.path.job_id"),
        ("/v1/jobs/..%2f..%2fetc", "$"),
        (f"/v1/jobs/{job_id(1).upper()}", "$.path.job_id"),
        (f"/v1/jobs/{job_id(1)}%0a", "$.path.job_id"),
        (f"/v1/jobs/{job_id(1)}/events?after=-1", "$.query.after"),
        (f"/v1/jobs/{job_id(1)}/events?after={10**30}", "$.query.after"),
        (f"/v1/jobs/{job_id(1)}/metrics?max_points=0", "$.query.max_points"),
        (f"/v1/jobs/{job_id(1)}/logs?rank=-1", "$.query.rank"),
    ],
)
def test_a_bad_parameter_is_named(service: Service, path: str, words: str) -> None:
    service.ended()
    answer = service.client.get(path)
    if words == "$":
        problem(answer, 404, "not-found")
    else:
        assert problem(answer, 422, "invalid")["errors"][0]["path"] == words


def test_a_log_cursor_that_is_not_ours_is_refused(service: Service) -> None:
    service.ended()
    found = problem(service.client.get(f"/v1/jobs/{job_id(1)}/logs?cursor=W10="), 422, "invalid")
    assert found["detail"] == "this cursor is not one of ours; begin without one"


def test_an_unknown_path_or_method_is_a_problem_too(service: Service) -> None:
    problem(service.client.get("/nothing"), 404, "not-found")
    problem(service.client.put("/v1/jobs"), 405, "method-not-allowed")


@pytest.mark.parametrize(("method", "rest"), [("GET", ""), ("POST", "/cancel"), ("POST", "/pause"), ("POST", "/resume"),
    ("POST", "/retry"), ("DELETE", ""), ("GET", "/events"),
    ("GET", "/metrics"), ("GET", "/checkpoints"), ("GET", "/logs"), ("DELETE", "/checkpoints/5")])  # fmt: skip
def test_a_job_that_is_not_there_or_not_yours_is_not_found(service: Service, method: str, rest: str) -> None:
    service.store.insert(row(2, project="another", state="failed"), ACCEPTED, None)
    for number in (1, 2):
        answer = service.client.request(method, f"/v1/jobs/{job_id(number)}{rest}")
        assert problem(answer, 404, "not-found")["detail"] == f"there is no job {job_id(number)}"


def test_a_dry_run_says_what_would_be_and_stores_nothing(service: Service) -> None:
    plan = service.post(BODY, key="once", query="?dry_run=true")
    assert plan.status_code == 200
    assert (plan.json()["steps"], plan.json()["dataset_version"]) == (10, "v1")
    assert service.store.live() == []
    assert service.store.replay("key", "once") is None
    assert service.post(BODY, key="once").status_code == 201


def test_a_job_is_accepted_once_per_key_whatever_the_order_of_its_fields(service: Service) -> None:
    first = service.post(BODY, key="once")
    assert (first.status_code, first.headers["location"]) == (201, f"/v1/jobs/{first.json()['id']}")
    again = service.post(dict(reversed(list(BODY.items()))), key="once")
    assert (again.status_code, again.json()) == (200, first.json())
    found = problem(service.post({**BODY, "steps": 11}, key="once"), 422, "idempotency-mismatch")
    assert first.json()["id"] in found["detail"]
    assert service.post(BODY, key="twice").status_code == 201
    assert service.post(BODY).status_code == 201
    assert len(service.store.live()) == 3
    problem(service.post(BODY, key="x" * 256), 422, "invalid")


def test_the_same_key_still_works_when_bucket_and_ray_do_not_answer(service: Service) -> None:
    first = service.post(BODY, key="once")
    service.bucket.reachable = service.ray.reachable = False
    assert service.post(BODY, key="once").json()["id"] == first.json()["id"]
    problem(service.post(BODY, key="new"), 503, "unavailable")
    assert len(service.store.live()) == 1


def test_cancelling_twice_is_harmless_and_an_end_is_a_conflict(service: Service) -> None:
    job = service.post(BODY).json()["id"]
    problem(service.client.delete(f"/v1/jobs/{job}"), 409, "conflict")
    problem(service.client.delete(f"/v1/jobs/{job}/checkpoints/5"), 409, "conflict")
    for _ in range(2):
        assert service.client.post(f"/v1/jobs/{job}/cancel").status_code == 202
    ended = service.ended()
    found = problem(service.client.post(f"/v1/jobs/{ended}/cancel"), 409, "conflict")
    assert found["detail"] == f"job {ended} has already failed; it cannot be cancelled"
    service.store.insert(row(2, state="cancelled"), ACCEPTED, None)
    assert service.client.post(f"/v1/jobs/{job_id(2)}/cancel").status_code == 202


def test_a_deleted_job_is_gone_at_once_and_its_row_stays(service: Service) -> None:
    job = service.ended()
    assert service.client.delete(f"/v1/jobs/{job}").status_code == 204
    problem(service.client.get(f"/v1/jobs/{job}"), 404, "not-found")
    problem(service.client.delete(f"/v1/jobs/{job}"), 404, "not-found")
    assert service.client.get("/v1/jobs").json()["items"] == []
    assert [buried.id for buried in service.store.to_purge()] == [job]


def test_pages_go_on_where_the_last_one_ended(service: Service) -> None:
    for number in range(1, 6):
        service.store.insert(row(number), ACCEPTED, None)
    seen, query = [], "?limit=2"
    while True:
        page = service.client.get(f"/v1/jobs{query}").json()
        seen += [job["id"] for job in page["items"]]
        if page["next_cursor"] is None:
            break
        query = f"?limit=2&cursor={page['next_cursor']}"
    assert seen == [job_id(number) for number in (5, 4, 3, 2, 1)]
    assert service.client.get(f"/v1/jobs/{job_id(1)}/events").json()["items"][0]["message"] == "accepted"


def test_ready_is_the_database_alone(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_FRESH", 0.0)

    def look() -> tuple[int, bool, dict[str, str]]:
        answer = service.client.get("/readyz")
        body = answer.json()
        return answer.status_code, body["ready"], {name: check["status"] for name, check in body["checks"].items()}

    assert look() == (200, True, {"database": "ok", "bucket": "ok", "ray": "ok"})
    service.bucket.reachable = service.ray.reachable = False
    assert look() == (200, True, {"database": "ok", "bucket": "degraded", "ray": "degraded"})
    service.store._engine.dispose()
    monkeypatch.setattr(service.store._engine.dialect, "connect", failing)
    assert look() == (503, False, {"database": "failed", "bucket": "degraded", "ray": "degraded"})
    assert service.client.get("/healthz").json() == {"status": "ok"}


def failing(*_: Any, **__: Any) -> Any:
    raise sqlite3.OperationalError("unable to open database file")


def test_a_locked_database_says_when_to_come_back(service: Service, tmp_path: Path) -> None:
    job = service.post(BODY).json()["id"]
    service.store._engine.dispose()
    sa.event.listen(service.store._engine, "connect", lambda new, _: new.execute("PRAGMA busy_timeout=0"))
    other = sqlite3.connect(tmp_path / "lockstep.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert service.client.get(f"/v1/jobs/{job}").status_code == 200  # who only reads needs no lock
    answer = service.client.post(f"/v1/jobs/{job}/cancel")
    assert problem(answer, 503, "unavailable")["detail"].startswith(
        "the database does not answer; send the request again"
    )
    assert answer.headers["retry-after"] == "5"
    other.rollback()
    other.close()


def test_a_bug_is_a_problem_without_a_traceback(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: Any) -> Any:
        raise ZeroDivisionError("canary-7f3a")

    monkeypatch.setattr(service.store, "get", bug)
    found = problem(service.client.get(f"/v1/jobs/{job_id(1)}"), 500, "internal-error")
    assert "canary" not in json.dumps(found)


def test_times_are_in_utc(service: Service) -> None:
    service.ended()
    assert service.client.get(f"/v1/jobs/{job_id(1)}").json()["created_at"] == T0.strftime("%FT%TZ")


LIVE = {"Accept": "text/event-stream"}
LISTS = ("events", "metrics", "logs")


@pytest.mark.parametrize("what", LISTS)
def test_a_live_stream_of_an_ended_job_is_its_list_and_its_end(service: Service, what: str) -> None:
    job = service.ended()
    stream = service.client.get(f"/v1/jobs/{job}/{what}", headers=LIVE)
    assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
    *items, end = Parser().feed(stream.content)
    assert (end.event, json.loads(end.data)["state"]) == ("end", "failed")
    assert [json.loads(message.data) for message in items] == service.client.get(f"/v1/jobs/{job}/{what}").json()[
        "items"
    ]


def test_a_live_stream_goes_on_after_the_last_id_rather_than_after_the_query(service: Service) -> None:
    job = service.ended()
    for query, headers, count in (("", {}, 1), ("?after=1", {}, 0), ("?after=0", {"Last-Event-ID": "1"}, 0)):
        answer = service.client.get(f"/v1/jobs/{job}/events{query}", headers={**LIVE, **headers})
        assert len(list(Parser().feed(answer.content))) == count + 1
    cursor = base64.urlsafe_b64encode(b"{}").decode()
    for query, headers in ((f"?cursor={cursor}", {}), ("?cursor=x", {"Last-Event-ID": cursor})):
        assert service.client.get(f"/v1/jobs/{job}/logs{query}", headers={**LIVE, **headers}).status_code == 200


@pytest.mark.parametrize("what", LISTS)
@pytest.mark.parametrize("last_id", ["null", "", "-1", "1.5", "9" * 30, "é", "1-0-a", "1-0-a:-1", "..-1-a:3", "1:1:1"])
def test_a_last_id_that_is_not_ours_is_refused(service: Service, what: str, last_id: str) -> None:
    service.ended()
    headers = {b"Accept": b"text/event-stream", b"Last-Event-ID": last_id.encode()}
    problem(service.client.get(f"/v1/jobs/{job_id(1)}/{what}", headers=headers), 422, "invalid")


@pytest.mark.parametrize(("path", "name"), [("events?limit=5", "limit"), ("metrics?max_points=5", "max_points")])
def test_what_a_live_stream_cannot_do_is_refused_by_name(service: Service, path: str, name: str) -> None:
    answer = service.client.get(f"/v1/jobs/{service.ended()}/{path}", headers=LIVE)
    assert problem(answer, 422, "invalid")["errors"][0]["path"] == f"$.query.{name}"


@pytest.mark.parametrize("what", LISTS)
def test_a_live_stream_needs_a_key_and_a_job_of_ones_own(service: Service, what: str) -> None:
    service.store.insert(row(2, project="another", state="failed"), ACCEPTED, None)
    for number in (1, 2):
        problem(service.client.get(f"/v1/jobs/{job_id(number)}/{what}", headers=LIVE), 404, "not-found")
    keyless = TestClient(service.app, headers=LIVE)
    problem(keyless.get(f"/v1/jobs/{service.ended()}/{what}"), 401, "unauthorized")


@pytest.mark.parametrize("what", LISTS)
def test_a_live_stream_too_many_is_refused_and_the_list_is_not(service: Service, what: str) -> None:
    service.app.state.streams = Streams(interval=0, keep_alive=3600, limit=0)
    answer = service.client.get(f"/v1/jobs/{service.ended()}/{what}", headers=LIVE)
    assert problem(answer, 503, "unavailable")["detail"].endswith("close one, or read the lists")
    assert answer.headers["retry-after"] == "5"
    assert service.client.get(f"/v1/jobs/{job_id(1)}/{what}").status_code == 200


def test_only_events_are_followed_without_the_threads_of_the_bucket(service: Service) -> None:
    reads: list[bool] = []

    class Noting(Streams):
        def answer(
            self,
            feed: Feed,
            check: Callable[[], object],
            reads_bucket: bool = True,
            key: str = "",
            project: str = "",
        ) -> StreamingResponse:
            reads.append(reads_bucket)
            return super().answer(feed, check, reads_bucket, key, project)

    service.app.state.streams, job = Noting(interval=0, keep_alive=3600), service.ended()
    for what in LISTS:
        service.client.get(f"/v1/jobs/{job}/{what}", headers=LIVE)
    assert reads == [False, True, True]


def test_a_cursor_of_one_worker_is_refused_for_another(service: Service) -> None:
    job = service.ended()
    cursor = base64.urlsafe_b64encode(b'{"rank":1}').decode()
    assert service.client.get(f"/v1/jobs/{job}/logs?rank=1&cursor={cursor}").status_code == 200
    for query in (f"?cursor={cursor}", f"?rank=0&cursor={cursor}"):
        found = problem(service.client.get(f"/v1/jobs/{job}/logs{query}"), 422, "invalid")
        assert found["detail"] == "this cursor is for the logs of worker 1; begin without one"
