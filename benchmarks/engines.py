"""The table of docs/engines.md: what each engine did on a machine, out of the records of real runs.

    python -m benchmarks.engines [HOME ...]

Reads the evaluations, migrations and rollbacks recorded in each HOME (a SWITCHYARD_HOME), adds them to
`docs/engines.json`, a later run in place of an earlier one that found no more, and writes the tables of docs/engines.md
from that file. A cell is what a run found, or why there is none. `build` of a row (a short name of its version) and
`not_run` are written by hand.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engines.units import figure
from tasks.evidence.behaviours.battery import DEFAULT_REQUIRED
from tasks.evidence.faults import KINDS
from tasks.records.store import Records, open_records
from tasks.records.tables import Run
from tasks.report.model_record import ModelRecord
from tasks.verdicts.verdict import CheckResult, Verdict, gate, reasons

Json = dict[str, Any]

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, PAGE = DOCS / "engines.json", DOCS / "engines.md"
BEGIN, END = "<!-- made by python -m benchmarks.engines -->", "<!-- end -->"
LOOK_BACK = 500  # runs of a home
HEAD = (
    "Engine",
    "Version",
    "Found",
    "Started",
    "Ready",
    "45 required behaviours",
    "Parity",
    "Faults",
    "Moved, and back",
)
FORMS = {"binary": "program", "hosted": "wheel, hosted", "native": "wheel, native", "attached": "attached"}
MOVES = ("migrate", "migrate-native", "rollback")
SPEED = tuple(f"performance.{name}_ratio" for name in ("ttft_p50", "tpot_p50", "e2e_p50"))
FIGURES = {
    "parity.prompt_tokens": "prompts read as the same tokens, share",
    "parity.top1_agreement": "same most likely token, share",
    "parity.mean_kld": "mean KLD, nats",
    "parity.exact_match": "answers equal to the letter, share",
    "performance.ttft_p50_ratio": "time to first token, times the incumbent's",
    "performance.tpot_p50_ratio": "time of a token, times the incumbent's",
    "memory.peak_ratio": "peak memory, times the incumbent's",
}


class Engine(NamedTuple):
    """One row: a kind of engine, how it is run, and its version as it reports it."""

    kind: str
    form: str
    version: str

    def __str__(self) -> str:
        return f"{self.kind} {self.version}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("homes", nargs="*", type=Path, metavar="HOME")
    kept: Json = json.loads(RESULTS.read_text(encoding="utf-8"))
    for home in parser.parse_args().homes:
        with open_records(home / "switchyard.db") as records:
            add(kept, records)
    RESULTS.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), kept), encoding="utf-8")


# --- out of the records


def add(kept: Json, records: Records) -> None:
    """Add to `kept` what is recorded, the oldest run first: a later result takes an earlier one's place."""
    rows = {Engine(row["engine"], row["form"], row["version"]): row for row in kept["rows"]}
    named: dict[str, Engine] = {}
    for run in reversed(records.history(LOOK_BACK)):
        if run.kind == "evaluate" and run.status == "done":
            kept["machine"] = _machine(run.environment)
            for model_id, checks in records.checks(run.id).items():
                model = ModelRecord.read(records, run, {"model": model_id, "checks": [c.model_dump() for c in checks]})
                arms = {arm: _engine(run, arm, one) for arm, one in model.engines.items()}
                named |= {str(model.engines[arm]["engine"]): engine for arm, engine in arms.items()}
                for arm, engine in arms.items():
                    row = rows.setdefault(engine, {**_key(engine), "build": "", "results": {}})
                    _put(row, _results(model, arm, arms), {"run": run.id, "model": model.name})
        if run.kind in MOVES:
            for name, moved in _moves(records, run):
                if name in named and named[name] in rows:
                    other = named.get(moved["with"])
                    _put(rows[named[name]], {"moved": {**moved, "with": str(other or moved["with"])}}, {"run": run.id})
    kept["rows"] = sorted(rows.values(), key=lambda row: (row["engine"], row["form"], row["version"]))


