"""Child processes: started in sessions of their own, watched, restarted, and ended to the last descendant.

Ray's job entrypoints and workers leave its process group, so a group kill does not reach them. As their
subreaper we inherit every orphan instead, and `end` finds them all as descendants.
"""

import ctypes
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit

import psutil

TICK = 0.1
"""Seconds between two looks at everything."""

_PR_SET_CHILD_SUBREAPER = 36
_KILL_PATIENCE = 10.0


class GaveUp(Exception):
    """A child died too often."""


def become_subreaper() -> bool:
    """Make every orphaned descendant a child of this process. False where the system cannot (not Linux)."""
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


class StopSignals:
    """Counts SIGINT, SIGTERM and SIGHUP: the first asks to stop, a second to hurry."""

    def __init__(self) -> None:
        self.received = 0

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received += 1

    def stop(self) -> bool:
        return self.received > 0

    def hurry(self) -> bool:
        return self.received > 1


def is_free(port: int) -> bool:
    """Whether nobody listens on this loopback port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_ports(count: int, *, avoid: Iterable[int] = ()) -> list[int]:
    """Return that many distinct free loopback ports, none of them in `avoid`."""
    taken, ports = set(avoid), list[int]()
    with ExitStack() as open_until_all_are_chosen:
        while len(ports) < count:
            held = open_until_all_are_chosen.enter_context(socket.socket())
            held.bind(("127.0.0.1", 0))
            port = int(held.getsockname()[1])
            if port not in taken:
                ports.append(port)
    return ports


def http_get(url: str, *, token: str = "", timeout: float = 3.0) -> tuple[int, bytes] | None:
    """Return status and body of one GET, past any proxy; None if nobody answers."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    try:
        target = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        connection.request("GET", target, headers={"Authorization": f"Bearer {token}"} if token else {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


@dataclass
class Restarts:
    """How often one child may die: a pure record of crashes, each with a longer pause after it."""

    limit: int = 5
    window: float = 300.0
    crashes: list[float] = field(default_factory=list)

    def pause(self, now: float) -> float | None:
        """Note a crash; return the seconds to wait before the next start, None if there were too many."""
        self.crashes = [at for at in self.crashes if now - at < self.window] + [now]
        if len(self.crashes) > self.limit:
            return None
        return 0.5 * float(2 ** (len(self.crashes) - 1))


@dataclass
class Child:
    """One program to keep running."""

    name: str
    title: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    is_ready: Callable[[], bool]
    patience: float = 60.0
    """Seconds from start to the first answer."""
    after: "Child | None" = None
    """Whose first answer to wait for."""
    owns_orphans: bool = False
    """Whether orphans that are in no other child's tree are this one's (Ray's are)."""
    restarts: Restarts = field(default_factory=Restarts)
    process: "subprocess.Popen[bytes] | None" = None
    started_at: float = 0.0
    start_at: float = 0.0
    ready: bool = False
    was_ready: bool = False

    def start(self) -> None:
        """Start it in a session of its own, with its output appended to its log."""
        self.started_at, self.ready = time.monotonic(), False
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(  # every word is ours, or a path that we found  # nosec B603
                self.command,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def log_tail(self, lines: int = 8) -> str:
        with suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return ""


def tree(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants, as far as they still exist."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def marked(variable: str, value: str) -> list[psutil.Process]:
    """Return the processes of this user whose environment says `variable=value`, except this one."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(variable) == value:
                found.append(process)
    return found


def living(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Leave out what has ended, zombies included."""
    alive = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


def end(
    find: Callable[[], list[psutil.Process]], grace: float, *, hurry: Callable[[], bool] = lambda: False
) -> list[psutil.Process]:
    """SIGTERM to all that `find` returns, again and again as more turn up; SIGKILL after `grace` seconds.

    Returns what even SIGKILL did not end: an empty list, unless the system is in trouble.
    """
    deadline = time.monotonic() + grace
    asked: set[psutil.Process] = set()
    quiet = 0
    while quiet < 2:  # one look can miss a process that changes parents during it
        remaining = living(find())
        quiet = 0 if remaining else quiet + 1
        late = time.monotonic() - deadline
        if late > _KILL_PATIENCE:
            return remaining
        for process in remaining:
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if late > 0 or hurry():
                    process.kill()
                elif process not in asked:
                    asked.add(process)
                    process.terminate()
        time.sleep(TICK / 2)
    return []


class Supervisor:
    """Starts children in order, restarts those that die, and at the end leaves no descendant behind."""

    def __init__(self, children: Sequence[Child], say: Callable[[str], None], signals: StopSignals) -> None:
        self.children = list(children)
        self._say = say
        self._signals = signals

    def run(self, on_ready: Callable[[], None]) -> None:
        """Keep the children running until a stop signal; call `on_ready` once all have answered.

        Raises GaveUp when one dies too often. The caller ends what is left, with `end_all`.
        """
        announced = False
        while not self._signals.stop():
            for child in self.children:
                self._look_at(child)
            self._reap_orphans()
            if not announced and all(child.ready for child in self.children):
                announced = True
                on_ready()
            time.sleep(TICK)

    def end_all(self, first: Child, *, grace: float = 5.0) -> list[psutil.Process]:
        """End `first`, then every descendant in whatever session. Returns what could not be ended."""
        if first.process is not None:
            pid = first.process.pid
            end(lambda: tree(pid), grace, hurry=self._signals.hurry)
        left = end(self._descendants, grace, hurry=self._signals.hurry)
        for child in self.children:
            if child.process is not None:
                child.process.poll()
        deadline = time.monotonic() + grace
        self._reap_orphans()
        while self._zombies() and time.monotonic() < deadline:
            time.sleep(TICK / 2)
            self._reap_orphans()
        return left

    def _look_at(self, child: Child) -> None:
        now = time.monotonic()
        if self._signals.stop():
            return
        if child.process is None:
            if now >= child.start_at and (child.after is None or child.after.was_ready):
                child.start()
        elif (code := child.process.poll()) is not None:
            self._restart(child, f"ended with {_exit_words(code)}")
        elif not child.ready:
            self._probe(child, now)

    def _probe(self, child: Child, now: float) -> None:
        if child.is_ready():
            child.ready = True
            again = " again" if child.was_ready else ""
            child.was_ready = True
            self._say(f"{child.title}: ready{again} in {time.monotonic() - child.started_at:.1f} s")
        elif now - child.started_at > child.patience:
            self._restart(child, f"did not answer within {child.patience:.0f} s")

    def _restart(self, child: Child, what: str) -> None:
        pause = child.restarts.pause(time.monotonic())
        self._end_leftovers(child)
        child.process, child.ready = None, False
        if pause is None:
            raise GaveUp(
                f"{child.title} {what}, {len(child.restarts.crashes)} times in "
                f"{child.restarts.window / 60:.0f} minutes. The end of {child.log}:\n{child.log_tail()}"
            )
        child.start_at = time.monotonic() + pause
        self._say(f"{child.title}: {what}; starting it again in {pause:g} s (see {child.log})")

    def _end_leftovers(self, child: Child) -> None:
        """End what one dead or silent child left running."""
        if child.process is None:
            return
        leader = child.process.pid
        find = self._orphans_of_none if child.owns_orphans else lambda: _session(leader)
        end(find, 2.0, hurry=self._signals.stop)
        child.process.wait()

    def _orphans_of_none(self) -> list[psutil.Process]:
        others = [other.process.pid for other in self.children if other.process and not other.owns_orphans]
        spared = {process for pid in others for process in tree(pid)}
        return [process for process in self._descendants() if process not in spared]

    def _descendants(self) -> list[psutil.Process]:
        return psutil.Process().children(recursive=True)

    def _reap_orphans(self) -> None:
        """Collect the exit status of processes that became ours when their parents died."""
        while (pid := _ended_child()) is not None and pid not in self._own():
            os.waitpid(pid, 0)

    def _zombies(self) -> list[psutil.Process]:
        """Return the orphans that have ended and not let go yet: of one with much memory and many threads the system
        shows that a moment before it can be collected."""
        zombies = []
        for process in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                if process.pid not in self._own() and process.status() == psutil.STATUS_ZOMBIE:
                    zombies.append(process)
        return zombies

    def _own(self) -> set[int]:
        return {child.process.pid for child in self.children if child.process is not None}


def _ended_child() -> int | None:
    """Return a child that has ended, without collecting its exit status; None if there is none.

    A system call: to look at every child's state many times a second takes some percent of a processor.
    """
    if sys.platform != "linux":  # no subreaper there, so no orphans
        return None
    try:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return ended.si_pid if ended is not None else None


def _session(leader: int) -> list[psutil.Process]:
    """Return the living members of a session; they outlive its leader."""
    members = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == leader:
                members.append(process)
    return members


def _exit_words(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
