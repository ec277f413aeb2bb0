"""Live answers by server-sent events: a feed is looked at again and again, and what is new is sent.

The looks block, so they run in threads of their own: a store that hangs must not take those of the other routes.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from contextvars import copy_context
from functools import partial
from itertools import islice
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import Receive, Scope, Send

from api.errors import ApiError, Fault, InvalidData, InvalidSpec, StorageError, Unavailable
from api.jobs import StreamError
from service.live import Feed, Message
from service.rates import Places

MEDIA_TYPE = "text/event-stream"
_HEADERS = {"Cache-Control": "no-cache, no-store", "X-Accel-Buffering": "no"}
_BUCKET_THREADS, _DATABASE_THREADS = 16, 4
_BATCH = 500
"""Messages that are read ahead of a client."""
_RETRY_MILLISECONDS = 1000
"""How long a browser shall wait before it connects again."""
_FULL = "the most live streams that {whose} at once, {{most}}, are open; close one, or read the lists"
_LAST = ("end", "error")
"""The events of messages after which a stream is closed."""
Stop = asyncio.Future[None]
"""Done when a stream shall end."""
logger = logging.getLogger("lockstep.service")


def wants_stream(accept: str) -> bool:
    """Tell whether an Accept header names the media type of streams, and likes JSON no better. `*/*` does not."""
    weights: dict[str, float] = {}
    for item in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in item.split(";"))
        weights[kind] = _weight(parameters)
    return weights.get(MEDIA_TYPE, 0.0) > 0 and weights[MEDIA_TYPE] >= weights.get("application/json", 0.0)


def _weight(parameters: list[str]) -> float:
    value = next((part[2:] for part in parameters if part.startswith("q=")), "1")
    try:
        return float(value)
    except ValueError:
        return 0.0


def refuse_parameter(request: Request, name: str) -> None:
    """Raise InvalidSpec for a query parameter that only the list has."""
    if name in request.query_params:
        message = f"a live stream has no `{name}`; leave it out, or ask for application/json"
        raise InvalidSpec(f"$.query.{name}: {message}", errors=[Fault(path=f"$.query.{name}", message=message)])


def stream_description(items: str) -> dict[int | str, dict[str, Any]]:
    """Return what OpenAPI shall say of the answer to `Accept: text/event-stream`."""
    text = (
        f"With `Accept: text/event-stream`: {items} as they come, each with the `id` to send back as `Last-Event-ID`; "
        "at the job's end a message `end`, or `error` with a `detail` where what is stored is damaged, after which the "
        "server closes. A comment now and then keeps it alive."
    )
    return {200: {"description": text, "content": {MEDIA_TYPE: {"schema": {"type": "string"}}}}}


class Streams:
    """The open streams of a server.

    `interval`: seconds between two looks; `keep_alive`: longest silence of a stream, in seconds; `limit`: most
    streams at once; `limit_key`, `limit_project`: of one of these.
    """

    def __init__(
        self, interval: float, keep_alive: float, limit: int = 200, limit_key: int = 200, limit_project: int = 200
    ) -> None:
        self._interval, self._keep_alive, self.limit = interval, keep_alive, limit
        self._of_keys = Places(limit_key, _FULL.format(whose="one API key opens"))
        self._of_projects = Places(limit_project, _FULL.format(whose="the keys of one project open"))
        # Two pools: looks that hang on the bucket must not hold up those that need only the database.
        self._on_bucket = ThreadPoolExecutor(_BUCKET_THREADS, thread_name_prefix="stream")
        self._on_database = ThreadPoolExecutor(_DATABASE_THREADS, thread_name_prefix="stream-database")
        self._open: set[Stop] = set()
        self._closed = False

    @property
    def open(self) -> int:
        """How many there are now."""
        return len(self._open)

    def close(self) -> None:
        """End every stream, and open no more. To be called in the event loop of the server."""
        self._closed = True
        for threads in (self._on_bucket, self._on_database):
            threads.shutdown(wait=False, cancel_futures=True)
        for stop in self._open:
            if not stop.done():
                stop.set_result(None)

    def answer(
        self,
        feed: Feed,
        check: Callable[[], object],
        reads_bucket: bool = True,
        key: str = "",
        project: str = "",
    ) -> StreamingResponse:
        """Return the response that follows a feed until the job's end, the client's or ours.

        `check` comes before each batch: an ApiError of it, a key revoked for instance, ends the stream. Too many
        streams are refused, with Unavailable, when the response is about to begin; too many of one API key or project,
        with RateLimited.
        """
        threads = self._on_bucket if reads_bucket else self._on_database
        return _LiveResponse(self._place(key, project), partial(self._body, feed, check, threads))

    @contextmanager
    def _place(self, key: str, project: str) -> Iterator[Stop]:
        """Count as an open stream, in the event loop; Unavailable or RateLimited if there are too many."""
        if len(self._open) >= self.limit:
            raise Unavailable(
                f"the most live streams that this server opens at once, {self.limit}, are open; "
                "close one, or read the lists"
            )
        with self._of_keys.one(key), self._of_projects.one(project):
            stop: Stop = asyncio.get_running_loop().create_future()
            if self._closed:
                stop.set_result(None)
            self._open.add(stop)
            try:
                yield stop
            finally:
                self._open.remove(stop)

    async def _body(
        self, feed: Feed, check: Callable[[], object], threads: ThreadPoolExecutor, stop: Stop
    ) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        try:
            spoken = loop.time()
            yield format_sse_event(retry=_RETRY_MILLISECONDS)
            async for messages in self._batches(feed, check, threads, stop):
                for message in messages:
                    yield format_sse_event(data_str=message.data, id=message.id, event=message.event)
                    if message.event in _LAST:
                        return
                silent = not messages and loop.time() - spoken >= self._keep_alive
                if silent:
                    yield KEEPALIVE_COMMENT
                if silent or messages:
                    spoken = loop.time()
        except ApiError as error:
            logger.info("a stream was ended: %s", error)

    async def _batches(
        self, feed: Feed, check: Callable[[], object], threads: ThreadPoolExecutor, stop: Stop
    ) -> AsyncIterator[list[Message]]:
        """Yield what look after look gives, and an empty batch every now and then while one takes its time."""
        loop = asyncio.get_running_loop()
        told: str | None = None
        while not stop.done():
            items, more = _look(feed), True
            while more and not stop.done():  # the server may stop while a batch is sent
                taking = loop.run_in_executor(threads, copy_context().run, _take, items, check)
                either: set[asyncio.Future[Any]] = {taking, stop}
                while not taking.done() and not stop.done():
                    yield []
                    await asyncio.wait(either, timeout=self._interval, return_when=asyncio.FIRST_COMPLETED)
                if stop.done():
                    return
                messages, trouble = taking.result()
                yield messages
                more = len(messages) == _BATCH and trouble is None
            if trouble not in (None, told):  # once, not at every look
                logger.warning("a stream waits: %s", trouble)
            told = trouble
            await asyncio.wait({stop}, timeout=self._interval)


class _LiveResponse(StreamingResponse):
    """Holds its place among the open streams while it is sent, and no longer, however it ends."""

    def __init__(self, place: AbstractContextManager[Stop], body: Callable[[Stop], AsyncIterator[bytes]]) -> None:
        super().__init__((), headers=_HEADERS, media_type=MEDIA_TYPE)
        self._place, self._body = place, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place as stop:
            self.body_iterator = self._body(stop)
            await super().__call__(scope, receive, send)


def _look(feed: Feed) -> Iterator[Message]:
    """Yield what a look gives. Damaged data are read no better the next time, so they end the stream."""
    try:
        yield from feed.look()
    except InvalidData as error:
        logger.warning("a stream was ended: %s", error)
        detail = f"the bucket holds something that cannot be read: {error}"
        yield Message(StreamError(detail=detail).model_dump_json(), event="error")


def _take(items: Iterator[Message], check: Callable[[], object]) -> tuple[list[Message], str | None]:
    """Return the next messages, at most _BATCH of them, and what will pass: that the database or the bucket fails.

    One look may go on for as long as a slow client reads, so the check is not left to the next one.
    """
    taken: list[Message] = []
    try:
        check()
        for message in islice(items, _BATCH):
            taken.append(message)
    except (StorageError, SQLAlchemyError) as error:
        return taken, str(error)
    return taken, None
