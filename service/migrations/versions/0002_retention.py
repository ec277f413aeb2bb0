"""Retention of checkpoints: marks, pins, and which jobs it has still to look at.

Jobs of before have no policy (the fields did not exist), so their `retention` is null.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column and the two tables."""
    time = sa.DateTime(timezone=True)
    op.add_column("jobs", sa.Column("retention", sa.String(16)))
    op.create_table(
        "marks",
        sa.Column("job_id", sa.String(32), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("segment", sa.String(64), primary_key=True),
        sa.Column("step", sa.BigInteger, primary_key=True),
        sa.Column("marked_at", time, nullable=False),
        sa.Column("doomed", sa.Integer, nullable=False),
    )
    op.create_table(
        "pins",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("job_id", sa.String(32), sa.ForeignKey("jobs.id"), nullable=False),
        sa.Column("segment", sa.String(64), nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("why", sa.String(32), nullable=False),
        sa.Column("expires_at", time, nullable=False),
    )
    op.create_index("pins_by_job", "pins", ["job_id"])
