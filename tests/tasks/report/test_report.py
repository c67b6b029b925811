"""The report: it stands alone, escapes what is not ours, agrees with the records, and says what is missing."""

from __future__ import annotations

import html
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from stored_nights import store_nights
from stored_series import append_samples

from engines.errors import BadInput
from engines.units import NOT_MEASURED, quantity
from tasks.records.series import Series
from tasks.records.store import Records, open_records
from tasks.records.tables import Arm
from tasks.report import plots
from tasks.report.markup import Html, el
from tasks.report.model_record import ModelRecord, decided_by
from tasks.report.model_section import pooled, side_by_side
from tasks.report.report import write_report
from tasks.verdicts.statistics import percentile
from tasks.verdicts.verdict import LEFT_TO_WHOLE, CheckResult, Verdict, at_most, not_measured

EVIL = "<script>alert('x')</script> & \"quoted\" \x00\x1b[31m \ud800"
EMPTY_ELEMENTS = {"br", "circle", "line", "path", "rect", "meta", "wbr"}
PLAN: dict[str, Any] = {
    "name": "trial",
    "incumbent": {"engine": "llama.cpp"},
    "candidate": {"engine": "mistral.rs"},
    "models": [{"id": "m", "gguf": "/models/m <1>.gguf"}],
    "accepted_unsupported": ["mlock"],
    "measure": {"looks": [3, 6], "concurrency": [1]},
    "limits": {
        "ttft_p50_ratio": 1.1,
        "ttft_p95_ratio": 1.2,
        "tpot_p50_ratio": 1.1,
        "e2e_p50_ratio": 1.1,
        "throughput_ratio": 1.1,
        "memory_peak_ratio": 1.1,
        "foreign_cpu": 0.1,
        "tie_gap_nats": 0.5,
    },
}


class Page(HTMLParser):
    """What a browser would make of a report: its tags, text, rows of checks; unbalanced tags are an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.text = ""
        self.attributes: list[tuple[str, str]] = []
        self.values: dict[str, list[float]] = {}
        self._open: list[str] = []
        self._check: str | None = None
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keeps tag and attributes; within the row of a check, its figures."""
        given = {key: value or "" for key, value in attrs}
        self.tags.append(tag)
        self.attributes += list(given.items())
        if tag == "tr":
            self._check = given.get("data-check")
        if self._check and "data-value" in given:
            self.values.setdefault(self._check, []).append(float(given["data-value"]))
        if tag not in EMPTY_ELEMENTS:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element without content."""
        assert tag in EMPTY_ELEMENTS, tag
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        """Every end belongs to the last tag still open."""
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Keeps the text."""
        self.text += data


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    with open_records(tmp_path / "switchyard.db") as opened:
        yield opened


def engine(arm: str, **more: object) -> dict[str, Any]:
    name = PLAN[arm]["engine"]
    argv = [name, "--model", "/models/m <1>.gguf", "--port", "1234"]
    return {"arm": arm, "engine": name, "version": "1.0", "form": "binary", "argv": argv, "unsupported": [], **more}


def environment(*arms: str) -> dict[str, Any]:
    return {"model_digest": "sha256:abc", "engines": [engine(arm) for arm in arms]}


def arm_of_block(index: int, factor: float) -> dict[str, Any]:
    ttft = [(100 + 3 * index + request) * factor for request in range(4)]
    tpot = [(10 + 0.1 * index + 0.2 * request) * factor for request in range(4)]
    e2e = [a + 15 * b for a, b in zip(ttft, tpot, strict=True)]
    return {
        "ttft_ms": ttft,
        "tpot_ms": tpot,
        "e2e_ms": e2e,
        "load_s": 1.5 * factor,
        "memory_peak_mib": [200.0 * factor],
    }


def block(index: int, *, void: str | None = None, factor: float = 1.05) -> dict[str, Any]:
    arms = {"incumbent": arm_of_block(index, 1.0), "candidate": arm_of_block(index, factor)}
    return {"index": index, "order": "AB", **arms, "foreign_cpu": {}, "void": void}


