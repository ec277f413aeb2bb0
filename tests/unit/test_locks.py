"""What images are installed from: locks with hashes, that say what pyproject.toml and constraints.txt say."""

import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
LOCKS = ("service.lock", "workers.lock", "torch.lock", "torch-cpu.lock", "build.lock")
#: Installed by `venv` or not at all where the tests run, which have a torch without CUDA.
NOT_IN_CONSTRAINTS = re.compile(r"setuptools|triton|nvidia-|cuda-")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, tuple[Requirement, list[str]]]:
    """Return the pins of a lock, each with its hashes. The whole file must be of that form."""
    text = re.sub(r"^#.*\n", "", (ROOT / "requirements" / name).read_text(), flags=re.MULTILINE)
    found = re.findall(r"^(\S.*?) \\\n((?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.MULTILINE)
    assert sum(len(f"{pin} \\\n{hashes}") for pin, hashes in found) == len(text), f"{name} has lines of another form"
    requirements = [(Requirement(pin), hashes.split("--hash=")[1:]) for pin, hashes in found]
    return {canonicalize_name(requirement.name): (requirement, hashes) for requirement, hashes in requirements}


def version(requirement: Requirement) -> Version:
    (pin,) = requirement.specifier
    assert pin.operator == "=="
    return Version(pin.version)


def needed(direct: list[Requirement], extra: str = "") -> Iterator[Requirement]:
    """Every requirement that holds on this machine, of those and of what is installed for them."""
    seen: set[tuple[str, str]] = set()
    waiting = [(requirement, extra) for requirement in direct]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        yield requirement
        for wanted in ("", *sorted(requirement.extras)):
            if (key := (canonicalize_name(requirement.name), wanted)) not in seen:
                seen.add(key)
                waiting += [(Requirement(text), wanted) for text in requires(requirement.name) or ()]


CONSTRAINTS: dict[str, Version] = {
    canonicalize_name(requirement.name): version(requirement)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
    for requirement in [Requirement(line)]
}


@pytest.mark.parametrize("name", LOCKS)
def test_each_line_of_a_lock_is_one_release_with_hashes_and_no_place_to_get_it_from(name: str) -> None:
    found = pins(name)
    assert found
    for requirement, hashes in found.values():
        assert requirement.url is None
        assert hashes
        version(requirement)


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_the_releases_that_the_tests_run_with(name: str) -> None:
    for package, (requirement, _) in pins(name).items():
        here = requirement.marker is None or requirement.marker.evaluate({"sys_platform": "linux"})
        if here and not NOT_IN_CONSTRAINTS.match(package):
            assert version(requirement).public == str(CONSTRAINTS[package]), f"{package}; `make lock` renews {name}"


@pytest.mark.parametrize(
    ("extra", "names"), [("service", ["service.lock"]), ("workers", ["workers.lock", "torch.lock"])]
)
def test_the_locks_of_an_image_hold_all_that_its_extra_needs(extra: str, names: list[str]) -> None:
    held = {package: pin for name in names for package, (pin, _) in pins(name).items()}
    direct = [Requirement(text) for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra])]
    walked = 0
    for requirement in needed(direct):
        package = canonicalize_name(requirement.name)
        assert package in held, f"{package} is in none of {names}; `make lock` renews them"
        assert requirement.specifier.contains(version(held[package]), prereleases=True), f"{package}: `make lock`"
        walked += 1
    assert walked > 20


def test_the_locks_of_workers_go_together_whichever_torch_is_chosen() -> None:
    workers, cuda, cpu = (pins(name) for name in ("workers.lock", "torch.lock", "torch-cpu.lock"))
    assert not workers.keys() & cuda.keys()
    assert list(cpu) == ["torch"]
    assert version(cpu["torch"][0]) == Version(f"{version(cuda['torch'][0])}+cpu")
    assert not [package for package in workers if re.match(r"torch$|triton|nvidia|cuda", package)]


#: The first releases without what is known of them: Host headers and ranges that do too much, pickles that run code.
@pytest.mark.parametrize(
    ("name", "package", "least"), [("service.lock", "starlette", "1.3"), ("workers.lock", "ray", "2.60")]
)
def test_what_had_holes_is_newer_than_those(name: str, package: str, least: str) -> None:
    assert version(pins(name)[package][0]) >= Version(least)
