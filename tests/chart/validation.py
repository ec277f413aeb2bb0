"""Strict validation of every kind of object that the chart makes: no unknown field anywhere."""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml
from kubernetes_validate.utils import schema_contents  # type: ignore[import-untyped]
from referencing import Registry, Resource

from tests.chart.chart import HERE, Object

OLDEST, NEWEST = "1.30", "1.37"
"""The Kubernetes that Chart.yaml asks for, and the newest with published schemas."""
Invalid = jsonschema.ValidationError
Schema = dict[str, Any]


def validate(item: Object, kubernetes: str = NEWEST) -> None:
    """Raise Invalid for an object that a server would refuse, or of which it would drop a field."""
    kind, version = item["kind"], item["apiVersion"]
    if version.startswith("ray.io/"):
        ray_validator(kind).validate(with_defaults(item, ray_validator(kind).schema))
    elif (own := HERE / "schemas" / f"{kind.lower()}.json").exists():
        jsonschema.Draft202012Validator(json.loads(own.read_text(encoding="utf-8"))).validate(item)
    else:
        kubernetes_validator(kind, version, kubernetes).validate(item)


@cache
def kubernetes_validator(kind: str, version: str, kubernetes: str) -> Any:
    """Return the validator that kubernetes_validate would use, kept: it reads megabytes for each object."""
    group, _, name = version.rpartition("/")
    file = "-".join(filter(None, (kind.lower(), group.partition(".")[0], name)))
    registry = Resource.from_contents(kubernetes_schema("_definitions", kubernetes)) @ Registry()
    return jsonschema.Draft202012Validator(kubernetes_schema(file, kubernetes), registry=registry)


@cache
def kubernetes_schema(file: str, kubernetes: str) -> Schema:
    folder = f"kubernetes-json-schema/v{kubernetes}.0-local-strict"
    loaded: Schema = schema_contents(f"{folder}/{file}.json", kubernetes)
    return loaded


@cache
def ray_validator(kind: str) -> Any:
    """Return a validator by KubeRay's definition of a kind, closed; skip the test where there is none."""
    beside = Path(__file__).parents[3] / "shared" / "kuberay"
    path = Path(os.environ.get("LOCKSTEP_KUBERAY", beside)) / f"ray.io_{kind.lower()}s.yaml"
    if not path.exists():
        pytest.skip(f"no {path.name}: set LOCKSTEP_KUBERAY to the folder with KubeRay's definitions")
    definition = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)
    (version,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1")
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # the server's own, not the definition's
    return jsonschema.Draft202012Validator(schema)


def closed(node: Any) -> Any:
    """Turn an OpenAPI schema of a definition into a JSON Schema that knows no field but its own."""
    if isinstance(node, list):
        return [closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    made = {
        key: {name: closed(each) for name, each in value.items()} if key == "properties" else closed(value)
        for key, value in node.items()
        if not key.startswith("x-kubernetes-")
    }
    if node.get("x-kubernetes-int-or-string") is True:
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in made and not node.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def with_defaults(value: Any, schema: Schema) -> Any:
    """Return a value as the server sees it when it validates: with the definition's defaults."""
    if isinstance(value, list):
        return [with_defaults(item, schema.get("items", {})) for item in value]
    if not isinstance(value, dict):
        return value
    known = schema.get("properties", {})
    defaults = {name: each["default"] for name, each in known.items() if "default" in each}
    return defaults | {name: with_defaults(each, known.get(name, {})) for name, each in value.items()}
