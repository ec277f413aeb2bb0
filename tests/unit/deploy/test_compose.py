"""What can be known of the compose files without an engine: what is open, what is locked, and what must agree."""

import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings
from tests.images import DEPLOY, ROOT, excluded, expand, make_secrets, project, read_compose, read_dockerfile
from workers import settings as worker_settings

FILES = ("compose.yaml", "compose.dashboard.yaml", "compose.gpu.yaml")
COMPOSE = read_compose()
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
RAY = ("ray-head", "ray-worker")
LOOPBACK = re.compile(r"127\.0\.0\.1:\$\{[A-Z_]+:-(\d+)\}:\1")


def environments(name: str) -> list[dict[str, str]]:
    """Return what a service is given, in each file that says something of it."""
    files = map(read_compose, FILES)
    return [file["services"][name].get("environment", {}) for file in files if name in file["services"]]


def image(service: dict[str, Any]) -> str:
    return expand(service["image"], {})


def test_every_file_is_looked_at() -> None:
    assert sorted(path.name for path in DEPLOY.glob("compose*.yaml")) == sorted(FILES)


def test_the_parts_are_there() -> None:
    parts = {"service", "migrate", "postgres", "s3", "ray-head", "ray-worker", "prometheus", "grafana"}
    assert set(SERVICES) == parts


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_is_locked(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "pid", "ipc", "network_mode", "devices"} & set(service)


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_runs_as_a_user_who_is_not_root(name: str) -> None:
    service = SERVICES[name]
    user = service.get("user")
    if user is None:
        user = read_dockerfile(Path(service["build"]["dockerfile"]).name).final.last("USER").text
    assert re.fullmatch(r"[1-9]\d*:\d+", user)


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_has_one_version_and_ours_has_the_projects(name: str) -> None:
    service = SERVICES[name]
    repository, _, tag = image(service).partition(":")
    assert re.match(r"v?\d+\.\d+", tag), f"{name} runs {image(service)}, which may be any version"
    if "build" in service:
        assert tag == project()["version"]
        assert repository == f"lockstep-{Path(service['build']['dockerfile']).suffix[1:]}"


@pytest.mark.parametrize("name", [name for name in SERVICES if "build" in SERVICES[name]])
def test_what_is_built_is_built_from_the_root(name: str) -> None:
    build = SERVICES[name]["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    parsed = read_dockerfile(Path(build["dockerfile"]).name)
    known = set(parsed.arguments) | {
        line.text.partition("=")[0] for stage in parsed.stages for line in stage.all("ARG")
    }
    assert set(build.get("args", {})) <= known


@pytest.mark.parametrize("file", FILES)
def test_ports_are_published_on_the_loopback_interface_only(file: str) -> None:
    published = {name: said["ports"] for name, said in read_compose(file)["services"].items() if "ports" in said}
    assert all(LOOPBACK.fullmatch(port) for port in chain(*published.values()))
    wanted = {"compose.yaml": {"service", "grafana"}, "compose.dashboard.yaml": {"ray-head"}, "compose.gpu.yaml": set()}
    assert set(published) == wanted[file]


@pytest.mark.parametrize("file", FILES)
def test_what_is_mounted_from_the_project_exists_and_cannot_be_written(file: str) -> None:
    compose = read_compose(file)
    for name, service in compose["services"].items():
        for volume in service.get("volumes", []):
            if isinstance(volume, str):
                source, _, mode = volume.split(":") if volume.count(":") == 2 else (*volume.split(":"), "rw")
                if source.startswith("."):
                    assert (DEPLOY / source).exists(), f"{name} mounts {source}, which does not exist"
                    assert mode == "ro"
                else:
                    assert source in compose["volumes"]


def test_settings_that_are_given_are_settings_that_we_have() -> None:
    of_workers = set(re.findall(r'"(LOCKSTEP_\w+)"', Path(worker_settings.__file__).read_text()))
    of_the_control_plane = {f"LOCKSTEP_{name.upper()}" for name in Settings.model_fields}
    known = {"service": of_the_control_plane, "migrate": of_the_control_plane} | dict.fromkeys(RAY, of_workers)
    for name in SERVICES:
        given = {variable for said in environments(name) for variable in said if variable.startswith("LOCKSTEP_")}
        assert given <= known.get(name, set()), name


def test_the_control_plane_can_start_from_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = make_secrets(tmp_path / "secrets")
    for variable, value in SERVICES["service"]["environment"].items():
        defaulted = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)
        monkeypatch.setenv(variable, defaulted.replace("/run/secrets", str(secrets)))
    settings = Settings()
    assert settings.database_url == (secrets / "database_url").read_text().strip()
    assert settings.ray_token_path == secrets / "ray_token"
    assert settings.bootstrap_key_path == secrets / "api_key"
    assert settings.trusted_hosts == ("localhost", "service")


