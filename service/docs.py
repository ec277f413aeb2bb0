"""/docs: the OpenAPI document as a page to read. No script and nothing from another host, so it works offline."""

import json
import re
from html import escape
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h3 { margin-top: 3rem; border-bottom: 1px solid #8886; } code, pre { font-size: 0.9em; background: #8882; }
pre { padding: 0.5rem; overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
td { border-top: 1px solid #8884; padding: 0.3rem 1rem 0.3rem 0; vertical-align: top; }
:root { color-scheme: light dark; }
"""
_BOUNDS = {
    "minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}",
    "multipleOf": "multiple of {}", "minLength": "at least {} characters", "maxLength": "at most {} characters",
    "maxItems": "at most {} items", "maxProperties": "at most {} entries", "pattern": "like {}",
}  # fmt: skip

Json = dict[str, Any]


async def show(request: Request) -> HTMLResponse:
    """Answer with the page; the same for everybody, as the document is."""
    return HTMLResponse(page(request.app.openapi()), headers=_HEADERS)


def page(document: Json) -> str:
    """Return an OpenAPI 3.1 document as HTML."""
    info, schemas = document["info"], document["components"]["schemas"]
    operations = [
        (f"{method.upper()} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    contents = "".join(f"<li>{_link(operation['operationId'], name)}</li>" for name, operation in operations)
    bodies = "".join(_operation(name, operation) for name, operation in operations)
    types = "".join(_schema(name, schema) for name, schema in schemas.items())
    title = escape(f"{info['title']} {info['version']}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1>{_paragraphs(info['description'])}"
        f'<p>For programs: <a href="openapi.json">openapi.json</a></p>'
        f"<ul>{contents}</ul><h2>Operations</h2>{bodies}<h2>Types</h2>{types}</html>\n"
    )


def _operation(name: str, operation: Json) -> str:
    parameters = [
        (f"{p['name']} ({p['in']})", p["schema"], p["required"], p.get("description", ""))
        for p in operation.get("parameters", [])
    ]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    if body:
        parameters.append(("the body", body["schema"], True, ""))
    examples = "".join(
        f"<p>{_prose(example['summary'])}:</p><pre>{escape(json.dumps(example['value'], indent=2))}</pre>"
        for example in body.get("examples", {}).values()
    )
    answers = "".join(
        f"<tr><td>{status}<td>{' or '.join(_answer(*content) for content in answer.get('content', {}).items())}"
        f"<td>{_prose(answer['description'])}"
        for status, answer in sorted(operation["responses"].items())
    )
    return (
        f"{_heading(operation['operationId'], name)}{_paragraphs(operation.get('description', ''))}"
        f"{_fields(parameters)}{examples}<table>{answers}</table>"
    )


def _answer(media_type: str, content: Json) -> str:
    return f"{_type(content.get('schema', {}))}{'' if media_type == 'application/json' else f' ({escape(media_type)})'}"


def _schema(name: str, schema: Json) -> str:
    required = schema.get("required", [])
    fields = [(n, s, n in required, s.get("description", "")) for n, s in schema.get("properties", {}).items()]
    return _heading(name, name) + _paragraphs(schema.get("description", "")) + (_fields(fields) or _type(schema))


def _fields(fields: list[tuple[str, Json, bool, str]]) -> str:
    """Return a table of (name, schema, required, description)."""
    rows = ""
    for name, schema, required, text in fields:
        default = "required" if required else escape(json.dumps(schema["default"])) if "default" in schema else ""
        rows += f"<tr><td><code>{escape(name)}</code><td>{_type(schema)}<td>{default}<td>{_prose(text)}"
    return f"<table>{rows}</table>" if fields else ""


def _type(schema: Json) -> str:
    if reference := schema.get("$ref"):
        name = reference.rpartition("/")[2]
        return _link(name, name)
    for several in ("anyOf", "oneOf"):
        if several in schema and "properties" not in schema:
            return " or ".join(_type(one) for one in schema[several])
    if values := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return ", ".join(f"<code>{escape(json.dumps(value))}</code>" for value in values)
    inner = {"array": schema.get("items"), "object": schema.get("additionalProperties")}.get(schema.get("type", ""))
    kind = escape(schema.get("type", "anything")) + (f" of {_type(inner)}" if isinstance(inner, dict) and inner else "")
    return ", ".join(
        [kind, *(escape(text.format(_whole(schema[key]))) for key, text in _BOUNDS.items() if key in schema)]
    )


def _whole(bound: Any) -> Any:
    return int(bound) if isinstance(bound, float) and bound.is_integer() else bound


def _heading(anchor: str, text: str) -> str:
    return f'<h3 id="{escape(anchor)}">{escape(text)}</h3>'


def _link(anchor: str, text: str) -> str:
    return f'<a href="#{escape(anchor)}">{escape(text)}</a>'


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{_prose(part)}</p>" for part in text.strip().split("\n\n") if part)


def _prose(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
