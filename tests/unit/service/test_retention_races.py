"""Retention beside everything that needs checkpoints, in any interleaving of single effects: nothing needed goes.

The store, the bucket's protocol, retention, the use cases and the workers' walk of the history are the real ones. What
a job needs is told by a model of its own, kept from what happened and not from what our code says.
"""

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import pytest
import sqlalchemy as sa
from hypothesis import currently_in_test_context, event
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from api.documents import CheckpointRef
from api.errors import Conflict, LockstepError
from api.jobs import JobState
from service.download import close
from service.export import PIN
from service.retention import policy_of
from service.tables import pins
from tests.databases import on_postgres
from tests.fakes import ACCEPTED, job_id, row
from tests.soak import soak
from tests.stepping import Work
from tests.unit.service.racing_jobs import GRACE, LIVE, POLICIES, START, WHO, Run, spec_of
from tests.unit.service.racing_world import RacingWorld

pytestmark = pytest.mark.database


class Races(RacingWorld, RuleBasedStateMachine):
    """Jobs, forks, downloads, deletions and deaths, while retention goes from effect to effect."""

    @initialize(policy=st.sampled_from(POLICIES), losses=st.lists(st.integers(1, 3), min_size=3, max_size=5))
    def a_job_runs(self, policy: dict[str, int], losses: list[int]) -> None:
        spec = spec_of(policy)
        assert self.store.insert(row(1, spec, dataset_version="v1"), ACCEPTED, None) is None
        self.runs.append(Run(job_id(1), policy_of(spec), None))
        self._begin(self.runs[0])
        self.runs[0].group.start.finish()  # type: ignore[union-attr]
        self._change(self.runs[0], JobState.RUNNING)
        for loss in losses:
            self._train(self.runs[0], self.runs[0].group, loss)
        self.retain("end")
        self.wait(GRACE.seconds)

    # Jobs and their worker groups.

    pick = st.integers(0, 30)

    @rule(pick=pick, to=st.sampled_from(["look", "put", "end"]), damaged=st.booleans())
    @precondition(lambda self: self._those(JobState.QUEUED, JobState.RECOVERING))
    def begin(self, pick: int, to: str, damaged: bool) -> None:
        """A new attempt begins; its rank 0 has only begun to look, has chosen and told nobody, or all are ready."""
        found = self._those(JobState.QUEUED, JobState.RECOVERING)
        self._begin_to(found[pick % len(found)], to, damaged)

    @rule(pick=pick, dies=st.booleans(), to=st.sampled_from(["look", "put", "end"]), damaged=st.booleans())
    @precondition(lambda self: self._those(*LIVE))
    def replace_the_group(self, pick: int, dies: bool, to: str, damaged: bool) -> None:
        """Ray starts the group again within its attempt; the old one may live on for a while."""
        found = self._those(*LIVE)
        run = found[pick % len(found)]
        if dies:
            self._die(run.group)
        if damaged:
            self._damage(run)
        self._start_group(run, run.group.attempt, run.group.restart + 1)
        self._start_on(run, to)

    @rule(pick=pick, dies=st.booleans(), to=st.sampled_from(["stay", "put", "put", "end"]), damaged=st.booleans())
    @precondition(lambda self: self._those(*LIVE))
    def lose_the_attempt(self, pick: int, dies: bool, to: str, damaged: bool) -> None:
        found = self._those(*LIVE)
        run = found[pick % len(found)]
        self._change(run, JobState.RECOVERING)
        if dies:
            self._die(run.group)
        if to != "stay":
            self._begin_to(run, to, damaged)

    @rule()
    @precondition(lambda self: self._beginning())
    def notice(self) -> None:
        for run in self._beginning():
            self._change(run, JobState.RUNNING)

    @rule(pick=pick, state=st.sampled_from([JobState.SUCCEEDED, JobState.CANCELLED]))
    @precondition(lambda self: self._those(*LIVE, JobState.RECOVERING))
    def end(self, pick: int, state: JobState) -> None:
        found = self._those(*LIVE, JobState.RECOVERING)
        if pick < 20 and found[0] is self.runs[0]:
            return  # more can happen while it lives
        run = found[pick % len(found)]
        begun = [group for group in run.groups if group.begun]
        if not run.group.begun:
            self._die(run.group)
        last = max(begun, key=lambda g: (g.attempt, g.restart), default=None)
        run.end = (last, last.step) if last is not None else None
        end = CheckpointRef(segment=last.name, step=last.step).model_dump() if last is not None else None
        self._change(run, state, history_end=end)

    @rule(pick=pick, losses=st.lists(st.none() | st.integers(1, 4), min_size=1, max_size=3), goes_on=st.booleans())
    @precondition(lambda self: self._writers())
    def train(self, pick: int, losses: list[int | None], goes_on: bool) -> None:
        run, group = self._writers()[-1 - pick % len(self._writers())]
        if run in self._beginning():
            self._change(run, JobState.RUNNING)
        for loss in losses:
            self._train(run, group, loss)
        if goes_on:
            self._upload(run, group)

    # The control plane.

    @rule(to=st.sampled_from(["delete", "write", "write", "end"]))
    @precondition(lambda self: self.pass_ is None)
    def retain(self, to: str) -> None:
        self.by_user = False
        self.pass_ = Work(lambda: self.retention.run(self.now))
        self._go_on(self.pass_, to)

    @rule(to=st.sampled_from(["look", "delete", "write", "end"]))
    @precondition(lambda self: self.pass_ is not None)
    def retain_on(self, to: str) -> None:
        self.by_user = False
        assert self.pass_ is not None
        self._go_on(self.pass_, to)

    @rule(
        calm=st.booleans(),
        seconds=st.sampled_from([1, 500, 900, 900]),
        to=st.sampled_from(["delete", "write", "write", "end"]),
    )
    @precondition(lambda self: self.pass_ is None)
    def mark_and_begin_to_delete(self, calm: bool, seconds: int, to: str) -> None:
        if calm:
            self._calm()
        for run, group in self._writers():
            self._train(run, group, None)
        self.retain("end")
        self.wait(seconds)
        self.retain(to)

    def _calm(self) -> None:
        """All that waits or begins comes to run."""
        for run in self._those(JobState.QUEUED, JobState.RECOVERING):
            self._begin(run)
        for run in self._those(*LIVE):
            self._start_on(run, "end")
        self.notice()

    @rule(pick=pick, newest=st.booleans(), to=st.sampled_from(["write", "end"]))
    @precondition(lambda self: len(self.runs) < 4 and len(self.requests) < 3)
    def fork(self, pick: int, newest: bool, to: str) -> None:
        if places := self._places():
            source, _, step = places[pick % len(places)]
            init = {"from_job": source, **({} if newest else {"step": step})}
            self._ask(lambda: self.jobs.submit(WHO, spec_of({"keep_last": 1}, init=init), {}, None), to)

    @rule(pick=pick, to=st.sampled_from(["write", "end", "end"]))
    @precondition(lambda self: len(self.requests) < 3)
    def download(self, pick: int, to: str) -> None:
        if places := self._places():
            at = places[pick % len(places)]
            self._ask(lambda: self._open(at), to)

    @rule(pick=pick, pieces=st.integers(1, 30))
    @precondition(lambda self: self.downloads)
    def take(self, pick: int, pieces: int) -> None:
        file = list(self.downloads)[pick % len(self.downloads)]
        at, taken = self.downloads[file]
        try:
            for _, piece in zip(range(pieces), file.pieces, strict=False):
                assert piece
            self.downloads[file] = (at, self.now)
            if pieces > 20:
                self.seen.add("a download ended")
                self.abandon(pick)
        except LockstepError:
            assert at in self.damaged or self.now - taken > PIN / 2, "only who takes nothing for minutes is cut off"
            self.abandon(pick)

    @rule(pick=pick)
    @precondition(lambda self: self.downloads)
    def abandon(self, pick: int) -> None:
        file = list(self.downloads)[pick % len(self.downloads)]
        del self.downloads[file]
        close(file.pieces, file.release)

    @rule(pick=pick, to=st.sampled_from(["delete", "write", "end"]))
    @precondition(lambda self: self._those(JobState.SUCCEEDED, JobState.CANCELLED) and len(self.requests) < 3)
    def delete_a_checkpoint(self, pick: int, to: str) -> None:
        places = [at for run in self.runs if run.ended and not run.deleted for at, _ in run.path()]
        if places:
            job, _, step = places[pick % len(places)]
            self._ask(lambda: self.jobs.delete_checkpoint(WHO, job, step), to)

    @rule(pick=pick)
    @precondition(lambda self: self._those(JobState.SUCCEEDED, JobState.CANCELLED))
    def delete_a_job(self, pick: int) -> None:
        found = self._those(JobState.SUCCEEDED, JobState.CANCELLED)
        run = found[pick % len(found)]
        with suppress(Conflict):
            self.jobs.delete(WHO, run.id)
            run.deleted = True

    @rule(to=st.sampled_from(["delete", "end"]))
    @precondition(lambda self: len(self.requests) < 3 and any(self._remains(run) for run in self.runs))
    def purge(self, to: str) -> None:
        self._ask(self._purge_all, to)

    def _purge_all(self) -> None:
        for found in self.store.to_purge():
            self.reconciler._purge(found)

    @rule(pick=pick, to=st.sampled_from(["look", "write", "put", "end"]))
    @precondition(lambda self: self._works())
    def go_on(self, pick: int, to: str) -> None:
        work = self._works()[pick % len(self._works())]
        self.by_user = work in self.requests
        self._go_on(work, to)

    @rule(seconds=st.sampled_from([1, 250, 500, 900]))
    def wait(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)
        for run in self.runs:
            for group in run.groups:
                if group.start is not None and not group.start.over and self.now - group.since > START:
                    self._die(group)

    @rule(sure=st.integers(0, 3))
    @precondition(lambda self: self.pass_ or self._works() or self.downloads)
    def kill_the_control_plane(self, sure: int = 0) -> None:
        if sure:
            return  # there are quiet times
        for work in [*self.requests, *([self.pass_] if self.pass_ is not None else [])]:
            work.kill()
        self.requests, self.pass_ = [], None
        self.downloads.clear()
        self._start_anew()

    # What holds.

    @invariant()
    def nothing_needed_is_gone(self) -> None:
        self.check()

    def teardown(self) -> None:
        for what in sorted(self.seen) if currently_in_test_context() else ():
            event(what)
        try:
            if self.runs:
                self._settle()
        finally:
            for work in [*self._works(), *([self.pass_] if self.pass_ is not None else [])]:
                work.kill()
            self.store._engine.dispose()
            self.patch.undo()
            self.folder.cleanup()

    def _settle(self) -> None:
        """All ends; after some time exactly what shall stay is there, nothing is held and nothing is looked at."""
        self.kill_the_control_plane()
        for run in self.runs:
            for group in run.groups:
                self._die(group)
        while self._those(*LIVE, JobState.RECOVERING, JobState.QUEUED):
            if not self._those(*LIVE, JobState.RECOVERING):
                self.begin(0, "look", False)
            self.end(30, JobState.CANCELLED)
        self.check()
        for _ in range(4):
            self.now += GRACE
            self.retain("end")
        for run in self.runs:
            if not run.deleted:
                named = {(run.id, g.origin.segment, g.origin.step) for g in run.groups if g.begun and g.origin}
                keys = [key for key in self.bucket.content if key.startswith(run.layout.segments) and "/step-" in key]
                there = {(run.id, key.split("/")[4], int(key.split("/")[5].removeprefix("step-"))) for key in keys}
                listed = {at for at in there if self._complete(at)}  # of which all stay where there is no policy
                assert there == (run.kept(self.lost) | (named & there) if run.policy else listed)
                assert self.store.marks(run.id) == []
        assert self.store.retained() == []
        with self.store._engine.connect() as connection:
            held = connection.execute(sa.select(pins.c.id).where(pins.c.expires_at > self.now)).all()
        assert held == []


