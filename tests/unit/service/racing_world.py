"""A control plane that goes from effect to effect, and the worker groups around it: for the races of retention."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import sqlalchemy as sa

from api.documents import CheckpointRef, Manifest, SegmentDocument
from api.errors import Conflict, InvalidData, InvalidSpec, NotFound, ObjectMissing
from api.jobs import JobState
from api.layout import CheckpointLayout, DatasetLayout, JobLayout
from api.manifest import sealed
from service.export import PIN, File
from service.jobs import Jobs
from service.leases import Leases
from service.reconciler import Reconciler
from service.retention import Retention, policy_of
from tests.databases import on_postgres, opened
from tests.fakes import T0, FakeRay, dataset, job_id, new_store, settings_for
from tests.stepping import SteppedBucket, Work, make_steps
from tests.unit.service.racing_jobs import LIVE, MARKS, VOCAB, WHO, Group, Place, Run, parts_of
from workers.restore import newest_valid, read_checkpoint, read_segments


class RacingWorld:
    """The store, the bucket's protocol, retention, the use cases and the workers' walk are the real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.now, self.numbers = T0, 1
        self.patch = pytest.MonkeyPatch()
        for module in ("jobs", "export", "reconciler"):
            self.patch.setattr(f"service.{module}.now", lambda: self.now)
        self.patch.setattr("service.retention.present", lambda: self.now)
        self.patch.setattr("service.jobs.new_job_id", self._new_id)
        self.store, self.bucket = new_store(Path(self.folder.name)), SteppedBucket()
        if not on_postgres():
            sa.event.listen(self.store._engine, "connect", lambda raw, _: raw.execute("PRAGMA synchronous=OFF"))
        make_steps(self.store._engine)
        self.settings = settings_for(Path(self.folder.name))
        self.leases = Leases(opened(self.settings.database_url), seconds=0)  # they are no effect of anything
        self.ray = FakeRay().backend()
        self.jobs = Jobs(self.store, self.bucket, self.ray, self.settings)
        self.bucket.put_document(DatasetLayout("default", "words", "v1").document, dataset(vocab_size=VOCAB))
        self.runs: list[Run] = []
        self.requests: list[Work] = []
        self.pass_: Work | None = None
        self.downloads: dict[File, tuple[Place, Any]] = {}
        self.doomed: set[Place] = set()
        self.lost: set[Place] = set()
        self.stale: set[Place] = set()
        self.damaged: set[Place] = set()
        self.marked: list[Place] = []
        self.by_user = False
        self.seen: set[str] = set()
        self._start_anew()

    def _new_id(self) -> str:
        self.numbers += 1
        return job_id(self.numbers)

    def _start_anew(self) -> None:
        """The control plane comes up and remembers nothing."""
        self.retention = Retention(self.store, self.bucket, self.settings, self.leases)
        self.reconciler = Reconciler(self.store, self.bucket, self.ray, self.settings, self.leases)

    def _those(self, *states: JobState) -> list[Run]:
        return [run for run in self.runs if not run.deleted and run.state in states]

    def _change(self, run: Run, state: JobState, **changes: Any) -> None:
        row = self.store.get(run.id, "default")
        assert row is not None
        assert self.store.apply(row, {"state": state.value, **changes}) is not None
        run.state = state

    def _begin(self, run: Run) -> None:
        attempt = run.group.attempt + 1 if run.groups else 1
        self._change(run, JobState.STARTING, attempt=attempt)
        self._start_group(run, attempt, 0)

    def _start_group(self, run: Run, attempt: int, restart: int) -> None:
        group = Group(attempt, restart, self.now)
        run.groups.append(group)
        group.start = Work(partial(self._start, run, group))

    def _start(self, run: Run, group: Group) -> None:
        """Rank 0 chooses and says so, as `begin_segment` does; then the others read what it chose."""
        try:
            origin, passed_over = newest_valid(self.bucket, run.layout, read_segments(self.bucket, run.layout))
            if origin.point is None and run.init is not None:
                origin = read_checkpoint(self.bucket, run.layout, run.init)
            group.origin = origin.point
            group.promised = self._is_promised(run, group)
            self.seen.add(f"chose, passed over {len(passed_over)}, promised {group.promised}")
            document = SegmentDocument(
                job_id=run.id, segment=group.name, origin=origin.point, world_size=2, fingerprint=None, created_at=T0
            )
            self.bucket.put_document(run.layout.segment(group.name).document, document)
            group.begun = True
            if origin.point is not None:
                read_checkpoint(self.bucket, run.layout, origin.point)
            group.ready = True
        except InvalidData:
            self.seen.add("a group died of damage")
        except ObjectMissing:
            if group.promised and self._is_present(run, group):
                raise
            self.seen.add("a group that nothing was promised to died")

    def _is_present(self, run: Run, group: Group) -> bool:
        return group is run.group and not group.dead and run.state in LIVE

    def _is_promised(self, run: Run, group: Group) -> bool:
        if group.origin is None or group.origin.job_id is not None:
            return True
        at = (run.id, group.origin.segment, group.origin.step)
        if at in self.doomed:
            return False
        return run.state is JobState.STARTING or at in run.kept(self.lost | self.doomed) - self.stale

    def _train(self, run: Run, group: Group, loss: float | None) -> None:
        at = self._upload(run, group)
        parts = [receipt for receipt, _ in parts_of(group.writing or 0)]
        fields = {"job_id": run.id, "segment": group.name, "step": group.writing, "world_size": 2, "parts": parts}
        metrics = {} if loss is None else {"eval_loss": loss}
        self.bucket.put(at.manifest, sealed(Manifest.model_validate({**fields, "metrics": metrics, "created_at": T0})))
        group.commits.append((group.writing or 0, loss))
        group.writing = None

    def _upload(self, run: Run, group: Group) -> CheckpointLayout:
        group.writing = group.writing or group.step + 4
        at = run.layout.segment(group.name).checkpoint(group.writing)
        for receipt, body in parts_of(group.writing):
            self.bucket.put(f"{at.prefix}{receipt.name}", body)
        return at

    def _begin_to(self, run: Run, to: str, damaged: bool) -> None:
        if damaged:
            self._damage(run)
        self._begin(run)
        self._start_on(run, to)

    def _start_on(self, run: Run, to: str) -> None:
        assert run.group.start is not None
        self._go_on(run.group.start, to)

    def _die(self, group: Group) -> None:
        if group.start is not None:
            group.start.kill()
        group.ready, group.dead = False, True

    def _beginning(self) -> list[Run]:
        found = self._those(JobState.STARTING)
        return [run for run in found if any(g.begun for g in run.groups if g.attempt == run.group.attempt)]

    def _writers(self) -> list[tuple[Run, Group]]:
        return [(run, group) for run in self.runs if not run.ended for group in run.groups if group.ready]

    def _damage(self, run: Run) -> None:
        """A byte of the newest checkpoint turns over: who begins next passes it over."""
        there = [at for at, _ in run.path() if at not in self.lost | self.doomed]
        if there:
            key = self._at(there[-1]).prefix + parts_of(there[-1][2])[0][0].name
            self.bucket.put(key, self.bucket.content[key][:-1] + b"!")
            self.damaged.add(there[-1])

    def _go_on(self, work: Work, to: str) -> None:
        """`look`: one effect; else to before the next deletion or change of the database, or to the end, checking what
        holds after each effect."""
        goal = {"delete": ["delete"], "write": ["write", "delete"], "put": ["put"]}.get(to, [])
        while not work.over:
            effect = work.next
            work.step()
            if work is self.pass_ and work.over:
                self.pass_ = None
            if effect in ("write", "put", "delete"):
                self.check()
            if to == "look" or work.next in goal:
                return

    def _places(self) -> list[Place]:
        """What a user sees; rather what retention has its eye on."""
        seen = [at for run in self.runs if not run.deleted for at, _ in run.path() if at not in self.lost]
        return [at for at in seen if at in self.marked] or seen

    def _ask(self, do: Callable[[], Any], to: str = "look") -> None:
        """A user asks for something; it is refused, or done effect by effect."""

        def ask() -> None:
            with suppress(Conflict, InvalidSpec, NotFound):
                do()

        self.by_user = True
        self.requests.append(Work(ask))
        self._go_on(self.requests[-1], to)

    def _open(self, at: Place) -> None:
        file = self.jobs.download(WHO, at[0], at[2], "model.safetensors")
        self.downloads[file] = (at, self.now)

    def _remains(self, run: Run) -> bool:
        return run.deleted and any(key.startswith(run.layout.prefix) for key in self.bucket.content)

    def _works(self) -> list[Work]:
        self.requests = [work for work in self.requests if not work.over]
        starts = [run.group.start for run in self.runs if run.groups and run.group.start is not None]
        old = [group.start for run in self.runs for group in run.groups[:-1] if group.start is not None]
        return [work for work in [*self.requests, *starts, *old] if not work.over]

    def _at(self, at: Place) -> CheckpointLayout:
        return JobLayout("default", at[0]).segment(at[1]).checkpoint(at[2])

    def _complete(self, at: Place) -> bool:
        layout = self._at(at)
        keys = [layout.manifest, *(layout.prefix + receipt.name for receipt, _ in parts_of(at[2]))]
        there = [key in self.bucket.content for key in keys]
        assert all(there) or not there[0], f"{at} is listed and not whole"
        return all(there)

    def _promises(self) -> Iterator[tuple[Place, str]]:
        """What must be there whatever a policy or a user says, and for whom."""
        for run in self.runs:
            if run.ended:
                continue
            if run.init is not None:
                yield (run.init.job_id or "", run.init.segment, run.init.step), f"a fork, {run.id}"
            path = {at[1] for at, _ in run.path()}
            for group in run.groups:
                if group.origin is None or group.origin.job_id is not None or not group.promised:
                    continue
                matters = group is run.group or group.name in path
                if matters and (group.begun or self._is_present(run, group)):
                    yield (run.id, group.origin.segment, group.origin.step), f"a group, {group.name}"
        for at, taken in self.downloads.values():
            if self.now - taken <= PIN / 2:
                yield at, "a download"

    def _note_forks(self) -> None:
        known = {run.id for run in self.runs}
        for found in self.store.live():
            if found.id not in known:
                self.runs.append(Run(found.id, policy_of(found.parsed_spec), CheckpointRef.model_validate(found.init)))
                self.seen.add("a fork was accepted")

    def _given_up(self) -> set[Place]:
        with self.store._engine.connect() as connection:
            if connection.execute(sa.text("SELECT count(*) FROM jobs")).scalar_one() > len(self.runs):
                self._note_forks()
            found = connection.execute(sa.text(MARKS)).all()
        self.marked = [(r.job_id, r.segment, r.step) for r in found]
        return {(r.job_id, r.segment, r.step) for r in found if r.doomed}

    def check(self) -> None:
        doomed = self._given_up()
        promised = dict(self._promises())
        gone = self.lost | self.doomed
        kept = {at for run in self.runs if not run.deleted for at in run.kept(gone)} - self.stale
        for at in doomed - self.doomed:
            self.seen.add(f"doomed by {'a user' if self.by_user else 'retention'}")
            assert at not in promised, f"{at} is given up, and {promised[at]} needs it"
            assert self.by_user or at not in kept, f"{at} is given up, and the policy keeps it"
        self.doomed = doomed
        for at, who in promised.items():
            assert self._complete(at), f"{at} is gone, and {who} needs it"
        everything = {at for run in self.runs for at, _ in run.path()}
        for at in everything - gone - doomed:
            if not self._complete(at):
                assert at not in kept, f"{at} is gone, and the policy keeps it"
        self.lost |= {at for at in everything if not self._complete(at)}
        self.stale = (self.stale | (everything - kept)) if self.pass_ is not None else set()
