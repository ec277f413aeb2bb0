"""Kill a part of the system in mid-run; the job ends as if nothing had happened, to the bit."""

import signal
from collections.abc import Callable

import psutil
import pytest

from api.jobs import Job, JobState
from tests.e2e.conftest import KILL_SPEC
from tests.e2e.harness import Stack, assert_same_bits, curve, final_state, follow, reached, wait_until

#: After the second checkpoint (20), off the interval.
KILL_AT = 24


def one_of_three_workers(stack: Stack, job: Job) -> list[psutil.Process]:
    (attempt,) = stack.train_run(f"{job.id}-1")["attempts"]
    victim = next(worker for worker in attempt["workers"] if worker["world_rank"] == 1)
    return [psutil.Process(victim["pid"])]


def the_driver(stack: Stack, job: Job) -> list[psutil.Process]:
    return [p for p in stack.children("workers.main") if job.id in p.cmdline()]


def all_of_ray(stack: Stack, job: Job) -> list[psutil.Process]:
    words = ("ray::", "raylet", "gcs_server", "ray/dashboard", "workers.main", "/ray/", "bin/ray")
    found = {p.pid: p for word in words for p in stack.children(word)}
    return list(found.values())


@pytest.mark.parametrize(
    ("victims", "attempts", "restarts"),
    [(one_of_three_workers, 1, 1), (the_driver, 2, 0), (all_of_ray, 2, 0)],
)
def test_a_killed_part_changes_no_bit_of_the_result(
    victims: Callable[[Stack, Job], list[psutil.Process]],
    attempts: int,
    restarts: int,
    undisturbed: Job,
    stack: Stack,
) -> None:
    job = stack.client.submit({**KILL_SPEC, "name": f"kill-{victims.__name__.replace('_', '-')}"})
    reached(stack.client, job, KILL_AT)
    for process in victims(stack, job):
        with_signal(process, signal.SIGKILL)
    ended = follow(stack.client, job)

    assert ended.state is JobState.SUCCEEDED, ended.message
    assert ended.attempt == attempts
    last = stack.client.checkpoints(job.id).items[-1]
    assert last.segment.startswith(f"{attempts}-{restarts}-")
    assert_same_bits(final_state(stack, ended), final_state(stack, undisturbed))
    assert curve(stack, ended) == curve(stack, undisturbed)
    assert ended.result["eval_loss"] == undisturbed.result["eval_loss"]
    (resumed,) = [e for e in stack.client.events(job.id).items if e.type == "resumed"]
    assert resumed.data["step"] in (20, 30)  # the run goes on between the look and the kill


def test_a_killed_control_plane_is_missed_by_nobody(undisturbed: Job, stack: Stack) -> None:
    job = stack.client.submit({**KILL_SPEC, "name": "kill-control-plane"})
    reached(stack.client, job, KILL_AT)
    (control_plane,) = stack.children("service.cli serve")
    with_signal(control_plane, signal.SIGKILL)
    wait_until(lambda: not control_plane.is_running() or control_plane.status() == "zombie", 10, "it to be dead")
    ended = follow(stack.client, job)
    assert ended.state is JobState.SUCCEEDED, ended.message
    assert stack.submissions(job) == [f"{job.id}-1"]
    assert_same_bits(final_state(stack, ended), final_state(stack, undisturbed))


def with_signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
