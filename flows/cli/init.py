"""`switchyard init`: a plan from the llama-server that is in use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.driver import Installation
from engines.errors import BadInput, EngineError
from engines.llama_cpp import argv as llama_server_argv
from engines.llama_cpp.argv import LlamaServerCommand
from engines.registry import driver
from engines.settings import Serve
from engines.yard.settings import YardSettings
from migrations.llama_cpp_to_mistral_rs import INCUMBENT, plan_for
from migrations.plan import ModelPlan, Plan
from migrations.plan_file import plan_to_toml

KEY_VARIABLE = "SWITCHYARD_API_KEY"  # unless the plan names another one


def write_plan(
    *, from_port: int | None, from_command: str | None, models: Sequence[Path], output: Path, force: bool
) -> dict[str, Any]:
    """Write the plan to `output`; what was lost, noted or not understood. BadInput when there is nothing to read."""
    if output.exists() and not force:
        raise BadInput(f"{output} exists already; choose another --output, or overwrite it with --force")
    command = _command(from_port, from_command)
    plan = _plan(command, models)
    losses = _losses(plan)
    unknown = [] if command is None else [f"{flag} {value or ''}".strip() for flag, value in command.unknown]
    comment = "Written by `switchyard init`. Evaluate with: switchyard evaluate " + str(output)
    key = _key_note(plan, command)
    comment += f"\n{key}" if key else ""
    try:
        output.write_text(plan_to_toml(plan, header_comment=comment, losses=losses), encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{output}: cannot be written ({error.strerror}); choose another --output") from error
    return {
        "plan": str(output),
        "models": [model.id for model in plan.models],
        "settings": plan.settings.model_dump(mode="json", exclude_none=True),
        "losses": losses,
        "notes": _notes(command, models) + ([key] if key else []),
        "unknown": unknown,
    }


def _command(from_port: int | None, from_command: str | None) -> LlamaServerCommand | None:
    if from_port is not None and from_command is not None:
        raise BadInput("--from-port and --from-command exclude each other; give one")
    if from_port is not None:
        return llama_server_argv.read_listener(from_port)
    if from_command is not None:
        return llama_server_argv.parse_command(from_command)
    return None


def _plan(command: LlamaServerCommand | None, models: Sequence[Path]) -> Plan:
    chosen = [ModelPlan(id=_slug(path), gguf=_existing(path)) for path in models]
    if command is None:
        if not chosen:
            raise BadInput(
                'nothing to plan from: give --from-port 8080, --from-command "llama-server ...", or --model FILE'
            )
        return plan_for(chosen)
    if command.gguf is None and not chosen:
        raise BadInput("the command names no model file (-m FILE); add --model FILE")
    if command.gguf is None or (chosen and not command.gguf.is_file()):  # elsewhere here, or in a container
        if command.alias:
            chosen[0] = chosen[0].model_copy(update={"id": command.model_id})
    elif command.gguf not in [model.gguf for model in chosen]:
        chosen.insert(0, ModelPlan(id=command.model_id, gguf=_existing(command.gguf)))
    incumbent = INCUMBENT.model_copy(update={"binary": _binary(command)})
    yard = YardSettings(host=command.host, port=command.port)
    key = {"api_key_env": KEY_VARIABLE} if command.has_api_key or not yard.on_loopback else {}
    return plan_for(chosen, incumbent=incumbent, settings=command.settings, yard=yard, **key)


def _notes(command: LlamaServerCommand | None, models: Sequence[Path]) -> list[str]:
    """What was not taken over from the command, and why."""
    if command is None:
        return []
    elsewhere = command.gguf is not None and models and not command.gguf.is_file()
    absent = [f"model file {command.gguf} is not here: {models[0]} stands for it"] if elsewhere else []
    return [*command.notes, *absent, *(f"kept out: {flag}" for flag in command.passthrough)]


def _key_note(plan: Plan, command: LlamaServerCommand | None) -> str | None:
    """What to do about the clients' key, where the plan needs one."""
    if plan.api_key_env is None:
        return None
    export = f"export {KEY_VARIABLE}=... before `switchyard serve` and `switchyard evaluate`"
    if plan.yard.on_loopback:
        return f"the command's API key is not copied: {export}; api_key_env in the plan names the variable"
    known = command is not None and command.has_api_key
    whose = "use the key that clients send today" if known else "choose one and give it to your clients"
    where = f"yard.host {plan.yard.host} can be reached from other machines and needs an API key"
    return f"{where}: {whose}; {export}; api_key_env in the plan names the variable"


def _binary(command: LlamaServerCommand) -> Path | None:
    """The very binary in use, when the command names it by its path; else it is searched for."""
    binary = Path(command.binary) if command.binary else None
    return binary if binary is not None and binary.is_absolute() and binary.is_file() else None


def _losses(plan: Plan) -> list[str]:
    """What the candidate does not support of the plan's settings, named by its driver for the form found here."""
    candidate = driver(plan.candidate.engine)
    try:
        installation = candidate.find()
    except EngineError:
        installation = Installation(candidate.name, "hosted", (), "not installed")
    serve = Serve(model_id="model", gguf=plan.models[0].gguf, port=1, settings=plan.settings)
    return candidate.unsupported(installation, serve)


def _existing(path: Path) -> Path:
    whole = path.expanduser().absolute()
    if not whole.is_file():
        raise BadInput(f"{path}: no such model file; give the path of a GGUF")
    return whole


def _slug(path: Path) -> str:
    return (
        "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in path.stem).lstrip("._-") or "model"
    )
