"""The whole API under schemathesis: whatever is asked, the answer is one that the OpenAPI document promises.

The document that is fuzzed knows the jobs that there are, so that not every answer is 404. Everything is derived from
a fixed seed: a run asks the same questions each time.
"""

import base64
import copy
import json
import re
from collections.abc import Iterator
from hashlib import sha256
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, get_args
from urllib.parse import parse_qs, urlsplit

import pytest
import schemathesis
import sqlalchemy as sa
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from schemathesis import checks
from schemathesis.specs.openapi import checks as openapi_checks

from api.documents import Manifest, Receipt, SegmentDocument, StreamLine
from api.errors import Problem
from api.jobs import JobState, ModelFile
from api.layout import CheckpointLayout, DatasetLayout, JobLayout, chunk
from api.spec_base import LabelFilter
from api.tenants import KeyRequest, Role
from service.app import make_api
from service.architectures import model_tensors
from service.auth import create_key
from service.database import make_engine
from service.download import places
from service.health import Dependencies
from service.jobs import Jobs
from service.rates import Limiter, Rate
from service.rows import NewEvent
from service.run_reader import read_logs
from service.sse import Streams
from service.store import Store
from service.tables import metadata, projects
from service.tenants import Tenants
from tests.fakes import (
    ACCEPTED,
    T0,
    FakeRay,
    MemoryBucket,
    dataset,
    job_id,
    new_store,
    prepare_spec,
    row,
    settings_for,
    train_spec,
)
from tests.soak import soak

KEY = "lk_test"
AUTH = {"Authorization": f"Bearer {KEY}"}
LABELS = {"team": "lm", "example.com/run.of-many": "7"}
STATES = {1: "succeeded", 2: "failed", 3: "cancelled", 4: "queued", 5: "running", 6: "paused"}
ENDED, UNKNOWN = (1, 2, 3), 7
MOST_BYTES = 262_144
LABEL = TypeAdapter(LabelFilter).json_schema()["pattern"]


class World:
    """What the application stands on: a few jobs, one of which has run, and a dataset."""

    def __init__(self, folder: Path) -> None:
        new_store(folder)._engine.dispose()
        self.engine = make_engine(f"sqlite:///{folder / 'lockstep.db'}")
        sa.event.listen(self.engine, "connect", lambda new, _: new.execute("PRAGMA synchronous=OFF"))
        self.store, self.bucket, self.ray = Store(self.engine), MemoryBucket(), FakeRay()
        self.settings = settings_for(folder)
        self.tenants = Tenants(self.engine)
        self.asked = 0
        self.reset()

    def reset(self) -> None:
        self.bucket.content = dict(TRAINED.content)
        with self.engine.begin() as connection:
            for table in reversed(metadata.sorted_tables):
                if table is not projects:
                    connection.execute(table.delete())
        create_key(self.tenants, KeyRequest(name="fuzz", role=Role.ADMIN), key=KEY)
        for number, state in STATES.items():
            end = {"segment": SEGMENT, "step": 10} if number == 1 else None
            pause = int(state == "paused")
            labels = LABELS if number % 2 else {}
            job = row(number, SMALL, state=state, labels=labels, history_end=end, pause_requested=pause)
            self.store.insert(job, ACCEPTED, None)
        first = self.store.get(job_id(1), "default")
        assert first is not None
        self.store.apply(first, {}, [NewEvent("state", "so it was", JobState(first.state), {"step": 10})])


def trained() -> MemoryBucket:
    """Return a bucket with a dataset and with what a run of ten steps leaves."""
    bucket, words, run = MemoryBucket(), DatasetLayout("default", "words", "v1"), JOB.segment(SEGMENT)
    bucket.put_document(words.document, dataset())
    bucket.put(words.tokenizer, b'{"added_tokens": []}')
    segment = SegmentDocument(
        job_id=JOB.job_id, segment=SEGMENT, origin=None, world_size=1, fingerprint=None, created_at=T0
    )
    bucket.put_document(run.document, segment)
    lines = [StreamLine(type="metrics", step=step, at=T0, values={"loss": 1 / step}) for step in range(1, 11)]
    bucket.put(chunk(run.stream, 0, "jsonl"), "".join(f"{line.model_dump_json()}\n" for line in lines).encode())
    bucket.put(chunk(run.logs(0), 0, "log"), b"one\ntwo\n")
    for step in (5, 10):
        put_checkpoint(bucket, run.checkpoint(step), step)
    return bucket


