"""`switchyard init`: a plan written from the engine in use."""

import contextlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from engines.driver import Installation
from engines.errors import BadInput, EngineError
from engines.llama_cpp.argv import LlamaServerCommand
from engines.llama_cpp.commands import parse_commands, read_listener
from engines.llama_cpp.flags import OWN_ARGS
from engines.model.header import read_header
from engines.ollama.library import StoredModel, differences, read_store, stores
from engines.settings import EngineArgs, Settings
from engines.units import number_of
from engines.yard.settings import YardSettings
from flows.cli.options import Json
from flows.cli.output import next_command, out, print_json
from migrations.carried import named, unsupported
from migrations.llama_cpp_to_mistral_rs import INCUMBENT, plan_for
from migrations.ollama_to_llama_cpp import CANDIDATES
from migrations.ollama_to_llama_cpp import plan_for as ollama_plan_for
from migrations.pairs import pair_of
from migrations.plan import EngineChoice, ModelPlan, Plan
from migrations.plan_file import plan_to_toml

NOT_IN_AN_ID = re.compile(r"[^A-Za-z0-9._-]")
STDIN = Path("-")
PARTLY_MOVED = {
    "--mmproj": "images work on the incumbent only: a candidate serves the text of this model, without the projector",
    "--lora": "the candidate serves the model without the adapter, other answers included",
    "--lora-scaled": "the candidate serves the model without the adapter, other answers included",
    "--control-vector": "the candidate serves the model without the control vector, other answers included",
}
KEY_VARIABLE = "SWITCHYARD_API_KEY"  # unless the plan names another one
SHOWN_NAMES = 3  # in a note that holds for several models


def init(
    from_port: Annotated[int | None, typer.Option(help="Read the llama-server that listens on this port.")] = None,
    from_command: Annotated[str | None, typer.Option(help="Read a llama-server command line (quote it).")] = None,
    from_file: Annotated[
        Path | None,
        typer.Option(help="Read a systemd unit, start script, compose file or llama-swap config; - is standard input."),
    ] = None,
    from_ollama: Annotated[
        bool, typer.Option("--from-ollama", help="Read the models of your Ollama (OLLAMA_MODELS, or its usual places).")
    ] = False,
    model: Annotated[list[Path] | None, typer.Option(help="A GGUF to evaluate; repeat for several.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the plan goes.")] = Path("switchyard.toml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing plan.")] = False,
    json_: Json = False,
) -> None:
    """Write a plan (TOML) from the engine you run now, and list what the candidate does not support.

    Commands and files are read, never executed. Every flag is kept: as a setting, or under [incumbent] args.

    Example: `switchyard init --from-port 8080`
    """
    given = [name for name in (from_port, from_command, from_file, from_ollama or None) if name is not None]
    if len(given) > 1:
        raise BadInput("--from-port, --from-command, --from-file and --from-ollama exclude each other: give one")
    commands: list[LlamaServerCommand] = []
    if from_port is not None:
        commands = [read_listener(from_port)]
    elif from_command is not None:
        commands = parse_commands(from_command)
    elif from_file is not None:
        commands = parse_commands(_text(from_file), cwd=None if from_file == STDIN else from_file.absolute().parent)
    if from_ollama:
        written = write_ollama_plan(model or [], output=output, force=force)
    else:
        written = write_plan(commands, models=model or [], output=output, force=force)
    if json_:
        print_json(written)
        return
    out.print(f"{output} written: {', '.join(written['models'])}")
    for title, word in (
        ("unsupported", "not supported"),
        ("notes", "note"),
        ("unknown", "kept, though no llama-server known here lists it"),
    ):
        for line in written[title]:
            note = ", accepted in the plan" if title == "unsupported" and named(line) in written["accepted"] else ""
            out.print(f"  {word}{note}: {line}", markup=False)
    out.print(next_command(f"switchyard preflight {output}") + f", then [bold]switchyard evaluate {output}[/bold]")


def _text(path: Path) -> str:
    try:
        return sys.stdin.read() if path == STDIN else path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not UTF-8 text; give a unit, script, compose file or llama-swap config") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error


def write_plan(
    commands: Sequence[LlamaServerCommand], *, models: Sequence[Path], output: Path, force: bool
) -> dict[str, Any]:
    """Write the plan of `commands` and `models` to `output`; what is unsupported, noted or unknown.

    Raises BadInput where there is nothing to read, or `output` is there and not to be overwritten.
    """
    _refuse_to_overwrite(output, force)
    plan = plan_of(commands, models)
    has_key = any(command.has_api_key for command in commands)
    key = _key_note(plan, has_key=has_key)
    notes = [note for command in commands for note in _notes(command, models)] + ([key] if key else [])
    written = _written(plan, output, comment=key or "", notes=notes)
    return {**written, "unknown": _unknown(commands, plan.incumbent)}


