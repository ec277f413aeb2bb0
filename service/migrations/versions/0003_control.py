"""Control over a run: pause, sizes, forks, the line, and what attempts in a row have come to."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the columns; a job of before has been in the line since it was created."""
    time = sa.DateTime(timezone=True)
    for name in ("keep_checkpoint", "pause_requested", "setbacks"):
        op.add_column("jobs", sa.Column(name, sa.Integer, nullable=False, server_default="0"))
    for name in ("workers", "workers_wanted"):
        op.add_column("jobs", sa.Column(name, sa.Integer))
    for name in ("queued_at", "attempt_at", "not_before"):
        op.add_column("jobs", sa.Column(name, time))
    op.add_column("jobs", sa.Column("init", sa.JSON))
    op.execute("UPDATE jobs SET queued_at = created_at")
    op.add_column("pins", sa.Column("holder", sa.String(32)))
