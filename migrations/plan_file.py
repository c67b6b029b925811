"""The plan as a file: read from TOML with one line for what is wrong, and written back."""

from __future__ import annotations

import difflib
import json
import logging
import math
import re
import textwrap
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args

from pydantic import AliasChoices, BaseModel, ValidationError
from pydantic_core import ErrorDetails

from engines.errors import BadInput
from engines.model.digest import shards
from engines.own_args import NEXT_FLAG
from engines.registry import driver
from engines.settings import NO_FILE, EngineArgs, Settings
from migrations.plan import API_KEY_FIX, RECORDED, Plan
from tasks.verdicts.limits import RENAMED_KEYS

PATH_KEYS = frozenset({"binary", "python", "gguf", "transcripts", "chat_template", "tokenizer_json"})
Location = tuple[int | str, ...]


def plan_path(named: Path | None, home: Path) -> Path:
    """The absolute path of the plan that was named, else of the one the yard served last, else ./switchyard.toml."""
    remembered = home / "yard" / "plan"
    last = remembered.read_text().strip() if named is None and remembered.is_file() else ""
    return (named or Path(last or "switchyard.toml")).absolute()


def remember_plan(path: Path, home: Path) -> None:
    """Let `plan_path` find this plan the next time."""
    (home / "yard" / "plan").write_text(f"{path.absolute()}\n")


