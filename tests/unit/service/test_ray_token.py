"""Whoever reaches an open Ray runs code on it, so whatever of ours starts one starts it with token authentication."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from service import stack, up

ROOT = Path(__file__).parents[3]
FOLDERS = ("api", "service", "workers", "deploy", "helm", "tests")
#: What starts a node of Ray, in a shell, a list of words, a RayCluster, or Python. `address="auto"` only joins one.
STARTS = re.compile(
    r"""\bray\s+start\b | \bstart\b["'\s,\\-]+--(head|address|block)\b | ^kind:\s*Ray(Cluster|Job|Service)\b
      | \bray\.init\((?!address="auto") | \bcluster_utils\b | ENTRYPOINT\ \["ray"\] | _ray\("start" """,
    re.VERBOSE | re.MULTILINE,
)
#: Joins the stack's Ray, with the environment of the head's own processes.
ANOTHER_NODE = "tests/e2e/test_nodes.py"


def starters() -> list[str]:
    """The files of ours that start Ray; prose and this test do not."""
    files = [
        path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".md"
    ]
    texts = {path: path.read_text(errors="replace") for path in files if "__pycache__" not in path.parts}
    found = [path for path, text in texts.items() if STARTS.search(text) and path != Path(__file__)]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def documents(path: Path) -> list[dict[str, Any]]:
    """The mappings in a YAML file; none in a template, which is no YAML yet."""
    try:
        return [found for found in yaml.safe_load_all(path.read_text()) if isinstance(found, dict)]
    except yaml.YAMLError:
        return []


def open_containers(compose: dict[str, Any]) -> Iterator[str]:
    """The services of a compose file that start Ray and do not say that it shall want a token, and which."""
    for name, service in compose.get("services", {}).items():
        command = service.get("command", "")
        words = command.split() if isinstance(command, str) else [str(word) for word in command]
        if "start" in words and {"--head", "--block"} & {word.partition("=")[0] for word in words}:
            environment = service.get("environment", {})
            secret = str(environment.get("RAY_AUTH_TOKEN_PATH", ""))
            if environment.get("RAY_AUTH_MODE") != "token" or not secret.startswith("/run/secrets/"):
                yield name


def wants_a_token(path: str) -> bool:
    text = (ROOT / path).read_text()
    kinds = re.findall(r"^kind:\s*Ray(?:Cluster|Job|Service)\b", text, re.MULTILINE)
    if kinds:  # also in a template: as many times as there are clusters, whatever the values say
        return len(re.findall(r"^ +authOptions:\n +mode: token\n +secretName: \S", text, re.MULTILINE)) == len(kinds)
    if path.rpartition("/")[2].startswith("Dockerfile"):
        return re.search(r"^(ENV )?\s*RAY_AUTH_MODE=token\b", text, re.MULTILINE) is not None
    found = documents(ROOT / path)
    return bool(found) and not [name for compose in found for name in open_containers(compose)]


def test_up_is_found_to_start_ray() -> None:
    assert {"service/stack.py", ANOTHER_NODE} <= set(starters())


def test_no_file_starts_ray_without_a_token() -> None:
    others = [path for path in starters() if path not in ("service/stack.py", ANOTHER_NODE)]
    assert [path for path in others if not wants_a_token(path)] == []


@pytest.mark.parametrize(
    "base", [{}, {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "known", "RAY_AUTH_TOKEN_PATH": "/x"}]
)
def test_up_starts_ray_with_a_token_of_its_own_whatever_the_environment(tmp_path: Path, base: dict[str, str]) -> None:
    state = up.prepare_state(tmp_path / "state")
    plan = stack.Plan(
        state=state,
        ports=stack.Ports(api=1, dashboard=2, s3=3, metrics=9, ray=(4, 5, 6, 7, 8)),
        programs=stack.Programs(s3=("rclone",), ray=("ray",)),
        cpus=1,
        ray_folder=tmp_path / "ray",
    )
    environment = stack.ray_environment(plan, base)
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == str(state / "ray_token")
    assert "RAY_AUTH_TOKEN" not in environment
    assert len((state / "ray_token").read_text().strip()) == 64  # 256 bits


COMPOSE = """
services:
  head:
    command: [start, --head, --block, --port=6379]
    environment: {RAY_AUTH_MODE: %s, RAY_AUTH_TOKEN_PATH: %s}
"""


@pytest.mark.parametrize(
    ("mode", "token", "found"),
    [("token", "/run/secrets/t", []), ("disabled", "/run/secrets/t", ["head"]), ("token", "known", ["head"])],
)
def test_a_composed_head_without_a_token_would_be_found(mode: str, token: str, found: list[str]) -> None:
    assert list(open_containers(yaml.safe_load(COMPOSE % (mode, token)))) == found
