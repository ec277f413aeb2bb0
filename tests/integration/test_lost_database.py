"""The database is lost while a job runs: real control planes, SQLite in a file, an S3 server, and the commands."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from api.client import Client
from api.documents import AttemptDocument, Manifest, ResultDocument, SegmentDocument, StreamLine, now
from api.jobs import Job, JobState, Reason
from api.layout import DatasetLayout, JobLayout, chunk
from api.storage import Bucket
from service.cli import app
from tests.fakes import FakeRay, dataset
from tests.faults.control_planes import ControlPlanes, control_planes, steady_port
from tests.faults.ray_server import ray_server
from tests.faults.waiting import wait_until

KEY = "lk_lost_database_test"
BODY: dict[str, Any] = {"name": "first", "data": {"dataset": "words"}, "model": {"size": "1m"}, "steps": 10}


@dataclass
class Place:
    """Everything around a control plane that comes and goes."""

    planes: ControlPlanes
    environment: dict[str, str]
    database: Path
    client: Client
    ray: FakeRay
    bucket: Bucket
    life: int = 0

    def start(self) -> None:
        self.life = self.planes.start(int(self.environment["LOCKSTEP_PORT"]))
        wait_until(self.answers)

    def answers(self) -> bool:
        try:
            return self.client.ready().ready
        except Exception:
            return False

    def kill(self) -> None:
        self.planes.kill(self.life)

    def lose_database(self) -> None:
        for ending in ("", "-wal", "-shm"):
            Path(f"{self.database}{ending}").unlink(missing_ok=True)

    def run(self, *command: str) -> Result:
        """`lockstep-server` with the environment of the control planes."""
        return CliRunner(env=self.environment).invoke(app, list(command))

    def begin(self, name: str) -> Job:
        """Have a job that runs."""
        job = self.client.submit({**BODY, "name": name})
        submission = f"{job.id}-1"
        wait_until(lambda: submission in self.ray.jobs)
        layout = JobLayout("default", job.id)
        meant = self.bucket.get_document(layout.attempt(1), AttemptDocument)
        segment = SegmentDocument(
            job_id=job.id, segment="1-0-x", origin=None, world_size=meant.workers or 1, fingerprint=None,
            created_at=now(),
        )  # fmt: skip
        self.ray.jobs[submission] = "RUNNING"
        self.bucket.put_document(layout.segment("1-0-x").document, segment)
        wait_until(lambda: self.client.get(job.id).state is JobState.RUNNING)
        return job

    def train(self, job: Job, step: int) -> None:
        """Let the workers of a job come to a step."""
        here = JobLayout("default", job.id).segment("1-0-x")
        lines = [StreamLine(type="metrics", step=n, at=now(), values={"loss": 1 / n}) for n in range(1, step + 1)]
        lines.append(StreamLine(type="event", step=step, at=now(), event="checkpoint", message="written"))
        manifest = Manifest(
            job_id=job.id, segment="1-0-x", step=step, world_size=1, parts=[], metrics={}, created_at=now()
        )
        self.bucket.put(chunk(here.logs(0), 0, "log"), b"a line\n")
        self.bucket.put_document(here.checkpoint(step).manifest, manifest)
        self.bucket.put(chunk(here.stream, 0, "jsonl"), "".join(f"{x.model_dump_json()}\n" for x in lines).encode())

    def end(self, job: Job) -> Job:
        self.train(job, 10)
        here = JobLayout("default", job.id).segment("1-0-x")
        done = ResultDocument(
            outcome="succeeded", reason=Reason.COMPLETED, message="trained", step=10, values={"eval_loss": 0.5},
            created_at=now(),
        )  # fmt: skip
        self.bucket.put_document(here.result, done)
        self.ray.jobs[f"{job.id}-1"] = "SUCCEEDED"
        wait_until(lambda: self.client.get(job.id).state.ended)
        return self.client.get(job.id)

    def seen(self, job: Job) -> dict[str, Any]:
        """Return all that a user can see of a job, but for what the control plane itself noted."""
        told = [event.type for event in self.client.events(job.id).items if event.type not in ("state", "rebuilt")]
        answer = self.client.get(job.id).model_dump(exclude={"started_at", "ended_at"})
        return {
            "job": answer,
            "events": told,
            "metrics": self.client.metrics(job.id).items,
            "checkpoints": self.client.checkpoints(job.id).items,
            "logs": self.client.logs(job.id).items,
        }


@contextmanager
def place(storage: str, bucket: Bucket, folder: Path) -> Iterator[Place]:
    bucket.put_document(DatasetLayout("default", "words", "v1").document, dataset())
    (folder / "key").write_text(KEY)
    port, ray, database = steady_port(), FakeRay(), folder / "lockstep.db"
    with ray_server(ray) as address:
        environment = {
            "LOCKSTEP_RECONCILE_INTERVAL": "0.02",
            "LOCKSTEP_PORT": str(port),
            "LOCKSTEP_DATABASE_URL": f"sqlite:///{database}",
            "LOCKSTEP_STORAGE": storage,
            "LOCKSTEP_RAY_ADDRESS": address,
            "LOCKSTEP_BOOTSTRAP_KEY_PATH": str(folder / "key"),
        }
        with (
            control_planes(environment, folder / "control-planes.log") as planes,
            Client(f"http://127.0.0.1:{port}", KEY) as client,
        ):
            yield Place(planes, environment, database, client, ray, bucket)


@pytest.fixture
def lockstep(storage: str, bucket: Bucket, tmp_path: Path) -> Iterator[Place]:
    with place(storage, bucket, tmp_path) as made:
        made.start()
        yield made


def test_a_rebuild_adopts_what_runs_and_runs_nothing_again(lockstep: Place) -> None:
    finished, running = lockstep.begin("finished"), lockstep.begin("running")
    lockstep.end(finished)
    lockstep.train(running, 4)
    before = lockstep.seen(finished)
    refused = lockstep.run("rebuild")
    assert (refused.exit_code, "in use by a control plane" in refused.stderr) == (1, True)
    lockstep.kill()
    lockstep.lose_database()
    rebuilt = lockstep.run("rebuild")
    assert rebuilt.exit_code == 0, rebuilt.output
    assert rebuilt.stdout.splitlines()[-1] == "rebuilt 2, renewed 0, damaged 0 (1 running, 1 succeeded)"
    lockstep.start()
    assert lockstep.seen(finished) == before
    ended = lockstep.end(running)
    assert (ended.state, ended.attempt, ended.result) == (JobState.SUCCEEDED, 1, {"eval_loss": 0.5})
    assert lockstep.ray.taken == [("session-1", f"{finished.id}-1"), ("session-1", f"{running.id}-1")]
    again = lockstep.client.submit({**BODY, "name": "next"})
    assert {job.id for job in lockstep.client.list().items} == {finished.id, running.id, again.id}


def test_a_backup_that_is_restored_knows_what_has_happened_since(lockstep: Place, tmp_path: Path) -> None:
    """One job ran then and has ended since, another ran then and runs on, a third came since."""
    ends, runs = lockstep.begin("ends"), lockstep.begin("runs")
    saved = lockstep.run("backup", str(tmp_path / "saved"))
    assert (saved.exit_code, "2 jobs, schema" in saved.stdout) == (0, True), saved.output
    lockstep.end(ends)
    came = lockstep.begin("came")
    lockstep.train(came, 4)
    wait_until(lambda: lockstep.client.get(came.id).progress.step == 4)
    before = lockstep.seen(ends)
    assert lockstep.run("restore", str(tmp_path / "saved")).exit_code == 1, "a control plane serves"
    lockstep.kill()
    restored = lockstep.run("restore", str(tmp_path / "saved"))
    assert restored.exit_code == 0, restored.output
    assert "the database of before is" in restored.stdout
    assert restored.stdout.splitlines()[-1] == "rebuilt 1, renewed 1, damaged 0 (1 running, 1 succeeded)"
    lockstep.start()
    assert lockstep.seen(ends) == before
    assert {job.state for job in map(lockstep.end, (runs, came))} == {JobState.SUCCEEDED}
    assert sorted(lockstep.ray.taken) == [("session-1", f"{job.id}-1") for job in (ends, runs, came)]


def test_a_control_plane_that_rebuilds_first_serves_what_came_back_in_spite_of_damage(lockstep: Place) -> None:
    running, damaged = lockstep.begin("running"), lockstep.begin("damaged")
    lockstep.kill()
    lockstep.lose_database()
    lockstep.bucket.put(JobLayout("default", damaged.id).job, b"{")
    assert lockstep.run("rebuild").exit_code == 1
    lockstep.lose_database()
    command = [sys.executable, "-m", "service.cli", "serve", "--rebuild"]
    with subprocess.Popen(command, env=os.environ | lockstep.environment, stdout=subprocess.PIPE, text=True) as plane:
        wait_until(lambda: plane.poll() is not None or lockstep.answers(), 60)
        assert [(job.id, job.state) for job in lockstep.client.list().items] == [(running.id, JobState.RUNNING)]
        plane.terminate()
        said, _ = plane.communicate()
    assert f"{damaged.id} is damaged" in said
