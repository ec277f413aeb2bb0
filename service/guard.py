"""What protects a person's browser: names under which we may be asked for, and headers that no answer goes without.

A key travels in a header that a page must set itself, never in a cookie, and no answer allows another origin: so a
foreign page can neither act in somebody's name nor read an answer.
"""

from collections.abc import Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import BadRequest
from service.problems import answer, request_id

ANY_HOST = ("*",)
LOOPBACK = ("localhost", "*.localhost")

_HEADERS = {
    b"cache-control": b"no-store",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}


def hosts_for(listening_at: str) -> tuple[str, ...]:
    """Return the names to be trusted where nobody says which: a server for this machine alone has only one."""
    return LOOPBACK if listening_at == "localhost" or _is_loopback(listening_at) else ANY_HOST


def is_trusted(host: str, trusted: Sequence[str]) -> bool:
    """Tell whether a Host header is an address, or a name that is trusted; `*.example.com` are all below that one.

    An address always is: probes ask by it, and only a name can be made to point at somebody else's server.
    """
    if "*" in trusted:
        return True
    name = _name(host)
    if name is None:
        return False
    return _is_address(name) or any(
        name == pattern or (pattern.startswith("*.") and name.endswith(pattern[1:])) for pattern in trusted
    )


def _name(host: str) -> str | None:
    """Return the name or address in a Host header; None if it is anything but that and a port."""
    try:
        parts = urlsplit(f"//{host}")
        parts.port  # noqa: B018  (a bad one raises)
    except ValueError:
        return None
    return parts.hostname if parts.netloc == host and not parts.username else None


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    return _is_address(name) and ip_address(name).is_loopback


class TrustedHosts:
    """The layer that refuses a request for a name that is not ours, before anything else looks at it."""

    def __init__(self, app: ASGIApp, trusted: Sequence[str]) -> None:
        self._app, self._trusted = app, trusted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_trusted(Headers(scope=scope).get("host", ""), self._trusted):
            await self._app(scope, receive, send)
            return
        error = BadRequest("this server is not known by the name in the Host header; see LOCKSTEP_TRUSTED_HOSTS")
        await answer(error, request_id(scope))(scope, receive, send)


class SafeHeaders:
    """The layer that adds to each answer those headers that it does not bring itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def adding(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message["headers"]}
                missing = [header for header in _HEADERS.items() if header[0] not in given]
                message["headers"] = [*message["headers"], *missing]
            await send(message)

        await self._app(scope, receive, adding)
