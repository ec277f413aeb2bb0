"""Server-sent events as a client reads them: bytes in, messages out.

The format is that of the HTML standard, section 9.2.6 "Interpreting an event stream", without a byte order mark and
without `retry`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

MEDIA_TYPE = "text/event-stream"
_LINE_END = re.compile(rb"\r\n|\n|\r")


@dataclass(frozen=True)
class Message:
    event: str
    """`message` where the sender gave no name."""
    data: str
    id: str | None
    """The newest id of this connection, sent with this message or before it. An empty one stands for the start."""


class Parser:
    """Makes messages of one connection's bytes, however they are cut. A message that never ended is none."""

    def __init__(self) -> None:
        self.alive = False
        """Whether a message or a comment has come; fields alone, a `retry` for instance, say little of a server."""
        self._rest = b""
        self._ended_in_cr = False
        self._id: str | None = None
        self._event = ""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> Iterator[Message]:
        """Yield the messages that end in this piece."""
        if self._ended_in_cr and piece:
            piece = piece.removeprefix(b"\n")  # the second half of a line end whose first half is done with
            self._ended_in_cr = False
        if not piece:
            return
        self._ended_in_cr = piece.endswith(b"\r")
        *lines, self._rest = _LINE_END.split(self._rest + piece)
        for line in lines:
            if line:
                self._field(line.decode(errors="replace"))
            else:
                yield from self._dispatch()

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not name:
            self.alive = True
        elif name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._id = value

    def _dispatch(self) -> Iterator[Message]:
        data, event = self._data, self._event
        self._data, self._event = [], ""
        if data:
            self.alive = True
            yield Message(event or "message", "\n".join(data), self._id)