def load_plan(path: Path) -> Plan:
    """The plan in the TOML file at `path`; relative paths in it start at its directory, and the files must exist.

    Raises BadInput with one line: the file, the key, the line, what is wrong and how to fix it.
    """
    where = str(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise BadInput(f"{where}: no such file; `switchyard init` writes a plan") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{where}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise BadInput(f"{where}: cannot be read: {error.strerror or error}") from error
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{where}: not valid TOML: {error}") from None
    _warn_of_old_keys(where, data)
    lines = _lines(text)
    for arm, name in _used(where, data).items():
        of_table = {place: line for place, line in lines.items() if place[:2] == ("engines", name)}
        lines |= {(arm, *place[2:]): line for place, line in of_table.items()}
    # JSON, because strict mode (no "20" for 20, no true for 1) then still takes strings for paths and arrays for tuples
    as_json = json.dumps(_resolved(data, path.absolute().parent), default=str)
    try:
        plan = Plan.model_validate_json(as_json, strict=True)
    except ValidationError as error:
        raise BadInput(_one_line(where, _problems(error), lines)) from None
    plan = _with_whole_paths(plan, path.absolute().parent)
    missing = list(_missing_files(plan))
    if missing:
        raise BadInput(_one_line(where, missing, lines))
    return plan


def _used(where: str, data: dict[str, Any]) -> dict[str, str]:
    """Put the table `[engines.NAME]` in place of `use = "NAME"`: the names, by arm. Raises BadInput."""
    found: dict[str, str] = {}
    tables = data.get("engines")
    tables = {n: {"name": n, **t} for n, t in tables.items() if isinstance(t, dict)} if isinstance(tables, dict) else {}
    for arm in ("incumbent", "candidate"):
        if not isinstance(choice := data.get(arm), dict) or "use" not in choice:
            continue
        name = choice["use"]
        if not isinstance(name, str) or name not in tables or len(choice) > 1:
            known = ", ".join(f"[engines.{one}]" for one in tables) or "none"
            raise BadInput(f"{where}: {arm}.use stands alone and names a table [engines.NAME]; there is {known}")
        data[arm], found[arm] = tables[name], name
    if isinstance(data.get("engines"), dict):
        data["engines"] = {name: data["engines"][name] for name in data["engines"] if name not in found.values()}
    return found


def _warn_of_old_keys(where: str, data: Mapping[str, Any]) -> None:
    found = []
    for table, keys in RENAMED_KEYS.items():
        part = data.get(table, data.get(RENAMED_KEYS[""].get(table, table))) if table else data
        found += [f"{old} is now {new}" for new, old in keys.items() if isinstance(part, dict) and old in part]
    if found:
        _warn(f"{where}: {', '.join(found)}; the old name is still read")


@cache
def _warn(line: str) -> None:
    """Log `line`, once in a process: a command reads its plan several times."""
    logging.getLogger("switchyard").warning("%s", line)


def recorded_plan(data: object) -> Plan:
    """The plan of a run on record, also one that would be refused today: it is read, and nothing starts by it."""
    return Plan.model_validate_json(json.dumps(data), context={RECORDED: True})


def build_plan(data: Mapping[str, object], *, where: str = "plan") -> Plan:
    """A plan out of `data` (a form's values, or parts already built); BadInput in one line, `where` first."""
    values = dict(data)
    _used(where, values)
    try:
        return Plan.model_validate(values)
    except ValidationError as error:
        raise BadInput(_one_line(where, _problems(error), {})) from None


def plan_to_toml(plan: Plan, *, header_comment: str = "", unsupported: Sequence[str] = ()) -> str:
    """`plan` as TOML with every field's reason as a comment above it; `load_plan` reads the same plan back.

    `unsupported` (a driver's own lines) are written as comments above `accepted_unsupported`.
    """
    blocks = [_comment(header_comment)] if header_comment else []
    blocks.append(_keys(plan, notes={"accepted_unsupported": _gaps(plan, unsupported)}))
    for name, field in Plan.model_fields.items():
        part = getattr(plan, name)
        if isinstance(part, BaseModel):
            blocks.append(_table(f"[{name}]", part, summary=field.description or ""))
            blocks.append(_variables(f"{name}.env", getattr(part, "env", {})))
        elif name == "models":
            for model in plan.models:
                blocks.append(_table("[[models]]", model))
                for engine, own in model.engines.items():
                    header = f"models.engines.{json.dumps(engine)}"
                    blocks += [_table(f"[{header}]", own), _variables(f"{header}.env", own.env)]
                for table in ("names", "sources"):
                    blocks.append(_variables(f"models.{table}", getattr(model, table), quoted=True))
                if model.overflow is not None:
                    blocks.append(_table("[models.overflow]", model.overflow))
                if _fields(model.settings, only_set=True):
                    blocks.append(_table("[models.settings]", model.settings, only_set=True))
    return "\n\n".join(block for block in blocks if block) + "\n"


def _gaps(plan: Plan, unsupported: Sequence[str]) -> str:
    """What of `unsupported` the plan accepts, and what it does not, with what that does."""
    groups: dict[bool, list[str]] = {True: [], False: []}
    for line in unsupported:
        groups[line.partition(":")[0] in plan.accepted_unsupported].append(f"  - {_flat(line)}")
    titles = {
        True: "Not supported by the candidate, and accepted:",
        False: "Not supported by the candidate, and not accepted: `evaluate` and the yard name it at each start; "
        "it blocks nothing. Add its name, the words before the colon, to accept it:",
    }
    return "\n".join("\n".join([titles[is_in], *lines]) for is_in, lines in groups.items() if lines)


def _resolved(value: Any, base: Path) -> Any:
    """`value` with every path in it made absolute from `base`."""
    if isinstance(value, list):
        return [_resolved(item, base) for item in value]
    if not isinstance(value, dict):
        return value
    resolved = {}
    for key, item in value.items():
        is_path = key in PATH_KEYS and isinstance(item, str)
        if key == "sources" and isinstance(item, dict):
            item = {name: str(base / Path(path).expanduser()) for name, path in item.items() if isinstance(path, str)}
        resolved[key] = str(base / Path(item).expanduser()) if is_path else _resolved(item, base)
    return resolved


def _with_whole_paths(plan: Plan, base: Path) -> Plan:
    """`plan` with every file that `args` and `env` name made absolute from `base`."""

    def whole(engine: str, own: EngineArgs) -> EngineArgs:
        return driver(engine).own_args.with_files(own, lambda name, _: str(base / Path(name).expanduser()))

    def kind(name: str) -> str:
        return plan.kinds[plan.named(name)]

    changed: dict[str, Any] = {
        arm: choice.model_copy(update=dict(whole(choice.engine, choice.own)))
        for arm, choice in (("incumbent", plan.incumbent), ("candidate", plan.candidate))
    }
    changed["models"] = tuple(
        model.model_copy(update={"engines": {name: whole(kind(name), own) for name, own in model.engines.items()}})
        for model in plan.models
    )
    return plan.model_copy(update=changed)


def _files_of(engine: str, own: EngineArgs) -> list[Path]:
    """The files that `args` and `env` of `engine` name."""
    found: list[Path] = []

    def note(name: str, kind: str) -> str:
        found.extend([Path(name)] if kind == "file" else [])
        return name

    driver(engine).own_args.with_files(own, note)
    return found


def _named_files(plan: Plan) -> Iterable[tuple[Location, Path | None]]:
    yield ("incumbent", "binary"), plan.incumbent.binary
    yield ("candidate", "binary"), plan.candidate.binary
    yield ("incumbent", "python"), plan.incumbent.python
    yield ("candidate", "python"), plan.candidate.python
    owners: list[tuple[Location, Settings]] = [(("settings",), plan.settings)]
    for index, model in enumerate(plan.models):
        yield ("models", index, "gguf"), model.gguf
        yield ("models", index, "transcripts"), model.transcripts
        owners.append((("models", index, "settings"), model.settings))
        for name, own in model.engines.items():
            yield from (
                (("models", index, "engines", name), file) for file in _files_of(plan.kinds[plan.named(name)], own)
            )
    for arm, choice in (("incumbent", plan.incumbent), ("candidate", plan.candidate)):
        yield from (((arm, "args"), file) for file in _files_of(choice.engine, choice.own))
    for location, settings in owners:
        yield (*location, "chat_template"), settings.chat_template
        yield (*location, "tokenizer_json"), settings.tokenizer_json


def _missing_files(plan: Plan) -> Iterable[tuple[Location, str]]:
    for index, model in enumerate(plan.models):
        for name, folder in model.sources.items():
            if not (folder / "config.json").is_file():
                yield ("models", index, "sources", name), f"{folder}: no directory of a model: it has no config.json"
    for location, file in _named_files(plan):
        if file in (None, NO_FILE):
            continue
        if not file.is_file():
            what = "is a directory, not a file" if file.is_dir() else "no such file"
            yield location, f"{file}: {what}; relative paths start at the plan's own directory"
        elif location[-1] == "gguf":
            try:
                shards(file)
            except BadInput as error:
                yield location, str(error)


_NOT_A = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text in quotes",
    "path": "a path in quotes",
    "tuple": "a list in [brackets]",
    "model": "a table of keys",
    "dict": "a table of keys",
}
# what is wrong with a value, and what to write instead, by pydantic's type of error
_FIXES = {
    "missing": "is missing: {description}",
    "greater_than_equal": "{value} is below {ge}; write {ge} or more",
    "less_than_equal": "{value} is above {le}; write {le} or less",
    "greater_than": "{value} is not above {gt}; write more than {gt}",
    "too_short": "is empty: {description}",
    "string_too_short": "is empty: {description}",
    "too_long": "is too long; {max_length} at most",
    "string_too_long": "is too long; {max_length} at most",
    "string_pattern_mismatch": "{value} does not fit: {description}",
    "int_from_float": "{value} is not a whole number",
    "finite_number": "{value} is not a number",
}
# what people who know llama.cpp's flags write
_LLAMA_WORDS = {
    "ctx": "context_tokens",
    "ctx_size": "context_tokens",
    "n_ctx": "context_tokens",
    "ngl": "gpu_layers",
    "cache_ram": "host_cache_mib",
    "cache_type_k": "kv_type",
    "cache_type_v": "kv_type",
}


