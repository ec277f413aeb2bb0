"""From a kill to the next step, by its parts: the service, and the same kill under plain Ray Train, in turns.

Some five minutes. No verdict: the peer keeps the interval of 2 s at which Ray looks at its workers, the service has
0.5 s. The parts of each round, in seconds:

- detect: from the kill until Ray Train has ended the old worker group
- schedule: until the process of the new rank 0 exists
- import: until our code runs in it: Python, torch, Ray Train, the meeting of the ranks
- restore: until the checkpoint is read: by the service verified to the last byte, by the peer put into its model, which
  is built in this part
- first step: until a step is done; the service opens its data, measures the hardware, builds its model and runs a step
  for nothing in this part
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import psutil
import pytest

from api.jobs import Job, JobState
from api.layout import PROJECT, DatasetLayout
from tests.bench.ways import spec
from tests.e2e.harness import CLOCKS, Stack, follow, kill, reached, running_stack, wait_until
from tests.e2e.shakespeare import example

ROUNDS, KILL_AFTER, EVERY = int(os.environ.get("LOCKSTEP_BENCH_ROUNDS", "3")), 45, 20
PARTS = ("detect", "schedule", "import", "restore", "first step")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack with the product's own clocks, not those of the tests."""
    with patch.dict(CLOCKS, clear=True), running_stack(tmp_path_factory.mktemp("bench") / "state", cpus=2) as running:
        yield running


@pytest.fixture(scope="module")
def dataset(stack: Stack) -> Job:
    source = {"type": "python-stdlib", "max_bytes": 3_000_000}
    done = follow(stack.client, stack.client.submit({**example("stdlib.yaml"), "source": source}))
    assert done.state is JobState.SUCCEEDED, done.message
    return done


def rank(stack: Stack, run: str, number: int, group: int) -> int:
    """Return the pid of a rank in a run's n-th worker group."""
    workers = stack.train_run(run)["attempts"][group]["workers"]
    return int(next(worker["pid"] for worker in workers if worker["world_rank"] == number))


def second_group(stack: Stack, run: str) -> tuple[float, float]:
    """Return when Ray Train had ended a run's first worker group, and when the second one's rank 0 became a process."""

    def there() -> tuple[float, float] | None:
        groups = stack.train_run(run)["attempts"]
        if len(groups) < 2 or not groups[1]["workers"]:
            return None
        return groups[0]["end_time_ns"] / 1e9, born(rank(stack, run, 0, 1))

    found: tuple[float, float] = wait_until(there, 120, "another worker group")
    return found


def born(pid: int) -> float:
    """Return when a process began (Linux), to 10 ms; psutil adds the time of the boot, which is in whole seconds."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    up = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - (up - ticks / os.sysconf("SC_CLK_TCK"))


def of_the_service(stack: Stack) -> list[float]:
    changes = {"log_every": 1, "checkpoint": {"every": EVERY}}
    job = stack.client.submit(spec(10_000, 2, **changes))
    reached(stack.client, job, KILL_AFTER)
    run = f"{job.id}-1"
    killed = time.time()
    kill(psutil.Process(rank(stack, run, 1, 0)))
    ended, process = second_group(stack, run)
    resumed = wait_until(lambda: [e for e in stack.client.events(job.id).items if e.type == "resumed"], 120, "resume")[
        0
    ]
    restored = resumed.at.timestamp()
    wait_until(lambda: stack.client.get(job.id).progress.step > resumed.data["step"], 120, "a step")
    segment = stack.client.get(job.id)
    stack.client.cancel(job.id)
    points = stack.client.metrics(job.id, from_step=resumed.data["step"] + 1).items
    assert follow(stack.client, segment, 60).state is JobState.CANCELLED
    stepped = min(point.at.timestamp() for point in points if point.at.timestamp() > restored)
    return parts(killed, ended, process, restored - resumed.data["seconds"], restored, stepped)


def of_plain_ray(stack: Stack, shard: Path, folder: Path) -> list[float]:
    folder.mkdir()
    command = [sys.executable, "-m", "tests.bench.plain_ray", str(shard), str(folder)]
    options = ["--steps", "10000", "--every", str(EVERY)]
    variables = {"RAY_TRAIN_ENABLE_STATE_TRACKING": "1"}
    posted = {"entrypoint": f"exec {shlex.join(command + options)}", "runtime_env": {"env_vars": variables}}
    submission = stack.ray("/api/jobs/", posted)["submission_id"]

    def notes(what: str) -> list[float]:
        file = folder / "notes.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [line["at"] for line in lines if line["what"] == what]

    wait_until(lambda: len(notes("step")) >= KILL_AFTER, 180, "steps of plain Ray Train")
    killed = time.time()
    kill(psutil.Process(rank(stack, folder.name, 1, 0)))
    ended, process = second_group(stack, folder.name)
    wait_until(lambda: any(at > killed + 1 and at > notes("begin")[-1] for at in notes("step")), 120, "a step")
    begun, restored = notes("begin")[1], notes("restored")[1]
    stack.ray(f"/api/jobs/{submission}/stop", {})
    wait_until(lambda: stack.ray(f"/api/jobs/{submission}")["status"] == "STOPPED", 60, "it to be stopped")
    return parts(killed, ended, process, begun, restored, min(at for at in notes("step") if at > restored))


def parts(*times: float) -> list[float]:
    return [after - before for before, after in pairwise(times)]


def table(rounds: dict[str, Sequence[Sequence[float]]]) -> str:
    """Return a Markdown table: the median of each part and of the whole."""
    lines = [f"| way | {' | '.join(PARTS)} | whole | whole, each round |", "|-" * (len(PARTS) + 3) + "|"]
    for way, times in rounds.items():
        wholes = [sum(times_of_round) for times_of_round in times]
        cells = [f"{median(column):.1f}" for column in zip(*times, strict=True)]
        lines.append(
            f"| {way} | {' | '.join(cells)} | {median(wholes):.1f} | {', '.join(f'{w:.1f}' for w in wholes)} |"
        )
    return "\n".join(lines)


@pytest.mark.timeout(1800)
def test_how_long_a_killed_run_takes_to_its_next_step(
    stack: Stack, dataset: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = tmp_path / "shard.bin"
    shard.write_bytes(stack.bucket.get(DatasetLayout(PROJECT, "stdlib", dataset.id).shard("train", 0)))
    rounds: dict[str, Any] = {"the service": [], "plain Ray Train": []}
    for turn in range(ROUNDS):
        rounds["the service"].append(of_the_service(stack))
        rounds["plain Ray Train"].append(of_plain_ray(stack, shard, tmp_path / f"plain-{turn}"))
    with capsys.disabled():
        print(f"\n{table(rounds)}")
    assert all(part > 0 for times in rounds.values() for parts_of_round in times for part in parts_of_round)
