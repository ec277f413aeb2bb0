"""A file as an HTTP answer: read piece by piece in a few threads, as fast as the client takes them."""

from collections.abc import AsyncIterator
from contextlib import suppress

from anyio import CancelScope, CapacityLimiter, to_thread
from fastapi.responses import StreamingResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import Receive, Scope, Send

from api.errors import LockstepError
from service.export import File

_READERS = CapacityLimiter(8)
"""Pieces that are read at once: slow downloads must not take the threads of the other routes, nor the memory."""


class Download(StreamingResponse):
    """An answer that ends short of its length where its pieces break off, which closes the connection."""

    def __init__(self, file: File, name: str) -> None:
        headers = {"Content-Length": str(file.size), "Content-Disposition": f'attachment; filename="{name}"'}
        super().__init__(_pieces(file), headers=headers, media_type="application/octet-stream")
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with CancelScope(shield=True):  # also when the client is gone, even before the first piece
                await to_thread.run_sync(close, self._file)

    async def stream_response(self, send: Send) -> None:
        with suppress(LockstepError):  # it is logged; raised, it would be again, as a bug and with a traceback
            await super().stream_response(send)


async def _pieces(file: File) -> AsyncIterator[bytes]:
    while piece := await to_thread.run_sync(next, file.pieces, b"", limiter=_READERS):
        yield piece


def close(file: File) -> None:
    file.pieces.close()
    with suppress(SQLAlchemyError):  # what keeps the content ends by itself
        file.release()
