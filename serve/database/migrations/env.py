"""Alembic's entry: runs the migrations on the connection that `open_database` gives it."""

from alembic import context

from serve.database.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite alters a table by making it anew
)
with context.begin_transaction():
    context.run_migrations()
