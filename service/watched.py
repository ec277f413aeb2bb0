"""The layer around the application that counts and logs each request."""

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.names import JOB_ID
from service.logs import about
from service.metrics import METHODS, UNKNOWN, Measures
from service.problems import request_id

logger = logging.getLogger("lockstep.service")

_PROBES = ("/healthz", "/readyz")
"""Asked every few seconds; only what is wrong is worth a line."""


class Watched:
    """Notes each request by its route's template, method and status."""

    def __init__(self, app: ASGIApp, measures: Measures) -> None:
        self._app, self._measures = app, measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status: int | None = None

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._measures.note_request(
                    scope["method"], _route(scope), message["status"], time.perf_counter() - began
                )
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            _log(scope, status, time.perf_counter() - began)


def _route(scope: Scope) -> str:
    return getattr(scope.get("route"), "path", UNKNOWN)


def _log(scope: Scope, status: int | None, seconds: float) -> None:
    """Write the line of a request once its answer is over. It has nothing that a caller chose but valid ids."""
    method = scope["method"] if scope["method"] in METHODS else UNKNOWN
    ids = {"request": request_id(scope), "method": method, "route": _route(scope)}
    ids |= {"status": status, "ms": round(seconds * 1e3, 1)}
    if (who := scope.get("state", {}).get("principal")) is not None:
        ids["key"] = who.key_id
    if JOB_ID.fullmatch(job := str(scope.get("path_params", {}).get("job_id", ""))):
        ids["job"] = job
    probe = ids["route"] in _PROBES and status is not None and status < 400
    with about(**ids):
        logger.log(logging.DEBUG if probe else logging.INFO, "answered")
