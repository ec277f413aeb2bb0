"""Spec files: YAML as its version 1.2 reads it, or JSON."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from .errors import LockstepError
from .words import plain


class SpecFileError(LockstepError):
    """A spec file cannot be read, or is not a mapping of YAML or JSON."""


def read_spec(file: str) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file (`-`: standard input). Raises SpecFileError."""
    where = "standard input" if file == "-" else file
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        spec = json.loads(text) if file.endswith(".json") else yaml.load(text, _SpecLoader)  # a SafeLoader  # nosec B506
    except OSError as error:
        raise SpecFileError(f"{where} cannot be read: {error.strerror}.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise SpecFileError(f"{where}{place}: not valid YAML: {problem}.") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise SpecFileError(f"{where} is not YAML or JSON: {plain(str(error))}.") from error
    if not isinstance(spec, dict):
        raise SpecFileError(f"{where} holds no job spec: it must be a mapping, such as `name: my-first-job`.")
    return spec


class _SpecLoader(yaml.SafeLoader):
    """YAML as its version 1.2 reads it, which is as JSON would: `6e-4` is a number, `no` and a date are text."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:  # PyYAML would let the last one win
                raise yaml.composer.ComposerError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (LookupError, ValueError, AttributeError) as error:  # as PyYAML has it for `!!bool maybe`
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"{str(node.value)[:60]!r} is no {kind}", node.start_mark
            ) from error

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


_SpecLoader.yaml_implicit_resolvers = {}  # none of YAML 1.1, whose rules these replace
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
    ("merge", r"<<", ["<"]),
):
    _SpecLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_SpecLoader.add_constructor("tag:yaml.org,2002:int", _SpecLoader.construct_integer)
