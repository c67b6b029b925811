"""`/yard`: one small page without scripts or anything from the network; it shows what `switchyard status` shows."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.units import ago

STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 16%, transparent);
  --card: color-mix(in srgb, currentColor 4%, transparent); --good: #15803d; --wait: #a16207; --bad: #b91c1c;
  --spark: #2563eb }
@media (prefers-color-scheme: dark) { :root { --good: #4ade80; --wait: #facc15; --bad: #f87171; --spark: #60a5fa } }
* { box-sizing: border-box }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.2rem; margin: 0 } h2 { font-size: 1.05rem; margin: 1.8rem 0 .2rem; overflow-wrap: anywhere }
p { margin: .15rem 0; overflow-wrap: anywhere } .muted { opacity: .65 }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr));
  gap: .8rem; margin: .6rem 0 }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem; min-width: 0 }
.serves { background: var(--card); border-color: color-mix(in srgb, currentColor 40%, transparent) }
.name { display: flex; justify-content: space-between; gap: 1rem; font-weight: 600 }
.state::before { content: "●"; margin-right: .35em }
.ready, .busy { color: var(--good) } .loading, .wait { color: var(--wait) }
.dead, .wedged, .failing, .bad { color: var(--bad) }
dl { display: grid; grid-template-columns: repeat(4, 1fr); gap: .2rem .6rem; margin: .6rem 0 }
.wide { grid-template-columns: 1fr 1fr }
dt { font-size: .78rem; opacity: .65 } dd { margin: 0; font-variant-numeric: tabular-nums }
svg { display: block; width: 100%; height: 2rem; margin-top: .15rem } polyline { fill: none; stroke: var(--spark);
  stroke-width: 1.5; vector-effect: non-scaling-stroke }
polygon { fill: color-mix(in srgb, var(--spark) 15%, transparent) } .range { font-size: .72rem; opacity: .65 }
summary { font-size: .8rem; opacity: .65; cursor: pointer } code { overflow-wrap: anywhere; font-size: .8rem }
ol { list-style: none; padding: 0; margin: .4rem 0 } li { border-top: 1px solid var(--line); padding: .35rem 0;
  overflow-wrap: anywhere }
"""

SHOWN_INCIDENTS = 12


def page(status: Mapping[str, Any], reports: Sequence[str] = ()) -> str:
    """The whole page, with links to the reports of these names; it loads itself again every 5 s."""
    models = "".join(_model(model) for model in status["models"])
    models += "".join(f"<p class='muted'>{_text(one_line(line, 400))}</p>" for line in retired(status))
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<meta http-equiv='refresh' content='5'><title>{_title(status)}</title><style>{STYLE}</style></head><body>"
        f"<h1>Switchyard</h1><p class='muted'>{_text(status['address'])} · up {ago(status['since'])} · "
        f"pid {_text(status['pid'])}</p>{models}{_incidents(status['incidents'])}{_reports(reports)}</body></html>"
    )


def _reports(names: Sequence[str]) -> str:
    links = " · ".join(f"<a href='/yard/reports/{_text(name)}'>{_text(Path(name).stem)}</a>" for name in names)
    return f"<h2>Reports of evaluations</h2><p>{links}</p>" if links else ""


def retired(status: Mapping[str, Any]) -> list[str]:
    """A line for each engine that nothing starts any more."""
    return list(status.get("retired", {}).values())


def one_line(text: object, most: int = 160) -> str:
    """The first line of a text from outside, without control characters, at most `most` characters long."""
    line = "".join(sign if sign.isprintable() else " " for sign in str(text).strip().partition("\n")[0])
    return line if len(line) <= most else line[: most - 1] + "…"


def _title(status: Mapping[str, Any]) -> str:
    loaded = [model for model in status["models"] if not model.get("dormant")]
    out = sum(_serving_state(model) not in ("ready", "busy") for model in loaded)
    return f"{out} not served · Switchyard" if out else "Switchyard"


def _serving_state(model: Mapping[str, Any]) -> str | None:
    return next((engine["state"] for engine in model["engines"] if engine["engine"] == model["serving"]), None)


def _model(model: Mapping[str, Any]) -> str:
    cards = "".join(_engine(engine, model) for engine in model["engines"])
    said = "".join(f"<p class='{kind}'>{_text(one_line(note, 400))}</p>" for kind, note in notes(model))
    serving = f"served by {_text(model['serving'])}" if model["serving"] else "<span class='bad'>not served</span>"
    return f"<h2>{_text(model['id'])} · {serving}</h2>{said}<div class='cards'>{cards}</div>"


