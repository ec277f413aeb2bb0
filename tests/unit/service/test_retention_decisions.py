"""Retention decides: what goes, what stays, and when, for every life that a job may have."""

import dataclasses
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from api.documents import CheckpointRef, SegmentDocument
from api.jobs import JobState
from service.retention import Decision, Folder, Look, Policy, decide
from service.rows import Mark
from tests.checkpoints import GRACE, folder, ref, refs, segment
from tests.fakes import (
    T0,
)

ONE = [segment("1-0-a")]
#: The second segment began at step 8; the checkpoint of step 12 was passed over.
TWO = [segment("1-0-a"), segment("1-1-b", "1-0-a@8")]
BRANCHED = "1-0-a@4 1-0-a@8 1-0-a@12 1-1-b@12 1-1-b@16"


def look(segments: list[SegmentDocument], folders: str, **fields: Any) -> Look:
    usual: dict[str, Any] = {"state": JobState.RUNNING, "end": None, "pinned": set(), "marks": []}
    return Look(segments=segments, folders=[folder(text) for text in folders.split()], **{**usual, **fields})


def goes(seen: Look, policy: Policy) -> set[CheckpointRef]:
    """Return what is deleted when nothing changes: marked now, and deleted after the grace."""
    first = decide(seen, policy, T0, GRACE)
    assert not first.delete
    marked = dataclasses.replace(seen, marks=[Mark(at, T0) for at in first.mark])
    assert not decide(marked, policy, T0 + GRACE - timedelta(microseconds=1), GRACE).delete
    last = decide(marked, policy, T0 + GRACE, GRACE)
    assert set(last.delete) == set(first.mark)
    assert not last.mark
    assert not last.unmark
    return set(last.delete)


SCORED = "1-0-a@4=3 1-0-a@8=1 1-0-a@12=2 1-0-a@16=2 1-0-a@20=5"


@pytest.mark.parametrize(
    ("policy", "stay"),
    [
        (Policy(), {4, 8, 12, 16, 20}),
        (Policy(keep_last=1), {20}),
        (Policy(keep_last=3), {12, 16, 20}),
        (Policy(keep_last=9), {4, 8, 12, 16, 20}),
        (Policy(keep_best=1), {8, 20}),  # the newest one, too: without it the job could not go on
        (Policy(keep_best=2), {8, 16, 20}),  # of the two at 2.0 the newer one
        (Policy(keep_best=3), {8, 12, 16, 20}),
        (Policy(keep_last=2, keep_best=1), {8, 16, 20}),
        (Policy(keep_last=2, keep_best=2), {8, 16, 20}),  # the same one may count for both
    ],
    ids=str,
)
@pytest.mark.parametrize("state", [JobState.RUNNING, JobState.SUCCEEDED])
def test_the_newest_and_the_best_stay(policy: Policy, stay: set[int], state: JobState) -> None:
    gone = goes(look(ONE, SCORED, state=state), policy)
    assert {at.step for at in gone} == {4, 8, 12, 16, 20} - stay


def test_a_checkpoint_without_an_evaluation_is_never_the_best() -> None:
    seen = look(ONE, "1-0-a@4 1-0-a@8=9 1-0-a@12")
    assert goes(seen, Policy(keep_best=1)) == refs("1-0-a@4")
    assert goes(seen, Policy(keep_best=3)) == refs("1-0-a@4")


@pytest.mark.parametrize(
    ("segments", "folders", "fields", "policy", "gone"),
    [
        (TWO, BRANCHED, {}, Policy(keep_last=9), "1-0-a@12"),
        (TWO, BRANCHED, {}, Policy(keep_last=1), "1-0-a@4 1-0-a@12 1-1-b@12"),
        (TWO, BRANCHED, {}, Policy(), ""),
        (TWO, "1-0-a@12? 1-0-a@8 1-1-b@16 1-1-b@20?", {}, Policy(), "1-0-a@12?"),
        (TWO, "1-0-a@12? 1-0-a@8 1-1-b@16 1-1-b@20?", {"state": "failed"}, Policy(), "1-0-a@12? 1-1-b@20?"),
        (TWO, "1-0-a@8 1-1-b@16 1-1-b@20?", {}, Policy(keep_last=1), ""),
        (ONE, "1-0-a@4 1-0-a@8 1-0-a@12", {"end": ref("1-0-a@8"), "state": "cancelled"}, Policy(keep_last=1),
         "1-0-a@4 1-0-a@12"),
        (ONE, "1-0-a@4 1-0-a@8", {"pinned": refs("1-0-a@4")}, Policy(keep_last=1), ""),
        (ONE, "1-0-a@4 1-0-a@8?", {}, Policy(keep_last=1), ""),
    ],
    ids=[
        "beyond where the history went on", "named by a from", "all kept", "leftover of before", "leftover of the end",
        "being written", "beyond the recorded end", "pinned", "not yet one",
    ],
)  # fmt: skip
def test_what_goes_and_what_stays(
    segments: list[SegmentDocument], folders: str, fields: dict[str, Any], policy: Policy, gone: str
) -> None:
    fields = {**fields, "state": JobState(fields.get("state", "running"))}
    assert goes(look(segments, folders, **fields), policy) == refs(gone.replace("?", ""))