def write_ollama_plan(models: Sequence[Path], *, output: Path, force: bool) -> dict[str, Any]:
    """Write the plan of the models in a user's Ollama to `output`; what `write_plan` returns. Raises BadInput."""
    _refuse_to_overwrite(output, force)
    if models:
        raise BadInput("--model and --from-ollama exclude each other: leave out of the plan what you do not move")
    found, notes = models_of_ollama(os.environ)
    candidate = next((one for one in CANDIDATES if _is_here(one)), CANDIDATES[0])
    notes += _once(found)
    return {**_written(ollama_plan_for(found, candidate), output, comment="", notes=notes), "unknown": []}


def _once(models: Sequence[StoredModel]) -> list[str]:
    """What Ollama adds to the files of these models: each line once, with the models that it holds for."""
    lines: dict[str, list[str]] = {}
    for model in models:
        for line in differences(model):
            lines.setdefault(line, []).append(model.name)
    return [f"{_named(names, len(models))}: {line}" for line, names in lines.items()]


def _named(names: Sequence[str], n_models: int) -> str:
    if len(names) == n_models > SHOWN_NAMES:
        return f"all {number_of(n_models, 'model')}"
    more = len(names) - SHOWN_NAMES
    return ", ".join(names) if more <= 0 else f"{', '.join(names[:SHOWN_NAMES])} and {more} more"


def models_of_ollama(env: Mapping[str, str]) -> tuple[list[StoredModel], list[str]]:
    """The models of the first store that has some, and a line for each that cannot be read. BadInput without any."""
    problems = []
    for folder in stores(env):
        try:
            found, lines = _with_headers(*read_store(folder))
        except BadInput as problem:
            found, lines = [], [str(problem)]
        problems += lines
        if found:
            return found, problems
    raise BadInput("no models of Ollama were found: " + "; ".join(problems or [f"{folder} holds none"]))


def _with_headers(models: list[StoredModel], lines: list[str]) -> tuple[list[StoredModel], list[str]]:
    """The models whose headers can be read; a line for each of the others, and for one that answers no chat."""
    found = []
    for model in models:
        try:
            header = read_header(model.gguf)
        except BadInput as problem:
            lines.append(f"{model.name}: {problem}; pull the model anew")
            continue
        found.append(model)
        if f"{header.architecture}.pooling_type" in header.meta:
            lines.append(f"{model.name}: gives embeddings; it cannot be moved: an evaluation compares chat")
    return found, lines


def _is_here(choice: EngineChoice) -> bool:
    with contextlib.suppress(EngineError):
        return bool(choice.find().version)
    return False


def _refuse_to_overwrite(output: Path, force: bool) -> None:
    if output.exists() and not force:
        raise BadInput(f"{output} exists already; choose another --output, or overwrite it with --force")