def answer(prompt: str, text: str, *, tokens: int = 5, second: float = -1.2) -> dict[str, Any]:
    words = text.split()
    positions = [[word, -0.5, None, [[word, -0.5, None], [f"other-{word}", second, None]]] for word in words]
    return {
        "id": prompt,
        "prompt": f"{prompt}: {EVIL}",
        "text": text,
        "reasoning": "",
        "tool_calls": [],
        "finish_reason": "length",
        "prompt_tokens": tokens,
        "completion_tokens": len(words),
        "cached_tokens": None,
        "positions": positions,
        "error": None,
    }


def put_model(records: Records, run_id: str, *, blocks: int = 4) -> list[CheckResult]:
    """Evidence of every kind for model "m", and its checks, stored."""
    both, name = environment("incumbent", "candidate"), "m"
    for index in range(blocks):
        void = "other programs <b>used</b> 40%" if index == 1 else None
        records.put_evidence(
            run_id, name, "both", "performance", block(index, void=void), key=f"{index:05d}", environment=both
        )
    said: dict[Arm, tuple[str, ...]] = {
        "incumbent": ("one two three", "same text"),
        "candidate": (f"one {EVIL}", "same text"),
    }
    for arm, texts in said.items():
        own = environment(arm)
        answers = [answer(f"p{number}", text) for number, text in enumerate(texts)]
        records.put_evidence(run_id, name, arm, "parity.answers", {"answers": answers}, environment=own)
        counts = {f"p{n}": {"tokens": 20 + n + (n == 1 and arm == "candidate")} for n in range(3)}
        records.put_evidence(run_id, name, arm, "parity.tokens", {"prompts": counts, "raw": []}, environment=own)
        seen = {"outcome": "passed", "observed": EVIL, "claim": "it answers", "group": "chat"}
        behaviours = {"chat": seen, "api_key": seen}
        records.put_evidence(run_id, name, arm, "compatibility", {"behaviours": behaviours}, environment=own)
        call = {"name": "get_weather", "arguments": EVIL, "fault": EVIL if arm == "candidate" else ""}
        called = {"id": "tool-one-01", "group": "one", "prompt": EVIL, "calls": [call], "text": "", "leaked": False}
        batch = {"batch": "0", "looks": [3], "required": False, "hidden": None, "again": []}
        batch |= {"answers": [called | {"cut": False, "error": None}]}
        records.put_evidence(run_id, name, arm, "parity.tool_calls", batch, key="0", environment=own)
        failure = {"at_s": 4.0, "type": "crash", "error": EVIL}
        soak = {"exposure_s": 30.0, "requests": 7, "failures": [failure] if arm == "candidate" else []}
        records.put_evidence(run_id, name, arm, "soak", soak, key="00000", environment=own)
        append_samples(records, run_id, name, arm, "memory_bytes", [(1e9 + t, 2**28 + 1000 * t) for t in range(60)])
    checks = [
        at_most("performance.ttft_p50_ratio", 1.0512345678901, limit=1.1, unit="ratio"),
        at_most("memory.peak_ratio", 1.25, limit=1.1, unit="ratio"),
        at_most("parity.mean_kld", 0.00012345, limit=0.005, unit="nats"),
        CheckResult(check="preflight.fit", verdict=Verdict.PASS, value=3e8, limit=2e10, unit="bytes", why=EVIL),
        CheckResult(check="compatibility.chat", verdict=Verdict.PASS, why="yes"),
        not_measured("stability.failures", "the soak was cut short", limit=0, unit="failures"),
        at_most("performance.load_s", 1.6, limit=9, unit="s").model_copy(update={"required": False}),
    ]
    records.put_checks(run_id, name, checks)
    return checks