OLD = [Mark(ref("1-0-a@4"), T0 - 9 * GRACE), Mark(ref("1-0-a@8"), T0 - 9 * GRACE, doomed=True)]
IDLE = [state for state in JobState if not state.ended and state is not JobState.RUNNING]


@pytest.mark.parametrize(
    "seen",
    [
        *(look(ONE, "1-0-a@4 1-0-a@8 1-0-a@12", state=state, marks=OLD) for state in IDLE),
        look(TWO, "1-0-a@4 1-0-a@8 1-0-a@12", marks=OLD),
        look(TWO, "1-0-a@4 1-0-a@8 1-0-a@12 1-1-b@12?", marks=OLD),
        look([segment("1-1-b", "1-0-a@8")], "1-1-b@12 1-1-b@16", marks=OLD),
        look(ONE, "1-0-a@4 1-0-a@8 1-0-a@12", marks=OLD, state=JobState.FAILED, end=ref("2-0-c@30")),
        look([], "", marks=OLD),
    ],
    ids=[*IDLE, "nothing of its own", "nothing complete", "a segment is missing", "the last is missing", "no segment"],
)
def test_nothing_is_decided_while_a_start_may_need_it_or_a_part_is_not_seen(seen: Look) -> None:
    decision = decide(seen, Policy(keep_last=1), T0, GRACE)
    assert decision == Decision()


def test_a_mark_goes_when_its_checkpoint_is_needed_again_or_gone() -> None:
    marks = [Mark(ref("1-0-a@8"), T0 - GRACE), Mark(ref("1-0-a@99"), T0 - GRACE)]
    decision = decide(look(ONE, "1-0-a@4 1-0-a@8", marks=marks), Policy(keep_last=1), T0, GRACE)
    assert set(decision.unmark) == refs("1-0-a@8 1-0-a@99")
    assert decision.mark == [ref("1-0-a@4")]
    assert not decision.delete


def test_a_deletion_that_was_begun_goes_on() -> None:
    marks = [Mark(ref("1-0-a@8"), T0, doomed=True)]
    on_request = look(ONE, "1-0-a@4 1-0-a@8", marks=marks, state=JobState.SUCCEEDED)
    assert decide(on_request, Policy(), T0, GRACE).delete == [ref("1-0-a@8")]
    for rest in ("1-0-a@4 1-0-a@8?", "1-0-a@4"):  # its manifest is gone, or all of it
        assert decide(look(ONE, rest, marks=marks), Policy(keep_last=1), T0, GRACE).delete == [ref("1-0-a@8")]
    needed_again = look(ONE, "1-0-a@4 1-0-a@8", marks=marks)
    decision = decide(needed_again, Policy(keep_last=1), T0, GRACE)
    assert (decision.unmark, decision.delete) == ([ref("1-0-a@8")], [])


def test_what_a_user_is_deleting_does_not_count_as_kept() -> None:
    marks = [Mark(ref("1-0-a@4"), T0 - GRACE), Mark(ref("1-0-a@8"), T0, doomed=True)]
    seen = look(ONE, "1-0-a@4 1-0-a@8", marks=marks, state=JobState.SUCCEEDED)
    decision = decide(seen, Policy(keep_last=1), T0, GRACE)
    assert (decision.delete, decision.unmark) == ([ref("1-0-a@8")], [ref("1-0-a@4")])


@pytest.mark.parametrize(
    ("fields", "settled"),
    [
        ({}, True),
        ({"state": JobState.RUNNING}, False),
        ({"marks": [Mark(ref("1-0-a@8"), T0)]}, False),
        ({"pinned": refs("1-0-a@4")}, True),
        ({"folders": [folder("1-0-a@4"), folder("1-0-a@8")], "pinned": refs("1-0-a@4")}, False),
    ],
    ids=["in order", "running", "a mark", "pinned", "a pin will end"],
)
def test_a_job_settles_when_nothing_is_left_to_do_for_it(fields: dict[str, Any], settled: bool) -> None:
    seen = dataclasses.replace(look(ONE, "1-0-a@8", state=JobState.SUCCEEDED), **fields)
    assert decide(seen, Policy(keep_last=1), T0, GRACE).settled is settled


