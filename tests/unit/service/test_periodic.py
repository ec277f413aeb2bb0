"""What is called again and again outlives whatever a call does, and ends when it is told to."""

import logging

import pytest
from sqlalchemy.exc import OperationalError

from service.periodic import Periodic


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OperationalError("select", {}, Exception("gone")), "checks: the database does not answer"),
        (KeyError("a bug"), "checks: a bug ended this pass"),
    ],
)
def test_a_call_that_fails_is_followed_by_the_next(
    error: Exception, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def fail() -> None:
        calls.append(periodic.stopping)
        if len(calls) == 3:
            periodic._stop.set()
        raise error

    periodic = Periodic("checks", fail, 0)
    with caplog.at_level(logging.WARNING):
        periodic._run()
    assert calls == [False] * 3
    assert [words in message for message in caplog.messages] == [True] * 3


def test_it_calls_in_a_thread_of_its_own_until_it_is_stopped() -> None:
    calls: list[int] = []
    periodic = Periodic("checks", lambda: calls.append(1), 3600)
    periodic.start()
    periodic.stop()
    assert len(calls) <= 1
    assert periodic.stopping
    assert not periodic._thread.is_alive()
