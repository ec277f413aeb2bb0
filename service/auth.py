"""API keys: 256 random bits, shown once, stored as a hash. A key belongs to a project."""

import hashlib
import secrets
from dataclasses import dataclass
from pathlib import Path

from api.errors import LockstepError, Unauthorized
from api.layout import PROJECT
from service.store import Store

_PREFIX = "lk_"


class KeyRevoked(LockstepError):
    """A key that shall be valid was revoked."""


@dataclass(frozen=True)
class Principal:
    """Who asks: the id of the API key, and the project that it opens."""

    key_id: str
    project: str


def create_key(store: Store, name: str, key: str | None = None) -> tuple[str, str]:
    """Make an API key (or adopt the given one) and return (id, key). The key cannot be read again."""
    key = key or _PREFIX + secrets.token_urlsafe(32)
    key_id = f"key-{secrets.token_hex(6)}"
    store.insert_key(key_id, name, _digest(key), PROJECT)
    return key_id, key


def ensure_key(store: Store, path: Path) -> None:
    """Make sure that the key in a file is valid: how a local stack gives its own client access."""
    key = path.read_text().strip()
    found = store.find_key(_digest(key))
    if found is None:
        create_key(store, "bootstrap", key)
    elif found.revoked:
        raise KeyRevoked(f"the API key in {path} was revoked; delete the file to get a new one")


def authenticate(store: Store, authorization: str | None) -> Principal:
    """Return who sends this `Authorization` header; Unauthorized if nobody we know.

    The look-up is by hash of 256 random bits, so its timing tells nothing about the key.
    """
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key:
        raise Unauthorized("send your API key as `Authorization: Bearer <key>`")
    found = store.find_key(_digest(key.strip()))
    if found is None or found.revoked:
        raise Unauthorized("this API key is not valid; an operator makes one with `lockstep-server keys create`")
    return Principal(found.id, found.project)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
