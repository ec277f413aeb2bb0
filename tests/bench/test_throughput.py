"""What the service costs: the same training in five ways, in rounds, beside the same running stack.

Some 13 minutes on two idle cores. LOCKSTEP_BENCH_TABLE names a file for the table.
"""

import os
import platform
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from api.jobs import JobState
from api.layout import PROJECT, DatasetLayout
from tests.bench.plain_torch import VOCAB
from tests.bench.ratios import steady_rate, surely_slower, table, time_ratio
from tests.bench.ways import job_document, our_loop, script, spec
from tests.e2e.harness import CLOCKS, Stack, follow, running_stack
from tests.e2e.shakespeare import example

ROUNDS, STEPS, SKIP = 5, 70, 20
BOUND = 1.02
ALONE, TORCHRUN, SERVICE = "our loop, one process", "our loop, torchrun", "the service"
HANDWRITTEN, PLAIN = "hand-written loop, our model", "plain torch"
WAYS = (ALONE, TORCHRUN, SERVICE, HANDWRITTEN, PLAIN)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack with the product's own clocks, not those of the tests."""
    with patch.dict(CLOCKS, clear=True), running_stack(tmp_path_factory.mktemp("bench") / "state", cpus=2) as running:
        yield running


@pytest.fixture(scope="module")
def version(stack: Stack) -> str:
    """The version of a dataset of the example's own kind, some megabytes of it."""
    source = {"type": "python-stdlib", "max_bytes": 3_000_000}
    done = follow(stack.client, stack.client.submit({**example("stdlib.yaml"), "source": source}))
    assert done.state is JobState.SUCCEEDED, done.message
    assert done.result["vocab_size"] == VOCAB
    return done.id


@pytest.fixture(scope="module")
def shard(stack: Stack, version: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokens for those that read no bucket."""
    path = tmp_path_factory.mktemp("tokens") / "shard.bin"
    path.write_bytes(stack.bucket.get(DatasetLayout(PROJECT, "stdlib", version).shard("train", 0)))
    return path


def rate_of(way: str, name: str, stack: Stack, version: str, shard: Path) -> float:
    """Train once; return tokens per second of the steps after the skipped ones."""
    if way == HANDWRITTEN:
        return script("handwritten", shard, STEPS, SKIP)["tokens_per_second"]
    if way == PLAIN:
        return script("plain_torch", shard, STEPS, SKIP)["tokens_per_second"]
    if way == SERVICE:
        done = follow(stack.client, stack.client.submit(spec(STEPS, 2)))
        assert done.state is JobState.SUCCEEDED, done.message
        return steady_rate([(p.step, p.values) for p in stack.client.metrics(done.id).items], SKIP)
    job = job_document(name, spec(STEPS, 1 if way == ALONE else 2), version)
    return our_loop(stack.bucket, "s3://lockstep", job, SKIP)


@pytest.mark.timeout(1800)
def test_the_service_trains_as_fast_as_a_hand_written_loop(
    stack: Stack, version: str, shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(ROUNDS):
        for way in WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]:
            rates[way].append(rate_of(way, f"bench-{turn}-{WAYS.index(way)}", stack, version, shard))
    text = f"{here()}\n\n{table(rates, HANDWRITTEN)}"
    file = Path(os.environ.get("LOCKSTEP_BENCH_TABLE", tmp_path / "throughput.md"))
    file.write_text(text)
    with capsys.disabled():
        print(f"\n{text}\nwritten to {file}")
    service = time_ratio(rates[SERVICE], rates[HANDWRITTEN])
    assert not surely_slower(service, BOUND), f"the service takes {service} of the hand-written loop's time"


def here() -> str:
    return f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores; {ROUNDS} rounds of {STEPS} steps"
