"""A reverse proxy in front of an S3 server that does to requests what networks, load balancers and stores do to them.

    with fault_proxy(server.endpoint) as proxy:  # give proxy.url to clients as AWS_ENDPOINT_URL_S3
        with proxy.faults(Fault("error", rate=0.2, seed=1), Fault("delay", seconds=0.1, method="GET")):
            ...
        assert proxy.counts["error"] > 0

The fault model. A request meets every fault whose filter fits and whose draw says so; of those that decide how it ends,
the first in order counts.

| kind         | carried out | what the client sees                                                            |
|--------------|-------------|---------------------------------------------------------------------------------|
| `delay`      | yes         | the answer, `seconds` later                                                     |
| `slow`       | yes         | the bodies of request and answer at `bytes_per_second`                          |
| `error`      | no          | this `status`, and in the body S3's `code`: 503 SlowDown, 403 ExpiredToken, …   |
| `reset`      | no          | a connection reset instead of an answer                                         |
| `black_hole` | no          | nothing, and the connection stays open                                          |
| `torn`       | broken off  | a reset, when `share` of the request's body has gone on to the store            |
| `lost_reply` | yes         | a connection reset instead of an answer                                         |
| `reset_body` | yes         | head and `share` of the answer's body, then a reset                             |
| `cut`        | yes         | the same, then an orderly end, though Content-Length promised more              |
| `cut_silent` | yes         | the same without Content-Length: nothing tells that something is missing        |
| `flip`       | yes         | one bit of the answer's body is another, or of the request's body if it has one |

An outage (`leave`, `come_back`) is no fault of a request: connections are refused, and open ones reset.

As a process of its own: `python -m tests.faults.proxy --upstream URL --port N --control FILE`. FILE is
`{"away": false, "faults": [{"kind": "error", "rate": 0.2}]}`, looked at often; replace it by renaming another over it.
What was asked for and what happened is in FILE.counts, likewise. The address is the first line on standard output.
"""

import argparse
import asyncio
import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from asyncio import StreamReader, StreamWriter
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Literal, NoReturn
from urllib.parse import parse_qs, unquote, urlsplit

from tests.faults.messages import Answer, Request, read_answer, read_body, read_request, write_body

Kind = Literal[
    "delay", "slow", "error", "reset", "black_hole", "torn", "lost_reply", "reset_body", "cut", "cut_silent", "flip"
]
_DELAYS: set[Kind] = {"delay", "slow"}
_WITHOUT_THE_STORE: set[Kind] = {"error", "reset", "black_hole"}
_OF_THE_ANSWER: set[Kind] = {"reset_body", "cut", "cut_silent"}
"""These leave alone an answer that has no body."""
_HOST = "127.0.0.1"