def _put(row: Json, results: Mapping[str, Json], source: Json) -> None:
    """Store results worth no less than those that are there; of parity and moves one for each other engine."""
    kept = row["results"]
    for column, result in results.items():
        pair = f"{column} {result.get('as', '')} {result['with']}" if "with" in result else column
        if "missing" in result and any(name.split()[0] == column and "missing" not in kept[name] for name in kept):
            continue
        if _worth(result) >= _worth(kept.get(pair, {})):
            kept[pair] = {**result, **source}
            if pair != column:
                kept.pop(column, None)


def _worth(result: Json) -> float:
    """How much a result says: of more behaviours, more figures, the quickest start, a move with all its steps."""
    told = sum(bool(result.get(name)) for name in ("rehearsal", "canary", "rolled_back"))
    start = 1 / (1 + result["load_s"]) if result.get("load_s") else 0.0  # the machine was quietest
    return start + told + int(result.get("tried", 0)) + len(result.get("figures", ()))


def _key(engine: Engine) -> Json:
    return {"engine": engine.kind, "form": engine.form, "version": engine.version}


def _engine(run: Run, arm: str, seen: Mapping[str, Any]) -> Engine:
    return Engine(str(run.plan[arm]["engine"]), str(seen["form"]), str(seen["version"]))


def _machine(environment: Mapping[str, Any]) -> str:
    gpus = environment.get("gpus") or ["no GPU"]
    ram = f"{environment['ram_bytes'] / 2**30:.0f} GiB"
    return f"{environment['cpu']}, {environment['cpu_cores']} cores, {ram}, {'; '.join(map(str, gpus))}"


def _results(model: ModelRecord, arm: str, arms: Mapping[str, Engine]) -> dict[str, Json]:
    """What one evaluation found of one of its engines, by column."""
    found = {
        "started": _started(model, arm),
        "behaviours": _behaviours(model, arm),
        "parity": {"missing": "it was the incumbent of its runs: others were compared with it"},
        "faults": {"missing": "only a candidate's faults are tried, and it was the incumbent"},
    }
    if arm == "candidate":
        found |= {"parity": _parity(model, str(arms.get("incumbent", ""))), "faults": _faults(model)}
        if shut := reasons(model.checks):
            found["moved"] = {"missing": f"the gate stayed shut: {shut[0].check} {shut[0].verdict}"}
    found.setdefault("moved", {"missing": "no migration was run"})
    return found


def _started(model: ModelRecord, arm: str) -> Json:
    launch = model.check(f"launch.{arm}")
    if launch is not None and launch.verdict is not Verdict.PASS:
        return {"failed": launch.why}
    loads = [block[arm]["load_s"] for block in model.blocks() if block[arm].get("load_s") is not None]
    if not loads and model.one(arm, "parity.first_tokens") is None:
        return {"missing": "nothing was asked of it"}
    return {"load_s": round(statistics.median(loads), 2) if loads else None}


def _behaviours(model: ModelRecord, arm: str) -> Json:
    seen = model.one(arm, "compatibility")
    if seen is None:
        return {"missing": _why(model, "compatibility.required_passed")}
    outcomes = {name: one["outcome"] for name, one in seen["behaviours"].items()}
    required = {name: outcome for name, outcome in outcomes.items() if name in DEFAULT_REQUIRED}
    passed = sum(outcome == "passed" for outcome in required.values())
    lacks = sorted(name for name, outcome in required.items() if outcome in ("failed", "errored"))
    others = {name: outcome for name, outcome in sorted(outcomes.items()) if outcome != "passed"}
    return {"passed": passed, "tried": len(required), "of": len(DEFAULT_REQUIRED), "lacks": lacks, "not_passed": others}


def _parity(model: ModelRecord, incumbent: str) -> Json:
    checks = [check for check in model.checks if check.check.startswith("parity.")]
    tokens = model.check("parity.prompt_tokens")
    if tokens is None or (tokens.value is None and tokens.verdict is Verdict.INCONCLUSIVE):
        return {"missing": _why(model, "parity.prompt_tokens")}
    shut = reasons(checks)
    figures = {one.check: one.value for one in model.checks if one.check in FIGURES and one.value is not None}
    return {"with": incumbent, "verdict": gate(checks).value, "by": [one.check for one in shut], "figures": figures}


