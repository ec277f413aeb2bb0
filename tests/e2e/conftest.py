"""One stack for the whole session: starting Ray takes ten seconds."""

from collections.abc import Iterator
from typing import Any

import pytest

from api.jobs import Job, JobState
from tests.e2e.harness import Stack, follow, running_stack
from tests.soak import soak

#: By `make soak` only: in short, test_faults.py, test_control.py and test_ray_lost.py stop and kill, and tests without
#: Ray watch, resize, make way, kill control planes and keep Ray silent.
_LONG = ("failpoints", "frozen_rank", "line", "nodes", "silent_ray", "sizes", "storm")
collect_ignore = soak([], [f"test_{name}.py" for name in _LONG])

STEPS = 60
#: After the second checkpoint (20), off the interval.
KILL_AT = 24

#: Three workers (two would hide DDP's re-bucketing), dropout, accumulation of 2, several gradient buckets.
KILL_SPEC: dict[str, Any] = {
    "name": "kill-me",
    "data": {"dataset": "small", "sequence_length": 32},
    "model": {"size": "1m", "dropout": 0.1},
    "batch": {"global_size": 24, "micro_size": 4},
    "steps": STEPS,
    "log_every": 3,
    "evaluate": {"every": 20, "sequences": 14},
    "checkpoint": {"every": 10},
    "resources": {"workers": 3},
}

#: Four micro-batches with dropout, so that one, two and four workers can share them.
ELASTIC: dict[str, Any] = {
    **KILL_SPEC,
    "determinism": "elastic",
    "batch": {"global_size": 16, "micro_size": 4},
    "steps": 600,
    "evaluate": {"every": 200, "sequences": 14},
    "checkpoint": {"every": 100},
}


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("e2e") / "state", cpus=4, program="tests.faults.stack") as running:
        yield running


@pytest.fixture(scope="session")
def dataset(stack: Stack) -> Job:
    """A small dataset, prepared as any user would."""
    job = stack.client.submit(
        {
            "kind": "prepare",
            "name": "small",
            "dataset": "small",
            "source": {"type": "python-stdlib", "max_bytes": 400_000},
            "tokenizer": {"vocab_size": 512},
        }
    )
    done = follow(stack.client, job)
    assert done.state is JobState.SUCCEEDED, done.message
    return done


@pytest.fixture(scope="session")
def undisturbed(stack: Stack, dataset: Job) -> Job:
    """The run that every disturbed one must equal to the bit."""
    done = follow(stack.client, stack.client.submit(KILL_SPEC))
    assert done.state is JobState.SUCCEEDED, done.message
    return done


@pytest.fixture(scope="session")
def alone(stack: Stack, dataset: Job) -> Job:
    """The run of one worker that an elastic one of any size must equal to the bit."""
    done = follow(stack.client, stack.client.submit({**ELASTIC, "name": "alone", "resources": {"workers": 1}}))
    assert done.state is JobState.SUCCEEDED, done.message
    return done


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the search for secrets behind what may have written some, then the tests that make Ray or the control plane
    forget the jobs of the others, and the one that stops the stack last."""
    last = ("test_secrets.py", "test_lost_database.py", "test_ray_lost.py", "test_storm.py", "test_stop.py")
    items.sort(key=lambda item: last.index(item.path.name) if item.path.name in last else -1)