def notes(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is to be known about a route, each with its kind: bad, wait, news or muted."""
    said = []
    if model["unservable"]:
        said.append(("bad", f"Not served: {model['unservable']}"))
    if model["fallback"]:
        said.append(("bad", f"Fallback: {model['committed']} is out of order, {model['fallback']} serves"))
    if model["moving"]:
        said.append(("wait", f"Under way: {model['moving']}"))
    if model.get("dormant"):
        said.append(("muted", "Not loaded; the next request loads it"))
    if model["holding"]:
        said.append(("wait", "Holding new requests"))
    if model["canary"]:
        said.append(("news", _of_canary(model["canary"])))
    if shadow := model.get("shadow"):
        said.append(("news", f"Shadow: {shadow['engine']} gets copies of {shadow['share']:.0%}{_verdict(shadow)}"))
    if last := model.get("last_canary"):
        said.append(("muted", f"Last canary{_verdict(last)}"))
    return [*said, ("muted", " · ".join(_usual(model)))]


def _of_canary(canary: Mapping[str, Any]) -> str:
    return f"Canary: {canary['engine']} answers {canary['weight']:.0%} of the conversations{_verdict(canary)}"


def _verdict(judged: Mapping[str, Any]) -> str:
    return f"; {judged['verdict']}: {one_line(judged.get('why', ''))}" if judged.get("verdict") else ""


def _usual(model: Mapping[str, Any]) -> list[str]:
    usual = [f"{model['waiting']} waiting"]
    if model["undo"]:
        usual.append(f"way back: {model['undo']}")
    if model["selected"] != "auto":
        usual.append(f"engine chosen by hand: {model['selected']}")
    return usual


def _engine(engine: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    state, serves = _text(engine["state"]), engine["engine"] == model["serving"]
    since = "" if engine["since"] is None else f" · {ago(engine['since'])}"
    loading = f" ({engine['loading']})" if engine["loading"] else ""
    return (
        f"<section class='card{' serves' if serves else ''}'><div class='name'><span>{_text(engine['engine'])}</span>"
        f"<span class='state {state}'>{state}{since}</span></div>"
        f"<p class='muted'>{_text(one_line(engine['why'] + loading))}</p>{_figures(engine)}"
        f"<details><summary>{_text(one_line(engine['version']))}, {_text(engine['form'])}</summary>"
        f"{_process(engine)}</details></section>"
    )


def _figures(engine: Mapping[str, Any]) -> str:
    """Its figures; one without a process has only its history."""
    ttft, memory, figures = engine["ttft_ms_series"], _number(_mib(engine["memory_bytes"]), "{:.0f} MiB"), []
    if engine["pid"] is not None:
        figures += [
            ("in flight", _text(engine["in_flight"])),
            ("tokens/s", _number(engine["tokens_per_s"], "{:.1f}")),
        ]
    figures.append(("restarts", _text(engine["restarts"])))
    if engine["load_s"] is not None:
        figures.append(("loaded in", f"{engine['load_s']:.1f} s"))
    if engine["vram_bytes"] is not None:
        memory += f" + GPU {_number(_mib(engine['vram_bytes']), '{:.0f} MiB')}"
    cells, history = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures), ""
    if engine["pid"] is not None or ttft:
        last = _number(ttft[-1] if ttft else None, "{:.0f} ms")
        history += f"<div><dt>first token</dt><dd>{last}{_spark(ttft, 1, 'ms')}</dd></div>"
    if engine["pid"] is not None:
        history += f"<div><dt>memory</dt><dd>{memory}{_spark(engine['memory_series'], 2**20, 'MiB')}</dd></div>"
    return f"<dl>{cells}</dl><dl class='wide'>{history}</dl>"


def _process(engine: Mapping[str, Any]) -> str:
    if engine["pid"] is None:
        return "<p class='muted'>no process</p>"
    context = "" if engine["context_tokens"] is None else f", context {engine['context_tokens']:,} tokens"
    command = f"<p><code>{_text(' '.join(engine['argv']))}</code></p>" if engine["argv"] else ""
    log = f"<p class='muted'>log: <code>{_text(engine['log'])}</code></p>" if engine["log"] else ""
    return f"<p class='muted'>pid {_text(engine['pid'])}{context}</p>{command}{log}"


def _incidents(incidents: Sequence[Mapping[str, Any]]) -> str:
    if not incidents:
        return "<h2>Incidents</h2><p class='muted'>none since the yard started</p>"
    rows = "".join(
        f"<li><span class='muted'>{ago(incident['at'])} ago · {_text(incident['model'])} "
        f"{_text(incident.get('engine', ''))}</span><br>{_text(one_line(incident['what'], 300))}</li>"
        for incident in list(incidents)[: -SHOWN_INCIDENTS - 1 : -1]
    )
    shown = f", the latest {SHOWN_INCIDENTS}" if len(incidents) > SHOWN_INCIDENTS else ""
    return f"<h2>Incidents: {len(incidents)}{shown}</h2><ol>{rows}</ol>"


def _spark(values: Sequence[float], unit_size: float, unit: str) -> str:
    """The values as a line, oldest first, from zero up: noise looks small, and growth looks like growth."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    points = " ".join(
        f"{100 * i / (len(values) - 1):.1f},{30 - 28 * value / (high or 1):.1f}" for i, value in enumerate(values)
    )
    label = f"{low / unit_size:.0f} to {high / unit_size:.0f} {unit}, last {len(values)}"
    return (
        f"<svg viewBox='0 0 100 30' preserveAspectRatio='none' role='img' aria-label='{label}'>"
        f"<polygon points='0,30 {points} 100,30'/><polyline points='{points}'/></svg><span class='range'>{label}</span>"
    )


def _mib(n_bytes: int | None) -> float | None:
    return None if n_bytes is None else n_bytes / 2**20


def _number(value: float | None, form: str) -> str:
    return "<span class='muted'>not measured</span>" if value is None else form.format(value)


def _text(value: object) -> str:
    return html.escape(str(value))