@pytest.mark.parametrize("name", SERVICES)
def test_a_secret_is_granted_to_whom_it_is_named_to_and_never_given_as_text(name: str) -> None:
    service = SERVICES[name]
    named = set(re.findall(r"/run/secrets/(\w+)", yaml.safe_dump(service.get("environment", {}))))
    if "build" in service:
        dockerfile = read_dockerfile(Path(service["build"]["dockerfile"]).name)
        named |= set(re.findall(r"/run/secrets/(\w+)", dockerfile.final.last("ENTRYPOINT").text))
    assert named == set(service.get("secrets", []))
    for variable, value in chain(*(said.items() for said in environments(name))):
        if re.search(r"PASSWORD|TOKEN|SECRET|KEY|CREDENTIALS|DATABASE_URL", variable):
            assert str(value).startswith("/run/secrets/"), f"{name} is given {variable} in plain text"


def test_each_secret_is_used_and_made(tmp_path: Path) -> None:
    declared = COMPOSE["secrets"]
    assert {name: said["file"] for name, said in declared.items()} == {name: f"./secrets/{name}" for name in declared}
    assert set(chain(*(service.get("secrets", []) for service in SERVICES.values()))) == set(declared)
    assert {path.name for path in make_secrets(tmp_path / "secrets").iterdir()} == set(declared)
    assert excluded("deploy/secrets/api_key")


def test_ray_asks_for_its_token_on_every_node() -> None:
    for name in RAY:
        environment = SERVICES[name]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN_PATH"] == SERVICES["service"]["environment"]["LOCKSTEP_RAY_TOKEN_PATH"]


def test_both_sides_have_the_same_bucket() -> None:
    storage = COMPOSE["x-storage"]
    for name in ("service", "migrate", *RAY):
        assert storage.items() <= SERVICES[name]["environment"].items()
    assert "".join(read_dockerfile("Dockerfile.s3").final.all("RUN")[0].text.split()[-1:]) == "/data/lockstep"
    assert (storage["LOCKSTEP_STORAGE"], storage["AWS_ENDPOINT_URL_S3"]) == ("s3://lockstep", "http://s3:9000")


def test_who_shares_a_network_with_whom() -> None:
    """Ray's ports are for Ray and the control plane; its nodes also meet the store, and Prometheus."""
    networks = {name: set(service["networks"]) for name, service in SERVICES.items()}
    meets = {one: {two for two in networks if two != one and networks[one] & networks[two]} for one in networks}
    assert meets["ray-head"] == {"ray-worker", "service", "s3", "prometheus"}
    assert meets["ray-worker"] == {"ray-head", "service", "s3", "prometheus"}
    assert meets["postgres"] == {"service", "migrate"}
    assert meets["s3"] == {"service", *RAY}
    assert meets["grafana"] == {"prometheus"}
    assert {name for name in networks if "ray" in networks[name]} == {"service", *RAY}


def test_only_what_publishes_a_port_has_a_network_that_leads_out() -> None:
    no_way_out = {"com.docker.network.bridge.enable_ip_masquerade": "false"}
    out = {
        name
        for name, said in COMPOSE["networks"].items()
        if not said.get("internal") and said.get("driver_opts") != no_way_out
    }
    assert out == {"api", "pages"}
    for name, service in SERVICES.items():
        assert bool(out & set(service["networks"])) == ("ports" in service), name


def test_who_is_waited_for_can_say_that_he_is_well() -> None:
    for name, service in SERVICES.items():
        for other, wanted in service.get("depends_on", {}).items():
            target = SERVICES[other]
            if wanted["condition"] == "service_healthy":
                own = target.get("healthcheck", {})
                built = "build" in target and read_dockerfile(Path(target["build"]["dockerfile"]).name).final
                assert own or (built and built.last("HEALTHCHECK").words), f"{name} waits for {other} for ever"
            elif wanted["condition"] == "service_completed_successfully":
                assert target["restart"] == "no", f"{name} waits for {other}, which never ends"


