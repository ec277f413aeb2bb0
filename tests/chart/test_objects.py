"""Every object of every scenario is one that a server takes as it stands."""

import shutil
from pathlib import Path

import helm_python
import pytest

from tests.chart.chart import CHART, SCENARIOS, Object, objects_of, render, values_of
from tests.chart.validation import NEWEST, OLDEST, Invalid, validate

PLANTED = [
    ("control-plane.yaml", "  revisionHistoryLimit: 3", "  revisionHistoryLimits: 3", "production"),
    ("control-plane.yaml", "automountServiceAccountToken: false", "automountServiceAccountToken: nope", "minimal"),
    ("raycluster.yaml", "    serviceType: ClusterIP", "    serviceTypes: ClusterIP", "minimal"),
    ("raycluster.yaml", "    mode: token", "    mode: password", "minimal"),
    ("raycluster.yaml", "enableServiceLinks: false", "enableServiceLink: false", "minimal"),
    ("monitoring.yaml", "  podMetricsEndpoints:", "  podMetricEndpoints:", "monitoring"),
    ("../alerts.yml", "      - alert: LockstepQueueStands", "      - alarm: LockstepQueueStands", "monitoring"),
    ("routes.yaml", "    - backendRefs:", "    - backendRef:", "gateway"),
    ("network-policies.yaml", "  policyTypes: [Ingress]", "  policyTypes: Ingress", "minimal"),
]


@pytest.mark.parametrize("scenario", sorted(SCENARIOS))
def test_lint_finds_nothing(scenario: str) -> None:
    report = helm_python.lint(CHART, values_of(scenario), strict=True)
    assert report["errors"] == []
    assert [m for m in report["messages"] if m["severity"] > 1] == []


@pytest.mark.parametrize("scenario", sorted(SCENARIOS))
@pytest.mark.parametrize("kubernetes", [OLDEST, NEWEST])
def test_kubernetes_takes_every_object(scenario: str, kubernetes: str) -> None:
    items = [item for item in objects_of(scenario) if item["kind"] != "RayCluster"]
    assert len(items) > 5
    for item in items:
        validate(item, kubernetes)


@pytest.mark.parametrize("scenario", sorted(SCENARIOS.keys() - {"existing-ray"}))
def test_kuberay_takes_the_cluster(scenario: str) -> None:
    (cluster,) = (item for item in objects_of(scenario) if item["kind"] == "RayCluster")
    validate(cluster)


@pytest.mark.parametrize(("template", "good", "bad", "scenario"), PLANTED)
def test_a_wrong_field_in_a_template_is_found(
    template: str, good: str, bad: str, scenario: str, tmp_path: Path
) -> None:
    folder = tmp_path / "lockstep"
    shutil.copytree(CHART, folder)
    path = folder / "templates" / template
    text = path.read_text(encoding="utf-8")
    assert good in text
    path.write_text(text.replace(good, bad), encoding="utf-8")
    clusters = template == "raycluster.yaml"
    items = [i for i in render(values_of(scenario), folder=folder) if (i["kind"] == "RayCluster") is clusters]
    with pytest.raises(Invalid):
        validate_all(items)


def validate_all(items: list[Object]) -> None:
    for item in items:
        validate(item)


def test_a_name_is_given_once() -> None:
    for scenario in SCENARIOS:
        names = [(item["kind"], item["metadata"]["name"]) for item in objects_of(scenario)]
        assert sorted(names) == sorted(set(names)), scenario
