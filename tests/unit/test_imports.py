"""The rooms and the arrows between them, as the code has them."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("api", "service", "workers")
MODULES = sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Return the top-level packages that a module imports anywhere in it, late and conditional imports included."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def importers(package: str) -> set[str]:
    return {str(file.relative_to(ROOT)) for file in MODULES if package in imported(file)}


def test_the_contracts_hold() -> None:
    """In a process of its own: the linter configures logging, and would silence the loggers of all later tests."""
    linter = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(linter, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ray_is_imported_where_workers_meet_it_and_nowhere_else() -> None:
    assert importers("ray") == {"workers/main.py", "workers/ray_session.py"}


@pytest.mark.parametrize("file", [file for file in MODULES if file.parent.name == "api"], ids=lambda file: file.name)
def test_api_imports_itself_relatively(file: Path) -> None:
    """So that the package also works where another one is called `api`."""
    assert "api" not in imported(file)


def test_only_the_shared_bucket_brings_boto3_into_the_contract() -> None:
    assert {name for name in importers("boto3") if name.startswith("api/")} == {"api/storage.py"}


def test_the_client_imports_no_bucket() -> None:
    """What reads datasets and manifests there is for control plane and workers; a contract keeps it from the client."""
    for file in MODULES:
        if file.parent.name == "api" and file.name not in ("datasets.py", "manifest.py"):
            nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
            assert "storage" not in {node.module for node in nodes if node.level}


def test_nothing_unpickles() -> None:
    """A pickle is a program. Tensors are in safetensors, all else in JSON; torch's own readers unpickle."""
    for package in ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"):
        assert importers(package) == set(), package
    unpickling = re.compile(r"\btorch\.(load|jit\.load|export\.load|hub)\b|\b(np|numpy)\.load\(|allow_pickle=True")
    assert [file.name for file in MODULES if unpickling.search(file.read_text())] == []