def _faults(model: ModelRecord) -> Json:
    if model.engines["candidate"]["form"] == "native":
        return {"missing": "a native engine is met behind a yard: the phase `native` rehearses its death and its hang"}
    drills = {kind: [one for one in model.checks if one.check.startswith(f"faults.{kind}")] for kind in KINDS}
    if not all(drills.values()) or not any(one.required for found in drills.values() for one in found):
        return {"missing": _why(model, f"faults.{KINDS[0]}")}
    if all(one.verdict is Verdict.INCONCLUSIVE for found in drills.values() for one in found):
        return {"missing": _why(model, f"faults.{KINDS[0]}")}
    verdicts = {kind: gate(found).value for kind, found in drills.items()}
    return {"passed": sum(one == Verdict.PASS for one in verdicts.values()), "drills": verdicts}


def _why(model: ModelRecord, check: str) -> str:
    found: CheckResult | None = model.check(check)
    return found.why if found else "it was not measured"


def _moves(records: Records, run: Run) -> Iterator[tuple[str, Json]]:
    """(name of an engine, what it took part in) of a migration that promoted a model, or of a rollback."""
    for model_id in {step.model_id for step in records.steps(run.id)}:
        steps = {step.step: step for step in records.steps(run.id, model_id)}
        if run.kind == "rollback" and run.verdict == Verdict.PASS:  # of a move by hand, where no migration is recorded
            new, old = str(steps["rollback"].detail["from"]), str(steps["rollback"].detail["serving"])
            parts = {"rehearsal": False, "canary": False, "rolled_back": run.id, "override": None}
            yield new, {"as": "candidate", "with": old, **parts}
            yield old, {"as": "incumbent", "with": new, **parts}
            continue
        promoted = steps.get("promote")
        if promoted is None or promoted.state != "done":
            continue
        old, new = str(promoted.detail["undo"]), str(promoted.detail["serving"])
        back = steps.get("rolled back")
        canary = [step.step for step in steps.values() if step.step.startswith("canary") and step.state == "done"]
        parts = {
            "rehearsal": "rehearsal" in steps and "left_out" not in steps["rehearsal"].detail,
            "canary": bool(canary) and all("left_out" not in steps[name].detail for name in canary),
            "rolled_back": back.detail["by_run"] if back else None,
            "override": steps["precondition"].detail.get("override") if "precondition" in steps else None,
        }
        yield new, {"as": "candidate", "with": old, **parts}
        yield old, {"as": "incumbent", "with": new, **parts}


# --- onto the page


def written(page: str, kept: Json) -> str:
    """`page` with the tables of `kept` between its two marks."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{tables(kept)}\n{END}{tail}"


def tables(kept: Json) -> str:
    """The table of all engines with its notes, and one for each engine that was run in several forms."""
    notes: list[str] = []
    builds = {str(Engine(row["engine"], row["form"], row["version"])): row["build"] for row in kept["rows"]}
    builds = {whole: f"{whole.partition(' ')[0]} {build}" for whole, build in builds.items() if build}
    rows = [_row(row, notes, builds) for row in kept["rows"]]
    parts = [f"Machine: {kept['machine']}.", "", *_table(HEAD, rows), ""]
    parts += [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    parts += ["", "Not run here:", ""] + [f"- {one['engine']}: {one['why']}" for one in kept["not_run"]]
    for kind in dict.fromkeys(row["engine"] for row in kept["rows"]):
        forms = [row for row in kept["rows"] if row["engine"].removesuffix("-native") == kind and _figures(row)]
        if len({row["form"] for row in forms}) > 1:
            parts += ["", f"### {kind}: its forms beside each other", "", *_forms(forms)]
    return "\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _row(row: Json, notes: list[str], builds: Mapping[str, str]) -> list[str]:
    is_ours = row["form"] != "attached"

    def cell(column: str, text: Callable[[Json], str]) -> str:
        found = [one for name, one in row["results"].items() if name.split()[0] == column]
        found = [one | {"with": builds.get(one["with"], one["with"])} if "with" in one else one for one in found]
        missing = [one["missing"] for one in found if "missing" in one]
        return f"not run here, because {_numbered(notes, missing[0])}" if missing else "; ".join(map(text, found))

    def started(result: Json) -> str:
        return f"no: {result['failed']}" if "failed" in result else "yes" if is_ours else "by others"

    def ready(result: Json) -> str:
        return "no" if "failed" in result else f"{figure(result['load_s'])} s" if result["load_s"] else "yes"

    return [
        row["engine"].removesuffix("-native"),
        ": ".join(filter(None, (row["build"], row["version"]))),
        FORMS[row["form"]],
        cell("started", started),
        cell("started", ready),
        cell("behaviours", _behaviours_text),
        cell("parity", _parity_text),
        cell("faults", _faults_text),
        cell("moved", _moved_text),
    ]


def _numbered(notes: list[str], note: str) -> str:
    """`(3)`, the note's place among `notes`, which has it now."""
    if note not in notes:
        notes.append(note)
    return f"({notes.index(note) + 1})"


