"""docs/settings.md has every variable that the control plane and the workers read, with its default and its meaning.

`LOCKSTEP_GOLDEN=write .venv/bin/pytest tests/unit/test_settings_page.py` makes its tables anew from the code.
"""

import ast
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from service.settings import Settings
from workers import settings as worker_settings

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "settings.md"
HEAD = "| variable | default | |\n|---|---|---|\n"
CONTROL_PLANE, WORKERS = "## The control plane\n\n", "## The workers\n\n"

# On purpose not on the page: what only tests set, and what one of our processes tells the next.
NOT_SETTINGS = {"LOCKSTEP_FAILPOINT", "LOCKSTEP_RESTART"}

Rows = dict[str, str]
"""A table, by variable."""


def row(name: str, default: object, unit: str, meaning: str) -> str:
    """Return a line of a table; what a meaning says of another setting is said by its variable there."""
    told = re.sub(r"`([a-z]+(_[a-z]+)+)`", lambda found: f"`LOCKSTEP_{found[1].upper()}`", " ".join(meaning.split()))
    value = f"{default:g}" if isinstance(default, float) else str(default)
    shown = f"`{value}` {unit}".strip() if default not in (None, "", (), []) else ""
    return f"| `{name}` | {'**required**' if name == 'LOCKSTEP_STORAGE' else shown} | {told} |"


def unit(name: str, kind: object) -> str:
    """Return the unit of a setting: whatever is no whole number is a time, or a rate."""
    if name.endswith("_bytes"):
        return "bytes"
    if name.endswith("_per_minute"):
        return "a minute"
    return "s" if kind is float else ""


def of_the_control_plane() -> Rows:
    rows = Rows()
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        variable = f"LOCKSTEP_{name.upper()}"
        rows[variable] = row(variable, default, unit(name, field.annotation), field.description or "")
    return {variable: line for variable, line in rows.items() if variable not in NOT_SETTINGS}


def of_the_workers() -> Rows:
    defaults = vars(worker_settings.WorkerSettings(storage="s3://bucket"))
    rows = Rows()
    for name, meaning in attribute_docstrings(Path(worker_settings.__file__), "WorkerSettings").items():
        variable = f"LOCKSTEP_{name.upper()}"
        rows[variable] = row(variable, defaults[name], unit(name, type(defaults[name])), meaning)
    return rows


def attribute_docstrings(file: Path, name: str) -> dict[str, str]:
    """Return what stands below each field of a class, which Python itself does not keep."""
    (found,) = (n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef) and n.name == name)
    told = dict[str, str]()
    for field, below in zip(found.body, [*found.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            told[field.target.id] = str(text.value) if isinstance(text, ast.Constant) else ""
    return told


def table(heading: str) -> re.Pattern[str]:
    """Match what stands before the lines of a section's table, and them."""
    return re.compile(
        f"({re.escape(heading)}(?:(?!^## ).)*?{re.escape(HEAD)})((?:^[|][^\n]*\n)*)", re.DOTALL | re.MULTILINE
    )


def on_the_page(heading: str) -> Rows:
    found = table(heading).search(PAGE.read_text())
    assert found, f"{PAGE} has no table below {heading!r}"
    return {line.split("`")[1]: line for line in found[2].splitlines()}


def write(heading: str, rows: Rows) -> None:
    text = "".join(f"{line}\n" for line in rows.values())
    PAGE.write_text(table(heading).sub(lambda found: found[1] + text, PAGE.read_text()))


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LOCKSTEP_") and name != "LOCKSTEP_GOLDEN"]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(("heading", "rows"), [(CONTROL_PLANE, of_the_control_plane), (WORKERS, of_the_workers)])
def test_each_setting_is_on_the_page_as_it_is_in_the_code(heading: str, rows: Callable[[], Rows]) -> None:
    wanted = rows()
    if os.environ.get("LOCKSTEP_GOLDEN") == "write":
        write(heading, wanted)
    found = on_the_page(heading)
    other = {name: (found.get(name), wanted.get(name)) for name in {**found, **wanted}}
    assert {name: lines for name, lines in other.items() if lines[0] != lines[1]} == {}, (
        "LOCKSTEP_GOLDEN=write mends it"
    )
    assert list(found) == list(wanted)


@pytest.mark.parametrize("rows", [of_the_control_plane, of_the_workers])
def test_each_setting_says_what_it_means(rows: Callable[[], Rows]) -> None:
    assert [line for line in rows().values() if line.endswith("|  |")] == []


def test_the_workers_read_no_other_variable_of_ours() -> None:
    read = {
        name for file in (ROOT / "workers").glob("*.py") for name in re.findall(r'"(LOCKSTEP_\w+)"', file.read_text())
    }
    assert read - NOT_SETTINGS == of_the_workers().keys()


def test_what_is_for_tests_alone_is_not_on_the_page() -> None:
    assert [name for name in NOT_SETTINGS if name in PAGE.read_text()] == []
