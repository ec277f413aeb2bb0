"""Three releases as a whole, so that a review sees what a change does to them.

`LOCKSTEP_GOLDEN=write .venv/bin/pytest tests/chart/test_golden.py` writes the files anew.
"""

import os

import pytest
import yaml

from tests.chart.chart import HERE, Object, objects_of

GOLDEN = ("minimal", "production", "dev")


@pytest.mark.parametrize("scenario", GOLDEN)
def test_a_release_is_as_it_was(scenario: str) -> None:
    path = HERE / "golden" / f"{scenario}.yaml"
    text = yaml.safe_dump_all(map(_without_secrets, objects_of(scenario)), width=120, allow_unicode=True)
    if os.environ.get("LOCKSTEP_GOLDEN") == "write":
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text, "if this is meant: LOCKSTEP_GOLDEN=write, and look at the diff"


def _without_secrets(item: Object) -> Object:
    """What the chart generates is another at each rendering."""
    if item["kind"] != "Secret":
        return item
    return item | {"stringData": dict.fromkeys(item["stringData"], "…")}
