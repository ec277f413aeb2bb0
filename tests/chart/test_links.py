"""Names, labels and ports lead where they should: what a typo would break only in a running cluster."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.chart.chart import SCENARIOS, Object, Pod, named, objects_of, pods, values_of


@pytest.mark.parametrize("scenario", sorted(SCENARIOS))
def test_every_name_that_a_pod_needs_exists(scenario: str) -> None:
    """In the release, or said by the values to exist."""
    objects = objects_of(scenario)
    given = set(_existing(values_of(scenario))) | {"default"}
    for pod in pods(objects):
        for kind, name, key in _needs(pod):
            made = named(objects, kind).get(name)
            assert made is not None or name in given, f"{scenario}: {pod.owner} needs {kind} {name}"
            if made is not None and key is not None:
                held = made.get("stringData", {}) | made.get("data", {})
                assert key in held, f"{scenario}: {kind} {name} has no {key}, which {pod.owner} needs"


@pytest.mark.parametrize("scenario", sorted(SCENARIOS))
def test_what_a_hook_needs_is_there_before_it(scenario: str) -> None:
    """Before an installation nothing of the release exists but hooks of a lower weight."""
    objects = objects_of(scenario)
    given = set(_existing(values_of(scenario))) | {"default"}
    for pod in pods(objects):
        if "pre-install" not in pod.hooks:
            continue
        for kind, name, _ in _needs(pod):
            if name in given:
                continue
            annotations = named(objects, kind)[name]["metadata"].get("annotations", {})
            assert "pre-install" in annotations.get("helm.sh/hook", ""), f"{pod.owner} needs {kind} {name} too early"
            assert int(annotations["helm.sh/hook-weight"]) < pod.weight


@pytest.mark.parametrize("scenario", sorted(SCENARIOS))
def test_kuberay_finds_its_secrets(scenario: str) -> None:
    objects = objects_of(scenario)
    given = set(_existing(values_of(scenario)))
    for cluster in named(objects, "RayCluster").values():
        auth = cluster["spec"]["authOptions"]
        assert auth["mode"] == "token"
        secrets = [(auth["secretName"], "auth_token")]
        redis = cluster["spec"].get("gcsFaultToleranceOptions", {}).get("redisPassword")
        if redis is not None:
            reference = redis["valueFrom"]["secretKeyRef"]
            secrets.append((reference["name"], reference["key"]))
        for name, key in secrets:
            assert name in given or key in named(objects, "Secret")[name]["stringData"]


@pytest.mark.parametrize("scenario", sorted(SCENARIOS))
def test_services_select_pods_that_listen_there(scenario: str) -> None:
    objects = objects_of(scenario)
    for name, service in named(objects, "Service").items():
        selected = [pod for pod in pods(objects) if _matches(service["spec"]["selector"], pod.labels)]
        assert len(selected) == 1, f"{scenario}: {name} selects {[pod.owner for pod in selected]}"
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in selected[0].ports, f"{scenario}: {name} leads to no port"


@pytest.mark.parametrize("scenario", sorted(SCENARIOS))
def test_selectors_select_what_they_are_for(scenario: str) -> None:
    objects = objects_of(scenario)
    for item in objects:
        selector = item.get("spec", {}).get("selector", {}).get("matchLabels")
        if item["kind"] == "Deployment":
            assert _matches(selector, item["spec"]["template"]["metadata"]["labels"])
        if item["kind"] in ("Deployment", "PodDisruptionBudget"):
            owners = [pod.owner for pod in pods(objects) if _matches(selector, pod.labels)]
            assert owners == [f"Deployment/{item['metadata']['name']}"]


def test_a_service_monitor_finds_the_port_of_the_metrics() -> None:
    objects = objects_of("monitoring")
    (monitor,) = named(objects, "ServiceMonitor").values()
    (service,) = (
        item
        for item in named(objects, "Service").values()
        if _matches(monitor["spec"]["selector"]["matchLabels"], item["metadata"]["labels"])
    )
    (endpoint,) = monitor["spec"]["endpoints"]
    assert [endpoint["port"]] == [port["name"] for port in service["spec"]["ports"]]
    assert service["spec"]["ports"][0]["targetPort"] == "metrics"


def test_a_pod_monitor_finds_the_ports_of_head_and_workers() -> None:
    objects = objects_of("monitoring")
    (monitor,) = named(objects, "PodMonitor").values()
    selected = [pod for pod in pods(objects) if _matches(monitor["spec"]["selector"]["matchLabels"], pod.labels)]
    assert [pod.owner for pod in selected] == ["RayCluster/lockstep/headgroup", "RayCluster/lockstep/cpu"]
    ports = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    assert ports <= selected[0].ports.keys()
    assert "metrics" in ports & selected[1].ports.keys()


@pytest.mark.parametrize(("scenario", "kind"), [("production", "Ingress"), ("gateway", "HTTPRoute")])
def test_routes_lead_to_the_api(scenario: str, kind: str) -> None:
    objects = objects_of(scenario)
    (route,) = named(objects, kind).values()
    ports = {port["name"]: port["port"] for port in named(objects, "Service")["lockstep"]["spec"]["ports"]}
    if kind == "Ingress":
        backend = route["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
        assert (backend["name"], backend["port"]["name"]) == ("lockstep", "http")
        assert "http" in ports
    else:
        (backend,) = route["spec"]["rules"][0]["backendRefs"]
        assert (backend["name"], backend["port"]) == ("lockstep", ports["http"])


def test_every_mount_has_a_volume_and_every_volume_a_mount() -> None:
    for scenario in SCENARIOS:
        for pod in pods(objects_of(scenario)):
            mounted = {mount["name"] for c in pod.containers for mount in c.get("volumeMounts", [])}
            if pod.owner.endswith("headgroup"):  # where KubeRay puts the autoscaler
                (cluster,) = named(objects_of(scenario), "RayCluster").values()
                mounted |= {
                    mount["name"] for mount in cluster["spec"].get("autoscalerOptions", {}).get("volumeMounts", [])
                }
            assert mounted == {volume["name"] for volume in pod.spec.get("volumes", [])}, f"{scenario}: {pod.owner}"


def test_a_control_plane_finds_the_service_that_kuberay_makes_for_the_head() -> None:
    for scenario, host in (("minimal", "lockstep-head-svc"), ("redis-fault-tolerance", "trainers-head-svc")):
        (cluster,) = named(objects_of(scenario), "RayCluster")
        assert host == f"{cluster}-head-svc"
        (plane,) = (pod for pod in pods(objects_of(scenario)) if pod.owner == "Deployment/lockstep")
        (address,) = (e["value"] for e in plane.containers[0]["env"] if e["name"] == "LOCKSTEP_RAY_ADDRESS")
        assert address == f"http://{host}:8265"


def _needs(pod: Pod) -> Iterator[tuple[str, str, str | None]]:
    """Yield kind, name and, where one is named, key of what a pod cannot start without."""
    yield "ServiceAccount", pod.spec.get("serviceAccountName", "default"), None
    for secret in pod.spec.get("imagePullSecrets", []):
        yield "Secret", secret["name"], None
    for volume in pod.spec.get("volumes", []):
        for kind, source, name in (("Secret", "secret", "secretName"), ("ConfigMap", "configMap", "name")):
            if source in volume:
                for item in volume[source].get("items", [{"key": None}]):
                    yield kind, volume[source][name], item["key"]
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"], None
    for container in pod.containers:
        for variable in container.get("env", []):
            for kind, source in (("Secret", "secretKeyRef"), ("ConfigMap", "configMapKeyRef")):
                reference = variable.get("valueFrom", {}).get(source)
                if reference:
                    yield kind, reference["name"], reference["key"]


def _existing(values: Any) -> Iterator[str]:
    """Yield the names that values say exist already."""
    if isinstance(values, dict):
        for key, value in values.items():
            if key.startswith("existing"):
                yield value
            elif key == "pullSecrets":
                yield from value
            elif key == "serviceAccount" and value.get("create") is False:
                yield value["name"]
            else:
                yield from _existing(value)


def _matches(selector: Object, labels: dict[str, str]) -> bool:
    return bool(selector) and selector.items() <= labels.items()
