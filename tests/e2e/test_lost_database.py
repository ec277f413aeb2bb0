"""Lose the database in mid-run: after a rebuild from the bucket nobody misses it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from api.jobs import Job
from tests.e2e.conftest import KILL_AT, KILL_SPEC
from tests.e2e.harness import Stack, all_events, assert_same_end, follow, frozen, kill, reached, wait_until


def test_a_rebuild_adopts_the_run_and_brings_back_what_has_finished(undisturbed: Job, stack: Stack) -> None:
    before = seen(stack, undisturbed)
    job = stack.client.submit({**KILL_SPEC, "name": "lost-database"})
    reached(stack.client, job, KILL_AT)
    with frozen(stack.process):  # it would start another control plane at once
        (control_plane,) = stack.children("service.cli serve")
        environment = control_plane.environ()
        kill(control_plane)
        wait_until(lambda: control_plane.status() == "zombie", 10, "it to be dead")
        for ending in ("", "-wal", "-shm"):
            Path(f"{stack.state / 'lockstep.db'}{ending}").unlink(missing_ok=True)
        command = [sys.executable, "-m", "service.cli", "rebuild"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    ended = follow(stack.client, job)
    assert (ended.attempt, stack.submissions(job)) == (1, [f"{job.id}-1"])
    assert "rebuilt" in [event.type for event in all_events(stack, job)]
    assert_same_end(stack, ended, undisturbed)
    assert seen(stack, undisturbed) == before
    assert stack.submissions(undisturbed) == [f"{undisturbed.id}-1"]


def seen(stack: Stack, job: Job) -> dict[str, Any]:
    """Return what a user sees of a job, but for what the control plane itself noted."""
    client = stack.client
    return {
        "job": client.get(job.id).model_dump(exclude={"started_at", "ended_at"}),
        "metrics": client.metrics(job.id).items,
        "checkpoints": client.checkpoints(job.id).items,
        "logs": client.logs(job.id).items,
        "events": [
            event.type for event in all_events(stack, job) if event.type not in ("state", "condition", "rebuilt")
        ],
    }
