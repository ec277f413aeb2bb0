"""Dashboards and alerts are those of deploy/, and find what the chart has scraped."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.chart.chart import CHART, Object, named, objects_of, render, values_of
from tests.monitoring import alerts, selectors_in

DEPLOY = CHART.parents[1] / "deploy"
DASHBOARDS = sorted((CHART / "dashboards").glob("*.json"))
ALERTS = CHART / "alerts.yml"
OTHER_RAY = {"ray": {"enabled": False, "address": "http://ray:8265", "token": {"existingSecret": "ray-token"}}}


@pytest.mark.parametrize(
    ("copies", "originals"),
    [(DASHBOARDS, DEPLOY / "grafana" / "dashboards"), ([ALERTS], DEPLOY / "prometheus" / "rules.yml")],
    ids=["dashboards", "alerts"],
)
def test_what_the_chart_carries_is_what_deploy_has(copies: list[Path], originals: Path) -> None:
    """A chart can read only files of its own folder."""
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
    text = json.dumps(alerts_of(objects)) + "".join(path.read_text(encoding="utf-8") for path in DASHBOARDS)
    assert set(re.findall(r'job=\\"(\w+)\\"', text)) <= {"lockstep", "ray"}


def test_alerts_are_those_of_the_file_and_see_this_release_alone() -> None:
    """One Prometheus may watch several releases; monitors put the namespace on what they scrape."""
    rendered, originals = alerts_of(objects_of("monitoring")), alerts()
    assert rendered.keys() == originals.keys()
    for name, rule in rendered.items():
        seen = selectors_in(rule["expr"])
        assert seen
        assert all('{namespace="ml"' in selector for selector in seen), name
        assert re.sub(r'namespace="ml",?', "", rule["expr"]).replace("{}", "") == originals[name]["expr"]
        assert rule["labels"] == originals[name]["labels"] | {"namespace": "ml"}
        assert rule["annotations"] == originals[name]["annotations"]


def test_prometheus_takes_the_alerts(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed; Debian's package `prometheus` brings it")
    (rule,) = named(objects_of("monitoring"), "PrometheusRule").values()
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rule["spec"]), encoding="utf-8")
    subprocess.run([promtool, "check", "rules", str(tmp_path / "rules.yml")], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "unscraped", [{"monitoring": {"podMonitor": {"enabled": False}}}, OTHER_RAY], ids=["off", "other"]
)
def test_where_ray_is_not_scraped_no_alert_waits_for_it(unscraped: Object) -> None:
    monitored = values_of("monitoring")
    both = monitored | unscraped | {"monitoring": monitored["monitoring"] | unscraped.get("monitoring", {})}
    assert alerts().keys() - alerts_of(render(both)).keys() == {"RayUnseen"}


def alerts_of(objects: list[Object]) -> dict[str, Object]:
    (rule,) = named(objects, "PrometheusRule").values()
    return {each["alert"]: each for group in rule["spec"]["groups"] for each in group["rules"]}


def _job(endpoint: Object) -> str:
    (name,) = (rule["replacement"] for rule in endpoint["relabelings"] if rule["targetLabel"] == "job")
    assert isinstance(name, str)
    return name