def _one_line(where: str, problems: Sequence[tuple[Location, str]], lines: Mapping[Location, int]) -> str:
    """The problem that comes first in the file, and how many more there are."""

    def line_of(location: Location) -> int | None:
        return next((lines[location[:end]] for end in range(len(location), 0, -1) if location[:end] in lines), None)

    location, what = min(problems, key=lambda problem: line_of(problem[0]) or math.inf)
    line = line_of(location)
    at = f"{_key(location)} (line {line}): " if line else f"{_key(location)}: " if location else ""
    others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return _flat(f"{where}: {at}{what}{others}")


def _key(location: Location) -> str:
    """`models[0].gguf` for ("models", 0, "gguf")."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return "".join(parts).removeprefix(".")


def _problems(error: ValidationError) -> list[tuple[Location, str]]:
    details = error.errors(include_url=False)
    outer = {detail["loc"][:depth] for detail in details for depth in range(len(detail["loc"]))}
    # a list whose entries are wrong is also reported as empty: that is no second problem
    return [_problem(detail) for detail in details if detail["type"] != "too_short" or detail["loc"] not in outer]


def _problem(detail: ErrorDetails) -> tuple[Location, str]:
    location = detail["loc"]
    if detail["type"] == "api_key_in_plan":
        return (*location, "api_key"), API_KEY_FIX
    leaf = location[-1] if location else ""
    if leaf == "api_key":
        return location, API_KEY_FIX
    if leaf in ("api_key_env", "url_env"):  # somebody may have put the secret itself there: do not echo it
        return location, "must be the NAME of an environment variable in capitals, such as SWITCHYARD_API_KEY"
    return location, _fix(detail)


def _fix(detail: ErrorDetails) -> str:
    """What is wrong with one value, and what to write instead."""
    kind, context, location = detail["type"], detail.get("ctx", {}), detail["loc"]
    value = _shown(detail["input"])
    if kind == "value_error":
        return str(context["error"])
    if kind == "extra_forbidden":
        return _unknown_key(location)
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", context["expected"])
        close = difflib.get_close_matches(str(detail["input"]), known, n=1)
        guess = f"; did you mean '{close[0]}'?" if close else ""
        noun = "engine " if location[-1] == "engine" else ""
        return f"unknown {noun}{value}; known: {', '.join(known)}{guess}"
    if kind in _FIXES:
        return _FIXES[kind].format(value=value, description=_description(location), **context)
    expected = _NOT_A.get(kind.partition("_")[0])
    return f"{value} is not {expected}" if expected else f"{value}: {detail['msg']}"


def _shown(value: object) -> str:
    """`value` as it would stand in TOML, cut short; tables are not shown, for one may hold a key."""
    if isinstance(value, str | Path):
        text = f"'{value}'"
    elif isinstance(value, dict | BaseModel):
        text = "a table"
    elif isinstance(value, list | tuple) and any(isinstance(item, dict | list | tuple | BaseModel) for item in value):
        text = "a list of tables"
    else:
        text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unknown_key(location: Location) -> str:
    parent = _model_at(location[:-1])
    known = [name for name in parent.model_fields if name != "api_key"] if parent else []
    key = str(location[-1])
    for new, old in RENAMED_KEYS.get("".join(map(str, location[:-1])), {}).items():
        if key == old:
            return f"is the old name of '{new}', which is given as well; keep one"
    close = [word for word in [_LLAMA_WORDS.get(key)] if word in known] or difflib.get_close_matches(key, known, n=1)
    close = close or [name for name in known if name.startswith(key)]
    return f"unknown key; did you mean '{close[0]}'?" if close else f"unknown key; known: {', '.join(known)}"


def _description(location: Location) -> str:
    parent = _model_at(location[:-1])
    field = parent.model_fields.get(_new_name(parent, str(location[-1]))) if parent else None
    return (field.description if field else None) or "a value is needed"


def _model_at(location: Location) -> type[BaseModel] | None:
    """The part of the plan that `location` leads to, where it is one."""
    here: type[BaseModel] | None = Plan
    for part in location:
        if isinstance(part, int):
            continue
        field = here.model_fields.get(_new_name(here, part)) if here else None
        here = _model_in(field.annotation) if field else None
    return here


def _new_name(part: type[BaseModel], key: str) -> str:
    """The name of the field that is also read under `key`."""
    for name, field in part.model_fields.items():
        if isinstance(field.validation_alias, AliasChoices) and key in field.validation_alias.choices:
            return name
    return key


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for inner in get_args(annotation) if (model := _model_in(inner))), None)


_HEADER = re.compile(r"^\s*(?P<open>\[\[?)\s*(?P<name>[\w.\-\"' ]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"^\s*(?P<name>[\w.\-\"' ]+?)\s*=")


def _lines(text: str) -> dict[Location, int]:
    """The line of every table and key in a TOML text; keys inside inline tables are found by their parent only."""
    found: dict[Location, int] = {}
    entries: dict[Location, int] = {}
    table: Location = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            table = ()
            parts = _parts(header["name"])
            for depth, part in enumerate(parts, start=1):
                table = (*table, part)
                if header["open"] == "[[" and depth == len(parts):
                    found.setdefault(table, number)
                    entries[table] = entries.get(table, -1) + 1
                if table in entries:
                    table = (*table, entries[table])
            found.setdefault(table, number)
        elif key := _KEY.match(line):
            found.setdefault((*table, *_parts(key["name"])), number)
    return found


def _parts(dotted: str) -> list[str]:
    return [part.strip().strip("\"'") for part in dotted.split(".")]


def _table(header: str, part: BaseModel, *, summary: str = "", only_set: bool = False) -> str:
    keys = _keys(part, only_set=only_set)
    return "\n".join(filter(None, [_comment(summary), header, keys]))


def _variables(header: str, env: Mapping[str, str | Path], *, quoted: bool = False) -> str:
    keys = (f"{json.dumps(name) if quoted else name} = {_value(value)}" for name, value in env.items())
    return "\n".join([f"[{header}]", *keys]) if env else ""


def _args(args: Sequence[str]) -> str:
    """`args` with a line for each flag."""
    lines: list[list[str]] = []
    for word in args:
        if NEXT_FLAG.match(word) or not lines:
            lines.append([])
        lines[-1].append(_value(word))
    rows = [", ".join(words) for words in lines]
    return f"[{', '.join(rows)}]" if sum(map(len, rows)) < 100 else "[\n    " + ",\n    ".join(rows) + ",\n]"


def _value(value: object) -> str:
    # JSON's words and escapes are TOML's, but TOML also wants DEL escaped
    return json.dumps(value, ensure_ascii=False, default=str).replace("\x7f", "\\u007f")


def _keys(part: BaseModel, *, only_set: bool = False, notes: Mapping[str, str] | None = None) -> str:
    """The keys of `part` that hold plain values, each under its description."""
    lines: list[str] = []
    for name, value in _fields(part, only_set=only_set).items():
        comment = "\n".join(filter(None, [type(part).model_fields[name].description, (notes or {}).get(name, "")]))
        written = _args(value) if name == "args" and isinstance(value, tuple) else _value(value)
        lines += [*([_comment(comment)] if comment else []), f"{name} = {written}"]
    return "\n".join(lines)


def _fields(part: BaseModel, *, only_set: bool = False) -> dict[str, object]:
    """Plain values of `part` by name, without those that TOML cannot say (None) and those that are parts themselves."""
    names = [name for name in type(part).model_fields if not only_set or name in part.model_fields_set]
    values = {name: getattr(part, name) for name in names}
    parts = ("models", *(name for name, value in values.items() if isinstance(value, BaseModel | dict)))
    return {name: value for name, value in values.items() if value not in (None, NO_FILE) and name not in parts}


def _comment(text: str) -> str:
    printable = ("".join(char if char.isprintable() else " " for char in line) for line in text.splitlines())
    lines = [wrapped for line in printable for wrapped in textwrap.wrap(line, 112) or [""]]
    return "\n".join(f"# {line}".rstrip() for line in lines)


def _flat(text: str) -> str:
    return " ".join(text.split())
