"""The plan of one migration: which engines, which models, how much is measured, and where the limits lie.

One pydantic model, read from TOML and written back to it. Frozen before the first measurement and named by its hash,
so that a verdict cannot be fitted to the data afterwards.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    SecretStr,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from engines.attached.driver import plain_url
from engines.driver import Installation, build_digest, native_of
from engines.environment import withhold
from engines.errors import BadInput, EngineNotFound
from engines.model.digest import directory_digest, model_digest
from engines.notify import NotifySettings
from engines.registry import ATTACHED, DIRECTORIES, PYTHONS, attached, driver, is_attached, known_engines, native_driver
from engines.settings import NO_FILE, EngineArgs, Serve, Settings
from engines.yard.settings import Load, YardSettings
from migrations import new_build
from tasks.records.payload import with_old_keys
from tasks.verdicts.limits import ClientNeeds, Limits, Measure, PlanPart, either

NATIVE = native_of("")  # how the names of native forms end
VARIABLE = r"^[A-Z_][A-Z0-9_]*$"
RECORDED = "recorded"  # in the context of a validation: the plan is read back from the records
API_KEY_FIX = (
    "a key does not belong in a plan: export it in an environment variable and write "
    'api_key_env = "NAME_OF_THE_VARIABLE" at the top of the plan instead'
)


def _known(kind: str) -> str:
    if kind not in known_engines() and not is_attached(kind):
        expected = ", ".join(map(repr, known_engines()))
        raise PydanticCustomError("literal_error", "not an engine", {"expected": expected})
    return kind


EngineName = Annotated[str, AfterValidator(_known)]


def _keyless(settings: Settings) -> Settings:
    # plans are stored, hashed and shown: a secret in one would be in all of those places
    if settings.api_key is not None:
        raise PydanticCustomError("api_key_in_plan", "api_key: {fix}", {"fix": API_KEY_FIX})
    return settings


class EngineChoice(PlanPart):
    """One engine and the form in which it is run."""

    name: str = Field(
        "",
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._@+-]*)?$",
        max_length=64,
        description="name on routes, in records and commands; letters, digits and ._@+-; without it, the engine's own",
    )
    engine: EngineName = Field(description="which engine it is")
    form: Literal["auto", "binary", "hosted", "native"] = Field(
        "auto", description="binary, hosted (a Python wheel), native, or auto: a binary if one is found"
    )
    binary: Path | None = Field(None, description="the engine's executable; without it the usual places are searched")
    python: Path | None = Field(None, description="the Python of an environment with vllm or xllamacpp")
    version: str | None = Field(None, min_length=1, description="part of the version that it must report")
    args: tuple[str, ...] = Field((), description="the engine's own flags, passed on as they stand, for every model")
    env: dict[str, str] = Field({}, description="the engine's own variables, passed on as they stand")
    url: str | None = Field(None, description="where a server answers that others run: it is attached, never started")
    api_key_env: str | None = Field(
        None, pattern=VARIABLE, description="environment variable that holds the key which an attached server wants"
    )
    dialect: str | None = Field(None, description="which server it is that is attached; without it, a plain one")

    @model_serializer(mode="wrap")
    def _without_unused(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unused = {"name"} if self.name == self.engine else set()
        later = ("args", "env", "version", "python", "url", "api_key_env", "dialect")
        return {key: value for key, value in dump(self).items() if key not in unused and (value or key not in later)}

    @model_validator(mode="after")
    def _whole(self) -> EngineChoice:
        if self.form == "native":
            if (native := native_driver(self.engine)) is None:
                raise ValueError(f"{self.engine} has no native form; its forms are binary and hosted")
            object.__setattr__(self, "engine", native.name)
            object.__setattr__(self, "form", "auto")
        object.__setattr__(self, "name", self.name or self.engine.partition(":")[0])
        self._attach()
        if self.python is not None and self.engine not in PYTHONS:
            raise ValueError(f"python is for {' and '.join(sorted(PYTHONS))}; for {self.engine} remove it")
        if self.python is not None and self.engine not in DIRECTORIES:
            if self.form == "binary" or self.binary is not None:
                raise ValueError("python runs a wheel, binary a program; remove one of the two")
            object.__setattr__(self, "form", "hosted")
        if self.engine in DIRECTORIES and self.binary is not None:
            raise ValueError(f"binary: {self.engine} runs in a Python environment; name its `python` instead")
        if self.name == "auto" or (self.name.endswith(NATIVE) and not self.engine.endswith(NATIVE)):
            raise ValueError(f"name '{self.name}' has a meaning of its own; choose another name")
        if self.form == "hosted" and self.binary is not None:
            raise ValueError('form "hosted" runs a Python wheel and takes no binary; remove one of the two')
        return self

    def _attach(self) -> None:
        """Check what an attached engine needs, and give it the kind of what it speaks. Raises ValueError."""
        if not is_attached(self.engine):
            for key in ("url", "api_key_env", "dialect"):
                if getattr(self, key) is not None:
                    raise ValueError(f'{key} is for an attached engine: write engine = "{ATTACHED}", or remove {key}')
            return
        unused = [key for key in ("binary", "args", "env") if getattr(self, key)] + ["form"] * (self.form != "auto")
        if unused:
            raise ValueError(f"{unused[0]}: an attached engine is started by others, and takes none; remove it")
        if self.url is None:
            raise ValueError('url is missing: where the server answers, such as "http://127.0.0.1:8000"')
        speaks = self.dialect or self.engine.partition(":")[2]
        kind = f"{ATTACHED}:{speaks}" if speaks else ATTACHED
        try:
            attached(kind)
            object.__setattr__(self, "url", plain_url(self.url))
        except BadInput as error:
            raise ValueError(str(error)) from error
        object.__setattr__(self, "engine", kind)
        object.__setattr__(self, "dialect", speaks or None)
        if self.api_key_env is not None:
            withhold(self.api_key_env)

    @property
    def own(self) -> EngineArgs:
        """What is passed on to the engine as it stands."""
        return EngineArgs(args=self.args, env=self.env)

    @property
    def speaks(self) -> str:
        """The kind of engine that it is, whoever runs it."""
        return self.dialect or self.engine

    def find(self, *, ask: bool = True) -> Installation:
        """The engine as it is on this machine, or answers at its `url`, under its name.

        Raises EngineNotFound, also for another version. Without `ask` an attached one is only described. One that does
        not report its version has the plan's.
        """
        if self.url is not None:
            there = attached(self.engine).attach(self.url, self.api_key_env or "")
            there = replace(there, engine=self.name, version=self.version or there.version)
            return self._checked(attached(self.engine).reached(there)) if ask else there
        named = self.binary or self.python
        try:
            found = driver(self.engine).find("auto" if self.form == "native" else self.form, named)
        except BadInput as error:
            if named:
                raise
            raise EngineNotFound(str(error), engine=self.name) from error  # a search met it: half installed, say
        return self._checked(replace(found, engine=self.name, build=build_digest(found)))

    def _checked(self, found: Installation) -> Installation:
        if self.version and self.version not in found.version:
            why = f"{self.name} is version {found.version} here ({found.where}), not {self.version}"
            raise EngineNotFound(f"{why}; name the `binary` of that version, or change `version`", engine=self.name)
        return found


class OverflowPlan(PlanPart):
    """A second engine, which takes new conversations while too many requests wait for the one that serves."""

    engine: str = Field(description="which of the plan's engines, by its name")
    waiting: int = Field(ge=0, description="requests that may wait for the engine that serves before it takes some")
    parallel: int | None = Field(
        None, ge=1, description="sequences that it serves at the same time, each with the context of one; else parallel"
    )

    @model_serializer(mode="wrap")
    def _without_unused(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if value is not None}


class ModelPlan(PlanPart):
    """One model: a GGUF file and the name by which clients ask for it.

    Where both engines are attached the file may be unknown: `gguf` is NO_FILE then.
    """

    id: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=128,
        description="name by which clients ask for the model: letters, digits, dots, dashes, underscores",
    )
    gguf: Path = Field(NO_FILE, description="the model file; the first one of a split set")
    transcripts: Path | None = Field(None, description="own chat requests (JSONL: messages, tools), for parity checks")
    aliases: tuple[str, ...] = Field((), description="other names by which clients ask for the model")
    engine: str = Field("auto", description="who serves it: auto (promote, rollback decide) or an engine, by its name")
    load: Load = Field("start", description="when the yard loads it: at its own start, or with the first request")
    pin: bool = Field(False, description="never unloaded to make room for another model")
    settings: Settings = Field(Settings(), description="settings of this model only; they win over the plan's")
    engines: dict[str, EngineArgs] = Field({}, description="args and env of this model only, by the engine's name")
    sources: dict[str, Path] = Field({}, description="the same weights as an engine takes them, by the engine's name")
    names: dict[str, str] = Field({}, description="its name at an attached engine, by the engine's name")
    overflow: OverflowPlan | None = Field(None, description="a second engine for what is too much for the first")

    _no_key = field_validator("settings")(_keyless)

    @model_serializer(mode="wrap")
    def _without_unused(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unused = {key for key in ("engines", "sources", "names", "overflow") if not getattr(self, key)}
        unused |= {"gguf"} if self.gguf == NO_FILE else set()
        return {key: value for key, value in dump(self).items() if key not in unused}

    @property
    def digest(self) -> str:
        """The content digest of its file; "unknown" where an attached engine has a file that nobody named."""
        return "unknown" if self.gguf == NO_FILE else model_digest(self.gguf)

    @field_serializer("settings")
    def _only_what_was_set(self, settings: Settings, info: SerializationInfo) -> dict[str, object]:
        # dumped defaults would come back as overrides of the plan's own settings
        return settings.model_dump(mode=info.mode, exclude_unset=True, exclude_none=True)


class CanarySteps(PlanPart):
    """Live traffic in growing shares before all of it moves. Each step is judged; one that fails is rolled back."""

    steps: tuple[Annotated[float, Field(gt=0, le=0.99)], ...] = Field(
        (0.05, 0.25, 0.5),
        min_length=1,
        max_length=8,
        description="shares of conversations, one step after the other",
    )
    min_requests: int = Field(20, ge=1, le=5000, description="answers a share needs; the last one also needs a verdict")
    max_minutes: float = Field(120, gt=0, le=10_080, description="minutes per share; no verdict by then: a rollback")

    @model_validator(mode="after")
    def _rising(self) -> CanarySteps:
        if list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"steps {list(self.steps)} must rise, each share once; write [0.05, 0.25, 0.5]")
        return self


class Retire(PlanPart):
    """When the incumbent may go for good."""

    rollback_window_days: float = Field(7, ge=0, le=3650, description="days on the candidate until the way back closes")
    approve: Literal["ask", "auto"] = Field(
        "ask", description="ask: a person approves it, by name and with a reason; auto: the conditions are enough"
    )


class Upgrade(PlanPart):
    """Where a newer build of the engine that serves shows up. It is compared at night; nothing moves by itself."""

    watch: str = Field(
        "",
        max_length=4096,
        description="a program by its absolute path, or a wheel on PyPI by its name; empty: nothing is looked for",
    )

    @field_validator("watch")
    @classmethod
    def _path_or_name(cls, watch: str) -> str:
        if watch and not (Path(watch).is_absolute() or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", watch)):
            raise ValueError(f"'{watch}' is neither an absolute path (/opt/llama.cpp/llama-server) nor a wheel's name")
        return watch


class Course(PlanPart):
    """How far the whole migration goes by itself."""

    phases: tuple[Literal["subprocess", "native", "deprecate"], ...] = Field(
        ("subprocess", "native", "deprecate"), description="what follows on the evaluation, in this order"
    )
    approve: Literal["ask", "auto"] = Field(
        "ask", description="ask: a person approves each phase of each model; auto: only what is INCONCLUSIVE"
    )
    wait_hours: float = Field(72, gt=0, le=8760, description="hours a question waits in Prefect; then nothing changes")


class Plan(PlanPart):
    """One migration: incumbent to candidate, for every model, within limits."""

    name: str = Field("migration", min_length=1, max_length=128, description="name of the plan in runs and reports")
    api_key_env: str | None = Field(
        None,
        pattern=VARIABLE,
        description="environment variable that holds the API key of clients; the key itself is never in a plan",
    )
    accepted_unsupported: tuple[str, ...] = Field(
        (),
        validation_alias=either("", "accepted_unsupported"),
        description="names of what the candidate does not support and you accept",
    )
    engines: dict[str, EngineChoice] = Field(
        {}, exclude=True, description="engines by name, for `use` in the two below"
    )
    incumbent: EngineChoice = Field(description="the engine that serves now")
    candidate: EngineChoice = Field(description="the engine that is proposed")
    settings: Settings = Field(Settings(), description="how every model is served, in words that belong to no engine")
    models: tuple[ModelPlan, ...] = Field(min_length=1, description="every model in use; each gets its own verdict")
    measure: Measure = Field(Measure(), validation_alias=either("", "measure"), description="how much is measured")
    limits: Limits = Field(Limits(), description="where a difference stops being acceptable, and why there")
    client: ClientNeeds = Field(ClientNeeds(), description="what the programs in front of the engine need")
    canary: CanarySteps = Field(CanarySteps(), description="how live traffic moves: in which shares, and what decides")
    migrate: Course = Field(Course(), description="the whole migration: its phases, and what it asks a person")
    retire: Retire = Field(Retire(), description="phase 4: when the incumbent may be retired")
    yard: YardSettings = Field(YardSettings(), description="the public port: where it is and what it takes")
    upgrade: Upgrade = Field(Upgrade(), description="newer builds of the engine that serves")
    notify: NotifySettings = Field(NotifySettings(), description="who is notified, and of what")

    _no_key = field_validator("settings")(_keyless)

    @model_serializer(mode="wrap")
    def _without_unused(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unused = {key for key, used in (("upgrade", self.upgrade.watch), ("notify", self.notify.is_used)) if not used}
        return {key: value for key, value in dump(self).items() if key not in unused}

    @field_validator("models")
    @classmethod
    def _one_of_each(cls, models: tuple[ModelPlan, ...]) -> tuple[ModelPlan, ...]:
        twice = [name for name, count in Counter(model.id for model in models).items() if count > 1]
        if twice:
            raise ValueError(f"id '{twice[0]}' is given twice; give each model an id of its own")
        names = Counter(name for model in models for name in (model.id, *model.aliases))
        shared = [name for name, count in names.items() if count > 1]
        if shared:
            raise ValueError(f"the name '{shared[0]}' is given to two models; an alias belongs to one")
        return models

    @model_validator(mode="after")
    def _known_default(self) -> Plan:
        default = self.yard.default_model
        if default is not None and default not in {model.id for model in self.models}:
            raise ValueError(f"yard.default_model '{default}' is no model of this plan")
        return self

    @model_validator(mode="after")
    def _limits_of_pair(self) -> Plan:
        """The limits of another build of one engine, where the plan sets none of its own."""
        if self.incumbent.speaks == self.candidate.speaks != ATTACHED:
            set_here = {name: getattr(self.limits, name) for name in self.limits.model_fields_set}
            whole = new_build.PAIR.limits.model_copy(update=set_here)
            low, tail = min(whole.top1_lower_bound, whole.top1_agreement), max(whole.p99_kld, whole.mean_kld)
            object.__setattr__(self, "limits", whole.model_copy(update={"top1_lower_bound": low, "p99_kld": tail}))
        return self

    @model_validator(mode="after")
    def _two_names(self, info: ValidationInfo) -> Plan:
        recorded, name = (info.context or {}).get(RECORDED, False), self.incumbent.name
        # an engine beside itself, as plans have had it, needs no second name: whichever is started, it is the same
        is_itself = self.incumbent == self.candidate and name == self.incumbent.engine
        if name == self.candidate.name and not (recorded or is_itself):
            raise ValueError(
                f"incumbent and candidate are both called {self.incumbent.name}, and routes, records and commands know "
                f'an engine by its name: give one of them another, such as name = "{self.candidate.name}@new"'
            )
        return self

    @model_validator(mode="after")
    def _passed_on(self, info: ValidationInfo) -> Plan:
        if (info.context or {}).get(RECORDED, False):
            return self
        names = (self.incumbent.name, self.candidate.name)
        for model in self.models:
            if model.engine not in ("auto", *known_engines(), *names, native_of(self.candidate.name)):
                raise ValueError(
                    f"models.engine of {model.id}: unknown engine '{model.engine}'; known: auto, {', '.join(names)}"
                )
            if unknown := {name for name in model.engines if self.named(name) not in names}:
                raise ValueError(f"models.engines.{min(unknown)}: no engine of this plan")
            settings = self.settings_for(model.id)
            set_here = {name for name, value in settings if value not in (None, False)}
            for arm, choice in (("incumbent", self.incumbent), ("candidate", self.candidate)):
                where = next(
                    (f"models.engines.{name}" for name in model.engines if self.named(name) == choice.name), arm
                )
                own = self.own_args(model.id, choice.name)
                for problem in driver(choice.engine).own_args.problems(own, set_here):
                    raise ValueError(f"{where}.{problem}")
                for clash in driver(choice.engine).clashes(settings, own):
                    raise ValueError(f"{where}: {choice.engine} would refuse to start: {clash}")
        return self

    @model_validator(mode="after")
    def _files_and_names(self) -> Plan:
        """A file for each model as each engine takes it, and names only at those that are attached."""
        arms = {choice.name: choice for choice in (self.incumbent, self.candidate)}
        needs = any(choice.url is None for choice in arms.values())
        for index, model in enumerate(self.models):
            if needs and model.gguf == NO_FILE:
                where: Any = ("models", index, "gguf")
                raise ValidationError.from_exception_data("Plan", [{"type": "missing", "loc": where, "input": {}}])
            for name in model.names:
                if (there := arms.get(self.named(name))) is None or there.url is None:
                    raise ValueError(f"models.names.{name} of {model.id}: no attached engine of this plan")
            given = {self.named(name) for name in model.sources}
            for choice in (one for one in arms.values() if one.engine in DIRECTORIES and one.name not in given):
                raise ValueError(
                    f"models.sources.{choice.name} of {model.id} is missing: {choice.engine} is given a directory of "
                    "float weights; `switchyard convert` writes one from a GGUF"
                )
            if unknown := given - {choice.name for choice in arms.values() if choice.engine in DIRECTORIES}:
                raise ValueError(f"models.sources.{min(unknown)} of {model.id}: no engine that takes a directory")
        return self

    @model_validator(mode="after")
    def _second_engines(self, info: ValidationInfo) -> Plan:
        arms = [self.incumbent.name, self.candidate.name]
        for model in self.models if not (info.context or {}).get(RECORDED, False) else ():
            if model.overflow is None:
                continue
            engine = self.named(model.overflow.engine)
            if engine not in arms or arms[0] == arms[1]:
                known = " and ".join(dict.fromkeys(arms))
                raise ValueError(f"models.overflow.engine of {model.id}: '{engine}' is not one of two engines: {known}")
            if self.named(model.engine) == engine:
                raise ValueError(
                    f"models.overflow.engine of {model.id}: {engine} serves it already; name the other one"
                )
        return self

    def given(self, model_id: str, engine: str) -> Path:
        """What an engine of the plan is given of a model: its file, or the directory in its place."""
        model = self.model(model_id)
        return {self.named(name): path for name, path in model.sources.items()}.get(engine, model.gguf)

    def name_there(self, model_id: str, engine: str) -> str:
        """The model's name at an attached engine; "" where it is the model's own."""
        names = {self.named(name): there for name, there in self.model(model_id).names.items()}
        return names.get(engine, "")

    def serve(self, model_id: str, engine: str, *, port: int = 1) -> Serve:
        """What `engine` is given to serve `model_id`, without a key."""
        own, settings = self.own_args(model_id, engine), self.settings_for(model_id)
        return Serve(model_id=model_id, gguf=self.given(model_id, engine), port=port, settings=settings, own=own)

    def own_args(self, model_id: str, engine: str) -> EngineArgs:
        """What `engine` gets beside the settings when it serves `model_id`; nothing for one that the plan lacks."""
        chosen = {choice.name: choice.own for choice in (self.candidate, self.incumbent)}
        chosen |= {self.named(name): own for name, own in self.model(model_id).engines.items()}
        return chosen.get(engine, EngineArgs())

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of each engine of the plan by its name, the candidate's native form included."""
        native = native_driver(self.candidate.engine)
        found = {native_of(self.candidate.name): native.name} if native else {}
        return {self.incumbent.name: self.incumbent.engine, self.candidate.name: self.candidate.engine, **found}

    def named(self, engine: str) -> str:
        """The name of an engine of the plan; a kind stands for the only engine of that kind."""
        of_kind = [name for name, kind in self.kinds.items() if kind == engine]
        return engine if engine in self.kinds or len(of_kind) != 1 else of_kind[0]

    def model(self, model_id: str) -> ModelPlan:
        """The model called `model_id`; BadInput lists the known ones."""
        for model in self.models:
            if model.id == model_id:
                return model
        raise BadInput(f"unknown model '{model_id}': the plan has {', '.join(model.id for model in self.models)}")

    def settings_for(self, model_id: str, *, api_key: SecretStr | None = None) -> Settings:
        """How `model_id` is served: the plan's settings, what the model itself sets over them, and the key if given."""
        own = self.model(model_id).settings
        set_here = {name: value for name in own.model_fields_set if (value := getattr(own, name)) is not None}
        return self.settings.model_copy(update=set_here | ({"api_key": api_key} if api_key is not None else {}))

    def settings_on(self, model_id: str, engine: str) -> Settings:
        """`settings_for` on one engine: as an overflow it may serve more sequences, each with as much context."""
        settings, over = self.settings_for(model_id), self.model(model_id).overflow
        if over is None or over.parallel is None or self.named(over.engine) != engine:
            return settings
        context = settings.context_tokens and settings.context_tokens // settings.sequences * over.parallel
        return settings.model_copy(update={"parallel": over.parallel, "context_tokens": context})

    def model_post_init(self, _: Any) -> None:
        """Have the clients' key kept from engines, whichever way this process starts them."""
        for name in filter(None, (self.api_key_env, self.notify.url_env)):
            withhold(name)

    def api_key(self, environment: Mapping[str, str]) -> SecretStr | None:
        """The first of the clients' keys, for requests of our own; otherwise as `api_keys`."""
        keys = self.api_keys(environment)
        return keys and SecretStr(next((key for key in map(str.strip, keys.get_secret_value().split(",")) if key), ""))

    def api_keys(self, environment: Mapping[str, str]) -> SecretStr | None:
        """The clients' keys out of `environment`, with commas between them; BadInput when the variable is not set.

        None when the plan names no variable.
        """
        if self.api_key_env is None:
            return None
        if not environment.get(self.api_key_env):
            raise BadInput(f"api_key_env: the environment variable {self.api_key_env} is not set; export it first")
        return SecretStr(environment[self.api_key_env])


