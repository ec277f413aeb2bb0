"""The chart, rendered without a cluster, and what tests ask of its objects."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from helm_python import Chart

CHART = Path(__file__).parents[2] / "helm" / "lockstep"
HERE = Path(__file__).parent
SCENARIOS = {path.stem: path for path in (HERE / "values").glob("*.yaml")} | {"dev": CHART / "values-dev.yaml"}
RELEASE, NAMESPACE = "lockstep", "ml"
HOOK = "helm.sh/hook"

Object = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod that the release leads to, with the labels that it will have."""

    owner: str
    hooks: str
    """When Helm makes it, if it is a hook: `pre-install,pre-upgrade`."""
    weight: int
    labels: dict[str, str]
    spec: Object

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def ports(self) -> dict[str, int]:
        """Its named ports."""
        return {port["name"]: port["containerPort"] for c in self.containers for port in c.get("ports", [])}


def values_of(scenario: str) -> Object:
    loaded: Object = yaml.safe_load(SCENARIOS[scenario].read_text(encoding="utf-8"))
    return loaded


def render_files(values: Object, *, name: str = RELEASE, folder: Path = CHART) -> dict[str, str]:
    """Return what each template gives; HelmError where values or templates are refused."""
    return _load(folder).render(values, name=name, namespace=NAMESPACE)


def render(values: Object, *, name: str = RELEASE, folder: Path = CHART) -> list[Object]:
    """Return the objects of a release."""
    return objects_in(render_files(values, name=name, folder=folder))


def objects_in(texts: dict[str, str]) -> list[Object]:
    """Return the objects that rendered templates describe."""
    manifests = (text for path, text in texts.items() if not path.endswith("NOTES.txt"))
    return [item for text in manifests for item in yaml.load_all(text, yaml.CSafeLoader) if item is not None]


@cache
def objects_of(scenario: str) -> list[Object]:
    """Return the objects of a scenario; no test changes them."""
    return render(values_of(scenario))


def named(objects: list[Object], kind: str) -> dict[str, Object]:
    return {item["metadata"]["name"]: item for item in objects if item["kind"] == kind}


def pods(objects: list[Object]) -> list[Pod]:
    return [pod for item in objects for pod in _pods_of(item)]


def pod(objects: list[Object], owner: str) -> Pod:
    (found,) = (pod for pod in pods(objects) if pod.owner == owner)
    return found


def environment(container: Object) -> dict[str, str]:
    """Return the literal part of a container's environment."""
    return {item["name"]: item["value"] for item in container["env"] if "value" in item}


def _pods_of(item: Object) -> Iterator[Pod]:
    owner = f"{item['kind']}/{item['metadata']['name']}"
    annotations = item["metadata"].get("annotations", {})
    hooks, weight = annotations.get(HOOK, ""), int(annotations.get("helm.sh/hook-weight", 0))
    if item["kind"] == "Pod":
        yield Pod(owner, hooks, weight, item["metadata"]["labels"], item["spec"])
    elif item["kind"] in ("Deployment", "Job"):
        template = item["spec"]["template"]
        yield Pod(owner, hooks, weight, template["metadata"]["labels"], template["spec"])
    elif item["kind"] == "RayCluster":
        yield from _ray_pods(item)


def _ray_pods(cluster: Object) -> Iterator[Pod]:
    """With the labels that KubeRay adds."""
    name, spec = cluster["metadata"]["name"], cluster["spec"]
    groups = [("head", "headgroup", spec["headGroupSpec"])]
    groups += [("worker", group["groupName"], group) for group in spec["workerGroupSpecs"]]
    for kind, group, body in groups:
        added = {
            "app.kubernetes.io/name": "kuberay",
            "ray.io/cluster": name,
            "ray.io/group": group,
            "ray.io/node-type": kind,
        }
        template = body["template"]
        yield Pod(f"RayCluster/{name}/{group}", "", 0, added | template["metadata"]["labels"], template["spec"])


@cache
def _load(folder: Path) -> Chart:
    return Chart.load(folder)
