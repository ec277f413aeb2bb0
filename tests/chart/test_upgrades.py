"""What another version of the chart does to what runs."""

import shutil
from pathlib import Path

import pytest
import yaml

from tests.chart.chart import CHART, Object, named, render, values_of

PINNED = {"images": {"worker": {"tag": "0.1.0-mine"}}}


@pytest.fixture
def next_chart(tmp_path: Path) -> Path:
    """The chart, with other numbers for itself and for the program."""
    folder = tmp_path / "lockstep"
    shutil.copytree(CHART, folder)
    about = yaml.safe_load((folder / "Chart.yaml").read_text(encoding="utf-8"))
    changed = about | {"version": "9.9.9", "appVersion": "9.9.8"}
    (folder / "Chart.yaml").write_text(yaml.safe_dump(changed), encoding="utf-8")
    return folder


def cluster(values: Object, folder: Path = CHART) -> Object:
    (found,) = named(render(values, folder=folder), "RayCluster").values()
    return found


@pytest.mark.parametrize("scenario", ["minimal", "production", "dev", "gpu"])
def test_another_chart_with_the_same_worker_image_leaves_rays_pods_alone(scenario: str, next_chart: Path) -> None:
    """KubeRay replaces them all when the cluster's spec has changed in anything."""
    values = values_of(scenario) | PINNED
    before, after = cluster(values), cluster(values, next_chart)
    assert before["metadata"]["labels"] != after["metadata"]["labels"]
    assert before["spec"] == after["spec"]


@pytest.mark.parametrize(
    "change",
    [
        {"database": {"url": "postgresql://lockstep@postgres:5432/lockstep", "password": "another"}},
        {"storage": {"credentials": {"accessKeyId": "AKIDINVALUES", "secretAccessKey": "another"}}},
    ],
    ids=["database", "bucket"],
)
def test_another_secret_in_the_values_is_taken_up_by_a_new_pod(change: Object) -> None:
    """The control plane reads them once; KubeRay's pods read the bucket's with each attempt, and are left alone."""
    values = values_of("own-secrets")
    objects = [
        render(values),
        render(values),
        render({key: value | change.get(key, {}) for key, value in values.items()}),
    ]
    before, same, after = (named(each, "Deployment")["lockstep"]["spec"]["template"] for each in objects)
    assert before == same
    assert before["spec"] == after["spec"]
    assert before["metadata"] != after["metadata"]
    (ray, _, new_ray) = (named(each, "RayCluster")["lockstep"]["spec"] for each in objects)
    assert ray == new_ray


def test_a_worker_image_without_a_tag_is_that_of_the_charts_program(next_chart: Path) -> None:
    head = cluster(values_of("minimal"), next_chart)["spec"]["headGroupSpec"]
    assert head["template"]["spec"]["containers"][0]["image"] == "lockstep-worker:9.9.8"
