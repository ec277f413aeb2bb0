"""The HTTP server: uvicorn, with an end that live streams do not hold up, and a port beside it for metrics."""

import asyncio
import socket
from contextlib import ExitStack
from typing import Any

import uvicorn
from fastapi import FastAPI

from service.bounds import HEAD_BYTES
from service.metrics import Measures
from service.settings import Settings
from service.sse import Streams

_HTTP: dict[str, Any] = {"http": "h11", "h11_max_incomplete_event_size": 2 * HEAD_BYTES}
"""The parser that bounds a head while it arrives; up to that, the application answers in its own words."""
_GRACE_SECONDS = 3
"""For requests to end by themselves when the server stops; then they are cut off."""


class Server(uvicorn.Server):
    """Serves the application until SIGINT or SIGTERM. Left alone, uvicorn would wait for the end of every stream."""

    def __init__(self, app: FastAPI, settings: Settings, **options: Any) -> None:
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            limit_concurrency=settings.connections + 1,  # uvicorn refuses the one that reaches it
            timeout_graceful_shutdown=_GRACE_SECONDS,
            ws="none",
            log_config=None,  # its lines go the way of ours
            access_log=False,  # the application writes one for each request
            **_HTTP,
            **options,
        )
        super().__init__(config)
        self._streams: Streams = app.state.streams
        self._measures: Measures = app.state.measures
        self._metrics_port, self._scrapes = settings.metrics_port, ExitStack()

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop; MetricsPortBusy before anything has started."""
        with self._scrapes as scrapes:
            if self._metrics_port is not None:
                scrapes.enter_context(self._measures.served(self.config.host, self._metrics_port))
            super().run(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._streams.close()
        await asyncio.to_thread(self._scrapes.close)  # before what a scrape looks at
        await super().shutdown(sockets)
