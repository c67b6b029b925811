"""The versions of the database's schema: an Alembic environment that ships with the package."""
