"""The control plane behind a real server, on a real S3 store, with a Ray address at which nobody listens."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import httpx2
import pytest
import uvicorn

from api.layout import DatasetLayout
from api.storage import Bucket
from service.app import create_app
from service.settings import Settings
from tests.fakes import dataset
from tests.servers import BUCKET, S3, free_port, s3_server

KEY = "lk_integration_test"
BODY: dict[str, Any] = {"name": "first", "data": {"dataset": "words"}, "model": {"size": "1m"}, "steps": 10}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with s3_server(tmp_path_factory.mktemp("s3") / "data") as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        Bucket(f"s3://{BUCKET}").put_document(DatasetLayout("default", "words", "v1").document, dataset())
        yield server


@contextmanager
def serving(folder: Path) -> Iterator[httpx2.Client]:
    """A control plane in a thread of this process, on a free port, and a client with a key for it."""
    key = folder / "key"
    key.write_text(KEY)
    settings = Settings(
        database_url=f"sqlite:///{folder / 'lockstep.db'}",
        storage=f"s3://{BUCKET}",
        ray_address=f"http://127.0.0.1:{free_port()}",
        bootstrap_key_path=key,
        reconcile_interval=0.05,
    )
    port = free_port()
    app = create_app(settings)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    limits = httpx2.Limits(max_connections=64)
    headers = {"Authorization": f"Bearer {KEY}"}
    try:
        with httpx2.Client(
            base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30, limits=limits, trust_env=False
        ) as client:
            until(lambda: server.started)
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def client(store: S3, tmp_path: Path) -> Iterator[httpx2.Client]:
    with serving(tmp_path) as made:
        yield made


def until(done: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "this never came true"
        time.sleep(0.02)


def problem(answer: httpx2.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert answer.headers["x-request-id"] == body["request_id"]
    return body


def listed(client: httpx2.Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get("/v1/jobs").json()["items"]
    return found


def test_of_fifty_posts_with_one_key_at_once_one_makes_a_job(client: httpx2.Client) -> None:
    barrier = threading.Barrier(50)

    def post(_: int) -> httpx2.Response:
        barrier.wait()
        return client.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "once"})

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(post, range(50)))
    assert sorted(answer.status_code for answer in answers) == [200] * 49 + [201]
    [job] = listed(client)
    assert {answer.json()["id"] for answer in answers} == {job["id"]}
    events = client.get(f"/v1/jobs/{job['id']}/events").json()["items"]
    assert [event["message"] for event in events if event["type"] == "state"] == ["accepted"]


def test_without_ray_a_job_is_accepted_with_a_warning_and_says_what_it_waits_for(client: httpx2.Client) -> None:
    answer = client.post("/v1/jobs", json=BODY)
    assert answer.status_code == 201
    assert any(warning.startswith("Ray does not answer") for warning in answer.json()["warnings"])
    place = answer.headers["location"]
    until(lambda: client.get(place).json()["conditions"])
    job = client.get(place).json()
    assert (job["state"], job["attempt"]) == ("queued", 0)
    [condition] = job["conditions"]
    assert condition["type"] == "ray_unreachable"
    assert "did not answer (ConnectError)" in condition["message"]
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["ready"]) == (200, True)
    assert {name: check["status"] for name, check in ready.json()["checks"].items()} == {
        "database": "ok", "bucket": "ok", "ray": "degraded"}  # fmt: skip
    assert client.post(f"{place}/cancel").status_code == 202
    until(lambda: client.get(place).json()["state"] == "cancelled")
    assert client.delete(place).status_code == 204
    problem(client.get(place), 404)


def test_an_accepted_job_is_there_after_a_restart(store: S3, tmp_path: Path) -> None:
    with serving(tmp_path) as first:
        job = first.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "once"}).json()["id"]
    with serving(tmp_path) as second:
        assert [found["id"] for found in listed(second)] == [job]
        assert second.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "once"}).json()["id"] == job


def test_a_store_that_refuses_the_credentials_is_told_in_one_sentence(
    store: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-7f3a")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it remembers credentials
    with serving(tmp_path) as refused:
        answer = refused.post("/v1/jobs", json=BODY)
        detail = problem(answer, 503)["detail"]
        assert "refused access" in detail
        assert "check the AWS credentials and the policy" in detail
        assert "canary" not in detail
        assert answer.headers["retry-after"]
        assert listed(refused) == []


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("missing", "there is no dataset broken; prepare one first, or check the name"),
        ("half-written", "has no dataset.json: its preparation has not finished, or failed"),
        ("damaged", "is not a valid DatasetDocument"),
        ("of another version", "is not a valid DatasetDocument"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_told_and_nothing_is_stored(
    client: httpx2.Client, state: str, words: str
) -> None:
    bucket, layout = Bucket(f"s3://{BUCKET}"), DatasetLayout("default", "broken", "v1")
    if state == "half-written":
        bucket.put(layout.shard("train", 0), b"x")
    elif state == "damaged":
        bucket.put(layout.document, b'{"name": "bro')
    elif state == "of another version":
        document = {**json.loads(dataset().model_dump_json()), "schema_version": 2}
        bucket.put(layout.document, json.dumps(document).encode())
    found = problem(client.post("/v1/jobs", json={**BODY, "data": {"dataset": "broken"}}), 422)
    assert words in found["detail"]
    assert found["errors"][0]["path"] == "$.data.dataset"
    assert listed(client) == []
    bucket.delete([item.key for item in bucket.objects(layout.prefix)])


def test_a_large_body_is_refused_while_it_arrives(client: httpx2.Client) -> None:
    pieces = (b" " * 65_536 for _ in range(160))
    headers = {"Content-Type": "application/json"}
    try:
        answer = client.post("/v1/jobs", content=pieces, headers=headers)
    except httpx2.WriteError:  # the server has hung up on what it will not read
        return
    problem(answer, 413)


def test_a_server_of_this_machine_answers_to_no_name_that_was_made_to_point_at_it(client: httpx2.Client) -> None:
    port = client.base_url.port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}"):
        assert client.get("/v1/jobs", headers={"Host": host}).status_code == 200
    problem(client.get("/v1/jobs", headers={"Host": f"rebound.example:{port}"}), 400)
    problem(client.get("/healthz", headers={"Host": f"rebound.example:{port}"}), 400)
