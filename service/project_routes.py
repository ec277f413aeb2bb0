"""The routes about the project itself: its keys, members and audit log. It is always the one of the key that asks."""

from typing import Annotated

from fastapi import Depends, Path, Query, Request

from api.documents import now
from api.errors import BadRequest, NotFound, QuotaExceeded, TooLarge
from api.jobs import Page
from api.tenants import (
    MEMBER,
    ApiKey,
    AuditEntry,
    KeyRequest,
    Member,
    MemberRole,
    NewApiKey,
    Project,
)
from service.auth import create_key
from service.keyed import ADMIN, VIEWER, Limit, Who, keyed_router
from service.problems import problem_responses
from service.quotas import DAY, use_of
from service.store import Store
from service.tenants import Tenants


def tenants(request: Request) -> Tenants:
    found: Tenants = request.app.state.tenants
    return found


def store(request: Request) -> Store:
    found: Store = request.app.state.store
    return found


Stored = Annotated[Tenants, Depends(tenants)]
KeyId = Annotated[str, Path(pattern=r"^key-[0-9a-f]{12}$", description="A key's id", examples=["key-0123456789ab"])]
MemberPath = Annotated[str, Path(pattern=MEMBER, description="A member's name", examples=["ada"])]
Cursor = Annotated[int | None, Query(ge=1, le=2**63 - 1, description="`next_cursor` of the page before")]

_ENDED_KEYS = 100
"""Most of a list; those that are valid are bounded anyway."""

router = keyed_router()


@router.get("/project", tags=["project"], openapi_extra=VIEWER)
def show_project(who: Who, stored: Stored, store: Annotated[Store, Depends(store)]) -> Project:
    """Show the project that the key opens: what the key may do there, what the project may use, and what it uses."""
    found = stored.project(who.project)
    use = use_of(found, store.live(who.project), store.submitted_since(who.project, now() - DAY))
    return Project(name=found.name, created_at=found.created_at, role=who.role, quotas=found.quotas, use=use)


@router.get("/project/keys", tags=["project"], openapi_extra=ADMIN)
def list_keys(who: Who, stored: Stored) -> Page[ApiKey]:
    """List the project's API keys, oldest first; never the keys themselves.

    Of those that were revoked or have expired, the newest 100 are in it.
    """
    return Page(items=[key for _, key in stored.keys(who.project, _ENDED_KEYS)])


@router.post(
    "/project/keys",
    status_code=201,
    responses=problem_responses(BadRequest, TooLarge, QuotaExceeded),
    tags=["project"],
    openapi_extra=ADMIN,
)
def make_key(who: Who, stored: Stored, wanted: KeyRequest) -> NewApiKey:
    """Make an API key of the project. The answer is the only place where it can be seen."""
    return create_key(stored, wanted, who.project, who.author)


@router.delete(
    "/project/keys/{key_id}",
    status_code=204,
    responses=problem_responses(NotFound),
    tags=["project"],
    openapi_extra=ADMIN,
)
def revoke_key(who: Who, stored: Stored, key_id: KeyId) -> None:
    """End an API key at once, live streams included; asking again is harmless."""
    stored.revoke_key(key_id, who.author, who.project)


@router.get("/project/members", tags=["project"], openapi_extra=ADMIN)
def list_members(who: Who, stored: Stored) -> Page[Member]:
    """List the project's members, by name."""
    return Page(items=stored.members(who.project))


@router.put(
    "/project/members/{member}",
    responses=problem_responses(BadRequest, TooLarge, QuotaExceeded),
    tags=["project"],
    openapi_extra=ADMIN,
)
def put_member(who: Who, stored: Stored, member: MemberPath, wanted: MemberRole) -> Member:
    """Make somebody a member, or give a member another role, which binds their keys at once."""
    return stored.put_member(who.project, member, wanted.role, who.author)


@router.delete(
    "/project/members/{member}",
    status_code=204,
    responses=problem_responses(NotFound),
    tags=["project"],
    openapi_extra=ADMIN,
)
def remove_member(who: Who, stored: Stored, member: MemberPath) -> None:
    """Take a member out of the project, and end their keys."""
    stored.remove_member(who.project, member, who.author)


@router.get("/project/audit", tags=["project"], openapi_extra=ADMIN)
def list_audit(who: Who, stored: Stored, limit: Limit = 50, cursor: Cursor = None) -> Page[AuditEntry]:
    """List who changed what in the project, newest first."""
    rows = stored.audit(who.project, limit + 1, cursor)
    return Page(items=rows[:limit], next_cursor=str(rows[limit - 1].id) if len(rows) > limit else None)
