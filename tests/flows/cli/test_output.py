"""What a run's table says on a terminal."""

from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console

from flows.cli.output import evaluation_table


def shown(*checks: tuple[str, str, str]) -> str:
    rows: list[dict[str, Any]] = [
        {"check": name, "verdict": verdict, "why": why, "value": None, "required": True}
        for name, verdict, why in checks
    ]
    console = Console(file=StringIO(), width=160, color_system=None)
    console.print(evaluation_table({"models": [{"model": "m", "verdict": "FAIL", "checks": rows}]}))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return " ".join(text.split())


def test_what_an_earlier_check_made_pointless_shares_a_row_and_the_rest_keeps_its_reason() -> None:
    """A check without a figure is no proof that the gate was shut before it."""
    skipped = "not measured: parity.prompt_tokens failed first, and the gate cannot open any more"
    text = shown(
        ("parity.prompt_tokens", "FAIL", "16 of 16 prompts differ"),
        ("parity.top1_agreement", "INCONCLUSIVE", "no logprobs to compare"),
        ("performance.ttft_p50_ratio", "INCONCLUSIVE", skipped),
        ("faults.sigkill", "INCONCLUSIVE", skipped),
        ("stability.failures", "INCONCLUSIVE", "not measured: this evaluation left the soak out"),
    )
    assert "parity.top1_agreement INCONCLUSIVE no logprobs to compare" in text
    assert f"not measured INCONCLUSIVE performance, faults: {skipped.removeprefix('not measured: ')}" in text
    assert "not measured INCONCLUSIVE stability: this evaluation left the soak out" in text
    assert text.count("cannot open") == 1
