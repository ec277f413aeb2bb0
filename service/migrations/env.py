"""Alembic's entry point: runs the migrations on the database that `service.database.migrate` names."""

import sqlalchemy as sa
from alembic import context

from service.database import make_engine
from service.tables import metadata

_LOCK = 0x6C6F636B73746570  # "lockstep"
"""The number of the advisory lock that migrations hold, so that of several control planes one migrates."""

engine = make_engine(context.config.attributes["url"])
try:
    with engine.execution_options(writes=True).begin() as connection:
        if engine.dialect.name == "postgresql":
            # A big table takes its time, and so does another's turn.
            for limit in ("statement_timeout", "lock_timeout"):
                connection.execute(sa.text(f"SET LOCAL {limit} = 0"))
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
            # Who waits for a table, behind a dump for instance, holds up everybody else who wants it: rather fail.
            connection.execute(sa.text("SET LOCAL lock_timeout TO DEFAULT"))
        context.configure(connection=connection, target_metadata=metadata)
        context.run_migrations()
finally:
    engine.dispose()
