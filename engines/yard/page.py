"""`/yard`: one small page without scripts from the network; it shows what `switchyard status` shows."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from typing import Any

STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent) }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 1.5rem auto; padding: 0 1rem }
h1 { font-size: 1.25rem } h2 { font-size: 1.05rem; margin: 1.6rem 0 .3rem }
table { border-collapse: collapse; width: 100%; display: block; overflow-x: auto }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
svg { width: 9rem; height: 1.6rem } polyline { fill: none; stroke: #3b82f6; stroke-width: 1.5 }
.ready, .busy { color: #15803d } .loading { color: #a16207 } .dead, .wedged, .failing, .bad { color: #b91c1c }
.muted { opacity: .7 } code { overflow-wrap: anywhere; font-size: .85em }
"""


SHOWN_INCIDENTS = 21
COLUMNS = ("engine", "state", "in flight", "tokens/s", "first token", "memory", "")


def page(status: dict[str, Any]) -> str:
    """The whole page; it loads itself again every 5 s."""
    models = "".join(_model(model) for model in status["models"])
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<meta http-equiv='refresh' content='5'><title>Switchyard</title><style>{STYLE}</style></head><body>"
        f"<h1>Switchyard</h1><p class='muted'>{_text(status['address'])}, pid {status['pid']}, "
        f"up {_ago(status['since'])}</p>{models}{_incidents(status['incidents'])}</body></html>"
    )


def _model(model: dict[str, Any]) -> str:
    notes = []
    if model["unservable"]:
        notes.append(f"<span class='bad'>{_text(model['unservable'])}</span>")
    if model["fallback"]:
        notes.append(f"<span class='bad'>fallback: {_text(model['committed'])} is out of order</span>")
    if model["moving"]:
        notes.append(_text(f"under way: {model['moving']}"))
    if model["canary"]:
        notes.append(_text(f"canary: {model['canary']['engine']} {model['canary']['weight']:.0%}"))
    if model["undo"]:
        notes.append(_text(f"way back: {model['undo']}"))
    notes.append(f"{model['waiting']} waiting")
    rows = "".join(_engine(engine, serves=engine["engine"] == model["serving"]) for engine in model["engines"])
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    return (
        f"<h2>{_text(model['id'])} → {_text(model['serving'])}</h2><p>{' · '.join(notes)}</p>"
        f"<table><tr>{head}</tr>{rows}</table>"
    )


def _engine(engine: dict[str, Any], *, serves: bool) -> str:
    name = f"<b>{_text(engine['engine'])}</b>" if serves else _text(engine["engine"])
    ttft, memory = engine["ttft_ms_series"], engine["memory_series"]
    cells = [
        f"<td>{name}<br><span class='muted'>{_text(engine['version'])}, {_text(engine['form'])}</span></td>",
        f"<td><span class='{engine['state']}'>{engine['state']}</span><br>"
        f"<span class='muted'>{_text(_short(engine['why']))}</span></td>",
        f"<td class='n'>{engine['in_flight']}</td>",
        f"<td class='n'>{_number(engine['tokens_per_s'], '{:.1f}')}</td>",
        f"<td>{_number(ttft[-1] if ttft else None, '{:.0f} ms')}<br>{_spark(ttft)}</td>",
        f"<td>{_number(_mib(engine['memory_bytes']), '{:.0f} MiB')}<br>{_spark(memory)}</td>",
        f"<td class='muted'>{'pid ' + str(engine['pid']) if engine['pid'] else ''}"
        f"{', ' + str(engine['restarts']) + ' restarts' if engine['restarts'] else ''}</td>",
    ]
    command = f"<tr><td colspan='7'><code>{_text(' '.join(engine['argv']))}</code></td></tr>" if engine["argv"] else ""
    return f"<tr>{''.join(cells)}</tr>{command}"


def _incidents(incidents: Sequence[dict[str, Any]]) -> str:
    if not incidents:
        return "<h2>Incidents</h2><p class='muted'>none</p>"
    rows = "".join(
        f"<tr><td class='muted'>{_ago(incident['at'])} ago</td><td>{_text(incident['model'])}</td>"
        f"<td>{_text(_short(incident['what']))}</td></tr>"
        for incident in list(incidents)[:-SHOWN_INCIDENTS:-1]
    )
    return f"<h2>Incidents</h2><table>{rows}</table>"


def _spark(values: Sequence[float]) -> str:
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    spread = (high - low) or 1.0
    points = " ".join(
        f"{100 * i / (len(values) - 1):.1f},{18 - 16 * (value - low) / spread:.1f}" for i, value in enumerate(values)
    )
    line = f"<polyline points='{points}'/>"
    return f"<svg viewBox='0 0 100 20' preserveAspectRatio='none' role='img' aria-label='history'>{line}</svg>"


def _mib(n_bytes: int | None) -> float | None:
    return None if n_bytes is None else n_bytes / 2**20


def _number(value: float | None, form: str) -> str:
    return "<span class='muted'>not measured</span>" if value is None else form.format(value)


def _short(text: str) -> str:
    line = text.partition("\n")[0]
    return line if len(line) <= 160 else line[:159] + "…"


def _ago(moment: float) -> str:
    seconds = max(time.time() - moment, 0)
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _text(value: object) -> str:
    return html.escape(str(value))