def _written(plan: Plan, output: Path, *, comment: str, notes: list[str]) -> dict[str, Any]:
    """Write the plan, accepting what its declaration accepts of the gaps of its candidate."""
    gaps, accepts = _unsupported(plan), pair_of(plan).accepted_unsupported
    accepted = tuple(name for name in dict.fromkeys(map(named, gaps)) if name in accepts)
    plan = plan.model_copy(update={"accepted_unsupported": accepted})
    head = f"Written by `switchyard init`. Evaluate with: switchyard evaluate {output}" + (comment and f"\n{comment}")
    try:
        output.write_text(plan_to_toml(plan, header_comment=head, unsupported=gaps), encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{output}: cannot be written ({error.strerror}); choose another --output") from error
    return {
        "plan": str(output),
        "models": [model.id for model in plan.models],
        "settings": plan.settings.model_dump(mode="json", exclude_none=True),
        "unsupported": gaps,
        "accepted": list(accepted),
        "notes": notes,
    }


def plan_of(commands: Sequence[LlamaServerCommand], models: Sequence[Path]) -> Plan:
    """The plan of `commands` and `models`. Raises BadInput where there is nothing to read."""
    names = [NOT_IN_AN_ID.sub("-", path.stem).lstrip("._-") or "model" for path in models]
    chosen = [ModelPlan(id=name, gguf=_existing(path)) for name, path in zip(names, models, strict=True)]
    if not commands:
        if not chosen:
            ways = '--from-port 8080, --from-command "llama-server ...", --from-file FILE, --from-ollama'
            raise BadInput(f"give {ways}, or --model FILE to plan from")
        return plan_for(chosen)
    first = commands[0]
    binary = _binary(first)
    incumbent = INCUMBENT.model_copy(update={"binary": binary, **dict(first.own)})
    yard = YardSettings(host=first.host, port=first.port)
    has_key = any(command.has_api_key for command in commands) or not yard.on_loopback
    rest = {"yard": yard, **({"api_key_env": KEY_VARIABLE} if has_key else {})}
    if len(commands) == 1:
        return plan_for(_of_command(first, chosen), incumbent=incumbent, settings=_settings(first, incumbent), **rest)
    incumbent = incumbent.model_copy(update=dict(EngineArgs()))
    each = [
        ModelPlan(
            id=command.model_id,
            gguf=_existing(_file_of(command)),
            aliases=command.aliases,
            load="demand",
            settings=_settings(command, incumbent),
            engines={incumbent.engine: command.own} if command.own != EngineArgs() else {},
        )
        for command in commands
    ]
    return plan_for([*each, *chosen], incumbent=incumbent, **rest)


def _binary(command: LlamaServerCommand) -> Path | None:
    """The program that the command names; None where it is not here, or named without a folder: then it is searched."""
    if command.binary is None or "/" not in command.binary:
        return None
    path = (command.cwd or Path()) / Path(command.binary).expanduser()
    return path.absolute() if path.is_file() else None


def _of_command(command: LlamaServerCommand, chosen: list[ModelPlan]) -> list[ModelPlan]:
    """The command's own model before those that were `chosen`; in its place the first of them where it is not here."""
    named = {"id": command.model_id, "aliases": command.aliases}
    if chosen and (command.gguf is None or not command.gguf.is_file()):  # elsewhere here, or in a container
        return [chosen[0].model_copy(update=named if command.names else {}), *chosen[1:]]
    gguf = _existing(_file_of(command))
    return [ModelPlan(gguf=gguf, **named), *(model for model in chosen if model.gguf != gguf)]


def _file_of(command: LlamaServerCommand) -> Path:
    if command.gguf is None:
        why = command.why_no_file or "the command names no model file (-m FILE)"
        raise BadInput(why if "--model" in why else f"{why}; add --model FILE")
    if not command.gguf.expanduser().is_file():
        raise BadInput(f"{command.gguf}: no such model file on this machine; give it with --model FILE")
    return command.gguf


def _notes(command: LlamaServerCommand, models: Sequence[Path]) -> list[str]:
    """What the plan does not take over from the command, and why."""
    elsewhere = command.gguf is not None and models and not command.gguf.is_file()
    absent = [f"model file {command.gguf} is not on this machine: {models[0]} is used instead"] if elsewhere else []
    own, has = OWN_ARGS.flags(command.own), OWN_ARGS.other_server(command.own)
    kinds = [f"{has}; the yard serves it, and it cannot be moved: an evaluation compares chat"] if has else []
    kinds += [f"{key}: {what}" for key, what in PARTLY_MOVED.items() if key in own]
    if "/" in (command.binary or "") and _binary(command) is None:
        kinds.append(f"{command.binary} is not on this machine: a llama-server found here becomes the incumbent")
    return [*kinds, *command.notes, *absent]


def _unknown(commands: Sequence[LlamaServerCommand], incumbent: EngineChoice) -> list[str]:
    """Flags that no list here has, and that the incumbent's own help does not have either."""
    unknown = [flag for command in commands for flag in command.unknown]
    with contextlib.suppress(EngineError):
        known = incumbent.find() if unknown and incumbent.binary else None
        unknown = [flag for flag in unknown if not (known and known.knows(flag.partition(" ")[0]))]
    return unknown


def _settings(command: LlamaServerCommand, incumbent: EngineChoice) -> Settings:
    """The command's settings; builds that cannot switch templates off render none unless they are told to."""
    if "jinja" in command.values or incumbent.binary is None:
        return command.settings
    with contextlib.suppress(EngineError):
        found = incumbent.find()
        return command.settings.model_copy(update={"jinja": found.knows("--no-jinja")})
    return command.settings


def _key_note(plan: Plan, *, has_key: bool) -> str | None:
    if plan.api_key_env is None:
        return None
    export = f"export {KEY_VARIABLE}=... before `switchyard serve` and `switchyard evaluate`"
    if plan.yard.on_loopback:
        return f"the command's API key is not copied: {export}; api_key_env in the plan names the variable"
    whose = "use the key that clients send today" if has_key else "choose one and give it to your clients"
    where = f"yard.host {plan.yard.host} can be reached from other machines and needs an API key"
    return f"{where}: {whose}; {export}; api_key_env in the plan names the variable"


def _unsupported(plan: Plan) -> list[str]:
    """The plan's settings that the candidate does not support, in the form installed here."""
    try:
        installation = plan.candidate.find()
    except EngineError:
        installation = Installation(plan.candidate.name, "hosted", (), "not installed")
    return list(dict.fromkeys(line for model in plan.models for line in unsupported(plan, model.id, installation)))


def _existing(path: Path) -> Path:
    whole = path.expanduser().absolute()
    if not whole.is_file():
        raise BadInput(f"{path}: no such model file; give the path of a GGUF")
    return whole
