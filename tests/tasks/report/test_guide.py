"""The guide: made of the records alone, in order, with every figure and reason; shared without what is private."""

import socket
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from engines.settings import Settings
from engines.yard.engine.launch_spec import LaunchSpec
from engines.yard.state import ModelState, YardState
from migrations.plan import Plan
from migrations.plan_file import build_plan
from tasks.records.store import Records, open_records
from tasks.report import guide
from tasks.report.guide_facts import Facts, Private, Retirement, gather, redacted
from tasks.verdicts.verdict import CheckResult, Verdict, at_least, at_most, not_measured

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
OLD, NEW = "llama.cpp", "mistral.rs"
HOME = Path("/home/paula/.switchyard")
EVIL = "<script>alert('x')</script> | **bold** `tick` [a](http://b) \x1b[31m\u202e"
ROOTS_HOME = str(Path("/", "root"))
SECRET_PROMPT = "Dear diary, today I"
SECTIONS = (
    "Summary",
    "Who is affected",
    "What changed",
    "What is not supported",
    "What behaves differently",
    "Models that stay, and why",
    "Check it yourself",
    "How to undo, and until when",
    "Known limits",
    "Evidence",
)
EMPTY_ELEMENTS = {"br", "meta", "wbr"}


class Page(HTMLParser):
    """Tags and text of a page; unbalanced tags are an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in EMPTY_ELEMENTS:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    with open_records(tmp_path / "switchyard.db") as opened:
        yield opened


@pytest.fixture
def plan() -> Plan:
    models = [
        {"id": "small", "gguf": "/home/paula/models/small-Q4.gguf", "aliases": ["default"]},
        {"id": "large", "gguf": "/mnt/big disk/large-Q4.gguf", "transcripts": "/home/paula/chats.jsonl"},
    ]
    engines = {"incumbent": {"engine": OLD}, "candidate": {"engine": NEW}}
    own = {"name": "move", "api_key_env": "NANOBOT_KEY", "accepted_unsupported": ["mlock"], "yard": {"port": 8088}}
    return build_plan({"models": models, **engines, **own})


def launch_spec(engine: str, plan: Plan, model: str) -> LaunchSpec:
    settings = Settings(context_tokens=4096, mlock=True)
    program = "/home/paula/bin/llama-server" if engine == OLD else "/usr/local/bin/mistralrs"
    return LaunchSpec(
        engine=engine,
        form="binary",
        program=(program,),
        version="b9999" if engine == OLD else "0.9.5",
        model_id=model,
        gguf=plan.model(model).gguf,
        settings=settings,
    )


def routes(plan: Plan, **serving: str) -> YardState:
    """A state in which each model is served by the engine named; OLD is the way back where that is another."""
    models = {}
    for model, engine in serving.items():
        specs = {name: launch_spec(name, plan, model) for name in (OLD, NEW)}
        moved = {"undo": OLD, "moved_at": NOW.timestamp() - 3600} if engine != OLD else {}
        models[model] = ModelState.model_validate({"serving": engine, "recipes": specs, **moved})
    return YardState(models=models)


def behaviours(**outcomes: str) -> dict[str, Any]:
    seen = {name: {"outcome": o, "observed": f"{name} {EVIL}", "claim": f"does {name}"} for name, o in outcomes.items()}
    return {"engine": "any", "version": "1", "behaviours": seen}


def put_evaluation(records: Records, plan: Plan, checks: dict[str, list[CheckResult]], *, done: bool = True) -> str:
    """An evaluation of every model in `checks`, with what both engines' APIs did."""
    environment = {"host": "paulas-box", "cpu": "A CPU", "ram_bytes": 8 * 2**30, "gpus": []}
    run = records.start_run("evaluate", plan.name, plan.model_dump(mode="json"), environment=environment)
    engine = {"arm": "incumbent", "engine": OLD, "version": "b1111", "form": "binary", "unsupported": []}
    under = {"model_digest": "sha256:feed", "engines": [{**engine, "argv": ["llama-server", "--port", "41234"]}]}
    for model, results in checks.items():
        for arm, tools in (("incumbent", "passed"), ("candidate", "failed")):
            seen = behaviours(chat="passed", tools=tools)
            records.put_evidence(run.id, model, arm, "compatibility", seen, environment=under)
            effect = {"parameters": {"min_p": {"effect": arm == "incumbent", "observed": "no change"}}}
            records.put_evidence(run.id, model, arm, "parity.parameters", effect, environment=under)
        records.put_checks(run.id, model, results)
    records.finish_run(run.id, "done" if done else "interrupted")
    return run.id


