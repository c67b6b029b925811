"""Tasks: one file per thing measured, judged or recorded. Plain functions over `engines`."""
