"""Dashboards and alerts are those of deploy/, and find what the chart has scraped."""

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.chart.chart import CHART, Object, named, objects_of

DEPLOY = CHART.parents[1] / "deploy"
DASHBOARDS = sorted((CHART / "dashboards").glob("*.json"))
ALERTS = CHART / "alerts.yml"


@pytest.mark.parametrize(
    ("copies", "originals"),
    [(DASHBOARDS, DEPLOY / "grafana" / "dashboards"), ([ALERTS], DEPLOY / "prometheus" / "rules.yml")],
    ids=["dashboards", "alerts"],
)
def test_what_the_chart_carries_is_what_deploy_has(copies: list[Path], originals: Path) -> None:
    """A chart can read only files of its own folder."""
    if not originals.exists():
        pytest.skip(f"there is no {originals}")
    sources = sorted(originals.glob("*.json")) if originals.is_dir() else [originals]
    same = [copy.read_bytes() for copy in copies] == [source.read_bytes() for source in sources]
    assert same, f"copy {[str(source) for source in sources]} to {copies[0].parent}"


def test_each_dashboard_is_a_config_map_that_grafana_finds() -> None:
    maps = named(objects_of("monitoring"), "ConfigMap").values()
    assert {item["metadata"]["labels"]["grafana_dashboard"] for item in maps} == {"1"}
    held = {name: json.loads(text) for item in maps for name, text in item["data"].items()}
    assert held == {path.name: json.loads(path.read_text(encoding="utf-8")) for path in DASHBOARDS}
    assert held


def test_alerts_and_dashboards_find_the_jobs_that_are_scraped() -> None:
    objects = objects_of("monitoring")
    (service_monitor,), (pod_monitor,) = (named(objects, kind).values() for kind in ("ServiceMonitor", "PodMonitor"))
    endpoints = [*service_monitor["spec"]["endpoints"], *pod_monitor["spec"]["podMetricsEndpoints"]]
    assert {_job(endpoint) for endpoint in endpoints} == {"lockstep", "ray"}
    (rule,) = named(objects, "PrometheusRule").values()
    assert rule["spec"] == yaml.safe_load(ALERTS.read_text(encoding="utf-8"))
    text = json.dumps(rule["spec"]) + "".join(path.read_text(encoding="utf-8") for path in DASHBOARDS)
    assert set(re.findall(r'job=\\"(\w+)\\"', text)) <= {"lockstep", "ray"}


def _job(endpoint: Object) -> str:
    (name,) = (rule["replacement"] for rule in endpoint["relabelings"] if rule["targetLabel"] == "job")
    assert isinstance(name, str)
    return name
