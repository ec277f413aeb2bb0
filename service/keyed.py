"""What every route under /v1 has in common: an API key comes first, and the route says which role it needs."""

from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from api.errors import Fault, Forbidden, HeadersTooLarge, InvalidSpec, RateLimited, Unauthorized, Unavailable
from api.tenants import Role
from service.auth import Principal, authenticate
from service.bounds import refuse_depth, refuse_encoding
from service.problems import problem_responses, request_id
from service.rates import Limiter

_ROLE = "x-role"
VIEWER, SUBMITTER, ADMIN = ({_ROLE: role.value} for role in Role)
"""What a route gives as `openapi_extra`: the role that it needs. It is enforced, and shown in the document."""


class KeyedRoute(APIRoute):
    """A route that wants a key before all else: FastAPI reads and parses a body before any dependency."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle, needed = super().get_route_handler(), role_needed(self)

        async def keyed(request: Request) -> Response:
            who = await run_in_threadpool(admitted, request)
            if not who.role.covers(needed):
                raise Forbidden(f"this API key is of the role {who.role}; this needs the role {needed}")
            if request.method in ("POST", "PUT"):
                body = await request.body()
                refuse_encoding(body)
                refuse_depth(body)
            request.state.principal = who
            return await handle(request)

        return keyed


def role_needed(route: APIRoute) -> Role:
    """Return the role that a route declares; without one, the server must not start."""
    declared = (route.openapi_extra or {}).get(_ROLE)
    if declared is None:
        raise TypeError(f"{route.path} says no role: give it openapi_extra=VIEWER, SUBMITTER or ADMIN")
    return Role(declared)


def admitted(request: Request) -> Principal:
    """Who asks, unless too often: keys count for themselves and for their project, what is no key by its address."""
    try:
        who = principal(request)
    except Unauthorized:
        address = request.client.host if request.client is not None else ""
        _count(request, request.app.state.strangers, address, f"too many requests without a valid key from {address}")
        raise
    _count(request, request.app.state.rates, who.key_id, "too many requests with this API key")
    told = request.state.answer_headers
    _count(request, request.app.state.project_rates, who.project, "too many requests with the keys of this project")
    request.state.answer_headers = told  # of the two, the limit that is reached first
    return who


def _count(request: Request, limiter: Limiter, name: str, complaint: str) -> None:
    """Count a request, and have its answer say how many more may follow; RateLimited if it is one too many."""
    verdict = limiter.take(name)
    request.state.answer_headers = limiter.headers(verdict)
    if not verdict.allowed:
        raise RateLimited(f"{complaint}; wait {verdict.wait} s", retry_after=verdict.wait)


def principal(request: Request) -> Principal:
    """Who asks; 401 if nobody we know."""
    found = authenticate(request.app.state.tenants, request.headers.get("authorization"))
    return replace(found, request_id=request_id(request.scope))


def who(request: Request) -> Principal:
    found: Principal = request.state.principal
    return found


def known_parameters(request: Request) -> None:
    """Refuse a query parameter that the route does not have: a misspelt `dry_run` must not submit a job."""
    unknown = set(request.query_params) - {field.alias for field in request.scope["route"].dependant.query_params}
    faults = [Fault(path=f"$.query.{name}", message="unknown parameter; see /docs") for name in sorted(unknown)]
    if faults:
        raise InvalidSpec(f"{faults[0].path}: {faults[0].message}", errors=faults)


def keyed_router() -> APIRouter:
    return APIRouter(
        prefix="/v1",
        route_class=KeyedRoute,
        dependencies=[Depends(HTTPBearer(auto_error=False, description="An API key")), Depends(known_parameters)],
        responses=problem_responses(Unauthorized, Forbidden, InvalidSpec, RateLimited, HeadersTooLarge, Unavailable),
    )


Who = Annotated[Principal, Depends(who)]
Limit = Annotated[int, Query(ge=1, le=200, description="Most items of a page")]
