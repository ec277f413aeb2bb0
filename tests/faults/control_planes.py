"""Control planes that live for a moment: `lockstep-server serve`, forked from a process that has imported it once.

A cold start takes Python a second or two, a fork milliseconds; from then on both do the same. The parent has one thread
and no connection to anything, so that a child begins as a new process would.

    with control_planes(environment, log) as planes:
        life = planes.start(port)
        planes.kill(life)

`python -m tests.faults.control_planes` is that parent: it reads `start PORT` and `wait PID`, and answers each with a
number.
"""

import gc
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from service.cli import serve

_ROOT = Path(__file__).parents[2]


class ControlPlanes:
    """The test's end; made by `control_planes`."""

    def __init__(self, parent: "subprocess.Popen[str]", log: Path) -> None:
        self._parent, self._log = parent, log

    def start(self, port: int) -> int:
        """Start a control plane on a port; return its process id."""
        return self._ask(f"start {port}")

    def kill(self, process: int) -> None:
        """kill -9; it must still have been alive. Until it has been waited for, its id belongs to nobody else."""
        os.kill(process, signal.SIGKILL)
        code = self._ask(f"wait {process}")
        assert code == -signal.SIGKILL, f"a control plane ended by itself with {code}:\n{self.said()}"

    def said(self) -> str:
        """Return the end of what the control planes have logged."""
        return self._log.read_text(errors="replace")[-5000:]

    def _ask(self, question: str) -> int:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(f"{question}\n")
        self._parent.stdin.flush()
        answer = self._parent.stdout.readline()
        assert answer, f"the process that forks control planes has ended:\n{self.said()}"
        return int(answer)


@contextmanager
def control_planes(environment: Mapping[str, str], log: Path) -> Iterator[ControlPlanes]:
    """Give a maker of control planes; when the block ends, none of their processes is left."""
    with (
        open(log, "wb") as file,
        subprocess.Popen(
            [sys.executable, "-m", "tests.faults.control_planes"],
            cwd=_ROOT,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            start_new_session=True,
        ) as parent,
    ):
        try:
            yield ControlPlanes(parent, log)
        finally:
            os.killpg(parent.pid, signal.SIGKILL)


def steady_port() -> int:
    """Return a free port that a kernel, left to its defaults, gives to no client.

    It stays free while nobody listens there, and no client that tries to connect to it can be given it and meet itself.
    """
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", random.randint(20_000, 30_000)))
            except OSError:
                continue
            return int(probe.getsockname()[1])


def main() -> None:
    for name in ("service.app", "service.server"):  # `serve` itself imports them late
        import_module(name)
    gc.freeze()
    assert threading.active_count() == 1, "a fork takes no thread along"
    for line in sys.stdin:
        match line.split():
            case ["start", port]:
                answer = _fork(port)
            case ["wait", process]:
                answer = _wait(int(process))
        print(answer, flush=True)
    os.killpg(0, signal.SIGKILL)  # the test is gone; so are we all


def _fork(port: str) -> int:
    if process := os.fork():
        return process
    code = 1
    try:
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        os.environ["LOCKSTEP_PORT"] = port
        os.dup2(2, 1)  # what it says goes to the log; standard output is for our answers
        serve()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


if __name__ == "__main__":
    main()
