"""Alembic's entry point: runs the migrations on the database that `service.store.migrate` names."""

from alembic import context

from service.database import make_engine
from service.tables import metadata

engine = make_engine(context.config.attributes["url"])
with engine.begin() as connection:
    context.configure(connection=connection, target_metadata=metadata)
    context.run_migrations()
engine.dispose()
