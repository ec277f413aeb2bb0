"""What a stranger, a foreign web page or a hostile job spec gets: nothing."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError

import service as service_package
from api.spec import job_spec_adapter
from service.app import make_api
from service.guard import ANY_HOST, LOOPBACK, hosts_for, is_trusted
from service.settings import Settings
from tests.fakes import World, job_id, settings_for, train_spec
from tests.unit.service.in_process import BODY, KEY, Service, problem

OURS = ("train.example.com", "*.svc")


@pytest.mark.parametrize(
    ("host", "trusted"),
    [
        ("train.example.com", True),
        ("Train.Example.com:8700", True),
        ("lockstep.default.svc", True),
        ("lockstep.default.svc:80", True),
        ("10.1.2.3", True),
        ("10.1.2.3:8700", True),
        ("[fd00::1]:8700", True),
        ("[::1]", True),
        ("", False),
        ("svc", False),
        ("example.com", False),
        ("evil.example", False),
        ("nottrain.example.com", False),
        ("train.example.com.evil.example", False),
        ("train.example.com@evil.example", False),
        ("evil.example@train.example.com", False),
        ("train.example.com/healthz", False),
        ("train.example.com/healthz?x=", False),
        ("evil.example/train.example.com", False),
        ("train.example.com#", False),
        ("evil.example?.svc", False),
        ("train.example.com:x", False),
        ("train.example.com:99999", False),
        ("[fd00::1", False),
        ("train.example.com, evil.example", False),
    ],
)
def test_an_address_and_the_names_of_ours_are_trusted_and_nothing_that_looks_like_one(host: str, trusted: bool) -> None:
    assert is_trusted(host, OURS) is trusted


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_a_server_for_this_machine_alone_knows_one_name(host: str) -> None:
    assert hosts_for(host) == LOOPBACK
    assert is_trusted("localhost:8700", hosts_for(host))
    assert not is_trusted("rebound.evil.example:8700", hosts_for(host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "train.example.com"])
def test_a_server_for_others_cannot_guess_its_names(host: str) -> None:
    assert hosts_for(host) == ANY_HOST


def test_names_are_given_with_commas_and_a_pattern_that_could_not_match_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCKSTEP_TRUSTED_HOSTS", "Train.example.com, *.svc")
    assert settings_for(tmp_path, trusted_hosts="a.example,b.example").trusted_hosts == ("a.example", "b.example")
    assert settings_for(tmp_path, trusted_hosts="").trusted_hosts == ()
    for wrong in ("train.example.com:8700", "https://train.example.com", "*example.com", "a.*.example", "a/b"):
        with pytest.raises(ValidationError, match="write names without port"):
            settings_for(tmp_path, trusted_hosts=wrong)


@pytest.mark.parametrize("wrong", [{"metrics_port": 8700}, {"retention_grace": 1}, {"port": "x"}, {"storage": "x"}])
def test_a_wrong_setting_is_told_without_the_passwords_of_others(wrong: dict[str, Any]) -> None:
    """Pydantic would show both ends of all that it was given."""
    with pytest.raises(ValidationError) as caught:
        Settings(**{"storage": "s3://memory/root", **wrong, "database_url": "postgresql://u:canary@db/x"})
    assert not {"canary", "input_value"} & set(re.findall(r"\w+", str(caught.value)))


# Every route


def every_route(service: Service) -> list[tuple[str, str]]:
    """Every (method, path), documented or not, and one of each that there is not."""
    paths: dict[str, Any] = service.app.openapi()["paths"]
    found = [
        (method.upper(), re.sub(r"\{\w+\}", _value, path)) for path, methods in paths.items() for method in methods
    ]
    assert len(found) >= 16
    return [*found, ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/nothing"), ("PUT", "/v1/jobs")]


def _value(name: re.Match[str]) -> str:
    return {"{job_id}": job_id(1), "{step}": "5", "{name}": "config.json"}.get(name[0], "x")


@pytest.fixture
def answers(service: Service) -> dict[str, httpx2.Response]:
    """Answers of every kind: to those with a key and without, of each status that we have."""
    service.ended(1)
    stranger = TestClient(service.app, raise_server_exceptions=False)
    found = {}
    for client, who in ((service.client, "with"), (stranger, "without")):
        for method, path in every_route(service):
            headers = {"Origin": "https://evil.example", "Cookie": "session=1"}
            answer = client.request(method, path, headers=headers)
            found[f"{method} {path} {who} a key: {answer.status_code}"] = answer
    accepted, invalid = service.post(BODY), service.post({})
    big = service.client.post("/v1/jobs", content=b" " * 300_000, headers={"Content-Type": "application/json"})
    bad_host = service.client.get("/v1/jobs", headers={"Host": "evil.example"})
    service.app.state.jobs = None
    bug = service.client.get("/v1/jobs")
    return found | {"accepted": accepted, "invalid": invalid, "too large": big, "another host": bad_host, "a bug": bug}


def test_no_answer_goes_without_what_protects_a_browser(answers: dict[str, httpx2.Response]) -> None:
    assert {a.status_code for a in answers.values()} >= {200, 201, 204, 400, 401, 404, 405, 413, 422, 500}
    for what, answer in answers.items():
        assert answer.headers.get_list("x-content-type-options") == ["nosniff"], what
        assert answer.headers.get_list("referrer-policy") == ["no-referrer"], what
        assert "no-store" in answer.headers["cache-control"], what
        [policy] = answer.headers.get_list("content-security-policy")
        assert policy.startswith("default-src 'none'; "), what
        assert "frame-ancestors 'none'" in policy, what


def test_no_answer_sets_a_cookie_or_lets_another_origin_in(
    service: Service, answers: dict[str, httpx2.Response]
) -> None:
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    asked = {p: service.client.options(p, headers=preflight) for _, p in every_route(service)}
    for what, answer in (answers | asked).items():
        assert "set-cookie" not in answer.headers, what
        assert not [name for name in answer.headers if name.startswith("access-control-")], what
    assert all(answer.status_code in (401, 405, 404) for answer in asked.values())


def test_a_request_for_another_name_is_refused_whoever_asks_and_a_probe_by_address_is_not(service: Service) -> None:
    for method, path in every_route(service):
        for client in (service.client, TestClient(service.app, raise_server_exceptions=False)):
            problem(client.request(method, path, headers={"Host": "evil.example"}), 400, "bad-request")
    for path in ("/healthz", "/readyz"):
        assert service.client.get(path, headers={"Host": "10.1.2.3:8700"}).status_code == 200


HOSTS = ["testserver/healthz", "testserver/healthz?x=", "x/docs#", "//healthz", "user@healthz", "testserver:80/../docs"]


@pytest.mark.parametrize("host", HOSTS)
def test_no_host_header_makes_a_route_one_that_needs_no_key(service: Service, host: str) -> None:
    """Even where any name is trusted: what a request may do is decided by the path that was routed."""
    app = make_api(262_144)
    app.state = service.app.state
    stranger = TestClient(app, raise_server_exceptions=False)
    for method, path in every_route(service):
        if path.startswith("/v1/") and (method, path) != ("PUT", "/v1/jobs"):
            for prefix in ("", "/", "//", "/healthz/..", "/docs/.."):
                answer = stranger.request(method, f"http://testserver{prefix}{path}", headers={"Host": host})
                assert answer.status_code in ((401,) if not prefix else (401, 404)), (method, prefix, path)


def test_no_answer_sends_anybody_to_where_the_host_header_says(service: Service) -> None:
    app = make_api(262_144)
    app.state = service.app.state
    stranger = TestClient(app, follow_redirects=False)
    for method, path in every_route(service):
        answer = stranger.request(method, f"{path}/", headers={"Host": "evil.example"})
        problem(answer, 404, "not-found")
        assert "location" not in answer.headers


def test_nothing_is_decided_by_a_url_that_the_host_header_is_a_part_of() -> None:
    sources = {path: path.read_text() for path in Path(service_package.__file__ or "").parent.glob("**/*.py")}
    assert len(sources) > 40
    made_of_the_host = r"request\.(url|base_url)\b|\burl_for\(|\bURL\(scope"
    assert [path.name for path, text in sources.items() if re.search(made_of_the_host, text)] == []


@pytest.mark.parametrize(
    "place", ["?key={}", "?api_key={}", "?access_token={}", "?token={}", "?authorization=Bearer {}"]
)
def test_a_key_counts_in_its_header_alone(service: Service, place: str) -> None:
    """Not in a URL, which logs and browsers keep; not in a cookie, which a browser sends by itself."""
    stranger = TestClient(service.app, raise_server_exceptions=False)
    problem(stranger.get(f"/v1/jobs{place.format(KEY)}"), 401, "unauthorized")
    for header in (
        {"Cookie": f"Authorization=Bearer {KEY}"},
        {"X-Api-Key": KEY},
        {"Proxy-Authorization": f"Bearer {KEY}"},
    ):
        problem(stranger.get("/v1/jobs", headers=header), 401, "unauthorized")


# What a spec can say

#: What would be taken for a path, an endpoint, a variable, a template or a command by whoever took it for one.
HOSTILE = [
    "../../default/jobs", "/etc/passwd", "a/b", "..", "a..b", ".", "~", "c:\\x", "a\\b", "%2e%2e%2fx",
    "a\x00b", "a\nb", "a\n", "a b", "*", "а", "\u202e", "A" * 200, "", "--help", "-x",
    "http://169.254.169.254/latest", "s3://other/bucket", "file:///etc/passwd", "//evil.example/x", "user@evil.example",
    "$AWS_SECRET_ACCESS_KEY", "${HOME}", "{job_id}", "{0.__class__}", "%(name)s", "{{7*7}}", "$(id)", "`id`", "a;id",
]  # fmt: skip
#: Fields of free text, which go into documents as they are and are used for nothing but what they say.
FREE_TEXT = {"SampleSpec.prompt", "labels", "ResourceSpec.memory"}


def text_fields(schemas: dict[str, Any], name: str, seen: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every place in a schema that takes a text, with what it says of it."""
    if name in seen:
        return
    seen.add(name)

    def within(place: str, schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        if reference := schema.get("$ref"):
            yield from text_fields(schemas, reference.rpartition("/")[2], seen)
        if schema.get("type") == "string" and not {"enum", "const"} & schema.keys():
            yield place, schema
        for inner in (*schema.get("anyOf", ()), *schema.get("oneOf", ()), *schema.get("prefixItems", ())):
            yield from within(place, inner)
        for key in ("items", "additionalProperties"):
            if isinstance(schema.get(key), dict):
                yield from within(place, schema[key])
        if schema.get("type") == "object" and "properties" not in schema:
            yield "labels", schema

    for field, schema in schemas[name].get("properties", {}).items():
        yield from within(f"{name}.{field}", schema)


def test_no_text_of_a_spec_can_be_a_path_an_endpoint_a_variable_or_a_template() -> None:
    schemas = job_spec_adapter.json_schema()["$defs"]
    fields = [field for kind in ("TrainSpec", "PrepareSpec") for field in text_fields(schemas, kind, set())]
    assert {"TrainSpec.name", "DataSpec.dataset", "InitSpec.from_job", "TextSource.folder"} <= {f for f, _ in fields}
    for place, schema in fields:
        if place not in FREE_TEXT:
            allowed = re.compile(schema["pattern"].replace("$", r"\Z"))
            longest = schema.get("maxLength", 95)
            assert [text for text in HOSTILE if allowed.match(text) and len(text) <= longest] == [], place
    assert {place for place, schema in fields if "pattern" not in schema} == FREE_TEXT
    for kind in ("TrainSpec", "PrepareSpec"):
        assert schemas[kind]["additionalProperties"] is False


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_is_refused_or_stays_a_text(world: World, text: str) -> None:
    """What Ray is asked to run, and where anything is written, is the same whatever a spec says."""
    for field in ({"name": text}, {"data": {"dataset": text}}, {"init": {"from_job": text}}):
        with pytest.raises(ValueError, match=r"1 validation error|validation errors"):
            train_spec(**field)
    world.add(1, name="harmless")
    world.add(2, name="harmless", sample={"prompt": text or " "})
    world.passes(4)
    bodies = [json.dumps(world.ray.bodies[f"{job_id(n)}-1"]).replace(job_id(2), job_id(1)) for n in (1, 2)]
    assert bodies[0] == bodies[1]
    keys = [{key for key in world.bucket.content if job_id(n) in key} for n in (1, 2)]
    assert {key.replace(job_id(2), job_id(1)) for key in keys[1]} == keys[0]
    stored = json.loads(world.bucket.content[world.layout(2).job])
    assert stored["spec"]["sample"]["prompt"] == (text or " ")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(tmp_path, monkeypatch)
    yield made
    made.store._engine.dispose()