def put_migration(records: Records, plan: Plan) -> str:
    """Phase 2: "small" was promoted against its open question, "large" stayed."""
    run = records.start_run("migrate", plan.name, plan.model_dump(mode="json"))
    gate = not_measured("phase_1.gate", "overridden by Paula Owner: I can wait", required=False)
    records.put_checks(run.id, "small", [gate, CheckResult(check="promote.token", verdict=Verdict.PASS, why="0.2 s")])
    records.put_decision(run.id, "small", "override", who="Paula Owner", why="I can wait")
    records.put_step(run.id, "small", "promote", "done")
    records.finish_run(run.id, "done")
    return run.id


SMALL = [
    at_most("performance.ttft_p50_ratio", 1.05, limit=1.1, unit="ratio", why="candidate 1.05x the incumbent"),
    at_most("memory.peak_ratio", 0.9, limit=1.1, unit="ratio"),
    at_least("parity.top1_agreement", 0.98, limit=0.97, unit="share"),
    at_least("compatibility.required_passed", 1.0, limit=1.0, unit="ratio", why="41 of 41 required behaviours pass"),
    not_measured("stability.failures", "the soak was cut short", unit="failures"),
]
LARGE = [
    at_least(
        "parity.prompt_tokens",
        0.0,
        limit=1.0,
        unit="share",
        why=f"cause: chat template (3 of 3); 1 of 1 prompts differ: '{SECRET_PROMPT}': 14 vs 23 tokens",
    ),
    CheckResult(check="faults.sigkill", verdict=Verdict.FAIL, why=f"no restart on paulas-box: {EVIL}"),
]


@pytest.fixture
def facts(records: Records, plan: Plan) -> Facts:
    put_evaluation(records, plan, {"small": SMALL, "large": LARGE})
    put_migration(records, plan)
    return gather(records, plan, routes(plan, small=NEW, large=OLD), home=HOME, now=NOW)


def section(text: str, title: str) -> str:
    """What stands under one heading of a guide in Markdown."""
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_section_stands_in_order(facts: Facts):
    """Both forms have the ten sections, in the order in which a reader asks."""
    headings = [line[3:] for line in guide.markdown(facts).splitlines() if line.startswith("## ")]
    page = guide.html(facts)
    assert headings == list(SECTIONS)
    places = [page.index(f"<h2>{title}</h2>") for title in SECTIONS]
    assert places == sorted(places)


def test_summary_says_who_moved_and_who_stays(facts: Facts):
    """In plain words, three to six sentences."""
    said = section(guide.markdown(facts), "Summary")
    assert "1 of 2 models moved: small is served by mistral.rs." in said
    assert "Left with llama.cpp, for the reasons given below: large." in said
    assert "No end of the way back is set" in said


def test_commands_before_and_after(facts: Facts):
    """The drivers' own commands, the port left open, home and model folder left out."""
    said = section(guide.markdown(facts), "What changed")
    assert "~/bin/llama-server -m small-Q4.gguf --host 127.0.0.1 --port PORT --alias small" in said
    assert "/usr/local/bin/mistralrs serve --host 127.0.0.1 -p PORT --format gguf -m MODELS -f small-Q4.gguf" in said
    assert "Before: llama.cpp b9999 (binary)" in said
    assert "Settings of both: `context_tokens = 4096`" in said


def test_what_is_unsupported_says_whether_they_were_accepted(facts: Facts):
    """Only of the model that moved."""
    said = section(guide.markdown(facts), "What is not supported")
    assert "`small`: mlock: " in said
    assert "(accepted in the plan)" in said
    assert "`small`: seed: a request's own seed is ignored; only the engine's seed counts (not accepted" in said
    assert "large" not in said


