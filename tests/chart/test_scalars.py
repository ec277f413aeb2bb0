"""What values hold comes out as text or number, as the server wants it, whatever it looks like to YAML."""

from collections.abc import Iterator

import pytest

from tests.chart.chart import objects_of, pods, render, values_of

INSTANCE = "app.kubernetes.io/instance"
OPENSHIFT_USER = 1_000_650_000


def found(node: object, key: str) -> Iterator[object]:
    """Yield every value that is under a key, at any depth."""
    if isinstance(node, dict):
        if key in node:
            yield node[key]
        for each in node.values():
            yield from found(each, key)
    elif isinstance(node, list):
        for each in node:
            yield from found(each, key)


@pytest.mark.parametrize("scenario", ["air-gapped", "monitoring", "production"])
def test_a_release_may_be_called_by_a_number(scenario: str) -> None:
    objects = render(values_of(scenario) | {"fullnameOverride": "lockstep"}, name="2026")
    named = list(found(objects, INSTANCE))
    assert len(named) == len(list(found(objects_of(scenario), INSTANCE)))
    assert set(named) == {"2026"}


def test_a_user_id_of_an_openshift_range_stays_a_whole_number() -> None:
    for pod in pods(render(values_of("minimal") | {"podSecurity": {"user": OPENSHIFT_USER}})):
        context = pod.spec["securityContext"]
        for name in ("runAsUser", "runAsGroup", "fsGroup"):
            assert type(context[name]) is int
            assert context[name] == OPENSHIFT_USER