@dataclass(frozen=True)
class Fault:
    """What goes wrong, with which requests, and how often."""

    kind: Kind
    rate: float = 1.0
    """The share of the requests that fit. Whether the n-th request of a method to a key is hit follows from `seed`
    alone, whatever the threads do."""
    seed: int = 0
    method: str = ""
    """A regular expression for the whole method; empty fits all."""
    target: str = ""
    """A regular expression to be found in `/bucket/key?query`, unquoted."""
    access_key: str = ""
    """Only requests signed by this key."""
    times: int | None = None
    """A burst: so many requests, then never again."""
    status: int = 500
    code: str = "InternalError"
    seconds: float = 0.0
    bytes_per_second: float = inf
    share: float = 0.5

    def fits(self, request: Request) -> bool:
        signed_by = next((value for name, value in request.headers if name.lower() == "authorization"), "")
        return (
            bool(re.fullmatch(self.method or ".*", request.method))
            and bool(re.search(self.target, unquote(request.target)))
            and self.access_key in signed_by
        )

    def draws(self, request: Request, number: int) -> bool:
        """Decide about the `number`-th request of this kind."""
        digest = hashlib.sha256(f"{self.seed} {_identity(request)} {number}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.rate * 2**64


_NOTHING = Fault("delay")


def _identity(request: Request) -> str:
    """Return what repeats itself when a client tries again; upload ids and signatures differ from run to run."""
    parts = urlsplit(request.target)
    return f"{request.method} {parts.path} {parse_qs(parts.query).get('partNumber', [])}"


class _End(Exception):
    """This connection is over: reset, or closed in order."""

    def __init__(self, resets: bool) -> None:
        self.resets = resets


class FaultProxy:
    """The proxy; made by `fault_proxy`. Its methods may be called from any thread."""

    def __init__(self, upstream: str, port: int, loop: asyncio.AbstractEventLoop) -> None:
        where = urlsplit(upstream)
        self._upstream = (where.hostname or _HOST, where.port or 80)
        self._port, self._loop = port, loop
        self._listening: socket.socket | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self._lock = threading.Lock()
        self._faults: Sequence[Fault] = ()
        self._seen: Counter[str] = Counter()
        self._left: dict[Fault, float] = {}
        self.requests: Counter[str] = Counter()
        """By method, those that met a fault too."""
        self.counts: Counter[str] = Counter()
        """Faults that happened, by kind."""

    @property
    def url(self) -> str:
        return f"http://{_HOST}:{self._port}"

    def set(self, *faults: Fault) -> None:
        """From now on these faults happen and no others."""
        with self._lock:
            self._faults = faults
            self._left = {fault: inf if fault.times is None else fault.times for fault in faults}
            self._seen.clear()

    @contextmanager
    def faults(self, *faults: Fault) -> Iterator[None]:
        """These faults happen inside the block."""
        self.set(*faults)
        try:
            yield
        finally:
            self.set()

    def leave(self) -> None:
        """Begin an outage, if there is none."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()

    def come_back(self) -> None:
        """End an outage, if there is one: listen at the same address again."""
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    async def _listen(self) -> None:
        if self._listening is not None:
            return
        self._listening = socket.create_server((_HOST, self._port))
        self._listening.setblocking(False)
        # Else the kernel takes whole bodies at once, whatever the rate at which they are read.
        self._listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**17)
        self._port = self._listening.getsockname()[1]
        self._loop.add_reader(self._listening, self._accept, self._listening)

    def _accept(self, listening: socket.socket) -> None:
        with suppress(OSError):  # the client has gone already
            connection, _ = listening.accept()
            task = self._loop.create_task(self._serve(connection))
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)

    async def _close(self) -> None:
        if self._listening is not None:
            self._loop.remove_reader(self._listening)
            self._listening.close()
            self._listening = None
        await asyncio.sleep(0)  # by now every connection is in the hands of its task
        tasks = list(self._serving)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, connection: socket.socket) -> None:
        """Serve one connection until either side ends it."""
        reader, writer = await asyncio.open_connection(sock=connection)
        try:
            while (request := await read_request(reader)) is not None:
                await self._handle(request, reader, writer)
        except _End as end:
            if not end.resets:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client has gone, or the server behind us
        finally:
            _reset(writer)  # unless it is closed

    async def _handle(self, request: Request, reader: StreamReader, writer: StreamWriter) -> None:
        delays, fault = self._meet(request)
        rate = min((delay.bytes_per_second for delay in delays), default=inf)
        await asyncio.sleep(sum(delay.seconds for delay in delays))
        if fault.kind in _WITHOUT_THE_STORE:
            await self._refuse(fault, request, reader, writer)
            return
        await read_body(request, reader, writer, rate)
        if fault.kind == "torn":
            await self._tear(request, fault.share)
        if fault.kind == "flip" and request.body:
            fault, request.body = _NOTHING, _flipped(request.body)
        answer = await self._forward(request)
        if fault.kind == "lost_reply":
            raise _End(resets=True)
        if fault.kind == "flip":
            answer.body = _flipped(answer.body)
        if fault.kind in _OF_THE_ANSWER and answer.body:
            await self._break_off(fault, answer, writer)
        if fault.kind in _OF_THE_ANSWER:
            self._count(fault, -1)  # nothing to break off
        await self._send(answer, writer, rate)

    async def _refuse(self, fault: Fault, request: Request, reader: StreamReader, writer: StreamWriter) -> None:
        if fault.kind == "black_hole":
            await asyncio.Event().wait()
        if fault.kind == "reset":
            raise _End(resets=True)
        answer = _refusal(fault, request)
        if request.expects:
            answer.length = None  # its body will not come, so nothing else can come by this connection
        else:
            await read_body(request, reader, writer)
        await self._send(answer, writer)

    async def _break_off(self, fault: Fault, answer: Answer, writer: StreamWriter) -> NoReturn:
        part = answer.body[: int(len(answer.body) * fault.share)]
        length = None if fault.kind == "cut_silent" else answer.length
        writer.write(replace(answer, length=length).head())
        await write_body(part, writer)
        raise _End(resets=fault.kind == "reset_body")

    def _meet(self, request: Request) -> tuple[list[Fault], Fault]:
        """Return what slows this request down, and what decides how it ends; count both."""
        with self._lock:
            number = self._seen[_identity(request)]
            self._seen[_identity(request)] += 1
            self.requests[request.method] += 1
            met = [
                fault
                for fault in self._faults
                if self._left[fault] > 0 and fault.fits(request) and fault.draws(request, number)
            ]
        delays = [fault for fault in met if fault.kind in _DELAYS]
        deciding = [fault for fault in met if fault.kind not in _DELAYS][:1]
        for fault in delays + deciding:
            self._count(fault, 1)
        return delays, deciding[0] if deciding else _NOTHING

    def _count(self, fault: Fault, times: int) -> None:
        with self._lock:
            self.counts[fault.kind] += times
            if fault in self._left:
                self._left[fault] -= times

    async def _forward(self, request: Request) -> Answer:
        """Let the server answer, on a connection of its own."""
        reader, writer = await asyncio.open_connection(*self._upstream)
        try:
            writer.write(request.head() + request.body)
            await writer.drain()
            return await read_answer(reader, request.method)
        finally:
            writer.transport.abort()

    async def _tear(self, request: Request, share: float) -> NoReturn:
        """Let the server have the head and a share of the body, and then a reset."""
        _, writer = await asyncio.open_connection(*self._upstream)
        writer.write(request.head() + request.body[: int(len(request.body) * share)])
        await writer.drain()
        _reset(writer)
        raise _End(resets=True)

    async def _send(self, answer: Answer, writer: StreamWriter, rate: float = inf) -> None:
        writer.write(answer.head())
        await write_body(answer.body, writer, rate)
        if answer.length is None:
            raise _End(resets=False)


def _refusal(fault: Fault, request: Request) -> Answer:
    body = f'<?xml version="1.0"?><Error><Code>{fault.code}</Code><Message>a fault</Message></Error>'.encode()
    headers = [("Content-Type", "application/xml")]
    return Answer(f"{fault.status} {fault.code}", headers, b"" if request.method == "HEAD" else body, len(body))


def _flipped(body: bytes) -> bytes:
    at = len(body) // 2
    return body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :] if body else body


def _reset(writer: StreamWriter) -> None:
    """End a connection by a reset: closing with a lingering time of zero does that."""
    with suppress(OSError):
        connection: socket.socket = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextmanager
def fault_proxy(upstream: str, port: int = 0) -> Iterator[FaultProxy]:
    """Run a proxy in front of the server at this URL, in a thread, until the block ends; port 0 takes a free one."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True, name="fault proxy")
    thread.start()
    proxy = FaultProxy(upstream, port, loop)
    proxy.come_back()
    try:
        yield proxy
    finally:
        proxy.leave()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="A proxy in front of an S3 server that makes faults.")
    parser.add_argument("--upstream", required=True, help="the server's URL")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--control", type=Path, required=True, help="a JSON file that says which faults to make")
    arguments = parser.parse_args()
    with fault_proxy(arguments.upstream, arguments.port) as proxy:
        obey_for_ever(proxy, arguments.control, lambda: True, lambda: print(proxy.url, flush=True))


def obey_for_ever(
    proxy: FaultProxy, control: Path, goes_on: Callable[[], bool], on_first: Callable[[], None] = lambda: None
) -> None:
    """Make the faults that a file asks for, while `goes_on` says so; `on_first` hears of the first look."""
    wish = _obey(proxy, control, "")
    on_first()
    while goes_on():
        time.sleep(0.05)
        wish = _obey(proxy, control, wish)


def _obey(proxy: FaultProxy, control: Path, known: str) -> str:
    """Do what the file says, if it is not what is known already; write what has happened; return what it says."""
    if (text := control.read_text() if control.exists() else "{}") != known:
        wish = json.loads(text)
        proxy.set(*(Fault(**fault) for fault in wish.get("faults", [])))
        (proxy.leave if wish.get("away") else proxy.come_back)()
    counts = control.with_name(f"{control.name}.counts")
    partial = counts.with_suffix(".partial")
    partial.write_text(json.dumps({"wish": text, "requests": proxy.requests, "faults": proxy.counts}))
    os.replace(partial, counts)
    return text


if __name__ == "__main__":
    main()