def test_deviations_are_said_once_for_all_models(facts: Facts):
    """A behaviour and a parameter that differ, each with both outcomes; what is alike is only counted."""
    said = section(guide.markdown(facts), "What behaves differently")
    assert "| tools: does tools | passed | failed |" in said
    assert "| min_p: a parameter | has effect | ignored | no change | small, large: Phase 1, evaluation |" in said
    assert "`small`: 2 API behaviours tried on both engines" in said
    assert "does chat" not in said


def test_a_model_that_stays_names_the_checks_that_closed_its_gate(facts: Facts):
    """With the run; the model that moved is not among them."""
    said = section(guide.markdown(facts), "Models that stay, and why")
    assert "It is served by llama.cpp: Phase 1, evaluation (run `" in said
    assert "ended in **FAIL**" in said
    assert "**FAIL** `parity.prompt_tokens`: cause: chat template" in said
    assert "### small" not in said


def test_weights_that_an_engine_computes_slowly_are_a_known_limit(records: Records, plan: Plan):
    run_id = put_evaluation(records, plan, {"small": SMALL})
    slow = {"device": "CPU", "quant": "Q4_1", "why": "2 of 3 tensors are Q4_1, which is slow", "source": "one thread"}
    engines = [{"engine": OLD}, {"engine": NEW, "slow": [slow]}]
    records.put_evidence(run_id, "small", "both", "preflight", {"engines": engines})
    said = section(guide.markdown(gather(records, plan, YardState(), home=HOME, now=NOW)), "Known limits")
    wanted = "mistral.rs, CPU: 2 of 3 tensors are Q4_1, which is slow (one thread)"
    assert f"- `small`: weights that an engine computes slowly: {wanted}" in said


def test_a_rollback_is_told(records: Records, plan: Plan):
    """A model that moved and came back says when."""
    put_evaluation(records, plan, {"small": SMALL})
    run = records.start_run("migrate", plan.name, plan.model_dump(mode="json"))
    failed = at_most("canary.ttft_p50_ratio", 2.0, limit=1.1, unit="ratio", why=f"slower ('{SECRET_PROMPT}')")
    records.put_checks(run.id, "small", [failed])
    records.put_step(run.id, "small", "rollback", "done")
    said = section(
        guide.markdown(gather(records, plan, routes(plan, small=OLD), home=HOME, now=NOW)), "Models that stay, and why"
    )
    assert "Phase 2, subprocess" in said
    assert "It was rolled back on 20" in said
    assert SECRET_PROMPT not in said


def test_verification_has_commands_and_expected_answers(facts: Facts):
    """Health, status, one chat request with the key's variable, and the report with its verdicts."""
    said = section(guide.markdown(facts), "Check it yourself")
    run = facts.models[0].phases[0].run_id
    assert "curl -s 'http://127.0.0.1:8088/health?model=small'" in said
    assert '`"engine": "mistral.rs"`' in said
    assert "shows `small → mistral.rs`, `large → llama.cpp`." in said
    assert '-H "Authorization: Bearer $NANOBOT_KEY"' in said
    assert f"switchyard report {run}" in said
    assert "`small INCONCLUSIVE`, `large FAIL`" in said


def test_undo_until_when(records: Records, plan: Plan):
    """The command, and the end of the window: set, over, or none."""
    put_evaluation(records, plan, {"small": SMALL})
    said = {}
    for days in (7, -7):
        until = NOW + timedelta(days=days)
        found = gather(records, plan, routes(plan, small=NEW), home=HOME, now=NOW, rollback_until=until)
        said[days] = section(guide.markdown(found), "How to undo, and until when")
    assert "switchyard rollback small    # back to llama.cpp" in said[7]
    assert "The way back is kept until 2026-11-29 12:00 UTC." in said[7]
    assert "The time to go back ended on 2026-11-15 12:00 UTC" in said[-7]