def outcome(run_id: str, checks: list[CheckResult], **more: Any) -> dict[str, Any]:
    risk = {"risk": "regression", "likelihood": "low", "impact": "high", "mitigation": EVIL}
    model = {
        "model": "m",
        "verdict": "FAIL",
        "checks": [check.model_dump(mode="json") for check in checks],
        "closed_by": ["memory.peak_ratio"],
        "risks": [{**risk, "verdict": "FAIL", "decided_by": ["memory.peak_ratio"]}],
    }
    return {"run_id": run_id, "plan": "trial", "verdict": "FAIL", "models": [model], **more}


def started(records: Records, name: str = "trial") -> str:
    machine = {"host": EVIL, "ram_bytes": 2**34, "gpus": None, "packages": {"httpx": "0.28"}, "clock": {}}
    return records.start_run("evaluate", name, PLAN, environment=machine).id


def full_page(records: Records, path: Path, **more: Any) -> str:
    run_id = started(records)
    checks = put_model(records, run_id)
    return write_report(records, run_id, outcome(run_id, checks, **more), path).read_text("utf-8")


def read_model(records: Records, run_id: str, checks: list[CheckResult]) -> ModelRecord:
    return ModelRecord.read(records, records.find_run(run_id), outcome(run_id, checks)["models"][0])


def test_the_command_that_repeats_it_is_the_one_that_was_given(records: Records, tmp_path: Path) -> None:
    """With the plan's own path, quoted for a shell; older runs did not record it."""
    command = ["switchyard", "evaluate", "/plans/my server.toml", "--soak", "6h"]
    run_id = records.start_run("evaluate", "trial", PLAN, environment={"command": command}).id
    page = Page(write_report(records, run_id, outcome(run_id, []), tmp_path / "r.html").read_text("utf-8"))
    assert f"switchyard evaluate '/plans/my server.toml' --soak 6h\nswitchyard report {run_id}" in page.text
    assert "switchyard evaluate PLAN.toml" in Page(full_page(records, tmp_path / "old.html")).text


# what comes from outside


def test_nothing_from_outside_becomes_markup(records: Records, tmp_path: Path) -> None:
    """Prompts, answers, observations, reasons and paths are text, whatever they hold."""
    page = full_page(records, tmp_path / "r.html", cannot_prove=[EVIL])
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert page.count("<b>used</b>") == 0
    assert parsed.text.count("<script>alert('x')</script>") >= 8
    assert not any(c in page for c in "\x00\x1b\ud800")


def test_the_page_needs_no_network_and_no_script(records: Records, tmp_path: Path) -> None:
    """No script, no event handler, nothing fetched: links lead only within the page."""
    page = Page(full_page(records, tmp_path / "r.html"))
    links = [value for key, value in page.attributes if key in ("href", "src", "srcset", "action")]
    assert links
    assert all(link.startswith("#") for link in links)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not [key for key, _ in page.attributes if key.startswith("on")]


def test_a_model_name_is_a_link_that_arrives(records: Records, tmp_path: Path) -> None:
    """The overview leads to the model's section."""
    page = Page(full_page(records, tmp_path / "r.html"))
    targets = {value for key, value in page.attributes if key == "id"}
    assert {value[1:] for key, value in page.attributes if key == "href"} <= targets


# over the nights


def test_what_drifts_over_the_nights_is_said_and_drawn(records: Records, tmp_path: Path) -> None:
    """At its head in words, at its model as a plot; a failure that never came is no plot."""
    noise = np.exp(0.02 * np.random.default_rng(1).standard_normal((40, 4)))
    noise[34:, 2] *= 1.3
    figures = {
        arm: [{"ttft_ms": 50 * a, "tpot_ms": 10 * b, "failures": 0} for a, b in noise[:, columns].tolist()]
        for arm, columns in (("incumbent", [0, 1]), ("candidate", [2, 3]))
    }
    versions = {"incumbent": ["b1"] * 20 + ["b2"] * 20, "candidate": ["0.9.5"] * 40}
    store_nights(records, PLAN, figures, versions=versions)
    run_id = started(records)
    page = write_report(records, run_id, outcome(run_id, put_model(records, run_id)), tmp_path / "r.html").read_text()
    head, _, _ = Page(page).text.partition("Verdicts that hold the gate")
    assert "Drift over the nights" in head
    assert re.search(r"m, mistral\.rs 0\.9\.5: TTFT, median, up 3\d\.\d% since \d{4}-\d\d-\d\d \(at once\)", head)
    drawn = {
        title: part for part in re.findall(r"<figure.*?</figure>", page) for title in re.findall("<h4>(.*?)<", part)
    }
    assert drawn["TTFT, median"].count('class="mark') == 2 * 40 + 2
    assert "llama.cpp b2 from" in drawn["TTFT, median"]
    assert "TTFT and TPOT together" in drawn
    assert "Failed requests" not in drawn


