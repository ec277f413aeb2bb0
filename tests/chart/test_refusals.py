"""What cannot work is refused before anything is installed, with a sentence that says what to change."""

from typing import Any

import helm_python
import pytest

from tests.chart.chart import Object, environment, pod, render

GROUP = {"name": "cpu", "replicas": 1, "cpu": 4, "memory": "16Gi"}
LONG = "a-release-with-a-name-so-long-that-nothing-fits-after"  # 53 characters, Helm's own limit


def group(**changes: Any) -> Object:
    return {"ray": {"workerGroups": [GROUP | changes]}}


def autoscaled(**changes: Any) -> Object:
    return {"ray": {"autoscaling": {"enabled": True}, "workerGroups": [GROUP | changes]}}


def variable(name: str) -> Object:
    return {"controlPlane": {"extraEnv": [{"name": name, "value": "x"}]}}


BY_SENTENCE: list[tuple[Object, str]] = [
    ({"storage": {"url": ""}}, "storage.url is missing. Set it to s3://bucket/prefix"),
    ({"controlPlane": {"replicas": 2}}, "SQLite serves one replica. Set database.url to a PostgreSQL"),
    ({"ray": {"name": "a" * 54}}, "has 54 characters; KubeRay takes 53"),
    ({"ray": {"name": "1st"}}, "must begin with a letter"),
    ({"ray": {"name": "Trainers"}}, "hold only lower-case letters"),
    ({"fullnameOverride": "a" * 54}, "has 54 characters; names of Services made from it would be too long"),
    ({"ray": {"address": "http://ray:8265"}}, "ray.enabled makes another. Keep one."),
    ({"ray": {"enabled": False}}, "Set ray.address to the URL of the dashboard"),
    ({"ray": {"enabled": False, "address": "http://ray:8265"}}, "Name the Secret with the token of the Ray to use"),
    ({"ray": {"workerGroups": [GROUP, GROUP]}}, "Two of ray.workerGroups are called cpu"),
    (autoscaled(), "cpu has no maxReplicas, which autoscaling needs"),
    (autoscaled(minReplicas=3, maxReplicas=2), "has minReplicas 3 above maxReplicas 2"),
    (autoscaled(replicas=5, maxReplicas=2), "begins with 5 replicas, which is not from minReplicas 0 to maxReplicas 2"),
    (autoscaled(replicas=0, minReplicas=1, maxReplicas=2), "begins with 0 replicas"),
    (
        autoscaled(maxReplicas=2) | {"fullnameOverride": "a" * 47},
        "has 51 characters; with autoscaling KubeRay cuts its name to 50",
    ),
    (group(maxReplicas=4), "which only ray.autoscaling.enabled uses"),
    ({"ray": {"gcsFaultTolerance": {"enabled": True}}}, "needs redisAddress, such as redis:6379"),
    (
        {"ray": {"gcsFaultTolerance": {"existingSecret": "redis", "password": "x"}}},
        "ray.gcsFaultTolerance has both existingSecret and password",
    ),
    (
        {"storage": {"credentials": {"existingSecret": "s3", "accessKeyId": "x", "secretAccessKey": "y"}}},
        "storage.credentials has both existingSecret and accessKeyId",
    ),
    ({"storage": {"credentials": {"accessKeyId": "x"}}}, "needs accessKeyId and secretAccessKey together"),
    (
        {"developmentStore": {"enabled": True}, "storage": {"endpoint": "http://s3"}},
        "endpoint and credentials of its own",
    ),
    ({"database": {"password": "x"}}, "database has a password and no url"),
    (
        {"database": {"url": "postgresql://a@b/c", "password": "x", "existingSecret": "y"}},
        "database has both existingSecret and password",
    ),
    ({"controlPlane": {"preStopSeconds": 28}}, "must be more than 5 s above preStopSeconds"),
    ({"networkPolicy": {"egress": {"enabled": True}}}, "would cut the pods off from the bucket"),
    ({"ingress": {"enabled": True}}, "ingress.enabled needs ingress.host"),
    ({"httpRoute": {"enabled": True}}, "httpRoute.enabled needs httpRoute.parentRefs"),
    ({"httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]}}, "all would be answered 400"),
    ({"monitoring": {"prometheusRule": {"enabled": True}}}, "Set monitoring.serviceMonitor.enabled"),
    ({"database": {"url": "postgresql://a@b/c?password=x"}}, "database.url has a password, which everyone sees"),
    ({"database": {"urlKey": "uri"}}, "database.urlKey names a key of database.existingSecret"),
    (
        {"database": {"urlKey": "uri", "existingSecret": "x", "url": "postgresql://a@b/c"}},
        "Name that Secret, and leave database.url out",
    ),
    ({"database": {"ca": {"existingConfigMap": "ca"}}}, "database.ca is for a PostgreSQL"),
    (
        {"database": {"url": "postgresql://a@b/c?sslmode=require", "ca": {"existingConfigMap": "ca"}}},
        "database.url has sslmode or sslrootcert, and would win over database.ca",
    ),
    (variable("LOCKSTEP_TRUSTED_HOSTS"), "controlPlane.extraEnv has LOCKSTEP_TRUSTED_HOSTS, which the chart sets"),
    (variable("AWS_DEFAULT_REGION"), "controlPlane.extraEnv has AWS_DEFAULT_REGION, which the chart sets itself"),
    ({"ray": variable("LOCKSTEP_CACHE")["controlPlane"]}, "ray.extraEnv has LOCKSTEP_CACHE, which the chart sets"),
    ({"ray": variable("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")["controlPlane"]}, "which the chart sets itself"),
]

BY_SCHEMA: list[tuple[Object, str]] = [
    ({"replicas": 2}, "additional properties 'replicas' not allowed"),
    ({"controlPlane": {"replica": 2}}, "at '/controlPlane': additional properties 'replica' not allowed"),
    ({"controlPlane": {"replicas": 0}}, "at '/controlPlane/replicas': minimum: got 0, want 1"),
    ({"controlPlane": {"replicas": "2"}}, "at '/controlPlane/replicas': got string, want integer"),
    ({"storage": {"url": "https://bucket"}}, "at '/storage/url': 'https://bucket' does not match pattern"),
    ({"storage": {"endpoint": "s3.internal"}}, "at '/storage/endpoint'"),
    ({"database": {"url": "mysql://a@b/c"}}, "at '/database/url'"),
    ({"database": {"url": "postgresql://a:password@b/c"}}, "at '/database/url'"),
    ({"database": {"url": "postgresql://a@b/c/d"}}, "at '/database/url'"),
    ({"apiKey": {"key": "api key"}}, "at '/apiKey/key': 'api key' does not match pattern"),
    ({"database": {"urlKey": "a: b"}}, "at '/database/urlKey'"),
    ({"images": {"service": {"digest": "sha256:12"}}}, "at '/images/service/digest'"),
    ({"ray": {"version": "2.51.0"}}, "at '/ray/version'"),
    ({"ray": {"drainSeconds": 0}}, "at '/ray/drainSeconds': minimum: got 0, want 1"),
    ({"ray": {"workerGroups": []}}, "at '/ray/workerGroups': minItems: got 0, want 1"),
    (group(gpu={"count": 0}), "at '/ray/workerGroups/0/gpu/count': minimum: got 0, want 1"),
    (group(gpu={}), "at '/ray/workerGroups/0/gpu': missing property 'count'"),
    (group(gpu={"count": 1, "resource": "nvidia.com/mig-1g.10gb"}), "at '/ray/workerGroups/0/gpu/resource'"),
    (group(cpu=0.5), "at '/ray/workerGroups/0/cpu'"),
    (group(memory="16GB"), "at '/ray/workerGroups/0/memory'"),
    (group(name="GPU"), "at '/ray/workerGroups/0/name'"),
    (group(maxReplicas=0), "at '/ray/workerGroups/0/maxReplicas': minimum: got 0, want 1"),
    ({"ray": {"autoscaling": {"upscalingMode": "Fast"}}}, "at '/ray/autoscaling/upscalingMode'"),
    ({"controlPlane": {"extraEnv": [{"value": "1"}]}}, "missing property 'name'"),
    ({"networkPolicy": {"prometheus": [{"podSelectors": {}}]}}, "at '/networkPolicy/prometheus/0'"),
]


@pytest.mark.parametrize(("change", "sentence"), [*BY_SENTENCE, *BY_SCHEMA])
def test_what_cannot_work_is_refused(change: Object, sentence: str) -> None:
    with pytest.raises(helm_python.HelmError) as refusal:
        render(change | {"storage": {"url": "s3://models"} | change.get("storage", {})})
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    "query", ["?sslmode=verify-full&sslrootcert=/etc/ssl/certs/ca.pem", "?options=-c%20work_mem=8MB"]
)
def test_a_database_url_may_have_parameters(query: str) -> None:
    url = f"postgresql://lockstep@db.internal:5432/lockstep{query}"
    plane = pod(render({"storage": {"url": "s3://models"}, "database": {"url": url}}), "Deployment/lockstep")
    assert environment(plane.containers[0])["LOCKSTEP_DATABASE_URL"] == url


def test_names_of_a_gateway_may_be_those_of_the_api_alone() -> None:
    gateway = {"enabled": True, "parentRefs": [{"name": "public"}]}
    values = {"storage": {"url": "s3://models"}, "httpRoute": gateway}
    plane = pod(render(values | {"controlPlane": {"trustedHosts": ["train.example.com"]}}), "Deployment/lockstep")
    assert environment(plane.containers[0])["LOCKSTEP_TRUSTED_HOSTS"].endswith(",train.example.com")


def test_a_release_name_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(helm_python.HelmError, match=r"has 62 characters; names of Services .* would be too long"):
        render({"storage": {"url": "s3://models"}}, name=LONG)


def test_a_release_name_that_begins_with_a_digit_is_refused() -> None:
    with pytest.raises(helm_python.HelmError, match=r"The RayCluster's name 1-lockstep must begin with a letter"):
        render({"storage": {"url": "s3://models"}}, name="1-lockstep")


def test_the_longest_names_that_are_taken_leave_room_for_what_is_appended() -> None:
    """KubeRay appends -serve-svc to the cluster's name, and the chart at most ten characters to Services and Jobs."""
    values = {
        "storage": {"url": "s3://models"},
        "fullnameOverride": "a" * 53,
        "database": {"url": "postgresql://a@b/c"},
        "monitoring": {"serviceMonitor": {"enabled": True}},
    }
    objects = render(values)
    names = [item["metadata"]["name"] for item in objects if item["kind"] in ("Service", "Job", "RayCluster", "Pod")]
    assert len(names) == 5
    assert max(map(len, names)) <= 63
    assert max(len(i["metadata"]["name"]) for i in objects if i["kind"] == "RayCluster") + len("-serve-svc") <= 63
