"""Bounds on what a request may hold, beside that on its body's size: the size of its head, the depth of its JSON."""

import re
from codecs import BOM_UTF8

from starlette.types import Scope

from api.errors import BadRequest, HeadersTooLarge

HEAD_BYTES = 160 * 1024
"""Path, query and headers. The longest cursor of a log is 64 KiB, and may come as a parameter and as a header."""
DEPTH = 32
"""Levels of a JSON body. A job spec has 5."""
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"?|[\[\]{}]', re.DOTALL)


def head_fault(scope: Scope) -> HeadersTooLarge | None:
    """Return what is wrong with the size of a request's head."""
    size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    size += sum(len(name) + len(value) for name, value in scope["headers"])
    if size <= HEAD_BYTES:
        return None
    return HeadersTooLarge(f"path, query and headers are {size} bytes; {HEAD_BYTES} is the most")


def refuse_encoding(body: bytes) -> None:
    """BadRequest if a body is in anything but plain UTF-8: Python reads JSON in UTF-16 and UTF-32, too.

    Whoever looks for brackets among those bytes finds other ones. A bracket has a NUL there, and never in UTF-8.
    """
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise BadRequest("the body is not in UTF-8; send it so") from error
    if b"\0" in body or body.startswith(BOM_UTF8):
        raise BadRequest("the body has NUL bytes or a byte order mark; send plain UTF-8, without either")


def refuse_depth(body: bytes) -> None:
    """BadRequest if a body nests more deeply than any of ours, whether or not it is JSON."""
    if body.count(b"[") + body.count(b"{") <= DEPTH:
        return
    depth = 0
    for token in _TOKEN.finditer(body):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token.group(), 0)
        if depth > DEPTH:
            raise BadRequest(f"the body is nested more deeply than {DEPTH} levels")
