"""What the chart has generated once stays as it is: Helm looks it up in the cluster."""

import re

import yaml
from helm_python import Config

from tests.chart.api_server import Secrets, api_server
from tests.chart.chart import CHART, NAMESPACE, RELEASE, named, objects_of, values_of

MADE: Secrets = {
    "lockstep-api-key": {"api-key": "the-key-of-the-first-installation"},
    "lockstep-ray-token": {"auth_token": "the-token-of-the-first-installation"},
    "lockstep-storage": {"access-key-id": "FIRSTACCESSKEY", "secret-access-key": "the-first-secret-key"},
}


def installed(there: Secrets) -> Secrets:
    """Return the Secrets that an installation would make in a cluster that has some already."""
    kinds = {(item["apiVersion"], item["kind"]) for item in objects_of("dev")}
    with api_server(kinds, there) as kubeconfig, Config(kubeconfig_content=kubeconfig, namespace=NAMESPACE) as cluster:
        release = cluster.install(CHART, RELEASE, values_of("dev"), namespace=NAMESPACE, dry_run="server")
    objects = [item for item in yaml.safe_load_all(release["manifest"]) if item]
    return {name: item["stringData"] for name, item in named(objects, "Secret").items()}


def test_generated_secrets_are_kept() -> None:
    kept = installed(MADE)
    assert {name: {key: kept[name][key] for key in values} for name, values in MADE.items()} == MADE
    assert kept["lockstep-storage"]["pair"] == '"FIRSTACCESSKEY,the-first-secret-key"'
    assert "aws_secret_access_key = the-first-secret-key" in kept["lockstep-storage"]["credentials"]


def test_where_none_are_each_is_made_anew() -> None:
    first, second = installed({}), installed({})
    assert re.fullmatch(r"lk_\w{43}", first["lockstep-api-key"]["api-key"])
    assert first.keys() == second.keys() == MADE.keys()
    for name, values in first.items():
        for key, value in values.items():
            assert len(value) >= 20
            assert value != second[name][key]
