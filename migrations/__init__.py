"""Migrations: one declaration per pair of engines, and the plan a user may write to override it. No I/O but TOML."""
