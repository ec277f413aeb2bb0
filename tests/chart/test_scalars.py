"""What values hold comes out as text or number, as the server wants it, whatever it looks like to YAML."""

import json
from collections.abc import Iterator

import pytest

from tests.chart.chart import Object, objects_of, pods, render, values_of

INSTANCE = "app.kubernetes.io/instance"
OPENSHIFT_USER = 1_000_650_000
DIGITS = "2026"
NAMED = {"existingSecret": DIGITS, "key": DIGITS}
CA = {"existingConfigMap": DIGITS, "key": DIGITS}
POD = {"priorityClassName": DIGITS}
GROUP = {"name": "cpu", "replicas": 1, "cpu": 4, "memory": "16Gi", "pod": POD, "runtimeClassName": DIGITS}
ACCOUNT = {"create": False, "name": DIGITS}

# Everything that values may call as they like, by digits alone: Secrets that exist, and those that the chart makes.
EXISTING: Object = {
    "images": {"pullSecrets": [DIGITS]},
    "storage": {"url": "s3://models", "credentials": NAMED, "ca": CA},
    "database": {"url": "postgresql://a@b/c", "existingSecret": DIGITS, "passwordKey": DIGITS, "ca": CA},
    "apiKey": NAMED,
    "controlPlane": {"serviceAccount": ACCOUNT, "pod": POD},
    "ray": {
        "python": DIGITS,
        "token": {"existingSecret": DIGITS},
        "serviceAccount": ACCOUNT,
        "cache": {"storageClass": DIGITS},
        "gcsFaultTolerance": {
            "enabled": True,
            "redisAddress": "redis:6379",
            "existingSecret": DIGITS,
            "passwordKey": DIGITS,
        },
        "head": {"cpu": 2, "memory": "8Gi", "pod": POD},
        "workerGroups": [GROUP],
    },
    "ingress": {"enabled": True, "className": DIGITS, "host": DIGITS, "tlsSecret": DIGITS},
}
URL_IN_A_FILE = EXISTING | {"database": {"existingSecret": DIGITS, "urlKey": DIGITS}}
MADE: Object = {
    "storage": {
        "url": "s3://models",
        "credentials": {"key": DIGITS, "accessKeyId": DIGITS, "secretAccessKey": DIGITS},
    },
    "database": {"volume": {"existingClaim": DIGITS}},
    "apiKey": {"key": DIGITS},
    "controlPlane": {"serviceAccount": {"create": True, "name": DIGITS}},
    "ray": {"serviceAccount": {"create": True, "name": DIGITS}},
    "httpRoute": {"enabled": True, "hostnames": [DIGITS], "parentRefs": [{"name": DIGITS}]},
}
MADE_WITH_VOLUMES: Object = {
    "database": {"volume": {"storageClass": DIGITS}},
    "developmentStore": {"enabled": True},
}


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


def scalars(node: object) -> Iterator[object]:
    """Yield every value and every key, at any depth."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield key
            yield from scalars(value)
    elif isinstance(node, list):
        for each in node:
            yield from scalars(each)
    else:
        yield node


@pytest.mark.parametrize("values", [EXISTING, URL_IN_A_FILE, MADE, MADE_WITH_VOLUMES])
def test_names_and_keys_may_be_digits_alone(values: Object) -> None:
    with_words: Object = json.loads(json.dumps(values).replace(DIGITS, "named"))
    said = list(scalars(render(values)))
    assert said.count(DIGITS) == list(scalars(render(with_words))).count("named") > 0


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
