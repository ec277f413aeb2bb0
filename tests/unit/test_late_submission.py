"""A submission is held up on the wire and arrives when the world has gone on: its attempt runs once or not at all.

The control plane and what the driver asks before anything else (`workers.attempt.claim`) together: neither can see to
it alone.
"""

import json
import shlex
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx2
import pytest

from api.jobs import Reason
from tests.fakes import FakeRay, World, job_id
from workers.attempt import claim, parse_arguments


class SlowWire(FakeRay):
    """Ray behind a wire that can hold submissions up; each that it takes starts a driver, which claims its attempt."""

    def __init__(self) -> None:
        super().__init__()
        self.holds = False
        self.held: list[httpx2.Request] = []

    def _act(self, request: httpx2.Request) -> httpx2.Response:
        if self.holds and request.method == "POST" and request.url.path == "/api/jobs/":
            self.held.append(request)
            raise httpx2.ReadTimeout("no answer yet", request=request)
        return super()._act(request)


class Late(World):
    """A world in which the first attempt's submission is held up."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        super().__init__(folder, patch)
        self.ray = self.wire = SlowWire()
        self.restart()
        self.ran: list[str] = []
        self._started = 0
        self.add()
        self.wire.holds = True
        self.passes(2)
        assert (self.job().state, self.ray.taken, len(self.wire.held)) == ("starting", [], 1)

    def arrive(self) -> None:
        """What was held up reaches the Ray that is there now."""
        held, self.wire.held = self.wire.held, []
        for request in held:
            self.wire._submit(json.loads(request.content))
        self.start_drivers()

    def start_drivers(self) -> None:
        """Let each driver that Ray has started since claim its attempt: begin to run, or exit."""
        for session, submission in self.ray.taken[self._started :]:
            self._started += 1
            command = shlex.split(str(self.ray.bodies[submission]["entrypoint"]))
            asked = parse_arguments(command[command.index("workers.main") + 1 :])
            attempt = claim(self.bucket, asked.project, asked.job, asked.attempt, partial(str, session))
            if attempt is None:
                self.ray.jobs[submission] = "FAILED"
                continue
            assert attempt.submission_id == submission
            self.ran.append(submission)
            if self.wish(attempt.number) == "run" and self.job().attempt == attempt.number:
                self.began()

    def go_on(self, passes: int, seconds: float = 1) -> None:
        for _ in range(passes):
            self.passes(1, seconds)
            self.start_drivers()

    def finish(self) -> None:
        """Let the present attempt succeed: then nothing of an older one is wanted or runs."""
        self.go_on(6)
        assert self.job().state == "running"
        self.result(f"{self.job().attempt}-0-x", "succeeded", Reason.COMPLETED)
        self.ray.jobs[self.submission()] = "SUCCEEDED"
        self.go_on(1)
        assert self.job().state == "succeeded"
        assert set(Counter(self.ran).values()) == {1}, "no attempt runs twice"


@pytest.fixture
def late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Late]:
    made = Late(tmp_path, monkeypatch)
    yield made
    made.store._engine.dispose()


@pytest.mark.parametrize("passes", range(8))
def test_a_submission_for_a_ray_that_was_restarted_is_refused_whenever_it_arrives(late: Late, passes: int) -> None:
    late.ray.restart("session-2")
    late.wire.holds = False
    late.go_on(passes)
    late.arrive()
    late.finish()
    assert ("session-2", f"{job_id(1)}-1") in late.ray.taken, "the new Ray knows nothing of it, so it takes it"
    assert sorted(late.ray.posts) == [f"{job_id(1)}-1", f"{job_id(1)}-2"], "an id is for one session"
    assert late.ran == [f"{job_id(1)}-2"]
    assert late.job().faults == 0


@pytest.mark.parametrize("place", ["job.json", "attempt.json", "/api/jobs/"])
def test_a_ray_that_is_restarted_while_the_attempt_is_written_down_does_not_run_it(late: Late, place: str) -> None:
    """The look at its session was just before."""

    def restarts(effect: str) -> None:
        if effect.startswith("before") and effect.endswith(place) and late.ray.session == "session-1":
            late.ray.restart("session-2")

    late.wire.holds = False
    late.wire.hook = late.bucket.hook = restarts
    late.go_on(1)
    assert late.ray.taken == [("session-2", f"{job_id(1)}-1")]
    late.arrive()
    late.finish()
    assert late.ran == [f"{job_id(1)}-2"]


@pytest.mark.parametrize("passes", range(8))
def test_a_submission_that_was_given_up_is_refused_by_the_same_ray(late: Late, passes: int) -> None:
    late.go_on(1, seconds=late.settings.start_deadline)
    assert (late.job().state, late.wish(1)) == ("recovering", "superseded")
    late.wire.holds = False
    late.go_on(passes)
    late.arrive()
    late.finish()
    assert ("session-1", f"{job_id(1)}-1") in late.ray.taken
    assert late.ran == [f"{job_id(1)}-2"]


def test_a_submission_that_arrives_in_time_runs_and_is_not_posted_again(late: Late) -> None:
    late.wire.holds = False
    late.arrive()
    late.finish()
    assert late.ran == late.ray.posts == [f"{job_id(1)}-1"]


def test_of_a_submission_and_its_repetition_one_runs(late: Late) -> None:
    late.go_on(3)
    assert len(late.wire.held) > 1
    late.arrive()
    late.finish()
    assert late.ran == [f"{job_id(1)}-1"]


def test_a_driver_that_starts_just_before_its_attempt_is_given_up_is_told(late: Late) -> None:
    """Between the look at Ray, which knew nothing, and the end of the attempt: it has claimed, and may run for the
    moment until it reads what is wanted of it."""

    def arrives(effect: str) -> None:
        if effect == f"before put {late.layout().control(1)}":
            late.arrive()

    late.bucket.hook = arrives
    late.go_on(1, seconds=late.settings.start_deadline)
    assert late.ran == [f"{job_id(1)}-1"]
    assert (late.job().state, late.wish(1)) == ("recovering", "superseded")
    late.wire.holds = False
    assert late.ray.jobs[f"{job_id(1)}-1"] in ("PENDING", "RUNNING"), "so it reads its control object"
    late.ray.jobs[f"{job_id(1)}-1"] = "SUCCEEDED"
    late.finish()
    assert late.ran == [f"{job_id(1)}-1", f"{job_id(1)}-2"]
