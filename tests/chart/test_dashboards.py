"""Dashboards and alerts speak of what is there."""

import json
import re

import pytest

from service import metrics
from tests.chart.chart import CHART, named, objects_of

PUBLISHED = CHART.parents[1] / "deploy" / "grafana"
DASHBOARDS = sorted((CHART / "dashboards").glob("*.json"))


def test_dashboards_are_those_of_the_repository() -> None:
    if not PUBLISHED.is_dir():
        pytest.skip("there is no deploy/grafana")
    published = {path.name: path.read_bytes() for path in PUBLISHED.rglob("*.json")}
    assert {path.name: path.read_bytes() for path in DASHBOARDS} == published, (
        "copy them: deploy/grafana to helm/lockstep/dashboards/"
    )


def test_each_dashboard_is_a_config_map_that_grafana_finds() -> None:
    maps = [
        m
        for m in named(objects_of("monitoring"), "ConfigMap").values()
        if "grafana_dashboard" in m["metadata"]["labels"]
    ]
    assert [m["metadata"]["labels"]["grafana_dashboard"] for m in maps] == ["1"] * len(DASHBOARDS)
    held = {name: json.loads(text) for m in maps for name, text in m["data"].items()}
    assert held == {path.name: json.loads(path.read_text(encoding="utf-8")) for path in DASHBOARDS}


def test_alerts_ask_for_metrics_that_the_control_plane_has() -> None:
    with open(metrics.__file__, encoding="utf-8") as source:
        known = set(re.findall(r'"(lockstep_[a-z_]+)"', source.read()))
    (rule,) = named(objects_of("monitoring"), "PrometheusRule").values()
    (group,) = rule["spec"]["groups"]
    asked = {name for alert in group["rules"] for name in re.findall(r"lockstep_[a-z_]+", alert["expr"])}
    assert len(asked) >= 4
    assert asked <= known
