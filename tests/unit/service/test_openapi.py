"""The OpenAPI document: the one in the tree is what the routes make, it holds together, and /docs shows it offline."""

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from fastapi.testclient import TestClient

from api.spec import job_spec_adapter
from service.app import make_api
from service.docs import page

DOCUMENT: dict[str, Any] = json.loads(json.dumps(make_api(0).openapi()))
EXAMPLES = DOCUMENT["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["examples"]


def test_the_checked_in_document_does_not_drift() -> None:
    checked_in = json.loads((Path(__file__).parents[3] / "api" / "openapi.json").read_text())
    assert checked_in == DOCUMENT, "run `make openapi`"


def test_every_reference_leads_somewhere() -> None:
    named = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(DOCUMENT)))
    assert len(named) > 20
    assert named <= set(DOCUMENT["components"]["schemas"])


def accepts(spec: Any) -> bool:
    body = DOCUMENT["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return jsonschema_rs.is_valid({**body, "components": DOCUMENT["components"]}, spec)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_valid_for_the_document_and_for_the_parser(name: str) -> None:
    assert accepts(EXAMPLES[name]["value"])
    job_spec_adapter.validate_python(EXAMPLES[name]["value"])


@pytest.mark.parametrize("model", [{"size": "3m"}, {"layers": 2, "width": 64}, {"size": "3m", "layers": 2}])
def test_a_model_needs_a_size_or_a_shape(model: dict[str, Any]) -> None:
    spec = {"name": "first", "data": {"dataset": "words"}, "model": model}
    assert accepts(spec)
    for part in ({}, {"layers": 2}, {"width": 64}):
        assert not accepts({**spec, "model": part})


@pytest.fixture(scope="module")
def html() -> str:
    return TestClient(make_api(0)).get("/docs").text


def test_the_docs_run_no_script_and_load_nothing(html: str) -> None:
    answer = TestClient(make_api(0)).get("/docs")
    assert answer.headers["content-security-policy"].startswith("default-src 'none';")
    assert not re.search(r"<script|<link|<img|<iframe|javascript:|@import|url\(|\son\w+=|src=|//", html)
    assert set(re.findall(r'href="([^#"][^"]*)"', html)) == {"openapi.json"}
    assert TestClient(make_api(0)).get("/redoc").status_code == 404


def test_the_docs_tell_every_operation_field_and_example(html: str) -> None:
    text = unescape(re.sub(r"<[^>]+>", "", html))
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            assert f"{method.upper()} {path}" in text
            for parameter in operation.get("parameters", []):
                assert f"{parameter['name']} ({parameter['in']})" in text
    for schema in DOCUMENT["components"]["schemas"].values():
        for field in schema.get("properties", {}).values():
            assert field.get("description", "").replace("`", "") in text
    for example in EXAMPLES.values():
        assert json.dumps(example["value"], indent=2) in text
    rows = re.findall(r"<tr><td><code>sequence_length</code><td>(.*?)<td>(.*?)<td>", html)
    assert rows == [("integer, ≥ 8, ≤ 131072", "256")]
    assert re.search(
        r"<tr><td><code>dataset</code><td>[^/]*<td>required<td>Name of a prepared dataset; <code>name@", html
    )


def test_every_link_in_the_docs_has_its_target(html: str) -> None:
    targets = re.findall(r' id="([^"]+)"', html)
    assert len(targets) == len(set(targets))
    assert set(re.findall(r'href="#([^"]+)"', html)) <= set(targets)


def test_what_the_document_says_is_text_and_never_markup() -> None:
    document = json.loads(json.dumps(DOCUMENT).replace("Trans", "<script>`<b>`&"))
    assert "<script" in json.dumps(document)
    assert not re.search(r"<script|<b>", page(document))
    assert "&lt;script&gt;<code>&lt;b&gt;</code>&amp;" in page(document)
