"""Defaults, schema and README name the same values."""

import json
import re
from collections.abc import Iterator

import pytest
import yaml

from tests.chart.chart import CHART, Object, named, objects_of, render_files, values_of

DEFAULTS: Object = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
SCHEMA: Object = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))


def test_the_schema_has_every_default_and_the_defaults_every_value_of_the_schema() -> None:
    assert set(_paths_of_defaults(DEFAULTS)) | {"global"} == set(_paths_of_schema(SCHEMA))


def test_no_object_of_the_schema_takes_what_it_does_not_name() -> None:
    """An object without names is one that Kubernetes' own schema checks."""
    objects = [node for node in _nodes(SCHEMA) if "properties" in node]
    assert len(objects) > 30
    assert all(node["additionalProperties"] is False for node in objects)


def test_the_readme_names_every_value() -> None:
    """In a row that begins with the section it is in."""
    text = (CHART / "README.md").read_text(encoding="utf-8")
    rows = [row.replace("**", "") for row in text.splitlines() if row.startswith("| ")]
    for path in _paths_of_defaults(DEFAULTS):
        top, leaf = path.partition(".")[0], path.rpartition(".")[2]
        told = " ".join(row for row in rows if re.match(rf"\| [^|]*`{top}\b", row))
        assert re.search(rf"`[^`|]*\b{leaf}\b[^`|]*`", told), path


def test_the_notes_name_what_is_there() -> None:
    notes = render_files(values_of("existing-secrets"))["lockstep/templates/NOTES.txt"]
    assert "get secret own-api-key -o jsonpath='{.data.key}'" in notes
    assert "get secret own-ray-token -o jsonpath='{.data.auth_token}'" in notes
    assert "port-forward service/lockstep 8700:8700" in notes
    assert "wait raycluster/lockstep --for" in notes
    assert "lockstep" in named(objects_of("existing-secrets"), "RayCluster")
    assert "lockstep" in named(objects_of("existing-secrets"), "Service")
    assert "raycluster" not in render_files(values_of("existing-ray"))["lockstep/templates/NOTES.txt"]
    assert "https://lockstep.example.com" in render_files(values_of("production"))["lockstep/templates/NOTES.txt"]


@pytest.mark.parametrize(
    ("hostnames", "told"),
    [
        (["lockstep.example.com"], "LOCKSTEP_URL=https://lockstep.example.com "),
        (["*.example.com", "lockstep.example.com"], "LOCKSTEP_URL=https://lockstep.example.com "),
        (["*.example.com"], "LOCKSTEP_URL=http://127.0.0.1:8700"),
    ],
)
def test_the_notes_lead_through_the_gateway_by_a_name_that_one_can_ask_for(hostnames: list[str], told: str) -> None:
    values = values_of("gateway")
    texts = render_files(values | {"httpRoute": values["httpRoute"] | {"hostnames": hostnames}})
    notes = texts["lockstep/templates/NOTES.txt"]
    assert told in notes
    assert ("port-forward service/lockstep " in notes) == ("127.0.0.1" in told)


def _paths_of_defaults(values: Object, above: str = "") -> Iterator[str]:
    for name, value in values.items():
        path = f"{above}{name}"
        if isinstance(value, dict) and value and not path.endswith((".resources", ".labels")):
            yield from _paths_of_defaults(value, f"{path}.")
        else:
            yield path


def _paths_of_schema(node: Object, above: str = "") -> Iterator[str]:
    for name, each in node["properties"].items():
        path = f"{above}{name}"
        target = SCHEMA["$defs"][each["$ref"].rpartition("/")[2]] if "$ref" in each else each
        if "properties" in target and not path.endswith(".resources"):
            yield from _paths_of_schema(target, f"{path}.")
        else:
            yield path


def _nodes(node: object) -> Iterator[Object]:
    if isinstance(node, dict):
        yield node
        for each in node.values():
            yield from _nodes(each)
    elif isinstance(node, list):
        for each in node:
            yield from _nodes(each)
