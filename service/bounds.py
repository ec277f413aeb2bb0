"""Bounds on what a request may hold, beside that on its body: how large its head is, how deep its JSON."""

import re

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


def refuse_depth(body: bytes) -> None:
    """BadRequest if a body nests more deeply than any of ours, whether or not it is JSON."""
    if body.count(b"[") + body.count(b"{") <= DEPTH:
        return
    depth = 0
    for token in _TOKEN.finditer(body):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token.group(), 0)
        if depth > DEPTH:
            raise BadRequest(f"the body is nested more deeply than {DEPTH} levels")