def test_a_first_evaluation_has_no_nights(records: Records, tmp_path: Path) -> None:
    assert "nights" not in Page(full_page(records, tmp_path / "r.html")).text


# agreement with the records


def test_every_check_stands_there_with_its_own_numbers(records: Records, tmp_path: Path) -> None:
    """Value and limit of each row are those of the stored check, to the last bit."""
    page = full_page(records, tmp_path / "r.html")
    run_id = records.find_run().id
    shown = Page(page).values
    for check in records.checks(run_id)["m"]:
        wanted = [number for number in (check.value, check.limit) if number is not None]
        assert shown.get(check.check, []) == wanted
        assert f'data-check="{check.check}"' in page


def test_side_by_side_figures_are_those_of_counted_blocks(records: Records) -> None:
    """Pooled over the blocks that count; the void one is left out."""
    run_id = started(records)
    model = read_model(records, run_id, put_model(records, run_id))
    counted = [one for one in (block(index) for index in range(4)) if one["index"] != 1]
    wanted = [value for one in counted for value in one["candidate"]["ttft_ms"]]
    assert pooled(model, "ttft_ms")["candidate"] == wanted
    figures = {what: arms for what, _, arms in side_by_side(model)}
    assert figures["TTFT, p95"]["candidate"] == percentile(wanted, 0.95)
    assert figures["soak, failures"] == {"incumbent": 0, "candidate": 1}
    assert figures["prefill, median"] == {"incumbent": None, "candidate": None}


def test_the_numbers_of_the_page_are_the_figures(records: Records, tmp_path: Path) -> None:
    """Each figure of the table side by side is in the page, exactly and as a reader sees it."""
    page = full_page(records, tmp_path / "r.html")
    run = records.find_run()
    model = read_model(records, run.id, records.checks(run.id)["m"])
    for _, unit, arms in side_by_side(model):
        for value in arms.values():
            if value is not None and unit != "s":
                shown = html.escape(quantity(value, unit))
                assert f'data-value="{value!r}">{shown}<' in page


def test_discarded_blocks_are_hollow_and_their_reason_is_given(records: Records, tmp_path: Path) -> None:
    """One discarded block: a hollow mark in each row of ratios, and one line why."""
    page = full_page(records, tmp_path / "r.html")
    ratio_plot = next(part for part in re.findall(r"<figure.*?</figure>", page) if "block by block" in part)
    assert ratio_plot.count("mark neutral hollow") == 5
    assert ratio_plot.count("mark neutral dot") == 5 * 3
    assert "performance block 1 was discarded: other programs" in Page(page).text


def test_answers_that_differ_stand_side_by_side(records: Records, tmp_path: Path) -> None:
    """Equal answers are not repeated."""
    text = Page(full_page(records, tmp_path / "r.html")).text
    assert "one two three" in text
    assert "same text" not in text


def test_tool_calls_are_counted_and_those_that_differ_are_shown(records: Records, tmp_path: Path) -> None:
    page = full_page(records, tmp_path / "r.html")
    assert Page(page).text.count("not valid: ") == 1
    cells = dict(re.findall(r'data-label="([^"]+)"[^>]*>([^<]*)', page.partition("<h3>Tool calls</h3>")[2]))
    assert cells | {"prompts": "1", "both call": "1", "F1": "1.000", "valid, candidate": "0 of 1"} == cells


