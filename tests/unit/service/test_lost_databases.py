"""The control plane dies at random instants, and its database with it. Whether it is rebuilt from the bucket, or comes
back from a backup of some time ago, no attempt is doubled, no end changes, and who is paused stays so."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from api.documents import AttemptDocument, FinalDocument
from api.jobs import JobState
from api.layout import JobLayout
from service.backup import backup, restore
from service.database import make_engine
from service.rebuild import rebuild
from service.rows import JobRow
from tests.fakes import ACCEPTED, World, new_store, row
from tests.unit.service.mortal import Mortal
from tests.unit.service.test_kill_loop import Fate

SEED = 1
END = ("state", "reason", "message", "result", "history_end", "spec", "init", "owner", "warnings")
ACCEPTANCE = ("project", "owner", "warnings", "dataset_version", "created_at", "queued_at", "init")


def quiet(_: str) -> None:
    return None


class Losing(Fate):
    """Whenever the control plane dies, the database may be lost with it."""

    most = 80

    def __init__(self, world: World, seed: int, folder: Path) -> None:
        super().__init__(world, seed, ray_restarts=True)
        self.database = folder / "lockstep.db"
        self.backups: list[Path] = []
        self.lost: Counter[str] = Counter()

    def live_pass(self) -> None:
        crashes = self.crashes
        super().live_pass()
        if self.crashes > crashes and self.random.random() < 0.3:
            self.lose()
        elif self.random.random() < 0.15:
            self.backups.append(self.database.with_name(f"backup-{self.rounds}"))
            backup(f"sqlite:///{self.database}", self.backups[-1], overwrite=True)

    def lose(self) -> None:
        """The database is gone; what comes in its place is compared with it."""
        before = self.store.everything()
        kept = self.backups and self.random.random() < 0.7
        with self.closed():
            if kept:
                found = self.random.choice(self.backups[-5:])
                del self.backups[self.backups.index(found) + 1 :]  # what came after that has not happened now
                restore(f"sqlite:///{self.database}", found, self.world.bucket, self.world.now, quiet)
            else:
                self.backups.clear()
                new_store(self.database.parent)._engine.dispose()
        outcome = rebuild(self.store, self.world.bucket, self.world.now, quiet)
        if kept:
            assert [*outcome.rebuilt, *outcome.renewed] == [], "a restore has done all of it"
        self.lost["restored" if kept else "rebuilt"] += 1
        after = {job.id: job for job in self.store.everything()}
        for job in before:
            self.compare(job, after.get(job.id))
        assert outcome.damaged == {}

    def held(self) -> int:
        """Return the CPUs of the attempts that live; a row may hold some more until a look at Ray says that its attempt
        is over."""
        alive = [name.rpartition("-") for name, s in self.world.ray.jobs.items() if s in ("PENDING", "RUNNING")]
        documents = [JobLayout("default", job).attempt(int(attempt)) for job, _, attempt in alive]
        return sum(self.world.bucket.get_document(key, AttemptDocument).workers or 0 for key in documents)

    @contextmanager
    def closed(self) -> Iterator[None]:
        self.store._engine.dispose()
        yield
        self.world.store = self.store = Mortal(make_engine(f"sqlite:///{self.database}"))
        self.world.restart()

    def compare(self, was: JobRow, now: JobRow | None) -> None:
        ended, written = JobState(was.state).ended, JobLayout("default", was.id).job in self.world.bucket.content
        if now is None:
            assert not written
            if not ended:  # its user submits it once more, as if under another id
                self.world.bucket.delete([item.key for item in self.world.bucket.objects(f"default/jobs/{was.id}/")])
                fields = {name: getattr(was, name) for name in ACCEPTANCE}
                self.store.insert(row(1, was.parsed_spec, id=was.id, **fields), ACCEPTED, None)
        elif written and ended:
            assert now.attempt in (was.attempt, was.attempt - 1)
            assert [getattr(now, name) for name in END] == [getattr(was, name) for name in END]
        elif written:
            assert now.attempt in (was.attempt, was.attempt - 1), "no more is lost than the intent of an attempt"
            assert now.faults - was.faults in (0, 1)
            if was.state == JobState.PAUSED and was.pause_requested:
                assert now.pause_requested or JobState(now.state).ended, "who is paused stays so, if not just cancelled"
            self.lost[f"{was.state} {now.state}"] += 1


def test_a_lost_database_doubles_no_attempt_and_changes_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, monkeypatch, resize_interval=10.0)
    fate = Losing(world, SEED, tmp_path)
    rounds = 0
    while fate.crashes < fate.most or fate.store.live():
        fate.users()
        fate.live_pass()
        fate.workers()
        fate.check()
        rounds += 1
        assert rounds < 20_000, f"no end is near: {[job.state for job in fate.store.live()]}"

    taken = Counter(submission for _, submission in world.ray.taken)
    assert set(taken.values()) == {1}, "an attempt ran twice"
    for job in fate.store.everything():
        if job.attempt:
            final = world.bucket.get_document(JobLayout("default", job.id).final, FinalDocument)
            assert (final.state, final.reason, final.message) == (job.state, job.reason, job.message)
        assert job.faults <= job.parsed_spec.retries
    assert {job.state for job in fate.store.everything()} == {"succeeded", "failed", "cancelled"}
    assert fate.forks
    assert min(fate.lost["restored"], fate.lost["rebuilt"]) > 4
    wanted = {"running running", "starting starting", "paused paused", "queued queued", "recovering recovering"}
    assert wanted <= set(fate.lost)
    fate.store._engine.dispose()
