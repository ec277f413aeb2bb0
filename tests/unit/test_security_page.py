"""The page says of each promise which test keeps it; those tests are there."""

import re
from pathlib import Path

from service.settings import Settings

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "SECURITY.md").read_text()


def test_each_test_that_the_page_names_is_there() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) > 30
    assert [f"{file}::{name}" for file, name in named if f"def {name}(" not in (TESTS / file).read_text()] == []


def test_each_row_of_the_checklist_names_a_test() -> None:
    rows = PAGE.rpartition("|---|---|\n")[2].strip().splitlines()
    assert len(rows) > 20
    assert [row for row in rows if "::" not in row] == []


def test_each_setting_that_the_page_names_is_one() -> None:
    named = set(re.findall(r"LOCKSTEP_(\w+)", PAGE))
    assert {"TRUSTED_HOSTS", "CONNECTIONS"} <= named
    assert {name.lower() for name in named} <= Settings.model_fields.keys()
