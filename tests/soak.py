"""The full forms of tests that have a short one: `make soak` sets LOCKSTEP_SOAK, `make test` does not."""

import os
from typing import TypeVar

T = TypeVar("T")


def soak(full: T, short: T) -> T:
    """Return how much of something a test shall do: all of it by `make soak`, less by `make test`."""
    return full if os.environ.get("LOCKSTEP_SOAK") else short
