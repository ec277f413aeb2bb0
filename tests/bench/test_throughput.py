"""What the service costs: the same training in several ways, in rounds, beside the same running stack.

Some 20 minutes on two idle cores. LOCKSTEP_BENCH_TABLE names a file for the tables.

Two of the ways say where the cost comes from. `BESIDE` is the hand-written loop while a Ray Train group sleeps: what
Ray Train's own processes take of the cores. `SERVICE_ALONE` is the service with one worker, against our loop in one
process: what all of it costs where one core is left for it.
"""

import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from api.jobs import JobState
from api.layout import PROJECT, DatasetLayout
from tests.bench.plain_torch import VOCAB
from tests.bench.ratios import steady_rate, surely_slower, table, time_ratio
from tests.bench.ways import job_document, our_loop, script, spec
from tests.e2e.harness import CLOCKS, Stack, follow, running_stack, wait_until
from tests.e2e.shakespeare import example

ROUNDS, STEPS, SKIP = 5, 70, 20
BOUND = 1.02
TORCHRUN, SERVICE = "our loop, torchrun", "the service"
HANDWRITTEN, PLAIN = "hand-written loop, our model", "plain torch"
BESIDE = "hand-written loop, a Ray Train group asleep"
PAIR = (HANDWRITTEN, PLAIN, TORCHRUN, BESIDE, SERVICE)
"""Two processes each."""
ALONE, SERVICE_ALONE = "our loop, one process", "the service, one worker"
SINGLE = (ALONE, SERVICE_ALONE)
WAYS = (*PAIR, *SINGLE)


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


@contextmanager
def sleeping_group(stack: Stack, signal: Path) -> Iterator[None]:
    """Have a group of two under plain Ray Train, which does nothing, until the block ends."""
    command = shlex.join([sys.executable, "-m", "tests.bench.sleeping_group", str(signal)])
    submission = stack.ray("/api/jobs/", {"entrypoint": f"exec {command}"})["submission_id"]
    try:
        wait_until(lambda: len(list(signal.parent.glob(f"{signal.name}.*"))) == 2, 120, "the group to sleep")
        yield
    finally:
        signal.touch()
        wait_until(lambda: stack.ray(f"/api/jobs/{submission}")["status"] == "SUCCEEDED", 60, "the group to end")


def rate_of(way: str, name: str, stack: Stack, version: str, shard: Path) -> float:
    """Train once; return tokens per second of the steps after the skipped ones."""
    if way == HANDWRITTEN:
        return script("handwritten", shard, STEPS, SKIP)["tokens_per_second"]
    if way == BESIDE:
        with sleeping_group(stack, shard.with_name(name)):
            return script("handwritten", shard, STEPS, SKIP)["tokens_per_second"]
    if way == PLAIN:
        return script("plain_torch", shard, STEPS, SKIP)["tokens_per_second"]
    workers = 1 if way in SINGLE else 2
    if way in (SERVICE, SERVICE_ALONE):
        done = follow(stack.client, stack.client.submit(spec(STEPS, workers)))
        assert done.state is JobState.SUCCEEDED, done.message
        return steady_rate([(p.step, p.values) for p in stack.client.metrics(done.id).items], SKIP)
    return our_loop(stack.bucket, "s3://lockstep", job_document(name, spec(STEPS, workers), version), SKIP)


@pytest.mark.timeout(3000)
def test_the_service_trains_as_fast_as_a_hand_written_loop(
    stack: Stack, version: str, shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(ROUNDS):
        for way in WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]:
            rates[way].append(rate_of(way, f"bench-{turn}-{WAYS.index(way)}", stack, version, shard))
    pair, single = ({way: rates[way] for way in ways} for ways in (PAIR, SINGLE))
    text = f"{here()}\n\n{table(pair, HANDWRITTEN)}\n{table(single, ALONE)}"
    file = Path(os.environ.get("LOCKSTEP_BENCH_TABLE", tmp_path / "throughput.md"))
    file.write_text(text)
    with capsys.disabled():
        print(f"\n{text}\nwritten to {file}")
    service = time_ratio(rates[SERVICE], rates[HANDWRITTEN])
    assert not surely_slower(service, BOUND), f"the service takes {service} of the hand-written loop's time"


def here() -> str:
    return f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores; {ROUNDS} rounds of {STEPS} steps"
