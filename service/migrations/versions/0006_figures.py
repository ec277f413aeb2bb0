"""What restarts cost a job, and an index from which a scrape is answered.

Jobs of before have lost nothing that we know of.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add the column and the index."""
    op.add_column("jobs", sa.Column("lost_seconds", sa.Float, nullable=False, server_default="0"))
    columns = ["state", "reason", "deleted_at", "attempt", "lost_seconds", "queued_at", "created_at"]
    op.create_index("jobs_in_figures", "jobs", columns)
