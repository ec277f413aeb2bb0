"""The client against a server that is a function: what it sends, what it retries, what it makes of answers."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from api.client import Client
from api.errors import (
    ApiError,
    BadRequest,
    Conflict,
    Fault,
    InvalidData,
    InvalidSpec,
    NotFound,
    Unauthorized,
    Unavailable,
    Unreachable,
)
from api.jobs import JobState, MetricPoint, PreparePlan, Rewind, TrainPlan
from api.spec import job_spec_adapter

URL = "http://lockstep.test"
ID = "job-01h4x5y6z7abcdefghjk"
SPEC = {"name": "tiny", "data": {"dataset": "words"}, "model": {"size": "1m"}}
PREPARE = {"kind": "prepare", "name": "words", "dataset": "words", "source": {"type": "python-stdlib"}}
AT = "2026-11-23T15:00:00Z"

Handler = Callable[[httpx2.Request], httpx2.Response]


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    def clock(self) -> float:
        return sum(self.pauses)


class Server:
    """Answers requests in turn from a script, repeating its last line, and remembers what it was asked."""

    def __init__(self, *script: Any) -> None:
        self.script = list(script)
        self.asked: list[httpx2.Request] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(request)
        answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, httpx2.Response) else httpx2.Response(200, json=answer)


def client_of(server: Handler, time: Time | None = None, url: str = URL) -> Client:
    time, transport = time or Time(), httpx2.MockTransport(server)
    return Client(url, "secret-key", transport=transport, sleep=time.pauses.append, clock=time.clock)


def job(**fields: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "id": ID, "name": "tiny", "project": "default", "owner": "ana", "labels": {}, "state": "running",
        "reason": None, "message": "", "attempt": 1, "conditions": [], "progress": {"step": 5, "total_steps": 10},
        "result": {}, "spec": SPEC, "dataset_version": None, "created_at": AT, "started_at": None, "ended_at": None,
    }  # fmt: skip
    return usual | fields


def event(seq: int, type: str = "state") -> dict[str, Any]:
    return {"seq": seq, "at": AT, "type": type, "message": f"event {seq}"}


def line(number: int, rank: int = 0, segment: str = "1-0-a") -> dict[str, Any]:
    return {"segment": segment, "rank": rank, "line": number, "text": f"line {number}"}


def page(*items: Any, next_cursor: str | None = None) -> dict[str, Any]:
    return {"items": list(items), "next_cursor": next_cursor}


def problem(status: int, name: str, detail: str = "No.", errors: list[dict[str, str]] | None = None) -> httpx2.Response:
    kind = f"urn:lockstep:problem:{name}"
    body = {"type": kind, "title": "t", "status": status, "detail": detail, "request_id": "r-1", "errors": errors or []}
    return httpx2.Response(status, json=body, headers={"Content-Type": "application/problem+json"})


UNAVAILABLE = problem(503, "unavailable", "The database does not answer.")
REFUSED = httpx2.ConnectError("connection refused")


def test_submit_posts_the_spec_as_given_with_the_key() -> None:
    server = Server(httpx2.Response(201, json=job()))
    submitted = client_of(server).submit(SPEC, idempotency_key="mine")
    request = server.asked[0]
    assert (request.method, str(request.url)) == ("POST", f"{URL}/v1/jobs")
    assert json.loads(request.content) == SPEC
    assert request.headers["Idempotency-Key"] == "mine"
    assert request.headers["Authorization"] == "Bearer secret-key"
    assert request.headers["Content-Type"] == "application/json"
    assert submitted.id == ID
    assert submitted.state is JobState.RUNNING


def test_submit_sends_a_parsed_spec_with_its_defaults() -> None:
    server = Server(job())
    spec = job_spec_adapter.validate_python(SPEC)
    client_of(server).submit(spec)
    assert job_spec_adapter.validate_json(server.asked[0].content) == spec


def test_submissions_get_different_keys_but_retries_of_one_share_theirs() -> None:
    server = Server(REFUSED, UNAVAILABLE, job())
    client = client_of(server)
    client.submit(SPEC)
    client.submit(SPEC)
    keys = [request.headers["Idempotency-Key"] for request in server.asked]
    assert len(keys) == 4
    assert keys[0] == keys[1] == keys[2] != keys[3]


@pytest.mark.parametrize("key", ["", "schlüssel", "two\nlines"])
def test_a_key_that_no_header_can_carry_is_refused_before_anything_is_sent(key: str) -> None:
    server = Server(job())
    with pytest.raises(BadRequest, match="idempotency key"):
        client_of(server).submit(SPEC, idempotency_key=key)
    assert not server.asked


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), b"bytes", object(), {1, 2}])
def test_a_spec_beyond_json_is_an_invalid_spec_that_names_the_field(value: object) -> None:
    server = Server(job())
    with pytest.raises(InvalidSpec, match="cannot be written as JSON") as caught:
        client_of(server).submit({**SPEC, "optimizer": {"epsilon": 1.0, "betas": [0.9, value]}})
    assert [fault.path for fault in caught.value.errors] == ["$.optimizer.betas[1]"]
    assert str(caught.value).startswith("$.optimizer.betas[1]: ")
    assert not server.asked


def test_a_spec_within_itself_is_an_invalid_spec() -> None:
    loop: list[object] = []
    loop += [loop, loop]
    with pytest.raises(InvalidSpec, match="nested too deeply"):
        client_of(Server(job())).submit({**SPEC, "seed": loop})


def test_plan_asks_for_a_dry_run_and_knows_both_kinds() -> None:
    memory = {"weights": 1, "gradients": 2, "optimizer": 3, "ddp_buckets": 4, "snapshot": 5}
    train = {
        "kind": "train", "spec": SPEC, "dataset_version": "v", "parameters": 1, "steps": 1, "tokens_per_step": 1,
        "tokens": 1, "epochs": 1.0, "memory_per_worker": memory, "checkpoint_size": 1, "submission": {}, "warnings": [],
    }  # fmt: skip
    server = Server(train, {"kind": "prepare", "spec": PREPARE, "submission": {}, "warnings": []})
    client = client_of(server)
    assert isinstance(client.plan(SPEC), TrainPlan)
    assert isinstance(client.plan(PREPARE), PreparePlan)
    assert str(server.asked[0].url) == f"{URL}/v1/jobs?dry_run=true"
    assert "Idempotency-Key" not in server.asked[0].headers


METRICS = f"GET /v1/jobs/{ID}/metrics"
VERDICT = httpx2.Response(200, content=b'{"type":"verdict","verdict":"well","checkpoints":[]}\n')
CALLS: list[tuple[Callable[[Client], object], str, Any]] = [
    (lambda c: c.get(ID), f"GET /v1/jobs/{ID}", job()),
    (lambda c: c.list(), "GET /v1/jobs?limit=50", page()),
    (lambda c: c.list("failed", "tiny", 3, "c1"), "GET /v1/jobs?state=failed&name=tiny&limit=3&cursor=c1", page()),
    (
        lambda c: c.list(["running", JobState.QUEUED], label=["team=a b", "x"]),
        "GET /v1/jobs?state=running&state=queued&limit=50&label=team%3Da+b&label=x",
        page(),
    ),
    (lambda c: c.list(JobState.FAILED, label="x"), "GET /v1/jobs?state=failed&limit=50&label=x", page()),
    (lambda c: c.cancel(ID), f"POST /v1/jobs/{ID}/cancel", httpx2.Response(202, json=job())),
    (lambda c: c.pause(ID), f"POST /v1/jobs/{ID}/pause", httpx2.Response(202, json=job())),
    (lambda c: c.resume(ID), f"POST /v1/jobs/{ID}/resume", httpx2.Response(202, json=job())),
    (lambda c: c.retry(ID), f"POST /v1/jobs/{ID}/retry", httpx2.Response(201, json=job())),
    (lambda c: c.queue(), "GET /v1/queue", page()),
    (lambda c: c.delete(ID), f"DELETE /v1/jobs/{ID}", httpx2.Response(204)),
    (lambda c: c.events(ID, 7, 9), f"GET /v1/jobs/{ID}/events?after=7&limit=9", page()),
    (lambda c: c.metrics(ID), f"{METRICS}?from_step=0", page()),
    (lambda c: c.metrics(ID, ["a", "b"], 5, 9), f"{METRICS}?keys=a%2Cb&from_step=5&max_points=9", page()),
    (lambda c: c.checkpoints(ID), f"GET /v1/jobs/{ID}/checkpoints", page()),
    (lambda c: c.verify(ID, 4), f"GET /v1/jobs/{ID}/verification?step=4", VERDICT),
    (lambda c: c.delete_checkpoint(ID, 400), f"DELETE /v1/jobs/{ID}/checkpoints/400", httpx2.Response(204)),
    (lambda c: c.logs(ID, 0, "c2"), f"GET /v1/jobs/{ID}/logs?rank=0&cursor=c2", page()),
    (lambda c: c.ready(), "GET /readyz", {"ready": True, "checks": {}}),
]


@pytest.mark.parametrize(("call", "route", "answer"), CALLS)
def test_each_method_is_one_route(call: Callable[[Client], object], route: str, answer: Any) -> None:
    server = Server(answer)
    call(client_of(server))
    assert [f"{request.method} {request.url.raw_path.decode()}" for request in server.asked] == [route]


@pytest.mark.parametrize(
    ("call", "body"),
    [
        (lambda c: c.cancel(ID), {"keep_checkpoint": False}),
        (lambda c: c.cancel(ID, keep_checkpoint=True), {"keep_checkpoint": True}),
        (lambda c: c.resume(ID), {"workers": None}),
        (lambda c: c.resume(ID, 4), {"workers": 4}),
    ],
)
def test_how_a_job_stops_and_goes_on_is_in_the_body(call: Callable[[Client], object], body: Any) -> None:
    server = Server(httpx2.Response(202, json=job()))
    call(client_of(server))
    assert json.loads(server.asked[0].content) == body
    assert server.asked[0].headers["Content-Type"] == "application/json"


def test_a_retry_is_safe_to_send_again_by_its_key() -> None:
    server = Server(REFUSED, UNAVAILABLE, httpx2.Response(201, json=job(id="job-2")))
    client = client_of(server)
    assert client.retry(ID).id == "job-2"
    assert client.retry(ID, idempotency_key="mine").id == "job-2"
    keys = [request.headers["Idempotency-Key"] for request in server.asked]
    assert keys[0] == keys[1] == keys[2] != keys[3] == "mine"
    with pytest.raises(BadRequest, match="idempotency key"):
        client.retry(ID, idempotency_key="")


def test_the_queue_is_read_with_all_that_it_says() -> None:
    entry = {"position": 1, "job_id": ID, "name": "tiny", "priority": 7, "state": "queued", "needs": "2 × 1 CPU",
             "message": "needs 2 × 1 CPU, 0 CPU free", "since": AT, "not_known_yet": 1}  # fmt: skip
    [found] = client_of(Server(page(entry))).queue().items
    assert (found.position, found.job_id, found.priority, found.needs) == (1, ID, 7, "2 × 1 CPU")


def test_a_url_with_a_path_and_a_slash_is_kept() -> None:
    server = Server(job())
    client_of(server, url="https://host.test/training/").get(ID)
    assert str(server.asked[0].url) == f"https://host.test/training/v1/jobs/{ID}"


@pytest.mark.parametrize("given", ["../../readyz", "a/b", "a?x=1#y"])
def test_an_id_cannot_lead_to_another_route(given: str) -> None:
    server = Server(problem(404, "not-found"))
    with pytest.raises(NotFound):
        client_of(server).get(given)
    path = server.asked[0].url.raw_path.decode()
    assert path.startswith("/v1/jobs/")
    assert path.count("/") == 3
    assert "?" not in path


@pytest.mark.parametrize("given", ["", ".", ".."])
def test_an_empty_id_is_not_found_without_asking(given: str) -> None:
    server = Server(page())
    with pytest.raises(NotFound, match="not a job id"):
        client_of(server).delete(given)
    assert not server.asked


def test_iter_jobs_walks_all_pages() -> None:
    server = Server(page(job(id="a"), job(id="b"), next_cursor="c1"), page(job(id="c")))
    assert [found.id for found in client_of(server).iter_jobs(name="tiny")] == ["a", "b", "c"]
    assert "cursor" not in server.asked[0].url.params
    assert server.asked[1].url.params["cursor"] == "c1"
    assert server.asked[1].url.params["name"] == "tiny"


def test_iter_jobs_asks_for_every_page_by_all_filters_even_those_that_can_be_read_once() -> None:
    server = Server(page(job(id="a"), next_cursor="c1"), page(job(id="b")))
    list(client_of(server).iter_jobs(iter(["queued", "running"]), label=iter(["x", "team=a"])))
    for request in server.asked:
        assert request.url.params.get_list("state") == ["queued", "running"]
        assert request.url.params.get_list("label") == ["x", "team=a"]


def test_the_last_answer_is_kept_byte_for_byte_with_fields_that_are_not_known_yet() -> None:
    body = json.dumps(job(new_field=1.50), indent=3).encode()
    client = client_of(Server(httpx2.Response(200, content=body)))
    assert client.get(ID).id == ID
    assert client.last_answer == body


@pytest.mark.parametrize(
    ("status", "name", "kind"),
    [(401, "unauthorized", Unauthorized), (404, "not-found", NotFound), (409, "conflict", Conflict)],
)
def test_a_problem_is_raised_as_its_error(status: int, name: str, kind: type[ApiError]) -> None:
    with pytest.raises(kind, match="because") as caught:
        client_of(Server(problem(status, name, "because"))).get(ID)
    assert caught.value.request_id == "r-1"


def test_faults_come_with_the_error() -> None:
    answer = problem(422, "invalid", errors=[{"path": "$.model.width", "message": "too wide"}])
    with pytest.raises(InvalidSpec) as caught:
        client_of(Server(answer)).submit(SPEC)
    assert caught.value.errors == [Fault(path="$.model.width", message="too wide")]


@pytest.mark.parametrize("status", [301, 404, 500])
def test_an_answer_of_something_else_says_to_check_the_url(status: int) -> None:
    with pytest.raises(ApiError, match=f"{status}.*LOCKSTEP_URL") as caught:
        client_of(Server(httpx2.Response(status, html="<h1>Hi</h1>"))).get(ID)
    assert type(caught.value) is ApiError


@pytest.mark.parametrize("content", [b"<html>", b"{}", b"\xff"])
def test_a_success_that_makes_no_sense_is_invalid_data(content: bytes) -> None:
    with pytest.raises(InvalidData, match="does not understand"):
        client_of(Server(httpx2.Response(200, content=content))).get(ID)


def test_a_gateway_without_its_server_is_retried_as_unavailable() -> None:
    server = Server(httpx2.Response(502, html="Bad Gateway"), job())
    assert client_of(server).get(ID).id == ID
    with pytest.raises(Unavailable):
        client_of(Server(httpx2.Response(504))).get(ID)


@pytest.mark.parametrize("trouble", [REFUSED, UNAVAILABLE, httpx2.ReadTimeout("slow"), httpx2.ReadError("cut")])
def test_a_get_is_retried_with_growing_pauses_and_not_for_ever(trouble: Any) -> None:
    time, server = Time(), Server(trouble)
    with pytest.raises((Unreachable, Unavailable)):
        client_of(server, time).get(ID)
    assert 3 <= len(server.asked) <= 6
    assert time.pauses == sorted(time.pauses)
    assert time.clock() <= 3


@pytest.mark.parametrize("trouble", [REFUSED, UNAVAILABLE])
@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.cancel(ID),
        lambda c: c.pause(ID),
        lambda c: c.resume(ID, 2),
        lambda c: c.delete(ID),
        lambda c: c.delete_checkpoint(ID, 1),
    ],
)
def test_a_request_that_is_not_idempotent_is_sent_once(trouble: Any, call: Callable[[Client], object]) -> None:
    server = Server(trouble)
    with pytest.raises((Unreachable, Unavailable)):
        call(client_of(server))
    assert len(server.asked) == 1


def test_other_errors_are_not_retried() -> None:
    server = Server(problem(500, "internal-error"))
    with pytest.raises(ApiError):
        client_of(server).get(ID)
    assert len(server.asked) == 1


@pytest.mark.parametrize("url", [URL, "lockstep.test", "http://host:port"])
def test_unreachable_says_which_url_and_what_to_do(url: str) -> None:
    with pytest.raises(Unreachable) as caught:
        client_of(Server(REFUSED), url=url).get(ID)
    for word in (url, "make up", "lockstep-server up", "LOCKSTEP_URL"):
        assert word in str(caught.value)


def test_not_ready_is_an_answer() -> None:
    body = {"ready": False, "checks": {"database": {"status": "failed"}}}
    readiness = client_of(Server(httpx2.Response(503, json=body))).ready()
    assert not readiness.ready
    assert readiness.checks["database"].status == "failed"


def test_ready_raises_what_is_not_readiness() -> None:
    with pytest.raises(InvalidData):
        client_of(Server(httpx2.Response(503, html="gateway"))).ready()
    with pytest.raises(Unauthorized):
        client_of(Server(problem(401, "unauthorized"))).ready()


def routed(jobs: Iterator[Any], others: Callable[[httpx2.Request], Any]) -> Handler:
    """Answer a look at the job from `jobs`, anything else by `others`."""

    def handle(request: httpx2.Request) -> httpx2.Response:
        answer = next(jobs) if request.url.path.endswith(ID) else others(request)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, httpx2.Response) else httpx2.Response(200, json=answer)

    return handle


def events_after(events: list[dict[str, Any]], size: int) -> Callable[[httpx2.Request], Any]:
    """Serve events as the API does, at most `size` of them in a page."""

    def answer(request: httpx2.Request) -> Any:
        rest = [e for e in events if e["seq"] > int(request.url.params["after"])]
        return page(*rest[:size], next_cursor="more" if len(rest) > size else None)

    return answer


def test_follow_yields_every_event_once_and_stops_at_the_end() -> None:
    time = Time()
    events = [event(1), event(2), event(3)]
    looks = iter([job(state="queued"), job(), job(state="succeeded")])

    def answer(request: httpx2.Request) -> Any:
        if len(time.pauses) == 2 and len(events) == 3:
            events.append(event(4))
        return events_after(events, 2)(request)

    updates = list(client_of(routed(looks, answer), time).follow(ID, poll_seconds=7))
    assert [[e.seq for e in update.events] for update in updates] == [[1, 2, 3], [], [4]]
    assert [update.job.state for update in updates] == ["queued", "running", "succeeded"]
    assert time.pauses == [7, 7]


def test_follow_outlives_a_control_plane_that_is_away() -> None:
    time = Time()
    away = [REFUSED] * 6 + [UNAVAILABLE] * 6 + [httpx2.Response(502)] * 3
    looks = iter([job(), *away, job(state="succeeded")])
    updates = list(client_of(routed(looks, events_after([event(1)], 9)), time).follow(ID))
    assert [update.job.state for update in updates] == ["running", "succeeded"]
    assert 30 < time.clock() < 120
    assert max(time.pauses) <= 5


def test_follow_gives_up_after_its_patience() -> None:
    time, server = Time(), Server(UNAVAILABLE)
    with pytest.raises(Unreachable, match="Gave up after 120 s"):
        list(client_of(server, time).follow(ID))
    assert 110 < time.clock() <= 120


def test_patience_starts_anew_after_an_answer() -> None:
    time = Time()
    away = [REFUSED] * 20
    looks = iter([*away, job(), *away, job(), *away, job(state="failed")])
    updates = list(client_of(routed(looks, events_after([], 9)), time).follow(ID))
    assert len(updates) == 3
    assert time.clock() > 200


def test_follow_ends_when_the_job_is_gone() -> None:
    looks = iter([job(), problem(404, "not-found")])
    with pytest.raises(NotFound):
        list(client_of(routed(looks, events_after([], 9))).follow(ID))


def stream_of(*messages: str, cut: bool = False) -> httpx2.Response:
    """A live stream of messages as they go over the wire; `cut`: the connection breaks after them."""

    def body() -> Iterator[bytes]:
        yield b"retry: 1000\n\n"
        for message in messages:
            yield f"{message}\n\n".encode()
        if cut:
            raise httpx2.ReadError("cut")

    return httpx2.Response(200, headers={"Content-Type": "text/event-stream; charset=utf-8"}, content=body())


def sent(body: Any, id: str | None = None, event: str | None = None) -> str:
    fields = {"event": event, "data": json.dumps(body), "id": id}
    return "\n".join(f"{name}: {value}" for name, value in fields.items() if value is not None)


END = sent({"state": "succeeded", "reason": "completed", "message": "done"}, event="end")


def test_a_stream_goes_on_after_its_last_id_until_the_job_has_ended() -> None:
    time = Time()
    server = Server(
        stream_of(sent(event(1), "1"), sent(event(2), "2"), cut=True),
        REFUSED,
        UNAVAILABLE,
        stream_of(": ping", sent(event(3), "3")),
        stream_of(sent(event(4), "4"), END, sent(event(5), "5")),
    )
    stream = client_of(server, time).stream_events(ID)
    assert [found.seq for found in stream] == [1, 2, 3, 4]
    assert [request.headers.get("Last-Event-ID") for request in server.asked] == [None, "2", "2", "2", "3"]
    assert {request.headers["Accept"] for request in server.asked} == {"text/event-stream"}
    assert {request.url.path for request in server.asked} == {f"/v1/jobs/{ID}/events"}
    assert time.pauses == [1.0, 2.0, 4.0, 1.0]


def test_a_stream_can_be_left_and_another_goes_on_from_there() -> None:
    first = client_of(Server(stream_of(sent(line(0), "c1"), sent(line(1), "c2"), END))).stream_logs(ID, rank=0)
    assert next(first).line == 0
    assert first.last_id == "c1"
    first.close()
    assert list(first) == []
    server = Server(stream_of(sent(line(1), "c2"), END))
    assert [found.line for found in client_of(server).stream_logs(ID, rank=0, last_id=first.last_id)] == [1]
    assert server.asked[0].headers["Last-Event-ID"] == "c1"
    assert dict(server.asked[0].url.params) == {"rank": "0"}


def test_a_stream_of_metrics_has_points_and_rewinds_and_may_go_back_to_the_start() -> None:
    point = {"segment": "1-0-a", "line": 0, "step": 5, "at": AT, "values": {"loss": 1.0}}
    rewinds = [sent({"step": step, "segment": "1-1-b"}, id, "rewind") for step, id in ((3, "1-0-a@3"), (0, ""))]
    server = Server(stream_of(sent(point, "1-0-a:0"), *rewinds, cut=True), stream_of(sent({}, event="news"), END))
    items = list(client_of(server).stream_metrics(ID, ["loss", "eval_loss"], from_step=5))
    assert items == [
        MetricPoint.model_validate(point),
        Rewind(step=3, segment="1-1-b"),
        Rewind(step=0, segment="1-1-b"),
    ]
    assert [request.headers.get("Last-Event-ID") for request in server.asked] == [None, None]
    assert dict(server.asked[0].url.params) == {"keys": "loss,eval_loss", "from_step": "5"}


@pytest.mark.parametrize("trouble", [REFUSED, UNAVAILABLE, httpx2.Response(502), httpx2.ReadTimeout("silence")])
def test_a_stream_gives_up_after_its_patience_and_says_so(trouble: Any) -> None:
    time, server = Time(), Server(stream_of(sent(event(1), "1"), cut=True), trouble)
    stream = client_of(server, time).stream_events(ID)
    assert next(stream).seq == 1
    with pytest.raises(Unreachable, match="Gave up after 120 s"):
        next(stream)
    assert 110 < time.clock() <= 120
    assert max(time.pauses) <= 5


def test_a_stream_that_is_always_cut_after_a_sign_of_life_is_never_given_up() -> None:
    time = Time()
    server = Server(*(stream_of(": ping", cut=True) for _ in range(300)), stream_of(END))
    assert list(client_of(server, time).stream_logs(ID)) == []
    assert set(time.pauses) == {1.0}


def test_a_slow_reader_and_a_stream_that_was_made_long_ago_lose_no_patience() -> None:
    time = Time()
    server = Server(REFUSED, stream_of(sent(event(1), "1"), cut=True), REFUSED, stream_of(sent(event(2), "2"), END))
    stream = client_of(server, time).stream_events(ID)
    time.pauses.append(200.0)
    assert next(stream).seq == 1
    time.pauses.append(200.0)
    assert [found.seq for found in stream] == [2]
    assert time.pauses == [200.0, 1.0, 200.0, 1.0, 2.0]


def test_patience_begins_when_a_break_is_noticed() -> None:
    time, asked = Time(), []

    def server(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        if len(asked) == 1:
            time.pauses.append(200.0)
            raise REFUSED
        return stream_of(END)

    assert list(client_of(server, time).stream_events(ID)) == []
    assert time.pauses == [200.0, 1.0]


@pytest.mark.parametrize("cut", [True, False])
def test_a_server_that_fails_right_after_it_answers_is_given_up(cut: bool) -> None:
    time, asked = Time(), []

    def server(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        assert len(asked) < 100
        return stream_of(cut=cut)

    with pytest.raises(Unreachable, match="Gave up after 120 s"):
        next(client_of(server, time).stream_events(ID))
    assert 110 < time.clock() <= 120


def test_a_stream_that_the_server_cannot_read_on_is_not_asked_for_again() -> None:
    server = Server(stream_of(sent(line(0), "c1"), sent({"detail": "line 1 is damaged"}, event="error")))
    stream = client_of(server).stream_logs(ID)
    assert next(stream).line == 0
    with pytest.raises(InvalidData, match="line 1 is damaged"):
        next(stream)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (problem(404, "not-found"), NotFound),
        (problem(422, "invalid"), InvalidSpec),
        (httpx2.Response(200, json=page()), InvalidData),
        (stream_of("data: {}"), InvalidData),
    ],
)
def test_a_stream_that_is_refused_or_makes_no_sense_is_not_asked_for_again(
    answer: httpx2.Response, kind: type[Exception]
) -> None:
    server = Server(answer)
    with pytest.raises(kind):
        next(client_of(server).stream_events(ID))
    assert len(server.asked) == 1


def test_tail_yields_the_lines_until_the_end() -> None:
    server = Server(stream_of(sent(line(0), "c1"), cut=True), stream_of(sent(line(1), "c2"), END))
    assert [found.line for found in client_of(server).tail(ID)] == [0, 1]


def test_leaving_the_block_closes_the_client() -> None:
    with client_of(Server(job())) as client:
        client.get(ID)
    with pytest.raises(RuntimeError):
        client.get(ID)
