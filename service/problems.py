"""Every error becomes application/problem+json (RFC 9457) with a request id; no traceback leaves the house."""

import logging
import re
import secrets
from math import ceil
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import (
    ApiError,
    BadRequest,
    InvalidData,
    InvalidSpec,
    MethodNotAllowed,
    NotFound,
    Problem,
    StorageError,
    TooLarge,
    Unavailable,
    faults_of,
)
from service.bounds import head_fault
from service.logs import about

logger = logging.getLogger("lockstep.service")

MEDIA_TYPE = "application/problem+json"
_SENTENCES = {404: "there is nothing at this path; see /docs", 405: "this path knows no such method; see /docs"}
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_AGAIN = "the database does not answer; send the request again, with the same Idempotency-Key if it submits a job"
"""A connection that breaks while a change is committed does not tell whether it was."""
_RETRY_AFTER = {503: 5.0}
"""Seconds, where an error does not say it itself."""
_BY_STATUS = {kind.status: kind for kind in (BadRequest, NotFound, MethodNotAllowed, TooLarge)}


def problem_responses(*kinds: type[ApiError]) -> dict[int | str, dict[str, Any]]:
    """Return what OpenAPI shall say of the given errors."""
    responses: dict[int | str, dict[str, Any]] = {}
    for kind in kinds:
        responses[kind.status] = {
            "description": kind.title,
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
    return responses


def install(app: FastAPI) -> None:
    """Translate every exception that we know; `Edge` answers the others."""

    def handle(kind: type[Exception], translate: Any) -> None:
        async def handler(request: Request, error: Exception) -> JSONResponse:
            response = answer(translate(error), request_id(request.scope))
            if response.status_code == MethodNotAllowed.status:
                response.headers["Allow"] = _allowed(request)
            return response

        app.add_exception_handler(kind, handler)

    handle(ApiError, lambda error: error)
    handle(RequestValidationError, _from_validation)
    handle(HTTPException, _from_http)
    handle(StorageError, lambda error: Unavailable(str(error)))
    handle(InvalidData, lambda error: Unavailable(f"the bucket holds something that cannot be read: {error}"))
    handle(SQLAlchemyError, _from_database)


def answer(error: ApiError, request: str) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    wait = error.retry_after if error.retry_after is not None else _RETRY_AFTER.get(error.status)
    if wait is not None:
        headers["Retry-After"] = str(ceil(wait))
    body: Problem = error.problem(request)
    return JSONResponse(body.model_dump(mode="json"), error.status, headers, MEDIA_TYPE)


def _from_validation(error: RequestValidationError) -> ApiError:
    if any(fault["type"] == "json_invalid" for fault in error.errors()):
        return BadRequest("the body is not valid JSON")
    faults = faults_of(list(error.errors()))
    count = f"{len(faults)} faults, the first one at " if len(faults) > 1 else ""
    return InvalidSpec(f"{count}{faults[0].path}: {faults[0].message}", errors=faults)


def _from_http(error: HTTPException) -> ApiError:
    kind = _BY_STATUS.get(error.status_code, BadRequest)
    return kind(_SENTENCES.get(error.status_code, str(error.detail)))


def _allowed(request: Request) -> str:
    """Return the methods that a path knows (RFC 9110, 15.5.6); Starlette names those of one of its routes only.

    A path that is not in the document is one of its own pages.
    """
    paths: dict[str, dict[str, Any]] = request.app.openapi()["paths"]
    found = [methods for path, methods in paths.items() if compile_path(path)[0].match(request.scope["path"])]
    return ", ".join(sorted({method.upper() for methods in found for method in methods} or {"GET", "HEAD"}))


def _from_database(error: SQLAlchemyError) -> ApiError:
    logger.error("the database failed: %s", error)
    return Unavailable(_AGAIN)


def _from_bug(error: Exception) -> ApiError:
    logger.error("an unexpected error", exc_info=error)
    return ApiError("an unexpected error; the log of the control plane has it under this request id")


def request_id(scope: Scope) -> str:
    return str(scope.get("state", {}).get("request_id", ""))


def _given_id(scope: Scope) -> str | None:
    """Return the id that a proxy or the caller gave the request, if it is one that can stand in a log."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if _REQUEST_ID.fullmatch(given) else None


class Edge:
    """The outermost layer: gives each request an id if it has none, cuts off a body that grows beyond the limit as it
    arrives, refuses a head that is too large, and answers for what nobody expected. The headers that a route left in
    `state.answer_headers` go into the answer, also into one that tells of an error."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app, self._limit = app, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _given_id(scope) or secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                extra = {"X-Request-Id": request, **scope["state"].get("answer_headers", {})}
                more = [(name.lower().encode(), value.encode()) for name, value in extra.items()]
                message["headers"] = [*message["headers"], *more]
            await send(message)

        with about(request=request):
            if (fault := head_fault(scope)) is not None:
                await answer(fault, request)(scope, receive, send_with_id)
                return
            try:
                await self._app(scope, self._bounded(scope, receive), send_with_id)
            except _BodyTooLarge:
                if not started:
                    error = TooLarge(f"the body is larger than {self._limit} bytes")
                    await answer(error, request)(scope, receive, send_with_id)
            except Exception as error:
                if started:
                    raise
                await answer(_from_bug(error), request)(scope, receive, send_with_id)

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        seen = 0

        async def bounded() -> Message:
            nonlocal seen
            if announced.isdigit() and int(announced) > self._limit:
                raise _BodyTooLarge
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._limit:
                raise _BodyTooLarge
            return message

        return bounded


class _BodyTooLarge(BaseException):
    """Not an Exception, so that no layer in between takes it for a fault of the body's content."""