class AnyLife(RuleBasedStateMachine):
    """A job that trains, dies and begins anew as it likes, while downloads pin and retention looks.

    `path` is what the job's history is, kept by hand and not by our own code: (checkpoint, eval loss), oldest first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.policy = Policy()
        self.now, self.state, self.step = T0, JobState.RUNNING, 0
        self.segments = [segment("1-0-a")]
        self.folders: dict[CheckpointRef, Folder] = {}
        self.path: list[tuple[CheckpointRef, float | None]] = []
        self.pins: set[CheckpointRef] = set()
        self.marks: dict[CheckpointRef, datetime] = {}

    @initialize(
        policy=st.sampled_from([Policy(), Policy(1), Policy(2), Policy(None, 1), Policy(None, 2), Policy(1, 1)])
    )
    def choose(self, policy: Policy) -> None:
        self.policy = policy

    @rule(losses=st.lists(st.none() | st.integers(1, 4), min_size=1, max_size=4))
    @precondition(lambda self: self.state is JobState.RUNNING)
    def train(self, losses: list[int | None]) -> None:
        for loss in losses:
            self._write(loss, True)

    @rule()
    @precondition(lambda self: self.state is JobState.RUNNING)
    def begin_to_write(self) -> None:
        self._write(None, False)

    def _write(self, loss: int | None, committed: bool) -> None:
        self.step += 4
        at = CheckpointRef(segment=self.segments[-1].segment, step=self.step)
        self.folders[at] = Folder(at, committed, loss)
        if committed:
            self.path.append((at, loss))

    @rule(passed_over=st.integers(0, 2))
    @precondition(lambda self: self.state is JobState.RUNNING)
    def die_and_begin_anew(self, passed_over: int) -> None:
        """At the newest checkpoint that is still there, or an older one if newer ones are damaged."""
        there = [n for n, (at, _) in enumerate(self.path) if at in self.folders]
        chosen = there[-1 - passed_over] if len(there) > passed_over else None
        self.path = [] if chosen is None else self.path[: chosen + 1]
        origin = self.path[-1][0] if self.path else None
        self.step = origin.step if origin else 0
        number = len(self.segments)
        self.segments.append(segment(f"{1 + number}-0-x").model_copy(update={"origin": origin}))

    @rule(state=st.sampled_from([JobState.STARTING, JobState.RECOVERING, JobState.RUNNING]))
    @precondition(lambda self: not self.state.ended)
    def change(self, state: JobState) -> None:
        self.state = state

    @rule(data=st.data())
    @precondition(lambda self: self.folders)
    def pin(self, data: st.DataObject) -> None:
        at = data.draw(st.sampled_from(sorted(self.folders, key=str)))
        self.pins ^= {at}

    @rule(seconds=st.sampled_from([1, 400, 900]))
    def wait(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    @rule()
    def retain(self) -> None:
        self._pass()

    @rule()
    def retain_for_long(self) -> None:
        self._pass()
        self.now += GRACE
        self._pass()

    def _seen(self) -> Look:
        end = CheckpointRef(segment=self.segments[-1].segment, step=self.step) if self.state.ended else None
        marks = [Mark(at, since) for at, since in self.marks.items()]
        return Look(self.state, end, self.segments, list(self.folders.values()), self.pins, marks)

    def _kept(self) -> set[CheckpointRef]:
        """The definition, in other words than ours."""
        if not self.policy:
            return {at for at, found in self.folders.items() if found.committed}
        there = [(at, loss) for at, loss in self.path if at in self.folders]
        newest = {at for at, _ in there[-(self.policy.keep_last or 1) :]}
        scored = sorted((loss, -at.step, at.segment) for at, loss in there if loss is not None)
        best = {CheckpointRef(segment=s, step=-step) for _, step, s in scored[: self.policy.keep_best or 0]}
        return newest | best

    def _pass(self) -> bool:
        decision = decide(self._seen(), self.policy, self.now, GRACE)
        named = {s.origin for s in self.segments}
        newest = self.segments[-1].segment
        for at in decision.delete:
            assert at not in named
            assert at not in self.pins
            assert at not in self._kept()
            assert self.now - self.marks[at] >= GRACE
            assert self.state is JobState.RUNNING or self.state.ended
            if not self.state.ended:
                assert at.segment != newest or self.folders[at].committed
                assert any(found.committed for found in self.folders.values() if found.at.segment == newest)
            del self.marks[at], self.folders[at]
        for at in decision.unmark:
            del self.marks[at]
        assert not self.marks.keys() & set(decision.mark)
        self.marks |= dict.fromkeys(decision.mark, self.now)
        return decision.settled

    @invariant()
    def what_is_there_can_be_resumed(self) -> None:
        """The newest checkpoint of the history is always there."""
        assert not self.path or self.path[-1][0] in self.folders

    def teardown(self) -> None:
        """The job ends; after some time, exactly what shall stay is there, and nothing is looked at any more."""
        self.state, self.pins = JobState.FAILED, set()
        passes = 0
        while not self._pass():
            self.now += GRACE
            passes += 1
        assert passes <= 2
        named = {s.origin for s in self.segments}
        assert set(self.folders) == {at for at in self.folders if at in named} | self._kept()


TestAnyLife = AnyLife.TestCase
TestAnyLife.settings = hypothesis_settings(max_examples=100, stateful_step_count=30, deadline=None)
