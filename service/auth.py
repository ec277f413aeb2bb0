"""API keys: 256 random bits, shown once, stored as a hash. A key belongs to a project and has a role in it."""

import hashlib
import logging
import secrets
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy.exc import IntegrityError

from api.documents import now
from api.errors import LockstepError, Unauthorized
from api.layout import PROJECT
from api.tenants import KeyRequest, NewApiKey, Role
from service.audit import OPERATOR, Author, Change
from service.rows import StoredKey
from service.tenants import Tenants

logger = logging.getLogger("lockstep.service")

_MARK = "lk"
"""How every key begins, so that scanners for leaked secrets find it."""
_TOUCH = timedelta(minutes=1)
"""Between two notes of a key's last use: reads must not become writes."""
_SHORTEST = 16
"""Characters of a bootstrap key, which somebody may have made up; ours have 43 behind their prefix."""


@dataclass(frozen=True)
class Principal:
    """Who asks: the id of the API key, the project that it opens, what it may do there and whose it is."""

    key_id: str
    project: str
    role: Role = Role.VIEWER
    member: str | None = None
    request_id: str = ""
    operator: bool = False
    """Whether the key is an operator's own: it may see what shows every tenant's jobs."""

    @property
    def author(self) -> Author:
        return Author(self.key_id, self.member, self.request_id)

    def change(self, action: str, target: str, **details: Any) -> Change:
        """Return what the audit log shall say of a change that this principal makes."""
        return self.author.change(self.project, action, target, **details)


def create_key(
    tenants: Tenants,
    wanted: KeyRequest,
    project: str = PROJECT,
    by: Author = OPERATOR,
    key: str | None = None,
    operator: bool = False,
) -> NewApiKey:
    """Make an API key, or adopt the given one; `operator`: it is an operator's own. The key cannot be read again."""
    prefix = None if key else f"{_MARK}_{secrets.token_hex(4)}"
    key = key or f"{prefix}_{secrets.token_urlsafe(32)}"
    made = tenants.insert_key(f"key-{secrets.token_hex(6)}", project, wanted, prefix, _digest(key), by, operator)
    return NewApiKey(**made.model_dump(), key=key)


def ensure_key(tenants: Tenants, path: Path) -> None:
    """Make the key in a file known: how a stack gives its first client access. One that was ended stays ended."""
    key = _read_key(path)
    found = tenants.find_key(_digest(key))
    if found is None:
        with suppress(IntegrityError):  # another replica has just made it
            create_key(tenants, KeyRequest(name="bootstrap", role=Role.ADMIN), key=key, operator=True)
        found = tenants.find_key(_digest(key))
    if found is not None and (why := why_not(found, now())) is not None:
        logger.warning("the bootstrap key in %s %s, so it opens nothing; put another key into that file", path, why)


def _read_key(path: Path) -> str:
    try:
        key = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise LockstepError(f"LOCKSTEP_BOOTSTRAP_KEY_PATH names a file that cannot be read: {error}") from error
    if not key:
        raise LockstepError(
            f"the file {path}, which LOCKSTEP_BOOTSTRAP_KEY_PATH names, is empty; put an API key into it"
        )
    if len(key) < _SHORTEST:
        raise LockstepError(
            f"the key in {path}, which LOCKSTEP_BOOTSTRAP_KEY_PATH names, has {len(key)} characters and could be "
            f"guessed; put one of {_SHORTEST} or more into it, such as what `openssl rand -hex 32` prints"
        )
    return key


def authenticate(tenants: Tenants, authorization: str | None) -> Principal:
    """Return who sends this `Authorization` header; Unauthorized if nobody we know.

    The look-up is by hash of 256 random bits, so its timing tells nothing about the key.
    """
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key:
        raise Unauthorized("send your API key as `Authorization: Bearer <key>`")
    found, at = tenants.find_key(_digest(key.strip())), now()
    if found is None:
        raise Unauthorized(
            "this API key is not valid; a project admin makes one, or an operator: `lockstep-server keys create`"
        )
    if (why := why_not(found, at)) is not None:
        advice = "an operator can restore it" if found.archived else "ask an admin of the project for another one"
        raise Unauthorized(f"this API key {why}; {advice}")
    if found.last_used_at is None or at - found.last_used_at >= _TOUCH:
        tenants.touch_key(found.id, at)
    return Principal(found.id, found.project, role_of(found), found.member, operator=found.operator)


def why_not(key: StoredKey, at: datetime) -> str | None:
    """Say why a key opens nothing; None if it does."""
    if key.revoked_at is not None:
        return "was revoked"
    if key.expires_at is not None and key.expires_at <= at:
        return f"expired at {key.expires_at:%F %T} UTC"
    if key.archived:
        return f"is of project {key.project}, which is archived"
    if key.member is not None and key.member_role is None:
        return f"is of {key.member}, who is not a member of project {key.project} any more"
    return None


def role_of(key: StoredKey) -> Role:
    """Return what a key may do: its own role, and never more than that of the member whose it is."""
    roles = [key.role] if key.member_role is None else [key.role, key.member_role]
    return min(roles, key=list(Role).index)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
