"""The dashboards and alert rules of deploy/: their queries, and the metrics that these name."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parent.parent / "deploy"
CONFIG, RULES = DEPLOY / "prometheus/prometheus.yml", DEPLOY / "prometheus/rules.yml"

EVERY_NAMESPACE = ".*"
"""What Grafana puts for the choice of all; it matches series without a namespace, too."""

_NOT_METRICS = {"and", "bool", "by", "on", "or", "unless"}


def dashboard(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOY / f"grafana/dashboards/{name}.json").read_text())
    return found


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the panels that show something."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def queries(job_id: str) -> dict[str, str]:
    """Return every query by where it stands, with a value for each of Grafana's variables.

    An alert's comparison becomes a number: it has a value while all is well, too.
    """
    found: dict[str, str] = {}
    for name in ("operators", "job"):
        for panel in panels(dashboard(name)):
            for target in panel["targets"]:
                query = target["expr"].replace("$__rate_interval", "10s").replace("$job", job_id)
                query = query.replace("$namespace", EVERY_NAMESPACE)
                found[f"{name}: {panel['title']}, {target['refId']}"] = query
    for name, rule in alerts().items():
        query, comparisons = re.subn(r"(>|<|==)(?=\s+[\d.]+$)", r"\1 bool", rule["expr"].strip())
        assert comparisons == 1, f"{name} does not end with a comparison"
        found[f"alert {name}"] = query
    return found


def selectors_in(query: str) -> set[str]:
    """Return what a query looks at: metrics, each with its `{…}` if it has one.

    That is what is neither a function, nor a label, a number or a word of PromQL.
    """
    bare = re.sub(r"\[[^]]*\]|\b(?:by|on)\s*\([^)]*\)", " ", query)
    words = re.finditer(r"\b([a-z_][a-z0-9_]*)(\{[^}]*\})?(?!\w|\s*\()", bare)
    return {word[0] for word in words if word[1] not in _NOT_METRICS}
