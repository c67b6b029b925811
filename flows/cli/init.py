"""`switchyard init`: a plan written from the llama-server in use."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from engines.driver import Installation
from engines.errors import BadInput, EngineError
from engines.llama_cpp.argv import LlamaServerCommand
from engines.llama_cpp.commands import parse_command, read_listener
from engines.registry import driver
from engines.settings import Settings
from engines.yard.settings import YardSettings
from flows.cli.options import Json
from flows.cli.output import next_command, out, print_json
from migrations.carried import unsupported
from migrations.llama_cpp_to_mistral_rs import INCUMBENT, plan_for
from migrations.plan import EngineChoice, ModelPlan, Plan
from migrations.plan_file import plan_to_toml

NOT_IN_AN_ID = re.compile(r"[^A-Za-z0-9._-]")
KEY_VARIABLE = "SWITCHYARD_API_KEY"  # unless the plan names another one


def init(
    from_port: Annotated[int | None, typer.Option(help="Read the llama-server that listens on this port.")] = None,
    from_command: Annotated[str | None, typer.Option(help="Read a llama-server command line (quote it).")] = None,
    model: Annotated[list[Path] | None, typer.Option(help="A GGUF to evaluate; repeat for several.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the plan goes.")] = Path("switchyard.toml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing plan.")] = False,
    json_: Json = False,
) -> None:
    """Write a plan (TOML) from the llama-server you run now, and list the flags mistral.rs does not support.

    Example: `switchyard init --from-port 8080`
    """
    written = write_plan(from_port=from_port, from_command=from_command, models=model or [], output=output, force=force)
    if json_:
        print_json(written)
        return
    out.print(f"{output} written: {', '.join(written['models'])}")
    for title, word in (("unsupported", "not supported"), ("notes", "note"), ("unknown", "not understood")):
        for line in written[title]:
            out.print(f"  {word}: {line}", markup=False)
    out.print(next_command(f"switchyard preflight {output}") + f", then [bold]switchyard evaluate {output}[/bold]")


def write_plan(
    *, from_port: int | None, from_command: str | None, models: Sequence[Path], output: Path, force: bool
) -> dict[str, Any]:
    """Write the plan to `output`; what is unsupported, noted or unknown. BadInput when there is nothing to read."""
    if output.exists() and not force:
        raise BadInput(f"{output} exists already; choose another --output, or overwrite it with --force")
    if from_port is not None and from_command is not None:
        raise BadInput("--from-port and --from-command exclude each other: give one")
    command = None
    if from_port is not None:
        command = read_listener(from_port)
    elif from_command is not None:
        command = parse_command(from_command)
    plan = _plan(command, models)
    gaps = _unsupported(plan)
    key = _key_note(plan, command)
    comment = f"Written by `switchyard init`. Evaluate with: switchyard evaluate {output}" + (f"\n{key}" if key else "")
    try:
        output.write_text(plan_to_toml(plan, header_comment=comment, unsupported=gaps), encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{output}: cannot be written ({error.strerror}); choose another --output") from error
    return {
        "plan": str(output),
        "models": [model.id for model in plan.models],
        "settings": plan.settings.model_dump(mode="json", exclude_none=True),
        "unsupported": gaps,
        "notes": _notes(command, models) + ([key] if key else []),
        "unknown": command.unknown if command else [],
    }


def _plan(command: LlamaServerCommand | None, models: Sequence[Path]) -> Plan:
    names = [NOT_IN_AN_ID.sub("-", path.stem).lstrip("._-") or "model" for path in models]
    chosen = [ModelPlan(id=name, gguf=_existing(path)) for name, path in zip(names, models, strict=True)]
    if command is None:
        if not chosen:
            raise BadInput('give --from-port 8080, --from-command "llama-server ...", or --model FILE to plan from')
        return plan_for(chosen)
    if command.gguf is None and not chosen:
        raise BadInput("the command names no model file (-m FILE); add --model FILE")
    if command.gguf is None or (chosen and not command.gguf.is_file()):  # elsewhere here, or in a container
        if command.names:
            chosen[0] = chosen[0].model_copy(update={"id": command.model_id, "aliases": command.aliases})
    elif command.gguf not in [model.gguf for model in chosen]:
        gguf = _existing(command.gguf)
        chosen.insert(0, ModelPlan(id=command.model_id, gguf=gguf, aliases=command.aliases))
    binary = Path(command.binary) if command.binary else None
    if binary is not None and not (binary.is_absolute() and binary.is_file()):
        binary = None  # not the one in use: the usual places are searched
    incumbent = INCUMBENT.model_copy(update={"binary": binary, **dict(command.own)})
    yard = YardSettings(host=command.host, port=command.port)
    key = {"api_key_env": KEY_VARIABLE} if command.has_api_key or not yard.on_loopback else {}
    return plan_for(chosen, incumbent=incumbent, settings=_settings(command, incumbent), yard=yard, **key)


def _notes(command: LlamaServerCommand | None, models: Sequence[Path]) -> list[str]:
    """What the plan does not take over from the command, and why."""
    if command is None:
        return []
    elsewhere = command.gguf is not None and models and not command.gguf.is_file()
    absent = [f"model file {command.gguf} is not on this machine: {models[0]} is used instead"] if elsewhere else []
    listed = [f"{flag}: no llama-server known here lists it; kept as it stands" for flag in command.unknown]
    return [*command.notes, *absent, *listed]


def _settings(command: LlamaServerCommand, incumbent: EngineChoice) -> Settings:
    """The command's settings; builds that cannot switch templates off render none unless they are told to."""
    if "jinja" in command.values or incumbent.binary is None:
        return command.settings
    with contextlib.suppress(EngineError):
        found = driver(incumbent.engine).find(incumbent.form, incumbent.binary)
        return command.settings.model_copy(update={"jinja": found.knows("--no-jinja")})
    return command.settings


def _key_note(plan: Plan, command: LlamaServerCommand | None) -> str | None:
    if plan.api_key_env is None:
        return None
    export = f"export {KEY_VARIABLE}=... before `switchyard serve` and `switchyard evaluate`"
    if plan.yard.on_loopback:
        return f"the command's API key is not copied: {export}; api_key_env in the plan names the variable"
    known = command is not None and command.has_api_key
    whose = "use the key that clients send today" if known else "choose one and give it to your clients"
    where = f"yard.host {plan.yard.host} can be reached from other machines and needs an API key"
    return f"{where}: {whose}; {export}; api_key_env in the plan names the variable"


def _unsupported(plan: Plan) -> list[str]:
    """The plan's settings that the candidate does not support, in the form installed here."""
    candidate = driver(plan.candidate.engine)
    try:
        installation = candidate.find()
    except EngineError:
        installation = Installation(candidate.name, "hosted", (), "not installed")
    return unsupported(plan, plan.models[0].id, installation)


def _existing(path: Path) -> Path:
    whole = path.expanduser().absolute()
    if not whole.is_file():
        raise BadInput(f"{path}: no such model file; give the path of a GGUF")
    return whole
