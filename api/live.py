"""A live stream of the API as an iterator that connects again by itself, from where it was."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Generic, Self, TypeVar

from pydantic import TypeAdapter, ValidationError

from . import __version__
from .errors import InvalidData, RateLimited, Unavailable, Unreachable
from .jobs import Event, LogLine, MetricPoint, Rewind, StreamError
from .sse import Parser

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Kinds = Mapping[str, TypeAdapter[T]]
"""What a stream's messages hold, by their event."""

_POINT: TypeAdapter[MetricPoint | Rewind] = TypeAdapter(MetricPoint)
_REWIND: TypeAdapter[MetricPoint | Rewind] = TypeAdapter(Rewind)
EVENT_KINDS: Kinds[Event] = {"message": TypeAdapter(Event)}
METRIC_KINDS: Kinds[MetricPoint | Rewind] = {"message": _POINT, "rewind": _REWIND}
LOG_KINDS: Kinds[LogLine] = {"message": TypeAdapter(LogLine)}
_ERROR = TypeAdapter(StreamError)

FIRST_PAUSE = 1.0
"""Seconds before a broken stream is asked for again; doubles while there is no answer."""
LONGEST_PAUSE = 5.0

Connect = Callable[[str | None], AbstractContextManager[Iterator[bytes]]]
"""Asks for the stream after an id and gives its bytes. Raises Unreachable where the connection fails or breaks."""


class Stream(Generic[T_co]):
    """The items of a live stream, until the job has ended. Close it to leave earlier.

    A connection that breaks is made again from `last_id` on, so nothing is lost and nothing comes twice. Raises
    Unreachable when neither a message nor a sign of life has come for `patience` seconds after a break was noticed,
    and InvalidData when the server cannot read on.
    """

    def __init__(
        self,
        connect: Connect,
        kinds: Kinds[T_co],
        last_id: str | None,
        patience: float,
        sleep: Callable[[float], None],
        clock: Callable[[], float],
    ) -> None:
        self.last_id = last_id
        """The id of the item that came last: what another stream needs in order to go on after it."""
        self._connect, self._kinds, self._patience = connect, kinds, patience
        self._sleep, self._clock = sleep, clock
        self._items = self._all()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T_co:
        return next(self._items)

    def close(self) -> None:
        self._items.close()

    def _all(self) -> Generator[T_co]:
        pause, broken_since = FIRST_PAUSE, None
        while True:
            parser, trouble = Parser(), "The stream was cut off."
            try:
                with self._connect(self.last_id) as pieces:
                    if (yield from self._of_one_connection(pieces, parser)):
                        return
            except (Unreachable, Unavailable, RateLimited) as error:
                trouble = str(error)
            now = self._clock()
            if broken_since is None or parser.alive:
                pause, broken_since = FIRST_PAUSE, now
            if now - broken_since + pause > self._patience:
                raise Unreachable(f"Gave up after {self._patience:.0f} s. {trouble}")
            self._sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _of_one_connection(self, pieces: Iterator[bytes], parser: Parser) -> Generator[T_co, None, bool]:
        """Yield what comes; return whether that was the end of the job, and not only of the connection."""
        for piece in pieces:
            for message in parser.feed(piece):
                if message.event == "end":
                    return True
                if message.event == "error":
                    raise InvalidData(_parsed(_ERROR, message.data).detail)
                if message.event in self._kinds:  # others are of a newer server
                    item = _parsed(self._kinds[message.event], message.data)
                    self.last_id = self.last_id if message.id is None else message.id or None
                    yield item
        return False


def _parsed(kind: TypeAdapter[T], data: str) -> T:
    try:
        return kind.validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidData(
            f"lockstep {__version__} does not understand a message of a live stream ({first['msg']}). "
            "Is the client as new as the server?"
        ) from error
