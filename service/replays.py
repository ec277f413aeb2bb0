"""Requests with an idempotency key: what is kept of one, and what answers it when it comes again."""

import hashlib
import json
from typing import Any

from api.errors import IdempotencyMismatch
from service.auth import Principal
from service.rows import IdempotencyRecord, JobRow, Replay


def record_of(who: Principal, body: Any, key: str | None) -> IdempotencyRecord | None:
    """Return what is to be kept of a request with an idempotency key."""
    if key is None:
        return None
    return IdempotencyRecord(who.key_id, key, hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest())


def replayed(found: Replay, record: IdempotencyRecord) -> JobRow:
    """Return the job that the same request made before; IdempotencyMismatch if it was another request."""
    if found.body_sha256 != record.body_sha256:
        raise IdempotencyMismatch(
            f"the idempotency key {record.key!r} was used for another request, which made {found.job.id}; "
            "use a new key for a new job"
        )
    return found.job
