"""As much of HTTP/1.1 as a proxy in front of an S3 server needs: whole messages over asyncio streams."""

import asyncio
from asyncio import StreamReader, StreamWriter
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

_PIECE_BYTES = 64 * 2**10
_OF_ONE_CONNECTION = {"connection", "expect", "keep-alive", "transfer-encoding", "content-length"}
"""What a message says of the connection that it came by, not of itself. Lengths are written anew."""

Headers = list[tuple[str, str]]


@dataclass
class Request:
    method: str
    target: str
    """Path and query as they came: the client's signature covers them, and the Host header too."""
    headers: Headers
    body: bytes = b""

    @property
    def expects(self) -> bool:
        """Whether the client waits for a word before it sends the body."""
        return bool(_find(self.headers, "expect"))

    def head(self) -> bytes:
        """Return the head for a server that shall close the connection after it has answered."""
        return _head(f"{self.method} {self.target} HTTP/1.1", self.headers, len(self.body), closes=True)


@dataclass
class Answer:
    status: str
    """Code and reason: `200 OK`."""
    headers: Headers
    body: bytes = b""
    length: int | None = None
    """What Content-Length says: more than the body after HEAD. None leaves it out, and only the end of the connection
    ends the body."""

    def head(self) -> bytes:
        return _head(f"HTTP/1.1 {self.status}", self.headers, self.length, closes=self.length is None)


async def read_request(reader: StreamReader) -> Request | None:
    """Return the head of the next request, its body still to be read; None when the client has gone."""
    try:
        first, headers = await _read_head(reader)
    except asyncio.IncompleteReadError:
        return None
    method, target, _ = first.split(" ", 2)
    return Request(method, target, headers)


async def read_body(request: Request, reader: StreamReader, writer: StreamWriter, rate: float = inf) -> None:
    """Read the body of a request, at so many bytes per second."""
    if request.expects:
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    missing, pieces = int(_find(request.headers, "content-length") or 0), []
    while missing:
        pieces.append(await reader.readexactly(min(missing, _PIECE_BYTES)))
        missing -= len(pieces[-1])
        await asyncio.sleep(len(pieces[-1]) / rate)
    request.body = b"".join(pieces)


async def write_body(body: bytes, writer: StreamWriter, rate: float = inf) -> None:
    """Write the body of an answer, at so many bytes per second."""
    for start in range(0, len(body), _PIECE_BYTES):
        piece = body[start : start + _PIECE_BYTES]
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(len(piece) / rate)


async def read_answer(reader: StreamReader, method: str) -> Answer:
    """Read a whole answer from a server that closes the connection after it."""
    first, headers = await _read_head(reader)
    status = first.split(" ", 1)[1]
    length = _find(headers, "content-length")
    if method == "HEAD" or status.startswith(("204", "304")):
        return Answer(status, headers, length=int(length or 0))
    if _find(headers, "transfer-encoding").lower() == "chunked":
        body = await _read_chunks(reader)
    else:
        body = await (reader.readexactly(int(length)) if length else reader.read())
    return Answer(status, headers, body, len(body))


async def _read_head(reader: StreamReader) -> tuple[str, Headers]:
    text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = text[:-4].split("\r\n")
    pairs = (line.split(":", 1) for line in lines)
    return first, [(name, value.strip()) for name, value in pairs]


async def _read_chunks(reader: StreamReader) -> bytes:
    pieces = []
    while size := int((await reader.readline()).split(b";")[0], 16):
        pieces.append(await reader.readexactly(size))
        await reader.readline()
    return b"".join(pieces)


def _find(headers: Headers, name: str) -> str:
    return next((value for key, value in headers if key.lower() == name), "")


def _head(first: str, headers: Iterable[tuple[str, str]], length: int | None, closes: bool = False) -> bytes:
    lines = [first, *(f"{key}: {value}" for key, value in headers if key.lower() not in _OF_ONE_CONNECTION)]
    lines += [f"Content-Length: {length}"] if length is not None else []
    lines += ["Connection: close"] if closes else []
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1")
