"""Kills at random, one after the other, in one run: it ends as if nothing had happened, and tells what that cost."""

import random
import time
from itertools import pairwise

import pytest

from api.jobs import Job, JobState
from tests.e2e.conftest import KILL_SPEC
from tests.e2e.harness import (
    Stack,
    all_events,
    assert_same_end,
    curve,
    drivers,
    follow,
    in_state,
    kill,
    kill_all_of_ray,
)

KILLS = {"rank": 12, "driver": 5, "ray": 3}
#: Seconds from one kill to the next: sometimes in the middle of a recovery, sometimes after some hundred steps.
PAUSES = (1.0, 20.0)
SPEC = {**KILL_SPEC, "steps": 1500, "log_every": 1, "checkpoint": {"every": 25}}


def strike(stack: Stack, job: Job, what: str, chance: random.Random) -> bool:
    """Kill a random rank, the driver, or all of Ray; False if there was nothing to kill just now."""
    match what:
        case "ray":
            kill_all_of_ray(stack)
            return True
        case "driver":
            victims = drivers(stack, job)
        case _:
            victims = [process for process in stack.children("ray::RayTrainWorker") if process.is_running()]
    if victims:
        kill(chance.choice(victims))
    return bool(victims)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_run_in_a_storm_of_kills_ends_as_if_nothing_had_happened(
    dataset: Job, stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    calm = follow(stack.client, stack.client.submit({**SPEC, "name": "calm"}), 900)
    assert calm.state is JobState.SUCCEEDED, calm.message

    chance = random.Random(4)
    kinds = [kind for kind, count in KILLS.items() for _ in range(count)]
    chance.shuffle(kinds)
    job = stack.client.submit({**SPEC, "name": "storm"})
    in_state(stack, job, JobState.RUNNING)
    began, struck = time.monotonic(), 0
    while kinds:
        time.sleep(chance.uniform(*PAUSES))
        assert not stack.client.get(job.id).state.ended, f"the run was over with {len(kinds)} kills to come"
        if strike(stack, job, kinds[0], chance):
            kinds.pop(0)
            struck += 1
    ended = follow(stack.client, job, 900)
    wall = time.monotonic() - began

    assert_same_end(stack, ended, calm)
    assert [step for step, _ in curve(stack, ended)] == list(range(1, SPEC["steps"] + 1)), (
        "each step once, and with it each of its samples"
    )
    resumes = [event for event in all_events(stack, job) if event.type == "resumed"]
    productive = running_seconds(stack, calm)
    with capsys.disabled():
        print(
            f"\n{struck} kills in {wall:.0f} s: {ended.attempt} attempts, {len(resumes)} resumes; "
            f"effective training time ratio {productive / wall:.2f} ({productive:.0f} s of training)"
        )


def running_seconds(stack: Stack, job: Job) -> float:
    """Return how long a job was in the state `running`."""
    moves = [event for event in all_events(stack, job) if event.state is not None]
    return sum((b.at - a.at).total_seconds() for a, b in pairwise(moves) if a.state is JobState.RUNNING)
