"""Ray over HTTP: every answer is one that means something, or RayUnreachable."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from service.lifecycle import RayStatus
from service.ray_backend import RayBackend, RayUnreachable
from tests.fakes import FakeRay

Calls = list[Callable[[RayBackend], Any]]
READS: Calls = [lambda ray: ray.session(), lambda ray: ray.nodes(), lambda ray: ray.status("job-1")]
WRITES: Calls = [lambda ray: ray.submit({"submission_id": "job-1"})]


def backend(answer: Callable[[httpx2.Request], httpx2.Response], token: Path | None = None) -> RayBackend:
    return RayBackend("http://ray:8265/", token, 1.0, transport=httpx2.MockTransport(answer))


def constant(status: int, content: bytes) -> Callable[[httpx2.Request], httpx2.Response]:
    return lambda _: httpx2.Response(status, content=content)


def test_session_nodes_and_status_are_read() -> None:
    fake = FakeRay(cpus=4)
    ray = fake.backend()
    assert ray.session() == "session-1"
    [node] = ray.nodes()
    assert dict(node.total) == {"CPU": 4, "memory": 16 * 2.0**30}
    assert ray.status("job-1") == (RayStatus.ABSENT, "Ray does not know it")
    ray.submit({"submission_id": "job-1"})
    assert ray.status("job-1") == (RayStatus.PENDING, "as Ray says")
    ray.stop("job-1")
    assert ray.status("job-1")[0] is RayStatus.STOPPED
    ray.close()


def test_dead_nodes_do_not_count() -> None:
    rows = [{"node_id": "a", "state": "DEAD", "resources_total": {"CPU": 1}}]
    body = json.dumps({"data": {"result": {"result": rows}}}).encode()
    assert backend(constant(200, body)).nodes() == []


@pytest.mark.parametrize("status", ["PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED"])
def test_every_status_of_ray_has_its_own_meaning(status: str) -> None:
    seen, message = backend(constant(200, json.dumps({"status": status, "message": None}).encode())).status("job-1")
    assert (seen, message) == (RayStatus(status.lower()), "")


def test_an_unknown_status_decides_nothing_and_is_named() -> None:
    ray = backend(constant(200, b'{"status": "HIBERNATING", "message": "zzz"}'))
    with pytest.raises(RayUnreachable, match="HIBERNATING"):
        ray.status("job-1")


def test_a_duplicate_is_answered_with_500_and_proves_nothing() -> None:
    ray = FakeRay().backend()
    ray.submit({"submission_id": "job-1"})
    with pytest.raises(RayUnreachable, match=r"500.*already exists"):
        ray.submit({"submission_id": "job-1"})
    assert ray.status("job-1")[0] is RayStatus.PENDING


@pytest.mark.parametrize("call", READS + WRITES)
@pytest.mark.parametrize(
    "error", [httpx2.ConnectError, httpx2.ReadTimeout, httpx2.RemoteProtocolError, httpx2.PoolTimeout]
)
def test_no_answer_is_unreachable(call: Callable[[RayBackend], Any], error: type[httpx2.HTTPError]) -> None:
    def fail(request: httpx2.Request) -> httpx2.Response:
        raise error("no")

    with pytest.raises(RayUnreachable, match=rf"Ray at http://ray:8265 did not answer \({error.__name__}\)"):
        call(backend(fail))


@pytest.mark.parametrize("call", READS + WRITES)
@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_token_names_the_setting(call: Callable[[RayBackend], Any], status: int) -> None:
    with pytest.raises(RayUnreachable, match="LOCKSTEP_RAY_TOKEN_PATH"):
        call(backend(constant(status, b"no")))


@pytest.mark.parametrize("call", READS + WRITES)
@pytest.mark.parametrize("status", [302, 429, 500, 502, 503])
def test_any_other_status_is_unreachable(call: Callable[[RayBackend], Any], status: int) -> None:
    with pytest.raises(RayUnreachable, match=f"answered {status}"):
        call(backend(constant(status, b"x" * 10_000)))


@pytest.mark.parametrize("call", READS)
@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"\xff\xfe", b"null", b"[]", b"{}", b"7", b'"x"', b'{"data": null}', b'{"status": {}}',
     b'{"status": null, "session_name": null}', b'{"data": {"result": {"result": 3}}}', b"[" * 100_000,
     b'{"data": {"result": {"result": [{"state": "ALIVE"}]}}}', b'{"data": {"result": {"result": [7]}}}'],
)  # fmt: skip
def test_a_body_that_makes_no_sense_is_unreachable(call: Callable[[RayBackend], Any], body: bytes) -> None:
    with pytest.raises(RayUnreachable):
        call(backend(constant(200, body)))


def test_the_token_is_sent_and_read_anew_each_time(tmp_path: Path) -> None:
    token, sent = tmp_path / "token", []

    def note(request: httpx2.Request) -> httpx2.Response:
        sent.append(request.headers.get("authorization"))
        return httpx2.Response(200, json={"session_name": "s"})

    ray = backend(note, token)
    with pytest.raises(RayUnreachable, match="token file cannot be read"):
        ray.session()
    for secret in ("first", "second"):
        token.write_text(f"{secret}\n")
        ray.session()
    backend(note).session()
    assert sent == ["Bearer first", "Bearer second", None]


def test_an_error_does_not_carry_the_token(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("canary-7f3a")
    with pytest.raises(RayUnreachable) as caught:
        backend(constant(500, b"oops"), token).session()
    assert "canary" not in str(caught.value)