def _behaviours_text(result: Json) -> str:
    tried = "" if result["tried"] == result["of"] else f" tried, {result['of']} are required"
    lacks = f"; lacks {', '.join(result['lacks'])}" if result["lacks"] else ""
    beside = result["tried"] - result["passed"] - len(result["lacks"])
    apart = f"; {beside} not applicable to this model" if beside else ""
    return f"{result['passed']} of {result['tried']}{tried}{lacks}{apart}"


def _parity_text(result: Json) -> str:
    figures = result["figures"]
    parts = [f"{result['verdict']} with {result['with']}"]
    if (agreement := figures.get("parity.top1_agreement")) is not None:
        parts.append(f"same token {agreement:.2%}")
    if (kld := figures.get("parity.mean_kld")) is not None:
        parts.append(f"KLD {figure(kld)} nats")
    by = f" ({', '.join(name.removeprefix('parity.') for name in result['by'])})" if result["by"] else ""
    return f"{parts[0]}{by}: {', '.join(parts[1:])}" if parts[1:] else parts[0] + by


def _faults_text(result: Json) -> str:
    wrong = [f"{kind} {verdict}" for kind, verdict in result["drills"].items() if verdict != Verdict.PASS]
    return f"{result['passed']} of {len(result['drills'])}" + (f"; {', '.join(wrong)}" if wrong else "")


def _moved_text(result: Json) -> str:
    way = f"from {result['with']}" if result["as"] == "candidate" else f"to {result['with']}"
    left_out = [name for name in ("rehearsal", "canary") if not result[name]]
    more = f", without {' and '.join(left_out)}" if left_out else ""
    gated = ", its shut gate overridden by hand" if result["override"] else ""
    return f"{way}{more}{gated}; {'rolled back' if result['rolled_back'] else 'not rolled back'}"


def _figures(row: Json) -> Json:
    """The figures of the latest comparison of an engine with another kind of engine."""
    found = [one for name, one in row["results"].items() if name.startswith("parity ") and one.get("figures")]
    found = [one for one in found if not one["with"].startswith(f"{row['engine']} ")]
    return max(found, key=lambda one: str(one["run"]))["figures"] if found else {}


def _forms(rows: Sequence[Json]) -> list[str]:
    """Figures of the forms of one engine, and the behaviours (required or not) that one of them does not pass."""
    names = [f"{FORMS[row['form']]}, {row['version']}" for row in rows]
    figures = list(map(_figures, rows))
    lines = [
        [title, *(figure(one[check]) if check in one else "-" for one in figures)]
        for check, title in FIGURES.items()
        if any(check in one for one in figures)
    ]
    seen = [row["results"]["behaviours"].get("not_passed") for row in rows]
    for name in sorted({name for one in seen if one for name in one}):
        if len({None if one is None else one.get(name, "passed") for one in seen} - {None}) > 1:
            required = " (required)" if name in DEFAULT_REQUIRED else ""
            lines.append([f"`{name}`{required}", *("-" if one is None else one.get(name, "passed") for one in seen)])
    return _table(["", *names], lines)


if __name__ == "__main__":
    main()
