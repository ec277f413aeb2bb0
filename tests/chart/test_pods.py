"""What pods are given: settings that the programs know, rights that they need, and no secret in plain sight."""

import json
import re
import shlex
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from api.spec import TrainSpec
from service.app import make_api
from service.render import submission
from service.settings import Settings
from tests.chart.chart import (
    CHART,
    SCENARIOS,
    Object,
    environment,
    named,
    objects_in,
    objects_of,
    pod,
    pods,
    render,
    render_files,
    values_of,
)
from tests.chart.validation import validate
from workers import settings as worker_settings
from workers.settings import WorkerSettings

URL_FILE = "LOCKSTEP_DATABASE_URL_PATH"
MANIFESTS = sorted(SCENARIOS)
RAY_PODS = ("RayCluster/lockstep/headgroup", "RayCluster/lockstep/cpu")


def ray_scenarios() -> list[str]:
    return [name for name in MANIFESTS if named(objects_of(name), "RayCluster")]


def set_environment(monkeypatch: pytest.MonkeyPatch, container: Object) -> dict[str, str]:
    """Make the environment of this process that of a container, as far as ours and the bucket's variables go."""
    values = environment(container)
    for name, value in values.items():
        if name.startswith("LOCKSTEP_") and name != URL_FILE:  # the file is on the pod
            monkeypatch.setenv(name, value)
    return values


