"""Tenants: projects with quotas, members, what keys may do and for how long, and the audit log.

Keys of before may do everything in their project, for ever, as before. The bootstrap key is an operator's.
"""

from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Create the tables, and a project for whatever has one."""
    time = sa.DateTime(timezone=True)
    projects = op.create_table(
        "projects",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("created_at", time, nullable=False),
        sa.Column("archived_at", time),
        sa.Column("running_workers", sa.Integer),
        sa.Column("running_cpus", sa.Integer),
        sa.Column("running_gpus", sa.Integer),
        sa.Column("queued_jobs", sa.Integer),
        sa.Column("jobs_per_day", sa.Integer),
        sa.Column("stored_bytes", sa.BigInteger),
        sa.Column("max_priority", sa.Integer),
        sa.Column("used_bytes", sa.BigInteger),
        sa.Column("measured_at", time),
    )
    op.create_table(
        "members",
        sa.Column("project", sa.String(64), sa.ForeignKey("projects.name"), primary_key=True),
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("created_at", time, nullable=False),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("at", time, nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("actor", sa.String(32), nullable=False),
        sa.Column("member", sa.String(64)),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("target", sa.String(128), nullable=False),
        sa.Column("details", sa.JSON, nullable=False),
        sa.Column("request_id", sa.String(64), nullable=False),
    )
    op.create_index("audit_by_project", "audit", ["project", "id"])
    op.add_column("api_keys", sa.Column("role", sa.String(16), nullable=False, server_default="viewer"))
    op.add_column("api_keys", sa.Column("operator", sa.Integer, nullable=False, server_default="0"))
    op.execute("UPDATE api_keys SET role = 'admin'")
    op.execute("UPDATE api_keys SET operator = 1 WHERE name = 'bootstrap'")
    for name, kind in (("member", sa.String(64)), ("prefix", sa.String(16))):
        op.add_column("api_keys", sa.Column(name, kind))
    for name in ("expires_at", "last_used_at"):
        op.add_column("api_keys", sa.Column(name, time))
    found = op.get_bind().execute(sa.text("SELECT project FROM jobs UNION SELECT project FROM api_keys"))
    names = {"default", *(name for (name,) in found)}
    op.bulk_insert(projects, [{"name": name, "created_at": datetime.now(UTC)} for name in sorted(names)])
