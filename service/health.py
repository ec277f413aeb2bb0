"""/healthz and /readyz: is the process alive, and what does it stand on? The only routes without an API key."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import State

from api.errors import LockstepError
from api.jobs import Check, Readiness
from api.layout import PROJECT

router = APIRouter(tags=["health"])

_PATIENCE = 2.0
"""Seconds; a probe must not wait for a store that hangs."""
_POOL = ThreadPoolExecutor(12, thread_name_prefix="readyz")
"""Of its own and bounded: looks that hang must take no thread from the routes."""


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


def checks(request: Request) -> dict[str, Callable[[], object]]:
    """What is looked at; the bucket by reading a key that need not exist."""
    return checks_of(request.app.state)


def checks_of(state: State) -> dict[str, Callable[[], object]]:
    return {
        "database": state.store.ping,
        "bucket": lambda: state.bucket.objects(f"{PROJECT}/readyz/"),
        "ray": state.ray.session,
    }


def look_at(every: dict[str, Callable[[], object]]) -> dict[str, Check]:
    """Look at all at once, and at each no longer than a probe may wait."""
    looks = {name: _POOL.submit(_look, check) for name, check in every.items()}
    return {name: _wait(look) for name, look in looks.items()}


@router.get("/readyz", responses={503: {"model": Readiness, "description": "The database does not answer"}})
def readyz(response: Response, every: Annotated[dict[str, Callable[[], object]], Depends(checks)]) -> Readiness:
    """Ready when the database answers; bucket and Ray are timed and at worst degraded, for a job can wait for them."""
    done = look_at(every)
    if done["database"].status != "ok":
        done["database"] = done["database"].model_copy(update={"status": "failed"})
        response.status_code = 503
    return Readiness(ready=done["database"].status == "ok", checks=done)


def _wait(look: Future[Check]) -> Check:
    """Return what a look found; what takes longer than a probe may wait is degraded."""
    try:
        return look.result(timeout=_PATIENCE)
    except TimeoutError:
        look.cancel()
        return Check(status="degraded", milliseconds=_PATIENCE * 1e3, message=f"no answer within {_PATIENCE:g} s")


def _look(check: Callable[[], object]) -> Check:
    start = perf_counter()
    try:
        check()
    except (LockstepError, SQLAlchemyError) as error:
        return Check(status="degraded", milliseconds=(perf_counter() - start) * 1e3, message=str(error))
    return Check(status="ok", milliseconds=(perf_counter() - start) * 1e3)