BEFORE: dict[str, Callable[[Races], None]] = {
    "nothing": lambda races: None,
    "a fork is being accepted": lambda races: races.fork(0, False, "write"),
    "a download is being opened": lambda races: races.download(0, "write"),
}


def fork_that_begins(races: Races) -> None:
    races.fork(0, False, "end")
    if races._those(JobState.QUEUED):
        races.begin(0, "end", False)


def slow_group(races: Races) -> None:
    """It has chosen, and the one that it replaces writes on: what it chose is not the newest any more."""
    races.replace_the_group(0, False, "put", False)
    races.train(0, [None, None], False)
    if races.pass_ is None:
        races.retain("end")
        races.wait(500)


def deleted_job(races: Races) -> None:
    races.download(0, "end")
    races.end(30, JobState.SUCCEEDED)
    races.delete_a_job(0)
    races.purge("end")


def purge_that_is_begun(races: Races) -> None:
    races.end(30, JobState.SUCCEEDED)
    races.delete_a_job(0)
    races.purge("delete")


BETWEEN: dict[str, Callable[[Races], None]] = {
    "nothing": lambda races: None,
    "a fork": fork_that_begins,
    "a download": lambda races: races.download(0, "end"),
    "another attempt": lambda races: races.lose_the_attempt(0, True, "put", True),
    "another group": lambda races: races.replace_the_group(0, False, "put", True),
    "a slow group": slow_group,
    "the end": lambda races: races.end(30, JobState.SUCCEEDED),
    "a deletion of all": deleted_job,
    "a purge that is begun": purge_that_is_begun,
    "a death": lambda races: races.kill_the_control_plane(),
}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("stand", ["not begun", "write", "delete", "end"])
def test_at_every_stand_of_a_deletion(before: str, between: str, stand: str) -> None:
    """What hypothesis may need long to find: retention has gone up to its decision, to the deletion, or to the end."""
    races = Races()
    try:
        races.a_job_runs({"keep_last": 1}, [1, 1])
        BEFORE[before](races)
        if stand != "not begun":
            races.retain(stand)
        BETWEEN[between](races)
        races.check()
        if races.pass_ is None:
            races.retain("end")
        for _ in range(2):
            for work in [*races._works(), *([races.pass_] if races.pass_ is not None else [])]:
                races.by_user = work is not races.pass_
                races._go_on(work, "end")
        for _ in list(races.downloads):
            races.take(0, 30)
        races.check()
    finally:
        races.teardown()


TestRaces = Races.TestCase
TestRaces.settings = hypothesis_settings(
    max_examples=soak(3000, 20 if on_postgres() else 80),
    stateful_step_count=16,
    deadline=None,
    derandomize=soak(False, True),
)