def put_checkpoint(bucket: MemoryBucket, layout: CheckpointLayout, step: int) -> None:
    """Write a checkpoint of one part, in which every weight is zero."""
    header, hashes, end = {}, {}, 0
    for name, shape in model_tensors(SMALL.model, 2048, SMALL.data.sequence_length).items():
        size = 4 * prod(shape)
        header[f"model.{name}"] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        hashes[f"model.{name}"] = sha256(bytes(size)).hexdigest()
        end += size
    text = json.dumps(header).encode()
    body = len(text).to_bytes(8, "little") + text + bytes(end)
    part = Receipt(rank=0, name="part", size=len(body), sha256=sha256(body).hexdigest(), tensors=hashes)
    manifest = Manifest(
        job_id=JOB.job_id, segment=SEGMENT, step=step, world_size=1, parts=[part], metrics={"loss": 1.5}, created_at=T0
    )
    bucket.put(f"{layout.prefix}part", body)
    bucket.put_document(layout.manifest, manifest)


JOB, SEGMENT = JobLayout("default", job_id(1)), "1-0-a"
SMALL_MODEL = {"layers": 1, "width": 8, "heads": 1}
SMALL = train_spec(model=SMALL_MODEL)
TRAINED = trained()
SPECS: list[dict[str, Any]] = [json.loads(train_spec().model_dump_json()), json.loads(prepare_spec().model_dump_json())]
SPECS += [{"name": "first", "data": {"dataset": "words"}, "model": {"size": "1m"}}]
SPECS += [json.loads(train_spec(model=SMALL_MODEL, steps=20, init={"from_job": job_id(1)}).model_dump_json())]
SPECS += [
    json.loads(train_spec(batch={"micro_size": 2}, resources={"workers": {"min": 1, "max": 4}}).model_dump_json())
]
LOG_CURSOR = str(read_logs(TRAINED, JOB, None, None)[1])


