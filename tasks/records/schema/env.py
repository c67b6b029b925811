"""Run by Alembic, on the connection that `tasks.records.schema.upgrade` hands over; logging is left as it is."""

from __future__ import annotations

from alembic import context

from tasks.records.schema.upgrade import VERSION_TABLE
from tasks.records.tables import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    version_table=VERSION_TABLE,
    # SQLite cannot alter a column in place: tables are copied and renamed there
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
