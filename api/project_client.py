"""What a client can do about the project of its key: `client.project`. All but `show` needs a key of the role admin."""

import json
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

import httpx2
from pydantic import TypeAdapter

from .jobs import Page
from .tenants import ApiKey, AuditEntry, Member, NewApiKey, Project, Role

T = TypeVar("T")

_PROJECT = TypeAdapter(Project)
_KEYS = TypeAdapter(Page[ApiKey])
_NEW_KEY = TypeAdapter(NewApiKey)
_MEMBERS = TypeAdapter(Page[Member])
_MEMBER = TypeAdapter(Member)
_AUDIT = TypeAdapter(Page[AuditEntry])


class Connection(Protocol):
    """What is needed of a client."""

    def _ask(self, answer: TypeAdapter[T], method: str, path: str, **request: Any) -> T: ...

    def _call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        patience: float = ...,
    ) -> httpx2.Response: ...


class ProjectClient:
    """The routes below /v1/project. Every method raises what those of the client do; Forbidden for too low a role."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def show(self) -> Project:
        """Return the project: the role of this key, quotas, and what is used of them."""
        return self._connection._ask(_PROJECT, "GET", "/v1/project")

    def keys(self) -> Page[ApiKey]:
        """Return the API keys, oldest first, the revoked ones included."""
        return self._connection._ask(_KEYS, "GET", "/v1/project/keys")

    def create_key(
        self, name: str, role: Role = Role.SUBMITTER, member: str | None = None, expires_in: int | None = None
    ) -> NewApiKey:
        """Make an API key; `expires_in`: seconds. The answer is the only place where it can be seen.

        It is sent once: if there is no answer, look at `keys` and revoke the one that nobody has.
        """
        body = _json(name=name, role=role, member=member, expires_in=expires_in)
        return self._connection._ask(_NEW_KEY, "POST", "/v1/project/keys", body=body, patience=0)

    def revoke_key(self, key_id: str) -> None:
        """End an API key at once; again is harmless."""
        self._connection._call("DELETE", f"/v1/project/keys/{quote(key_id, safe='')}")

    def members(self) -> Page[Member]:
        """Return the members, by name."""
        return self._connection._ask(_MEMBERS, "GET", "/v1/project/members")

    def put_member(self, name: str, role: Role) -> Member:
        """Make somebody a member, or give a member another role."""
        path = f"/v1/project/members/{quote(name, safe='')}"
        return self._connection._ask(_MEMBER, "PUT", path, body=_json(role=role))

    def remove_member(self, name: str) -> None:
        """Take a member out of the project, and end their keys."""
        self._connection._call("DELETE", f"/v1/project/members/{quote(name, safe='')}", patience=0)

    def audit(self, limit: int = 50, cursor: str | None = None) -> Page[AuditEntry]:
        """Return who changed what, newest first."""
        return self._connection._ask(_AUDIT, "GET", "/v1/project/audit", params={"limit": limit, "cursor": cursor})


def _json(**fields: Any) -> bytes:
    """Return a body as it was given: what is wrong with it, the control plane says."""
    return json.dumps(fields).encode()