def test_a_retired_engine_is_restored_first(records: Records, plan: Plan):
    """From the state: since when, by whom; its command before is still known, and so is its archive."""
    state = routes(plan, small=NEW).retire(
        OLD, at=NOW.timestamp(), who="Paula Owner", why="not needed", archive=str(HOME / "archive")
    )
    found = gather(records, plan, state, home=HOME, now=NOW)
    said = section(guide.markdown(found), "How to undo, and until when")
    assert "switchyard restore llama.cpp\nswitchyard promote small --to llama.cpp" in said
    assert "retired on 2026-11-22 12:00 UTC by Paula Owner (not needed)" in said
    assert "~/.switchyard/archive" in said
    assert "~/bin/llama-server" in section(guide.markdown(found), "What changed")


def test_a_retirement_that_is_about_to_be_is_told(records: Records, plan: Plan):
    """The guide is written before the state changes: the caller says so."""
    going = Retirement(OLD, NOW, "Paula Owner", "not needed", "/srv/archive")
    found = gather(records, plan, routes(plan, small=NEW), home=HOME, now=NOW, retirement=going)
    said = section(guide.markdown(found), "How to undo, and until when")
    assert "in /srv/archive" in said
    assert "switchyard restore llama.cpp\nswitchyard promote small --to llama.cpp" in said
    assert "switchyard rollback" not in said


def test_native_goes_back_one_step_or_all_the_way(records: Records, plan: Plan):
    """A native model rolls back to the subprocess, and is promoted back to the incumbent."""
    native = plan.model_copy(update={"name": f"{plan.name}-native"})
    run = records.start_run("migrate-native", native.name, native.model_dump(mode="json"))
    records.put_checks(run.id, "small", [CheckResult(check="promote.token", verdict=Verdict.PASS, why="0.1 s")])
    state = routes(plan, small=NEW)
    route = state.models["small"].model_copy(update={"serving": f"{NEW}-native", "undo": NEW})
    found = gather(records, plan, state.with_model("small", route), home=HOME, now=NOW)
    said = section(guide.markdown(found), "How to undo, and until when")
    assert "switchyard rollback small    # back to mistral.rs\nswitchyard promote small --to llama.cpp" in said
    assert "| Phase 3, native | `small` |" in section(guide.markdown(found), "Evidence")


def test_overrides_and_gaps_are_known_limits(facts: Facts):
    """Who decided what and why, and what was not proven, each with its reason."""
    said = section(guide.markdown(facts), "Known limits")
    assert "`small`: override, decided by Paula Owner on 20" in said
    assert "I can wait (run `" in said
    assert "**INCONCLUSIVE** `stability.failures`: the soak was cut short" in said
    assert "the plan was changed" not in said
    assert "parity.prompt_tokens" not in said


def test_a_changed_plan_and_a_cut_run_are_known_limits(records: Records, plan: Plan):
    """Evidence about another plan, or of a run that did not end, is said to be that."""
    other = plan.model_copy(update={"accepted_unsupported": ()})
    put_evaluation(records, other, {"small": SMALL}, done=False)
    said = section(guide.markdown(gather(records, plan, YardState(), home=HOME, now=NOW)), "Known limits")
    assert "the plan was changed since this run" in said
    assert "its run is interrupted" in said
    assert "`large`: never evaluated" in said


def test_evidence_has_runs_figures_and_digests(facts: Facts):
    """Figures with limits and verdicts; what was not measured is said, never 0."""
    said = section(guide.markdown(facts), "Evidence")
    assert "| Time to first token (TTFT), median | 1.05× | 1.1× | **PASS** | candidate 1.05x the incumbent; " in said
    assert "| Whole request (E2E), median | not measured |" in said
    assert "41 of 41 required behaviours pass" in said
    assert "| `small` | `small-Q4.gguf` | `sha256:feed` |" in said
    assert facts.plan_hash in said
    assert all(phase.run_id in said for model in facts.models for phase in model.phases)


