"""Run by Alembic, on the connection that `tasks.schema.upgrade` hands over; logging is left as it is."""

from __future__ import annotations

from alembic import context

from tasks.records import METADATA
from tasks.schema.upgrade import VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    version_table=VERSION_TABLE,
    # SQLite cannot alter a column in place: tables are copied and renamed there
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
