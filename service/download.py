"""Answers that are read piece by piece in a few threads, as fast as the client takes them: files, and lines."""

import logging
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import AbstractContextManager, nullcontext, suppress
from time import monotonic
from typing import Any

from anyio import CancelScope, CapacityLimiter, to_thread
from fastapi.responses import StreamingResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import Receive, Scope, Send

from api.errors import ApiError, LockstepError
from api.verification import MEDIA_TYPE
from service.export import File
from service.rates import Places

Check = Callable[[], object]
"""Raises an ApiError once whoever asked may have no more, their key having ended for instance."""
Place = AbstractContextManager[None]
"""Held while an answer is sent; where there is none left, it raises an ApiError in place of the answer."""
_ANYWHERE = nullcontext()

logger = logging.getLogger("lockstep.service")

_READERS = CapacityLimiter(8)
"""Pieces that are read at once: slow downloads must not take the threads of the other routes, nor the memory."""
_CHECKED_EVERY = 10.0
"""Seconds; an answer may take hours, and must not outlast its key; a check is a look into the database."""

LINES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Lines of JSON: how far it is (`type: progress`), and at last the verdict (`type: verdict`). "
        "An answer that ends without that broke off",
        "content": {MEDIA_TYPE: {"schema": {"type": "string"}}},
    }
}
"""What OpenAPI shall say of an answer in lines."""


def places(most: int) -> Places:
    """Return what bounds a project's answers of this kind, so that none takes all the readers."""
    return Places(
        most, "the most downloads and verifications that a project runs at once, {most}, are running; wait for one"
    )


class Piecewise(StreamingResponse):
    """An answer made of pieces; `release` lets go of what keeps them, at the end, also if no piece was ever taken."""

    def __init__(
        self,
        pieces: Generator[bytes, None, None],
        check: Check,
        media_type: str,
        headers: dict[str, str],
        place: Place,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(_read(_checked(pieces, check)), headers=headers, media_type=media_type)
        self._pieces, self._place, self._release = pieces, place, release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._place:
                await super().__call__(scope, receive, send)
        finally:
            with CancelScope(shield=True):  # also when the client is gone, even before the first piece
                await to_thread.run_sync(close, self._pieces, self._release)

    async def stream_response(self, send: Send) -> None:
        with suppress(LockstepError):  # it is logged; raised, it would be again, as a bug and with a traceback
            await super().stream_response(send)


class Download(Piecewise):
    """A file: an answer that ends short of its length where its pieces break off, which closes the connection."""

    def __init__(self, file: File, name: str, check: Check, place: Place = _ANYWHERE) -> None:
        headers = {"Content-Length": str(file.size), "Content-Disposition": f'attachment; filename="{name}"'}
        super().__init__(file.pieces, check, "application/octet-stream", headers, place, file.release)


class Lines(Piecewise):
    """Lines of JSON as they come: no proxy shall collect them, and none keep them."""

    def __init__(self, lines: Generator[bytes, None, None], check: Check, place: Place = _ANYWHERE) -> None:
        super().__init__(lines, check, MEDIA_TYPE, {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}, place)


def close(pieces: Generator[bytes, None, None], release: Callable[[], None]) -> None:
    """End an answer, wherever it stands."""
    pieces.close()
    with suppress(SQLAlchemyError):  # what keeps the content ends by itself
        release()


def _checked(pieces: Generator[bytes, None, None], check: Check) -> Generator[bytes, None, None]:
    """Yield the pieces for as long as the check passes. A database that is away ends none."""
    due = monotonic() + _CHECKED_EVERY
    for piece in pieces:
        if monotonic() >= due:
            try:
                with suppress(SQLAlchemyError):
                    check()
            except ApiError as error:
                logger.info("an answer was ended: %s", error)
                raise
            due = monotonic() + _CHECKED_EVERY
        yield piece


async def _read(pieces: Generator[bytes, None, None]) -> AsyncIterator[bytes]:
    while piece := await to_thread.run_sync(next, pieces, b"", limiter=_READERS):
        yield piece
