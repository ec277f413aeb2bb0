"""One stack for the whole session: starting Ray takes ten seconds."""

from collections.abc import Iterator
from typing import Any

import pytest

from api.jobs import Job, JobState
from tests.e2e.harness import Stack, follow, running_stack

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


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("e2e") / "state", cpus=4) as running:
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the test that stops the shared stack behind all others."""
    items.sort(key=lambda item: item.path.name == "test_stop.py")
