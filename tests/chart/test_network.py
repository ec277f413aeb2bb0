"""Who may reach whom, by the network policies as a cluster would read them."""

from dataclasses import dataclass, field

import pytest

from tests.chart.chart import NAMESPACE, Object, Pod, named, objects_of, pod, pods, values_of

HEAD, WORKER, PLANE = "RayCluster/lockstep/headgroup", "RayCluster/lockstep/cpu", "Deployment/lockstep"
RAY_PORTS = {"gcs": 6379, "dashboard": 8265, "client": 10001, "worker": 20_000, "agent": 52_365}


@dataclass(frozen=True)
class Caller:
    """A pod somewhere in the cluster."""

    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = NAMESPACE


STRANGER, NEIGHBOUR = Caller(namespace="other"), Caller({"app": "notebook"})
PROMETHEUS = Caller({"app.kubernetes.io/name": "prometheus"}, "monitoring")
OPERATOR = Caller({"app.kubernetes.io/name": "kuberay-operator"}, "kuberay")


def caller(objects: list[Object], owner: str) -> Caller:
    return Caller(pod(objects, owner).labels)


def reachable(objects: list[Object], source: Caller, target: Pod, port: int) -> bool:
    """Tell whether a caller may open a TCP port of a pod: policies add up, and a pod without one is open."""
    policies = [
        policy["spec"]
        for policy in named(objects, "NetworkPolicy").values()
        if "Ingress" in policy["spec"]["policyTypes"] and _selects(policy["spec"]["podSelector"], target.labels)
    ]
    return not policies or any(_allows(rule, source, target, port) for spec in policies for rule in spec["ingress"])


def _allows(rule: Object, source: Caller, target: Pod, port: int) -> bool:
    numbers = [target.ports.get(entry["port"], entry["port"]) for entry in rule.get("ports", [])]
    peers = rule.get("from")
    return (not numbers or port in numbers) and (peers is None or any(_is(peer, source) for peer in peers))


def _is(peer: Object, source: Caller) -> bool:
    if "ipBlock" in peer:
        return False
    if "namespaceSelector" in peer:
        there = _selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": source.namespace})
    else:
        there = source.namespace == NAMESPACE
    return there and _selects(peer.get("podSelector", {}), source.labels)


def _selects(selector: Object, labels: dict[str, str]) -> bool:
    wanted: dict[str, str] = selector.get("matchLabels", {})
    return wanted.items() <= labels.items()


@pytest.mark.parametrize("target", [HEAD, WORKER])
@pytest.mark.parametrize("port", RAY_PORTS.values(), ids=RAY_PORTS)
def test_rays_ports_are_closed_to_others(target: str, port: int) -> None:
    objects = objects_of("minimal")
    there = pod(objects, target)
    assert not any(reachable(objects, who, there, port) for who in (STRANGER, NEIGHBOUR, PROMETHEUS))


@pytest.mark.parametrize("port", RAY_PORTS.values(), ids=RAY_PORTS)
def test_ray_reaches_itself_everywhere(port: int) -> None:
    objects = objects_of("minimal")
    for source, target in ((HEAD, WORKER), (WORKER, HEAD), (WORKER, WORKER)):
        assert reachable(objects, caller(objects, source), pod(objects, target), port)


def test_the_control_plane_and_the_operator_reach_the_dashboard_and_nothing_else_of_ray() -> None:
    objects = objects_of("minimal")
    head = pod(objects, HEAD)
    for who in (caller(objects, PLANE), OPERATOR):
        assert [name for name, port in RAY_PORTS.items() if reachable(objects, who, head, port)] == ["dashboard"]


@pytest.mark.parametrize(
    ("owner", "port"),
    [(HEAD, "metrics"), (HEAD, "as-metrics"), (HEAD, "dash-metrics"), (WORKER, "metrics"), (PLANE, "metrics")],
)
def test_only_prometheus_reads_metrics(owner: str, port: str) -> None:
    objects = objects_of("minimal")
    target = pod(objects, owner)
    assert reachable(objects, PROMETHEUS, target, target.ports[port])
    others = [STRANGER, NEIGHBOUR, OPERATOR] + ([caller(objects, PLANE)] if owner != PLANE else [])
    assert not any(reachable(objects, who, target, target.ports[port]) for who in others)


def test_everyone_reaches_the_api_unless_clients_are_named() -> None:
    for scenario, open_to_all in (("minimal", True), ("gateway", False)):
        objects = objects_of(scenario)
        plane = pod(objects, PLANE)
        assert reachable(objects, STRANGER, plane, plane.ports["http"]) is open_to_all
        assert reachable(objects, Caller(namespace="gateways"), plane, plane.ports["http"])
        assert reachable(objects, caller(objects, "Pod/lockstep-test"), plane, plane.ports["http"])


def test_no_worker_reaches_the_control_plane_where_clients_are_named() -> None:
    objects = objects_of("gateway")
    plane = pod(objects, PLANE)
    assert not any(reachable(objects, caller(objects, WORKER), plane, port) for port in plane.ports.values())


def test_only_the_release_reaches_the_development_store() -> None:
    objects = objects_of("dev")
    store = pod(objects, "Deployment/lockstep-s3")
    for owner in (PLANE, HEAD, WORKER):
        assert reachable(objects, caller(objects, owner), store, store.ports["s3"])
    assert not any(reachable(objects, who, store, store.ports["s3"]) for who in (STRANGER, NEIGHBOUR, PROMETHEUS))


def test_the_egress_policy_holds_every_pod() -> None:
    objects = objects_of("air-gapped")
    (policy,) = (p for p in named(objects, "NetworkPolicy").values() if p["spec"]["policyTypes"] == ["Egress"])
    assert all(_selects(policy["spec"]["podSelector"], each.labels) for each in pods(objects))


def test_what_leaves_the_release_is_names_itself_and_what_the_values_allow() -> None:
    (policy,) = (p["spec"] for p in named(objects_of("air-gapped"), "NetworkPolicy").values() if "egress" in p["spec"])
    names, itself, *others = policy["egress"]
    assert names == {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}
    (peer,) = itself["to"]
    assert "ports" not in itself
    assert all(_selects(peer["podSelector"], each.labels) for each in pods(objects_of("air-gapped")))
    assert others == values_of("air-gapped")["networkPolicy"]["egress"]["rules"]
