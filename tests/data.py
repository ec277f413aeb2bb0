"""Real data for tests: found by LOCKSTEP_DATA or in `shared/data` beside the checkout, else the test is skipped."""

import os
from pathlib import Path

import pytest


def data_file(name: str) -> Path:
    """Return a file of the test data; skip the test where there is none."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    path = Path(os.environ.get("LOCKSTEP_DATA", beside)) / name
    if not path.exists():
        pytest.skip(f"no {name}: set LOCKSTEP_DATA to the folder with the test data")
    return path
