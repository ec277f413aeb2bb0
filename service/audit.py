"""The audit log: one row for each change that somebody made, in the transaction of that change."""

from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from api.documents import now
from api.tenants import AuditEntry
from service.tables import audit


@dataclass(frozen=True)
class Change:
    """What is to be written down about a change. No secret may be in it."""

    project: str
    actor: str
    member: str | None
    request_id: str
    action: str
    target: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Author:
    """Who makes a change: an API key, which may be a member's, in a request; or an operator."""

    actor: str
    member: str | None = None
    request_id: str = ""

    def change(self, project: str, action: str, target: str, **details: Any) -> Change:
        given = {name: value for name, value in details.items() if value is not None}
        return Change(project, self.actor, self.member, self.request_id, action, target, given)


OPERATOR = Author("operator")
"""Somebody with access to the database; projects do not bind them."""


def record(connection: sa.Connection, change: Change | None) -> None:
    """Write a change down; None is one that nobody asked for, such as the reconciler's."""
    if change is not None:
        row = {name: getattr(change, name) for name in Change.__dataclass_fields__}
        connection.execute(audit.insert().values(at=now(), **row))


def read_audit(connection: sa.Connection, project: str, limit: int, before: int | None) -> list[AuditEntry]:
    """Return the changes of a project, newest first; `before` is the id of the last one already seen."""
    query = sa.select(audit).where(audit.c.project == project)
    if before is not None:
        query = query.where(audit.c.id < before)
    rows = connection.execute(query.order_by(audit.c.id.desc()).limit(limit)).mappings()
    return [AuditEntry.model_validate({**row}) for row in rows]