def test_nothing_private_is_shared(facts: Facts):
    """Neither folders, nor hosts, nor words of the user's own conversations, in either form."""
    for text in (guide.markdown(facts), guide.html(facts)):
        for private in (
            "/home/",
            "paula/",
            "paulas-box",
            "big disk",
            "chats.jsonl",
            SECRET_PROMPT,
        ):
            assert private not in text, private
        assert "Paula Owner" in text


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        ("see /home/paula/models/a b.gguf", "see a b.gguf"),
        ("/opt/other/x/b-00001-of-00002.gguf is cut", "b-00001-of-00002.gguf is cut"),
        ("paula@box.lan in /data/paula-x/log", "USER@this host in /data/USER/log"),
        (f"/srv/yard/logs and {ROOTS_HOME}/x and /Users/ann/y", "$SWITCHYARD_HOME/logs and ~/x and ~/y"),
        ("paulas-box and boxes", "paulas-box and boxes"),
        ("authorization: Bearer abcdefghijklmnopqrstuvwxyz", "authorization: Bearer [redacted]"),
        ("key sk-abcdefghijklmnopqrstuv", "key [redacted]"),
    ],
)
def test_redacted(text: str, shared: str):
    """Each kind of private word, and words that only look like one."""
    private = Private(Path("/srv/yard"), "paula", "/home/paula", ("box",), (Path("/home/paula/models/a b.gguf"),))
    assert redacted(text, private) == shared


def test_the_host_is_named_when_asked(records: Records, plan: Plan):
    """A guide for one's own house may say which machine it is about."""
    found = gather(records, plan, YardState(), home=HOME, now=NOW, show_host=True)
    assert socket.gethostname() in guide.markdown(found)


def test_the_page_is_whole_and_escaped(facts: Facts):
    """Balanced tags, nothing executable, nothing fetched; foreign text reads as it was written."""
    page = Page(guide.html(facts))
    assert not {"script", "link", "img", "a"} & set(page.tags)
    assert not [value for name, value in page.attributes if name in ("src", "href") or name.startswith("on")]
    assert "<script>alert('x')</script> | **bold** `tick` [a](http://b)" in page.text
    assert "\x1b" not in page.text


def test_markdown_holds_foreign_text_as_text(facts: Facts):
    """No tag, link, emphasis or new table cell comes from outside."""
    text = guide.markdown(facts)
    assert "&lt;script&gt;" in text
    assert "<script>" not in text
    assert "[a](http" not in text
    assert "\x1b" not in text
    heads = [line for line in text.splitlines() if line.startswith("| Behaviour")]
    rows = [line for line in text.splitlines() if line.startswith("| tools")]
    assert rows[0].replace("\\|", "").count("|") == heads[0].count("|")


@pytest.mark.parametrize(
    "text", ["a | b\\| c \\", "# x", "``a`` `b", "&lt;b&gt; & <i>", "**PASS** _x_ \\*", "- 1 | 2", "```", "|"]
)
def test_any_text_reads_the_same_on_the_page(facts: Facts, text: str):
    """As a sentence, as a cell of a table, and as a name in it: the marks of Markdown come and go."""
    before = facts.models[0].before
    assert before is not None
    model = replace(facts.models[0], names=(text,), before=replace(before, version=text))
    page = Page(guide.html(replace(facts, machine=text, models=(model,)))).text
    assert f"({text})." in page
    assert f"llama.cpp {text} (binary)" in page
    assert f"{text}llama.cpp {text}" in page


def test_both_forms_say_the_same(facts: Facts):
    """Every word of the Markdown without its marks is in the page."""
    page = " ".join(Page(guide.html(facts)).text.split())
    for line in section(guide.markdown(facts), "Check it yourself").splitlines():
        words = line.strip("`# ").replace("`", "")
        assert words in page or words == "sh", words


def test_empty_records_make_a_guide_that_says_so(records: Records, plan: Plan):
    """Nothing is guessed: never evaluated, not measured, nothing moved."""
    found = gather(records, plan.model_dump(mode="json"), YardState(), home=HOME, now=NOW)
    text = guide.markdown(found)
    assert "no model was evaluated, and none has moved" in section(text, "Summary")
    assert "it was never evaluated" in section(text, "Models that stay, and why")
    assert "There is nothing to undo" in section(text, "How to undo, and until when")
    assert "| `small` | `small-Q4.gguf` | `not measured` |" in section(text, "Evidence")
    assert "`small`: never evaluated; its speed, memory and answers were not measured" in text
    Page(guide.html(found))