@pytest.mark.parametrize("scenario", MANIFESTS)
def test_the_control_plane_knows_every_setting_that_it_is_given(scenario: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = f"Deployment/{'trainer' if scenario == 'extras' else 'lockstep'}"
    values = set_environment(monkeypatch, pod(objects_of(scenario), owner).containers[0])
    own = {name.removeprefix("LOCKSTEP_").lower() for name in values if name.startswith("LOCKSTEP_")}
    assert own <= Settings.model_fields.keys()
    settings = Settings()
    assert settings.host == "0.0.0.0"
    assert settings.storage == values["LOCKSTEP_STORAGE"]


@pytest.mark.parametrize("scenario", ray_scenarios())
def test_workers_know_every_setting_that_they_are_given(scenario: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = set(re.findall(r'"(LOCKSTEP_[A-Z_]+)"', Path(worker_settings.__file__).read_text(encoding="utf-8")))
    for each in pods(objects_of(scenario)):
        if not each.owner.startswith("RayCluster/"):
            continue
        values = set_environment(monkeypatch, each.containers[0])
        assert {name for name in values if name.startswith("LOCKSTEP_")} <= known
        mounts = [mount["mountPath"] for mount in each.containers[0]["volumeMounts"]]
        cached = any(WorkerSettings().cache.is_relative_to(mount) for mount in mounts if mount != "/tmp")
        assert cached is not each.owner.endswith("/headgroup"), "no rank runs there, and a volume costs"


def test_the_cache_stays_below_the_size_of_its_volume(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod that fills an emptyDir beyond its limit is evicted."""
    worker = pod(objects_of("dev"), "RayCluster/lockstep/cpu")
    set_environment(monkeypatch, worker.containers[0])
    (size,) = (v["emptyDir"]["sizeLimit"] for v in worker.spec["volumes"] if v["name"] == "cache")
    assert size == "2Gi"
    assert WorkerSettings().cache_bytes == int(2 * 2**30 * 0.8)


def test_the_control_plane_is_told_what_the_autoscaler_may_add(monkeypatch: pytest.MonkeyPatch) -> None:
    plane = pod(objects_of("autoscaled-from-zero"), "Deployment/lockstep")
    set_environment(monkeypatch, plane.containers[0])
    groups = [(group.max, dict(group.resources)) for group in Settings().addable_nodes]
    assert groups == [
        (10, {"CPU": 8, "memory": 32 * 2**30}),
        (2, {"CPU": 8, "GPU": 1, "memory": 1.5 * 2**30}),
    ]


def test_clients_may_ask_for_every_name_of_the_api(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, pod(objects_of("production"), "Deployment/lockstep").containers[0])
    assert {"localhost", "lockstep", "lockstep.ml.svc", "lockstep.example.com"} <= set(Settings().trusted_hosts)
    set_environment(monkeypatch, pod(objects_of("gateway"), "Deployment/lockstep").containers[0])
    assert "lockstep.example.com" in Settings().trusted_hosts


def test_probes_ask_routes_that_exist() -> None:
    plane = pod(objects_of("minimal"), "Deployment/lockstep").containers[0]
    asked = [plane[kind]["httpGet"]["path"] for kind in ("startupProbe", "livenessProbe", "readinessProbe")]
    assert asked == ["/healthz", "/healthz", "/readyz"]
    assert set(asked) <= make_api(0).openapi()["paths"].keys()
    (test,) = pod(objects_of("minimal"), "Pod/lockstep-test").containers
    assert test["command"][-1] == "http://lockstep:8700/readyz"


def test_a_test_leaves_its_log_to_be_read() -> None:
    """Helm reads it after the hook's end; what is deleted by then cannot be read."""
    test = named(objects_of("minimal"), "Pod")["lockstep-test"]
    assert test["metadata"]["annotations"]["helm.sh/hook-delete-policy"] == "before-hook-creation"


def test_in_maintenance_nothing_serves_and_nothing_restarts_the_pod() -> None:
    objects = render(values_of("minimal") | {"controlPlane": {"maintenance": True}})
    container = pod(objects, "Deployment/lockstep").containers[0]
    assert container["command"] == ["sleep", "infinity"]
    assert not {"startupProbe", "livenessProbe", "readinessProbe"} & container.keys()
    for item in objects:
        if item["kind"] != "RayCluster":
            validate(item)


@pytest.mark.parametrize("owner", RAY_PODS)
def test_rays_probes_ask_a_route_that_needs_no_token(owner: str) -> None:
    """KubeRay starts the agent on this port."""
    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    agent = Path(spec.origin).parent / "dashboard" / "http_server_agent.py"
    (public,) = re.findall(r"PUBLIC_EXACT_PATHS = \[(.*?)\]", agent.read_text(encoding="utf-8"), re.DOTALL)
    container = pod(objects_of("minimal"), owner).containers[0]
    for kind in ("readinessProbe", "livenessProbe"):
        assert container[kind]["httpGet"]["port"] == 52_365
        assert f'"{container[kind]["httpGet"]["path"]}"' in public


@pytest.mark.parametrize("scenario", MANIFESTS)
def test_no_secret_shows_outside_of_a_secret(scenario: str) -> None:
    """Neither one from the values nor one that the chart makes, in any object or in the notes."""
    texts = render_files(values_of(scenario))
    objects = objects_in(texts)
    values = [value for item in objects if item["kind"] == "Secret" for value in item["stringData"].values()]
    secrets = {line.rpartition("= ")[2].strip() for value in values for line in value.splitlines()} - {"[default]"}
    shown = json.dumps([item for item in objects if item["kind"] != "Secret"])
    shown += texts["lockstep/templates/NOTES.txt"]
    assert bool(secrets) is (scenario not in ("existing-secrets", "production"))
    assert not [secret for secret in secrets if secret in shown]


@pytest.mark.parametrize("scenario", MANIFESTS)
def test_every_pod_meets_the_restricted_standard(scenario: str) -> None:
    for each in pods(objects_of(scenario)):
        assert each.spec["securityContext"]["runAsNonRoot"] is True
        assert each.spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in each.containers:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("scenario", MANIFESTS)
def test_only_a_head_with_an_autoscaler_can_speak_to_kubernetes(scenario: str) -> None:
    objects = objects_of(scenario)
    assert not {item["kind"] for item in objects} & {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"}
    for each in pods(objects):
        autoscaled = any(c["spec"]["enableInTreeAutoscaling"] for c in named(objects, "RayCluster").values())
        expected = autoscaled and each.owner.endswith("/headgroup")
        assert each.spec["automountServiceAccountToken"] is expected, f"{scenario}: {each.owner}"


def test_no_service_of_the_release_comes_into_an_environment() -> None:
    """One called `lockstep` would set LOCKSTEP_PORT to an URL."""
    for scenario in MANIFESTS:
        assert all(each.spec["enableServiceLinks"] is False for each in pods(objects_of(scenario)))


@pytest.mark.parametrize("owner", RAY_PODS)
def test_ray_has_the_grace_that_its_end_takes(owner: str) -> None:
    ray = pod(objects_of("minimal"), owner)
    shell, option, script = ray.containers[0]["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, option) == ("/bin/bash", "-c")
    (announced,) = re.findall(r"(?:--deadline-remaining-seconds=|left = )(\d+)", script)
    assert int(announced) + 30 == ray.spec["terminationGracePeriodSeconds"]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_a_heads_end_looks_for_the_drivers_that_the_control_plane_starts() -> None:
    script = pod(objects_of("minimal"), "RayCluster/lockstep/headgroup").containers[0]["lifecycle"]["preStop"]
    (argument,) = re.findall(r"\^(\S+)\$' /proc", script["exec"]["command"][2])
    example = CHART.parents[1] / "deploy" / "examples" / "stdlib-gpt.yaml"
    spec = TrainSpec.model_validate(yaml.safe_load(example.read_text(encoding="utf-8")))
    command = submission(spec, "default", "job", 1, Settings(storage="s3://models"))["entrypoint"]
    assert argument.replace("\\", "") in shlex.split(command)


def test_a_group_with_a_tag_of_its_own_has_not_the_digest_of_the_others() -> None:
    """A digest goes before a tag, and would have GPUs get the image for CPUs."""
    common = {"repository": "trainer", "digest": f"sha256:{'1' * 64}"}
    size = {"replicas": 1, "cpu": 1, "memory": "1Gi"}
    images = {
        "plain": {},
        "tagged": {"tag": "cuda"},
        "elsewhere": {"repository": "other"},
        "fixed": {"tag": "cuda", "digest": f"sha256:{'2' * 64}"},
    }
    groups = [{"name": name, "image": image} | size for name, image in images.items()]
    objects = render(values_of("minimal") | {"images": {"worker": common}, "ray": {"workerGroups": groups}})
    found = {name: pod(objects, f"RayCluster/lockstep/{name}").containers[0]["image"] for name in images}
    assert found == {
        "plain": f"trainer@sha256:{'1' * 64}",
        "tagged": "trainer:cuda",
        "elsewhere": "other:0.1.0",
        "fixed": f"trainer@sha256:{'2' * 64}",
    }


def test_sqlite_is_never_shared_and_postgres_is_migrated_first() -> None:
    alone, shared = objects_of("minimal"), objects_of("production")
    assert named(alone, "Deployment")["lockstep"]["spec"]["strategy"] == {"type": "Recreate"}
    assert not named(alone, "Job")
    assert named(shared, "Deployment")["lockstep"]["spec"]["strategy"]["type"] == "RollingUpdate"
    job = named(shared, "Job")["lockstep-migrate"]
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert job["spec"]["template"]["spec"]["containers"][0]["command"] == ["lockstep-server", "migrate"]
    assert not named(shared, "PersistentVolumeClaim")


def test_serving_and_migrating_verify_the_certificate_of_the_database() -> None:
    objects = objects_of("production")
    for owner in ("Deployment/lockstep", "Job/lockstep-migrate"):
        each = pod(objects, owner)
        values = environment(each.containers[0])
        assert values["PGSSLMODE"] == "verify-full"
        folder, _, file = values["PGSSLROOTCERT"].rpartition("/")
        (mount,) = (m["name"] for m in each.containers[0]["volumeMounts"] if m["mountPath"] == folder)
        (volume,) = (v["configMap"] for v in each.spec["volumes"] if v["name"] == mount)
        assert volume == {"name": "postgres-ca", "items": [{"key": "root.crt", "path": file}]}


def test_serving_and_migrating_read_the_url_of_the_database_in_a_file() -> None:
    for owner in ("Deployment/lockstep", "Job/lockstep-migrate"):
        each = pod(objects_of("database-url-in-a-file"), owner)
        container = each.containers[0]
        folder, _, file = environment(container)[URL_FILE].rpartition("/")
        (mount,) = (m["name"] for m in container["volumeMounts"] if m["mountPath"] == folder)
        (secret,) = (v["secret"] for v in each.spec["volumes"] if v["name"] == mount)
        assert (secret["secretName"], secret["items"]) == ("postgres-app", [{"key": "uri", "path": file}])
        assert not {"PGPASSWORD", "LOCKSTEP_DATABASE_URL"} & {variable["name"] for variable in container["env"]}


def test_serving_and_migrating_are_told_the_same() -> None:
    """A proxy, or a setting that the other must agree with."""
    objects = objects_of("production")
    serving, migrating = (
        environment(pod(objects, owner).containers[0]) for owner in ("Deployment/lockstep", "Job/lockstep-migrate")
    )
    assert migrating["LOCKSTEP_START_DEADLINE"] == "800"
    assert migrating.items() <= serving.items()


@pytest.mark.parametrize("scenario", MANIFESTS)
def test_no_container_names_a_variable_twice(scenario: str) -> None:
    for each in pods(objects_of(scenario)):
        for container in each.containers:
            names = [variable["name"] for variable in container.get("env", [])]
            assert len(names) == len(set(names)), f"{scenario}: {each.owner}"