@pytest.mark.parametrize(("value", "offered"), [(1.15, True), (1.3, False), (9.0, False), (0.2, False)])
def test_a_larger_limit_is_offered_only_to_what_lies_near_it(records: Records, value: float, offered: bool) -> None:
    run_id = started(records)
    facts = {"value": value, "limit": 1.1, "unit": "ratio", "why": "too far"}
    over = CheckResult(check="performance.ttft_p50_ratio", verdict=Verdict.FAIL, **facts)
    lost = CheckResult(check="compatibility.stop_string", verdict=Verdict.FAIL, why="lost")
    assert ("a limit a little larger" in read_model(records, run_id, [over]).next_step) is offered
    assert "larger" not in read_model(records, run_id, [over, lost]).next_step


def test_a_risk_without_evidence_is_not_one_that_passed(records: Records, tmp_path: Path) -> None:
    assert decided_by({"decided_by": [], "not_measured": ["faults"]}) == "not measured: faults"
    assert decided_by({"decided_by": ["stability.failures"], "not_measured": ["faults"]}).endswith(
        "; not measured: faults"
    )
    assert decided_by({"decided_by": []}) == "every check on it passed"


def test_the_head_says_why_the_gate_is_shut_or_open(records: Records, tmp_path: Path) -> None:
    """In counts and in the words of the worst check; and what to do."""
    run_id = started(records)
    checks = put_model(records, run_id)
    closed = read_model(records, run_id, checks)
    assert closed.why.startswith("1 failed (memory), 1 unproven (stability) of 6 required checks. Worst: memory.peak")
    assert "memory" in closed.next_step
    unproven = read_model(records, run_id, [check for check in checks if check.verdict is not Verdict.FAIL])
    assert "Soak for longer" in unproven.next_step
    looked = [not_measured("performance.ttft_p50_ratio", f"not measured: {LEFT_TO_WHOLE}")]
    assert "evaluate it without --quick" in read_model(records, run_id, looked).next_step
    opened = read_model(records, run_id, [check for check in checks if check.verdict is Verdict.PASS])
    assert opened.why == "All 4 required checks passed."
    assert "may move" in opened.next_step


# what is missing


def test_an_empty_run_says_that_nothing_was_measured(records: Records, tmp_path: Path) -> None:
    """No model, no self-test: a page still, and no zero."""
    run_id = records.start_run("evaluate", "trial", {}).id
    path = write_report(
        records,
        run_id,
        {"run_id": run_id, "plan": "trial", "verdict": "INCONCLUSIVE", "models": []},
        tmp_path / "r.html",
    )
    page = Page(path.read_text("utf-8"))
    assert "No model was measured" in page.text
    assert NOT_MEASURED in page.text


@pytest.mark.parametrize(("caveats", "named"), [((), "PLAN.toml"), (("leaks",), "demo")])
def test_the_demo_is_known_by_its_caveats_not_by_its_name(
    records: Records, tmp_path: Path, caveats: Sequence[str], named: str
) -> None:
    """A user's plan called "demo" is measured anew from its file."""
    run_id = started(records, "demo")
    path = write_report(records, run_id, outcome(run_id, [], cannot_prove=caveats), tmp_path / "r.html")
    assert f"switchyard evaluate {named}" in path.read_text("utf-8")


def test_a_model_without_evidence_has_reasons_in_place_of_plots(records: Records, tmp_path: Path) -> None:
    """Every plot is replaced by a line that says why, in the words of the check."""
    run_id = started(records)
    checks = [not_measured("performance.ttft_p50_ratio", "not measured: preflight.loads failed first")]
    path = write_report(records, run_id, outcome(run_id, checks), tmp_path / "r.html")
    text, page = Page(path.read_text("utf-8")).text, path.read_text("utf-8")
    assert "<svg" not in page
    assert f"Latency: {NOT_MEASURED}; preflight.loads failed first" in text
    assert f"Memory during the soak: {NOT_MEASURED}; the records hold no evidence of it" in text


