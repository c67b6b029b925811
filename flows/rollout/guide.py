"""The migration guide as files: Markdown and HTML, made again from the records whenever it is asked for."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from engines.yard.state import StateFile
from migrations.plan import Plan
from tasks.records.store import Records
from tasks.report.guide import html, markdown
from tasks.report.guide_facts import gather


def write_guide(records: Records, plan: Plan, home: Path, folder: Path | None = None) -> tuple[Path, Path]:
    """`guide.md` and `guide.html` in `folder` (default: under `home`, by the plan's name), redacted for sharing."""
    state = StateFile(home / "yard").read()
    moved = [route.moved_at for route in state.models.values() if route.moved_at is not None]
    until = None  # none was moved, or the way back is closed already
    if moved and plan.incumbent.name not in state.retired:
        until = datetime.fromtimestamp(max(moved), UTC) + timedelta(days=plan.retire.rollback_window_days)
    facts = gather(records, plan, state, home=home, now=datetime.now(UTC), rollback_until=until)
    where = folder or home / "guides" / plan.name
    where.mkdir(parents=True, exist_ok=True)
    written = where / "guide.md", where / "guide.html"
    for path, text in zip(written, (markdown(facts), html(facts)), strict=True):
        path.write_text(text, encoding="utf-8")
    return written