def known(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document with what there is in place of what could be; wrong values are generated all the same."""
    document = copy.deepcopy(document)
    ids = [job_id(number) for number in (*STATES, UNKNOWN)]
    values = {
        "job_id": {"enum": ids},
        "step": {"enum": [5, 7, 10]},
        "label": {"items": {"enum": [*LABELS, *(f"{key}={value}" for key, value in LABELS.items()), "team=other"]}},
    }
    for operation in (operation for path in document["paths"].values() for operation in path.values()):
        operation.pop("security", None)  # the key is given, and not a part of the question
        for parameter in operation.get("parameters", []):
            parameter["schema"] |= values.get(parameter["name"], {})
            if parameter["name"] == "cursor":
                given = LOG_CURSOR if "LogLine" in str(operation["responses"]) else ids[2]
                parameter["schema"] = {"anyOf": [{"enum": [given]}, parameter["schema"]]}
    schemas = document["components"]["schemas"]
    schemas["DataSpec"]["properties"]["dataset"] |= {"enum": ["words", "words@v1", "none"]}
    schemas["InitSpec"]["properties"]["from_job"] |= {"enum": ids}
    return document


def configuration() -> schemathesis.Config:
    """The same questions at every run: a fixed seed, and nothing learnt from answers, which hold new ids."""
    refusals = {"negative_data_rejection": {"expected-statuses": ["4xx"]}}  # by default not 431
    config = schemathesis.Config.from_dict({"seed": 1, "checks": refusals})
    project = config.projects.get_default()
    project.generation.deterministic = True
    project.phases.fuzzing.extra_data_sources.responses = False
    project.phases.fuzzing.error_feedback.is_enabled = False
    return config


APP = make_api(MOST_BYTES)
SCHEMA = schemathesis.openapi.from_dict(known(APP.openapi()), config=configuration())
SCHEMA.app = APP
CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.response_headers_conformance,
    openapi_checks.negative_data_rejection,
    openapi_checks.unsupported_method,
    openapi_checks.allow_header_conformance,
]


def client() -> TestClient:
    return TestClient(APP, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("fuzz"))
    APP.state.store, APP.state.bucket, APP.state.ray = made.store, made.bucket, made.ray.backend()
    APP.state.tenants = made.tenants
    APP.state.jobs = Jobs(made.store, made.bucket, APP.state.ray, made.settings)
    APP.state.streams = Streams(0.01, 1.0)
    APP.state.rates = APP.state.project_rates = APP.state.strangers = Limiter(Rate(1e9, 10**9))
    APP.state.long_answers, APP.state.dependencies = places(8), Dependencies({"database": made.store.ping})
    yield made
    made.engine.dispose()
    assert not made.asked or made.asked >= soak(30_000, 0)  # in one process, all operations together


def has_good_labels(url: str) -> bool:
    """Whether a query has labels, all good ones: what the fuzzer meant as a number or null is text there."""
    labels = parse_qs(urlsplit(url).query, keep_blank_values=True).get("label", [])
    return bool(labels) and all(re.fullmatch(LABEL, label) for label in labels)


@pytest.mark.soak
@pytest.mark.timeout(soak(1800, 300))
@SCHEMA.parametrize()
@settings(max_examples=soak(2000, 100), deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_one_that_the_document_promises(case: "schemathesis.Case[Any]", world: World) -> None:
    world.asked += 1
    fitting = [check for check in CHECKS if check is not openapi_checks.negative_data_rejection]
    answer = case.call(headers=AUTH)
    case.validate_response(answer, checks=fitting if has_good_labels(str(answer.request.url)) else CHECKS)
    assert answer.status_code != 401
    if answer.status_code in (201, 202, 204):
        world.reset()


@pytest.mark.parametrize("rest", ["", "/events", "/metrics", "/checkpoints", "/logs"])
def test_the_job_that_the_fuzzer_knows_best_answers_with_something(world: World, rest: str) -> None:
    answer = client().get(f"/v1/jobs/{job_id(1)}{rest}", headers=AUTH)
    assert answer.status_code == 200
    assert answer.json().get("items", True)


@pytest.mark.parametrize("spec", range(len(SPECS)))
def test_each_spec_that_the_fuzzer_breaks_is_whole(world: World, spec: int) -> None:
    answer = client().post("/v1/jobs?dry_run=true", json=SPECS[spec], headers=AUTH)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("number", "what"), [(2, "retry"), (5, "pause"), (5, "cancel"), (6, "resume")])
def test_the_fuzzer_knows_a_job_of_which_each_thing_can_be_asked(world: World, number: int, what: str) -> None:
    answer = client().post(f"/v1/jobs/{job_id(number)}/{what}", headers=AUTH)
    assert answer.status_code in (201, 202), answer.text
    world.reset()


@pytest.mark.parametrize("name", get_args(ModelFile))
def test_the_fuzzer_knows_a_checkpoint_that_can_be_downloaded(world: World, name: str) -> None:
    answer = client().get(f"/v1/jobs/{job_id(1)}/checkpoints/10/files/{name}", headers=AUTH)
    assert answer.status_code == 200, answer.text


def operations() -> list[tuple[str, str]]:
    """Every (method, path) below /v1 that the application routes, whether or not its document says so."""

    def flat(routes: list[Any]) -> Iterator[APIRoute]:
        for route in routes:
            yield from flat(route.original_router.routes) if hasattr(route, "original_router") else [route]

    found = [(m, r.path) for r in flat(APP.routes) if isinstance(r, APIRoute) for m in sorted(r.methods or ())]
    return [(method, path) for method, path in found if path.startswith("/v1/")]


def test_the_document_tells_all_operations() -> None:
    told = {(method.upper(), path) for path, methods in APP.openapi()["paths"].items() for method in methods}
    assert {operation for operation in told if operation[1].startswith("/v1/")} == set(operations())
    assert len(operations()) >= 10


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", f"Basic {KEY}", "Bearer \xff"])
@pytest.mark.parametrize(("method", "path"), operations())
def test_without_a_key_the_answer_is_401_whatever_else_is_wrong(
    world: World, method: str, path: str, authorization: str | None
) -> None:
    headers = [(b"Content-Type", b"application/json"), (b"Accept", b"text/event-stream")]
    headers += [(b"Authorization", authorization.encode("latin-1"))] if authorization else []
    for ids, query, body in product(("known", "bad"), ("", "?limit=x&no=such"), (b"", b"{", b"\xff", b" " * 300_000)):
        place = re.sub(r"\{\w+\}", "%00" if ids == "bad" else job_id(1), path) + query
        answer = client().request(method, place, headers=headers, content=body)
        assert answer.status_code == 401, (place, body[:9], answer.text)
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["www-authenticate"] == "Bearer"


texts = st.text(st.characters(exclude_categories=()), max_size=8)  # halves of surrogate pairs too
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | texts
    | st.sampled_from(["train", "1m", 2**63, -(10**400)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def broken_specs(draw: st.DrawFn) -> Any:
    """A spec of which some values at any depth were replaced, taken out or added."""
    spec = copy.deepcopy(draw(st.sampled_from(SPECS)))
    for _ in range(draw(st.integers(1, 3))):
        place: Any = spec
        while True:
            key = draw(st.sampled_from([*place, "another"]))
            if not isinstance(place.get(key), dict) or not place[key] or draw(st.booleans()):
                break
            place = place[key]
        if draw(st.integers(0, 5)):
            place[key] = draw(json_values)
        else:
            place.pop(key, None)
    return spec


#: What JSON texts break on, or its readers.
PIECES = [
    b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\x00", b"\n", b'"', b"\\", b"\\ud800", b"\\u0000", b",", b":", b"}",
    b"]", b"{", b"[" * 9000, b'{"a":' * 9000, b"[" * 60 + b"]" * 60, b"9" * 5000, b"-", b"1e999", b"1e-999",
    b"-0", b"0x1", b"NaN", b"-Infinity", b'{"name":"a","name":["b"]}', b'"name":', b"//", b"'a'", b"null", b"[]", b'""',
]  # fmt: skip


@st.composite
def mangled(draw: st.DrawFn) -> bytes:
    """A spec as JSON, in which pieces of JSON stand where they do not belong."""
    body = json.dumps(draw(st.sampled_from(SPECS) | broken_specs())).encode()
    for piece in draw(st.lists(st.sampled_from(PIECES), min_size=1, max_size=3)):
        start = draw(st.integers(0, len(body)))
        body = body[:start] + piece + body[start + draw(st.integers(0, 8)) :]
    return body


bodies = (broken_specs() | json_values).map(lambda value: json.dumps(value).encode()) | mangled()


@pytest.mark.soak
@pytest.mark.timeout(soak(1800, 300))
@given(body=bodies)
@settings(max_examples=soak(30_000, 500), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_body_for_a_spec_is_planned_or_refused_with_the_paths_of_its_faults(world: World, body: bytes) -> None:
    headers = {**AUTH, "Content-Type": "application/json"}
    answer = client().post("/v1/jobs?dry_run=true", content=body, headers=headers)
    assert answer.status_code in (200, 400, 422), answer.text
    if answer.status_code == 200:
        assert answer.json()["kind"] == json.loads(body).get("kind", "train")
        return
    assert answer.headers["content-type"] == "application/problem+json"
    problem = Problem.model_validate_json(answer.content)
    assert problem.errors or answer.status_code == 400
    assert all(fault.path.startswith("$") and fault.message for fault in problem.errors)


media_types = st.sampled_from(["text/event-stream", "application/json", "*/*", "text/*", "TEXT/EVENT-STREAM", "", "a"])
weights = st.sampled_from(["", ";q=0", ";q=1", ";q=0.5", ";q=nan", ";q=inf", ";q=", ";q=-1", "; charset=utf-8", ";;"])
text = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=20)
accepts = st.lists(st.tuples(media_types, weights).map("".join), max_size=3).map(",".join) | text
numbers = st.integers(-1, 3) | st.sampled_from([2**63, 10**30])
log_places = st.fixed_dictionaries(
    {},
    optional={
        "rank": st.none() | numbers,
        "closed": st.sampled_from(["", "1-0-a", "1-0", "9-9-z", "a-b-c", "-1-0-a"]),
        "open": st.dictionaries(
            st.sampled_from(["1-0-a", "../x", ""]),
            st.dictionaries(
                st.sampled_from(["0", "1", "-1", "x"]), st.lists(numbers, min_size=3, max_size=5), max_size=2
            ),
            max_size=2,
        ),
    },
)
log_cursors = log_places.map(lambda place: base64.urlsafe_b64encode(json.dumps(place).encode()).decode())
last_ids = (
    st.none() | text | log_cursors | st.sampled_from(["0", "1", "9" * 15, "9" * 16, "1-0-a:3", "2-0-x:0", LOG_CURSOR])
)


@given(
    path=st.sampled_from(["events", "metrics", "logs"]), number=st.sampled_from(ENDED), accept=accepts, last=last_ids
)
@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_an_ended_job_is_listed_or_streamed_to_its_end_whatever_the_headers(
    world: World, path: str, number: int, accept: str, last: str | None
) -> None:
    headers = [(b"Authorization", AUTH["Authorization"].encode()), (b"Accept", accept.encode("latin-1"))]
    headers += [] if last is None else [(b"Last-Event-ID", last.encode("latin-1"))]
    answer = client().get(f"/v1/jobs/{job_id(number)}/{path}", headers=headers)
    kind = answer.headers["content-type"].partition(";")[0]
    if kind == "text/event-stream":
        assert answer.status_code == 200
        assert "text/event-stream" in accept.lower()
        assert answer.text.count("event: end") == 1
    else:
        assert (answer.status_code, kind) in ((200, "application/json"), (422, "application/problem+json"))