def test_a_first_look_that_failed_is_named_where_plots_are_missing(records: Records, tmp_path: Path) -> None:
    """Not its figures; checks that were left out for it are no more failures; slow weights and a way out are shown."""
    run_id, left = started(records), "not measured: performance.first_look failed first"
    checks = [
        CheckResult(check="performance.first_look", verdict=Verdict.FAIL, why="candidate against incumbent: 11x"),
        not_measured("performance.ttft_p50_ratio", left),
    ]
    slow = {"device": "CPU", "quant": "Q4_1", "tensors": 2, "why": "2 of 3 tensors are Q4_1, which is slow"}
    slow |= {"faster": "F16", "times": [0.8, 2.0], "source": "measured here"}
    needs: dict[str, Any] = {"fit": {"needs": []}}
    engines = [{"engine": "llama.cpp", **needs}, {"engine": "mistral.rs", "slow": [slow], **needs}]
    records.put_evidence(run_id, "m", "both", "preflight", {"engines": engines})
    text = Page(write_report(records, run_id, outcome(run_id, checks), tmp_path / "r.html").read_text("utf-8")).text
    assert f"Latency: {NOT_MEASURED}; performance.first_look failed first" in text
    assert "FAIL performance.first_look: candidate against" in " ".join(text.split())
    assert "mistral.rs, CPU: 2 of 3 tensors are Q4_1, which is slow (measured here)" in text
    assert "switchyard requantize '/models/m <1>.gguf' --to F16" in text


def test_one_engine_alone_is_shown_and_the_other_is_not_zero(records: Records, tmp_path: Path) -> None:
    """Blocks in which the candidate never came up."""
    run_id = started(records)
    dead = {**block(0, void="the candidate did not come up"), "candidate": {"failed": "exit 1", "records": []}}
    alive = {**block(1), "candidate": {"failed": "exit 1", "ttft_ms": []}}
    for one in (dead, alive):
        records.put_evidence(run_id, "m", "both", "performance", one, key=f"{one['index']:05d}")
    page = write_report(records, run_id, outcome(run_id, []), tmp_path / "r.html").read_text("utf-8")
    assert "candidate: not measured" in Page(page).text
    assert "incumbent: median 104 ms" in Page(page).text


def test_memory_that_was_never_read_is_not_drawn(records: Records, tmp_path: Path) -> None:
    """A series of None is no line at 0."""
    run_id = started(records)
    append_samples(records, run_id, "m", "candidate", "memory_bytes", [(1e9, None), (1e9 + 1, None)])
    page = write_report(records, run_id, outcome(run_id, []), tmp_path / "r.html").read_text("utf-8")
    assert "Memory during the soak: not measured" in Page(page).text


# the file


def test_the_report_replaces_an_older_one_and_leaves_nothing_beside_it(records: Records, tmp_path: Path) -> None:
    """Parents are made; one file is there afterwards."""
    path = tmp_path / "deep" / "er" / "r.html"
    run_id = started(records)
    write_report(records, run_id, outcome(run_id, []), path)
    before = path.read_text("utf-8")
    write_report(records, run_id, outcome(run_id, [], cannot_prove=["leaks"]), path)
    assert path.read_text("utf-8") != before
    assert [file.name for file in path.parent.iterdir()] == ["r.html"]


def test_a_place_that_cannot_be_written_is_one_clear_line(records: Records, tmp_path: Path) -> None:
    """A file where a directory should be."""
    (tmp_path / "file").write_text("")
    run_id = started(records)
    with pytest.raises(BadInput, match=r"cannot be written to .*file/r\.html.*--output") as raised:
        write_report(records, run_id, outcome(run_id, []), tmp_path / "file" / "r.html")
    assert "\n" not in str(raised.value)


def test_an_unknown_run_is_bad_input(records: Records, tmp_path: Path) -> None:
    """No page about nothing."""
    with pytest.raises(BadInput, match="no run"):
        write_report(records, "20200101-000000-abcd", {"models": []}, tmp_path / "r.html")


# plots