def content_hash(plan: Plan) -> str:
    """sha256 (hex) of what the plan means, by content and not by path.

    Models, transcripts, templates and binaries enter by their `model_digest`, settings as each model gets them. So a
    moved or renamed file, another order of keys or a default written out leave the hash alone; another file changes it.
    Engines that are found by search enter by name only: their version is recorded with every result.
    """
    elsewhere = {"incumbent", "candidate", "settings", "models"}  # below, by content
    identity = plan.model_dump(
        mode="json", exclude=elsewhere | {"canary", "migrate", "retire", "yard", "upgrade", "notify"}
    )
    identity["engines"] = [
        {"engine": one.engine, "form": one.form, "binary": model_digest(one.binary) if one.binary else None}
        | _own_identity(one.engine, one.own)
        | ({"url": one.url} if one.url else {})
        for one in (plan.incumbent, plan.candidate)
    ]
    identity["models"] = [_model_identity(plan, model) for model in plan.models]
    return hashlib.sha256(
        json.dumps(with_old_keys(identity), sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def _model_identity(plan: Plan, model: ModelPlan) -> dict[str, object]:
    settings = plan.settings_for(model.id)
    served = settings.model_dump(mode="json")
    for name in ("chat_template", "tokenizer_json"):
        file: Path | None = getattr(settings, name)
        served[name] = model_digest(file) if file else None
    transcripts = model_digest(model.transcripts) if model.transcripts else None
    engines = {name: _own_identity(plan.kinds[plan.named(name)], own) for name, own in model.engines.items()}
    identity: dict[str, object] = {
        "id": model.id,
        "gguf": model.digest,
        "transcripts": transcripts,
        "settings": served,
    }
    there = {plan.named(name): name_there for name, name_there in model.names.items()}
    sources = {plan.named(name): directory_digest(path) for name, path in model.sources.items()}
    later = {"engines": engines, "names": there, "sources": sources}
    return identity | {key: value for key, value in later.items() if value}


def _own_identity(engine: str, own: EngineArgs) -> dict[str, object]:
    """`own` with the content of the files it names; empty where nothing is passed on, as it was before these keys."""

    def content(name: str, kind: str) -> str:
        return model_digest(Path(name)) if kind == "file" else name

    passed_on: dict[str, object] = driver(engine).own_args.with_files(own, content).model_dump(mode="json")
    return passed_on