def test_ray_has_a_disk_to_write_to_and_may_load_libraries_from_it() -> None:
    """A `tmpfs` is memory, and mounted `noexec`."""
    for name in RAY:
        volumes = SERVICES[name]["volumes"]
        assert {"type": "volume", "target": "/tmp"} in volumes, "each node its own"
        assert "tmpfs" not in SERVICES[name]
    cache = read_dockerfile("Dockerfile.worker").final.environment["LOCKSTEP_CACHE"]
    assert f"cache:{cache}" in SERVICES["ray-worker"]["volumes"]


def test_a_worker_promises_ray_no_more_than_the_engine_gives_it() -> None:
    worker = SERVICES["ray-worker"]
    assert f"--num-cpus={worker['cpus']}" in worker["command"]
    assert "--num-cpus=0" in SERVICES["ray-head"]["command"]


def test_the_workers_find_the_head_on_rays_own_network() -> None:
    (alias,) = SERVICES["ray-head"]["networks"]["ray"]["aliases"]
    assert f"--address={alias}:6379" in SERVICES["ray-worker"]["command"]
    assert "--port=6379" in SERVICES["ray-head"]["command"]
    assert alias not in SERVICES


def test_the_dashboards_charts_come_from_what_runs_here() -> None:
    dashboard = read_compose("compose.dashboard.yaml")["services"]
    said = dashboard["ray-head"]["environment"]
    assert dashboard["ray-head"]["networks"] == ["query"]
    for variable, name, port in (
        ("RAY_PROMETHEUS_HOST", "prometheus", 9090),
        ("RAY_GRAFANA_HOST", "grafana", 3000),
    ):
        assert said[variable] == f"http://{name}:{port}"
        assert "query" in SERVICES[name]["networks"]
    (port,) = SERVICES["grafana"]["ports"]
    assert port.startswith(said["RAY_GRAFANA_IFRAME_HOST"].removeprefix("http://") + ":")


def test_grafana_has_the_dashboards_that_its_provisioning_names() -> None:
    grafana, folder = SERVICES["grafana"], DEPLOY / "grafana" / "provisioning" / "dashboards"
    places = {volume.split(":")[1]: volume.split(":")[0] for volume in grafana["volumes"]}
    assert places["/etc/grafana/provisioning"] == "./grafana/provisioning"
    named = [provider for file in folder.iterdir() for provider in yaml.safe_load(file.read_text())["providers"]]
    sources = {places[provider["options"]["path"]] for provider in named}
    assert sources == {"./grafana/dashboards", "ray-dashboards"}


def test_ray_writes_its_dashboards_where_grafana_reads_them() -> None:
    folder = SERVICES["ray-head"]["environment"]["RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"]
    assert f"ray-dashboards:{folder}" in SERVICES["ray-head"]["volumes"]
    assert any(folder in line.text for line in read_dockerfile("Dockerfile.worker").final.all("RUN"))


def test_what_prometheus_scrapes_is_there() -> None:
    configuration = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    metrics = {
        "service": int(SERVICES["service"]["environment"]["LOCKSTEP_METRICS_PORT"]),
        **{name: 8080 for name in RAY if "--metrics-export-port=8080" in SERVICES[name]["command"]},
    }
    scraped = set()
    for job in configuration["scrape_configs"]:
        targets = [target for group in job.get("static_configs", []) for target in group["targets"]]
        targets += [f"{host}:{dns['port']}" for dns in job.get("dns_sd_configs", []) for host in dns["names"]]
        for host, _, port in (target.partition(":") for target in targets):
            if host not in ("localhost", "127.0.0.1"):
                assert metrics[host] == int(port), f"Prometheus scrapes {host}:{port}"
                assert set(SERVICES["prometheus"]["networks"]) & set(SERVICES[host]["networks"])
                scraped.add(host)
    assert scraped == set(metrics)


def test_the_page_tells_every_variable_and_no_other() -> None:
    text = "".join((DEPLOY / file).read_text() for file in FILES)
    rows = re.findall(r"^\| (`[A-Z_]+`.*?) \|", (ROOT / "docs" / "deploy-compose.md").read_text(), re.MULTILINE)
    told = {variable for row in rows for variable in re.findall(r"`([A-Z_]+)`", row)}
    assert told - {"COMPOSE_FILE"} == set(re.findall(r"\$\{([A-Z_]+)", text))