def test_a_soak_of_three_days_keeps_its_peak_in_few_points() -> None:
    """259,200 points become at most about 600, the one spike among them."""
    values = np.full(259_200, 3e8)
    values[123_456] = 9e8
    (run,) = plots.thinned(Series(t=1e9 + np.arange(259_200.0), values=values))
    assert len(run) <= plots.MAX_POINTS + 2
    assert max(value for _, value in run) == 9e8
    assert run[-1][0] == 259_199


def test_a_pause_in_the_sampling_breaks_the_line() -> None:
    """No line is drawn through an hour in which nothing was sampled, nor through None."""
    t = np.concatenate((np.arange(100.0), 3700 + np.arange(100.0), [np.nan]))
    values = np.full(len(t), 1.0)
    values[-1] = np.nan
    assert [len(run) for run in plots.thinned(Series(t=t, values=values))] == [100, 100]


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0, 1, False), (0, 987.6, False), (3e8, 3.01e8, False), (0.9, 1.3, True), (2, 9e4, True)]
)
def test_ticks_are_round_and_apart(low: float, high: float, log: bool) -> None:
    """At least two, within the axis, never on top of each other."""
    scale = plots.Scale(low, high, log=log)
    ticks = scale.ticks()
    assert len(ticks) >= 2
    assert all(low <= tick <= high * (1 + 1e-12) for tick in ticks)
    places = [scale.at(tick) for tick in ticks]
    assert all(b - a >= plots.TICK_GAP * 0.99 for a, b in itertools.pairwise(places))


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [1e-3, 1e6], [7.0] * 5000])
def test_strips_draw_odd_samples(values: list[float]) -> None:
    """One value, equal values, nine decades, thousands: well-formed, finite, not too many marks."""
    drawn = plots.strips("TTFT", "ms", {"incumbent": values, "candidate": [3.0]}, {"incumbent": "a", "candidate": "b"})
    ElementTree.fromstring(drawn)
    assert "nan" not in drawn
    assert "inf" not in drawn
    assert drawn.count("dot") <= plots.MAX_DOTS + 3


def test_the_axis_is_logarithmic_where_medians_are_far_apart() -> None:
    """More than three times: the words under the axis say so."""
    names = {"incumbent": "a", "candidate": "b"}
    near = plots.strips("TTFT", "ms", {"incumbent": [10.0, 11.0], "candidate": [20.0]}, names)
    far = plots.strips("TTFT", "ms", {"incumbent": [10.0, 11.0], "candidate": [200.0]}, names)
    assert "logarithmic" not in near
    assert "logarithmic" in far


def test_a_hopeless_interval_does_not_squeeze_the_blocks() -> None:
    """An interval up to 1e300 is cut at the edge of the axis."""
    row = plots.RatioRow("TTFT, median", [1.0, 1.2], [], 1.1, 1e-300, 1e300, 1.1, "INCONCLUSIVE")
    drawn = plots.ratios("Ratios", [row])
    ElementTree.fromstring(drawn)
    dots = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', drawn)]
    assert abs(dots[0] - dots[1]) > 50


def test_divergences_and_token_counts_tell_themselves_in_words() -> None:
    """The description has the numbers for whoever does not see the marks; infinite and unseen gaps are drawn."""
    found = [
        plots.Divergence(3, 0.1, 0.2, True),
        plots.Divergence(9, math.inf, math.inf, False),
        plots.Divergence(0, None, None, None),
    ]
    drawn = plots.divergences("Where", found, 0.5)
    described = ElementTree.fromstring(drawn).findtext(".//desc")
    assert described == ("3 answers part from the incumbent's; 1 unexplained (cross), 1 not visible (hollow).")
    counts = ElementTree.fromstring(plots.token_counts("Tokens", [(5, 5), (7, 9), (700, 700)]))
    assert counts.findtext(".//desc") == "2 of 3 prompts have equally many tokens; 1 differ (crosses)."


# words


def test_an_element_escapes_text_and_keeps_markup() -> None:
    """Attributes too."""
    assert el("b", "<i>", Html("<i></i>"), title='"') == '<b title="&quot;">&lt;i&gt;<i></i></b>'
