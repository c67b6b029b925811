"""Flows: the phases as tables of contents, and the `switchyard` command."""
