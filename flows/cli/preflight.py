"""`switchyard preflight`: whether a plan's models, or GGUF files, load and fit, from their headers alone."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from engines.errors import BadInput, EngineError
from engines.model.gguf import SHARD_NAME
from engines.model.header import read_header
from engines.registry import DRIVERS
from engines.settings import NO_FILE
from engines.units import number_of, size
from flows.cli.options import Json
from flows.cli.output import EXIT_CODES, out, prepared_home, print_result, print_step
from flows.evaluation.load import judged_by_load, loads_of_files, loads_of_plan
from migrations.llama_cpp_to_mistral_rs import CANDIDATE
from migrations.plan import EngineChoice
from migrations.plan_file import load_plan
from tasks.evidence import preflight as headers

LOADS = {"yes": "green", "no": "red", "unknown": "yellow"}


def preflight(
    targets: Annotated[list[Path], typer.Argument(help="A plan (.toml), or GGUF files and folders.")],
    context: Annotated[int | None, typer.Option(min=1, help="Context in tokens, not the plan's or model's.")] = None,
    load: Annotated[bool, typer.Option("--load", help="Load each model in each engine, for one token.")] = False,
    fit: Annotated[bool, typer.Option("--fit", help="Find the largest context that fits under each engine.")] = False,
    json_: Json = False,
) -> None:
    """Check from file headers, in milliseconds, whether each engine loads a model and memory suffices.

    Example: `switchyard preflight model.gguf --context 32768`

    With `--fit`, for the plan's number of sequences, for 1 and 4, and for a KV cache of f16 and q8_0: the context up to
    which the model *fits* (the upper figure is within the free memory) and is *tight* (only the expected figure is).

    Exit code 3: the candidate does not load a model, no context fits under it (with `--fit`), or an overflow engine
    does not fit beside; 4: that is unknown.
    """
    if fit and (load or context is not None):
        raise BadInput(f"--fit looks for the context: {'--load' if load else '--context'} cannot be combined with it")
    report = examine(targets, context=context, load=load, fit=fit)
    print_result(report, json_, lambda _: out.print(_table(report), soft_wrap=False))
    # files alone have no candidate: the one that plans are written for
    candidate = report["models"][0]["engines"][-1]["engine"] if targets[0].suffix == ".toml" else CANDIDATE.engine
    loads = {e["loads"] for model in report["models"] for e in model["engines"] if e["engine"] == candidate}
    loads |= {
        "no" for model in report["models"] for e in model["engines"] if e["engine"] == candidate and _no_context(e)
    }
    loads |= {"no" for model in report["models"] if "overflow" in model and model["side_by_side"]["fits"] is False}
    raise typer.Exit(EXIT_CODES["FAIL" if "no" in loads else "INCONCLUSIVE" if "unknown" in loads else "PASS"])


def _no_context(entry: Mapping[str, Any]) -> bool:
    """Whether no context was found that is at least tight."""
    ways = entry.get("largest", ())
    return bool(ways) and not any(way["tight_tokens"] for way in ways)


def examine(targets: Sequence[Path], *, context: int | None, load: bool = False, fit: bool = False) -> dict[str, Any]:
    """What loads and fits, of the plan's models or of the files named; BadInput names the first that cannot be read.

    Of a folder, files that are no models are named as `not_models`. With `load`, each engine is asked by a real load;
    with `fit`, the largest contexts that fit are added.
    """
    plans = [target for target in targets if target.suffix == ".toml"]
    if plans and len(targets) > 1:
        raise BadInput(f"{plans[0]}: give one plan, or GGUF files, not both")
    if not plans:
        paths, not_models = _models_of(targets)
        stems = [path.stem for path in paths]  # names of the models, but the path where two files share a stem
        names = [stem if stems.count(stem) == 1 else str(path) for stem, path in zip(stems, paths, strict=True)]
        files = dict(zip(names, paths, strict=True))
        report = headers.preflight(
            list(files.items()),
            context=context,
            largest=fit,
            **_installed({kind: EngineChoice(engine=kind) for kind in DRIVERS}),
        )
        report["not_models"] = not_models
        loads = loads_of_files(report, files, context)
    else:
        plan = load_plan(plans[0])
        arms = {one.name: one for one in (plan.incumbent, plan.candidate)}
        files = {model.id: model.gguf for model in plan.models if model.gguf != NO_FILE}
        if not files:
            raise BadInput(f"{plans[0]}: names no model file, and so there is no header to read")
        report = headers.preflight(
            list(files.items()),
            settings_by_model={model.id: plan.settings_for(model.id) for model in plan.models},
            own_args={(model.id, name): plan.own_args(model.id, name) for model in plan.models for name in arms},
            engines={name: one.engine for name, one in arms.items()},
            overflow={
                model.id: (name, plan.settings_on(model.id, name))
                for model in plan.models
                if model.overflow is not None and (name := plan.named(model.overflow.engine))
            },
            context=context,
            largest=fit,
            **_installed(arms),
        )
        loads = loads_of_plan(plan, context)
    return judged_by_load(report, loads, prepared_home(), print_step) if load else report


def _models_of(targets: Sequence[Path]) -> tuple[list[Path], list[dict[str, str]]]:
    """The files to examine, and those in folders that are no models, each with the reason.

    Raises BadInput where nothing is left. Of a split set the first shard stands for all.
    """
    models, others = [], []
    for target in targets:
        if not target.is_dir():
            models.append(target)
            continue
        for path in sorted(target.iterdir()):
            shard = SHARD_NAME.match(path.name)
            if path.is_dir() or (shard and int(shard["number"]) != 1):
                continue
            try:
                read_header(path)
                models.append(path)
            except BadInput as error:
                others.append({"path": str(path), "why": str(error)})
    if not models:
        first = f"; {others[0]['why']}" if others else ""
        raise BadInput(f"{targets[0]}: no model that can be read lies in this folder{first}")
    return models, others


def _installed(engines: Mapping[str, EngineChoice]) -> dict[str, Any]:
    """What the answer may depend on of each engine installed here: its version, and whether it is a hosted wheel."""
    found = {}
    for name, engine in engines.items():
        with contextlib.suppress(EngineError):
            found[name] = engine.find()
    return {
        "versions": {name: one.version for name, one in found.items()},
        "hosted": {name for name, one in found.items() if one.form == "hosted"},
    }


def _table(report: Mapping[str, Any]) -> Group:
    parts: list[Any] = []
    for model in report["models"]:
        parts.append(Text.assemble("\n", (model["model"], "bold"), f"  {model['architecture']}"))
        table = Table(box=None, padding=(0, 2, 0, 2), show_header=False)
        for entry in model["engines"]:
            table.add_row(entry["engine"], Text(entry["loads"], style=LOADS[entry["loads"]]), entry["why"])
            table.add_row("", entry["fit"]["verdict"], entry["fit"]["why"])
            for warning in entry["warnings"]:
                table.add_row("", Text("note", style="yellow"), warning)
        parts.append(table)
        parts.append(Padding(_memory_line(model["memory"]), (0, 0, 0, 2)))
        if "largest" in model["engines"][0]:
            parts.append(_largest_table(model["engines"], report["free"]))
        if "overflow" in model:
            beside = model["side_by_side"]
            fits = {True: "fits", False: "does not fit", None: "may fit"}[beside["fits"]]
            parts.append(Padding(f"overflow: {model['overflow']} {fits} beside it: {beside['why']}", (0, 0, 0, 2)))
        parts += [Padding(Text(f"instead: {option}", style="cyan"), (0, 0, 0, 2)) for option in model["alternatives"]]
    if left_out := report.get("not_models"):
        parts.append(Text("\nnot examined, no models that can be read:", style="yellow"))
        parts += [Padding(Text(f"{other['why']}"), (0, 0, 0, 2)) for other in left_out]
    return Group(*parts)


def _largest_table(engines: Sequence[Mapping[str, Any]], free: Mapping[str, int | None]) -> Group:
    """One row for each engine, number of sequences, KV type and, beside a GPU, number of layers on it."""
    devices = [device for device in ("ram", "vram") if free[f"{device}_bytes"] is not None]
    has_gpu = "vram" in devices
    table = Table(box=None, padding=(0, 0, 0, 2))
    table.add_column("engine", no_wrap=True)
    for column in ("parallel", "KV", *["layers"] * has_gpu, "fits to", "tight to"):
        table.add_column(column, justify="right", no_wrap=True)
    for device in devices:
        for column in (device.upper(), "up to"):
            table.add_column(column, justify="right", no_wrap=True)
    for entry in engines:
        if not entry["largest"]:
            table.add_row(entry["engine"], "not known", style="yellow")
        for way in entry["largest"]:
            kv, needs = "/".join(dict.fromkeys(way["kv_types"])), {need["device"]: need for need in way["needs"]}
            layers = ["all" if way["gpu_layers"] is None else str(way["gpu_layers"])] * has_gpu
            tokens = [_tokens(way[key], way["trained_tokens"]) for key in ("fits_tokens", "tight_tokens")]
            found = [size(needs[one][key]) if one in needs else "" for one in devices for key in ("expected", "high")]
            table.add_row(entry["engine"], str(way["parallel"] or "auto"), kv, *layers, *tokens, *found)
    total = " and ".join(f"{size(free[f'{device}_bytes'])} of {device.upper()}" for device in devices)
    return Group(Padding(f"largest context in {total} (*: all that it was trained for)", (0, 0, 0, 2)), table)


def _tokens(tokens: int | None, trained: int | None) -> str:
    return "none" if tokens is None else f"{tokens:,}{'*' * (tokens == trained)}"


def _memory_line(memory: Mapping[str, Any]) -> Text:
    if memory["kv_bytes_per_token"] is None:
        return Text(f"weights {size(memory['weights_bytes'])}; KV cache unknown: {memory['why_unknown']}")
    text = f"weights {size(memory['weights_bytes'])}, KV {memory['kv_bytes_per_token']:,} B per token"
    text += f" = {size(memory['kv_bytes'])} at {number_of(memory['context_tokens'], 'token')}"
    if memory["state_bytes_per_sequence"]:
        text += f", state {size(memory['state_bytes_per_sequence'])} per sequence"
    return Text(text)
