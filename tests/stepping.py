"""Work that goes from one effect to the next when a test says so: any interleaving of several, the same each time.

An effect is a call on the bucket or a transaction of the database. Each work is a thread, of which one at a time runs;
it waits before each of its effects, and whoever dies there has done nothing of it.
"""

import threading
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from tests.fakes import Crash, MemoryBucket

_here = threading.local()


class Work:
    """Something that is done effect by effect."""

    def __init__(self, do: Callable[[], None]) -> None:
        self._do = do
        self._go, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        self._dies = False
        self._error: BaseException | None = None
        self.over = False
        self.next = ""
        """The effect before which it waits: read or write the database, look into the bucket, put, delete."""
        threading.Thread(target=self._run, daemon=True).start()
        self._go_on()

    def step(self) -> None:
        """Let it carry out one effect, and all that follows up to the next; raises what it raises."""
        if not self.over:
            self._go_on()

    def run_to(self, *effects: str) -> None:
        """Let it go on until it waits before one of these, or to its end; at least one effect."""
        self.step()
        while not self.over and self.next not in effects:
            self.step()

    def finish(self) -> None:
        while not self.over:
            self.step()

    def kill(self) -> None:
        """Let it die where it is; nothing that it would do on its way out has an effect."""
        self._dies = True
        self.finish()

    def _go_on(self) -> None:
        self._go.release()
        self._stands.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self) -> None:
        _here.work = self
        self._go.acquire()
        try:
            self._do()
        except Crash:
            pass
        except BaseException as error:
            self._error = error
        self.over = True
        self._stands.release()

    def wait(self, effect: str) -> None:
        if not self._dies:
            self.next = effect
            self._stands.release()
            self._go.acquire()
        if self._dies:
            raise Crash


def before(effect: str) -> None:
    """Wait, if this thread is a work."""
    work: Work | None = getattr(_here, "work", None)
    if work is not None:
        work.wait(effect)


class SteppedBucket(MemoryBucket):
    """S3 in memory, each call of which is an effect."""

    def put(self, key: str, body: bytes) -> None:
        before("put")
        super().put(key, body)

    def get(self, key: str) -> bytes:
        before("look")
        return super().get(key)

    def objects(self, prefix: str) -> Any:
        before("look")
        return super().objects(prefix)

    def delete(self, keys: list[str]) -> None:
        before("delete")
        super().delete(keys)


def make_steps(engine: sa.Engine) -> None:
    """Make each transaction an effect: it waits before it takes SQLite's lock, or before its first statement."""

    def statement(_connection: Any, _cursor: Any, text: str, *_: Any) -> None:
        if text.startswith("BEGIN"):
            before("write" if text == "BEGIN IMMEDIATE" else "read")

    def begin(connection: sa.Connection) -> None:
        before("write" if connection.get_execution_options().get("writes") else "read")

    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "before_cursor_execute", statement)
    else:
        sa.event.listen(engine, "begin", begin)
