"""What the pages have people type fits what the chart makes."""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from service.settings import Settings
from tests.chart.chart import CHART, Object, environment, objects_of, pod, pods, render

ROOT = CHART.parents[1]
PAGES = [ROOT / "docs" / "deploy.md", CHART / "README.md", ROOT / "docs" / "monitoring.md"]
DEFAULTS: Object = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))


def commands(page: Path) -> list[str]:
    """Return the lines of a page's blocks of commands, continued ones in one piece."""
    blocks = re.findall(r"^ *```(?:sh)?\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [line.strip() for block in blocks for line in block.replace("\\\n", "").splitlines()]


def test_who_changes_a_release_waits_until_the_pods_have_changed() -> None:
    """A command that wants no control plane at work must not run beside the one of before."""
    upgrades = 0
    for page in PAGES:
        lines = commands(page)
        for at, line in enumerate(lines):
            if line.startswith("helm") and " upgrade " in line:
                upgrades += 1
                assert lines[at + 1] == "kubectl -n ml rollout status deploy/lockstep", line
            if "maintenance=true" in line:
                assert " get pods -l " in lines[at + 2], line
    assert upgrades == 4


def test_the_pods_that_are_counted_are_the_control_planes() -> None:
    for selector in _options(r" get pods? -l (\S+)"):
        labels = dict(pair.split("=") for pair in selector.split(","))
        owners = [each.owner for each in pods(objects_of("minimal")) if labels.items() <= each.labels.items()]
        expected = "RayCluster/lockstep/headgroup" if "ray.io/cluster" in labels else "Deployment/lockstep"
        assert owners == [expected], selector


def test_each_value_that_is_set_is_one() -> None:
    for path in _options(r" --set ([\w.]+)="):
        node = DEFAULTS
        for name in path.split("."):
            assert name in node, path
            node = node[name]


def test_the_dashboards_that_are_fetched_are_those_that_rays_head_writes() -> None:
    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    head = Path(spec.origin).parent / "dashboard" / "modules" / "metrics" / "metrics_head.py"
    text = "\n".join(commands(ROOT / "docs" / "monitoring.md"))
    (names,) = re.findall(r"for name in (.*); do", text)
    for name in names.split():
        assert f'"{name}_grafana_dashboard.json"' in head.read_text(encoding="utf-8")
        assert f"--from-file=ray-{name}.json" in text
    (container,) = re.findall(r"-c (\S+) -- cat", text)
    assert container == pod(objects_of("minimal"), "RayCluster/lockstep/headgroup").containers[0]["name"]


def test_the_example_of_trusted_hosts_is_what_the_chart_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"^LOCKSTEP_TRUSTED_HOSTS=(\S+)$", (ROOT / "SECURITY.md").read_text(), re.MULTILINE)
    ingress = {"enabled": True, "host": "train.example.com"}
    objects = render({"storage": {"url": "s3://models"}, "ingress": ingress})
    told = environment(pod(objects, "Deployment/lockstep").containers[0])["LOCKSTEP_TRUSTED_HOSTS"]
    assert set(example.split(",")) == set(told.split(","))
    monkeypatch.setenv("LOCKSTEP_STORAGE", "s3://models")
    monkeypatch.setenv("LOCKSTEP_TRUSTED_HOSTS", example)
    assert "lockstep" in Settings().trusted_hosts


def _options(pattern: str) -> Iterator[str]:
    found = [match for page in PAGES for line in commands(page) for match in re.findall(pattern, line)]
    assert found
    yield from found
