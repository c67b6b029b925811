"""The page: everything shown is escaped, nothing missing is shown as a number, and it needs nothing but itself."""

import re
import time
from html.parser import HTMLParser

import pytest

from engines.yard.ports.notes import one_line
from engines.yard.ports.page import page

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&"


def engine(**changed):
    """As a yard tells it, of an engine that never ran."""
    return {
        "engine": "old",
        "version": "1",
        "form": "binary",
        "state": "stopped",
        "why": "never started",
        "since": None,
        "loading": "",
        "pid": None,
        "argv": None,
        "log": None,
        "memory_bytes": None,
        "vram_bytes": None,
        "memory_series": [],
        "ttft_ms_series": [],
        "tokens_per_s": None,
        "in_flight": 0,
        "load_s": None,
        "restarts": 0,
        "context_tokens": None,
        **changed,
    }


RUNNING = {
    "state": "ready",
    "pid": 7,
    "since": time.time() - 60,
    "argv": ["engine", "--port", "1"],
    "log": "/h/logs/e.log",
    "memory_bytes": 300 * 2**20,
    "memory_series": [100 * 2**20, 200 * 2**20, 300 * 2**20],
    "ttft_ms_series": [20.0, 40.0],
    "tokens_per_s": 12.5,
    "load_s": 1.5,
    "context_tokens": 4096,
}


def status(*engines, incidents=(), **changed):
    model = {
        "id": "m",
        "serving": "old",
        "committed": "old",
        "selected": "auto",
        "fallback": None,
        "undo": None,
        "canary": None,
        "waiting": 0,
        "holding": False,
        "moving": None,
        "unservable": None,
        "engines": list(engines) or [engine(**RUNNING)],
        **changed,
    }
    return {
        "pid": 1,
        "since": time.time(),
        "address": "http://127.0.0.1:8080",
        "models": [model],
        "incidents": list(incidents),
        "events": [],
    }


class Tags(HTMLParser):
    """Every tag with its attributes, and that each one that opens is closed."""

    def __init__(self, text):
        super().__init__()
        self.seen, self.open = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "polyline", "polygon"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def text_of(html):
    return re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.DOTALL)


def test_everything_that_comes_from_outside_is_escaped():
    hostile = engine(
        **{**RUNNING, "argv": [HOSTILE], "log": HOSTILE},
        engine=HOSTILE,
        version=HOSTILE,
        form=HOSTILE,
        why=HOSTILE,
        loading=HOSTILE,
    )
    html = page(
        status(
            hostile | {"state": HOSTILE},
            id=HOSTILE,
            serving=HOSTILE,
            committed=HOSTILE,
            selected=HOSTILE,
            fallback=HOSTILE,
            undo=HOSTILE,
            canary={"engine": HOSTILE, "weight": 0.1, "verdict": "FAIL", "why": HOSTILE},
            last_canary={"verdict": "FAIL", "why": HOSTILE},
            moving=HOSTILE,
            unservable=HOSTILE,
            incidents=[{"at": time.time(), "model": HOSTILE, "engine": HOSTILE, "what": HOSTILE}],
        )
    )
    seen = Tags(html).seen
    assert not [tag for tag, _ in seen if tag in ("script", "img")]
    assert not [name for _, attributes in seen for name in attributes if name.startswith("on")]
    assert html.count("&lt;script&gt;") >= 14


@pytest.mark.parametrize(("committed", "shown"), [("old", True), ("new", False)])
def test_the_last_canary_is_shown_until_its_engine_serves(committed, shown):
    """The yard judged one that was promoted a moment before the flow did, which has the verdict."""
    last = {"engine": "new", "verdict": "INCONCLUSIVE", "why": "21 more answers"}
    html = page(status(engine(), committed=committed, last_canary=last))
    assert ("21 more answers" in html) is shown


def test_what_was_not_measured_is_not_a_number():
    html = page(status(engine(state="ready", pid=7)))
    assert "not measured" in html
    assert not re.search(r"\bNone\b|0 MiB|(?<![.\d])0\.0(?![.\d])", text_of(html))


def test_an_engine_that_never_ran_and_a_model_without_engines_are_shown():
    assert "never started" in page(status(engine()))
    empty = status()
    empty["models"][0] |= {"engines": [], "serving": None, "unservable": "no engine can serve m: none is here"}
    html = page(empty)
    assert "not served" in html
    assert "none is here" in html
    assert "None" not in text_of(html)


def test_it_is_whole_and_takes_nothing_from_elsewhere_and_needs_no_script():
    html = page(status(incidents=[{"at": time.time(), "model": "m", "what": "its process ended"}]))
    tags = Tags(html)
    assert tags.open == []
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in tags.seen}
    assert "url(" not in html
    assert "@import" not in html
    assert ("meta", {"http-equiv": "refresh", "content": "5"}) in tags.seen
    assert any(attributes.get("name") == "viewport" for tag, attributes in tags.seen if tag == "meta")


def test_first_token_and_memory_are_drawn_from_zero_up():
    lines = [attributes["points"] for tag, attributes in Tags(page(status())).seen if tag == "polyline"]
    assert lines == ["0.0,16.0 100.0,2.0", "0.0,20.7 50.0,11.3 100.0,2.0"]
    assert "100 to 300 MiB, last 3" in page(status())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"fallback": "new", "serving": "new"}, "Fallback: old is out of order, new serves"),
        ({"canary": {"engine": "new", "weight": 0.25}}, "Canary: new answers 25% of the conversations"),
        ({"undo": "new"}, "way back: new"),
        ({"moving": "promote to new"}, "Under way: promote to new"),
        ({"waiting": 3}, "3 waiting"),
        ({"selected": "old"}, "engine chosen by hand: old"),
        ({"shadow": {"engine": "new", "share": 0.1}}, "Shadow: new gets copies of 10%"),
    ],
)
def test_what_is_out_of_the_ordinary_is_said(changed, words):
    assert words in page(status(**changed))


def test_the_title_tells_a_tab_in_the_background_that_something_is_not_served():
    assert "<title>Switchyard</title>" in page(status())
    assert "<title>1 not served" in page(status(engine(state="dead")))


def test_a_model_that_is_not_loaded_is_no_alarm():
    """It says so, and the title stays quiet."""
    shown = page(status(engine(), dormant=True))
    assert "<title>Switchyard</title>" in shown
    assert "the next request loads it" in shown


def test_a_retired_engine_is_named_with_its_way_back():
    told = {**status(engine(**RUNNING)), "retired": {"old": f"old was retired {HOSTILE}; `switchyard restore old`"}}
    assert "switchyard restore old" in page(told)
    assert "<script>" not in page(told)


def test_the_latest_incidents_come_first_and_are_bounded():
    html = page(status(incidents=[{"at": time.time(), "model": "m", "what": f"number {n}."} for n in range(30)]))
    assert html.index("number 29.") < html.index("number 28.")
    assert "number 5." not in html
    assert "Incidents: 30, the latest 12" in html


def test_reasons_are_shown_whole():
    why = "its process ended: signal SIGABRT; its last lines:\n" + "\n".join(f"line {n} " + "x" * 200 for n in range(8))
    html = page(status(engine(**RUNNING, why=why), unservable=why, incidents=[{"at": 0, "model": "m", "what": why}]))
    assert html.count("line 7 ") == 3


def test_one_line_is_short_and_without_control_characters():
    assert one_line("first\nsecond") == "first"
    assert one_line("a\x1b[31mb\x07") == "a [31mb "
    assert len(one_line("x" * 500)) == 160


def test_a_running_yard_shows_its_page(start_yard):
    yard = start_yard().ready()
    (yard.home / "reports").mkdir()
    (yard.home / "reports" / "20261123-020000-abcd.html").write_text("<p>the report</p>")
    (yard.home / "secret.html").write_text("no report")
    with yard.http() as http:
        answer = http.get("/yard")
        report = http.get("/yard/reports/20261123-020000-abcd.html")
        others = [http.get(f"/yard/reports/{name}").status_code for name in ("x.html", "..%2Fsecret.html", "")]
    assert "<a href='/yard/reports/20261123-020000-abcd.html'>20261123-020000-abcd</a>" in answer.text
    assert (report.status_code, report.text) == (200, "<p>the report</p>")
    assert report.headers["content-type"].startswith("text/html")
    assert others == [404, 404, 404]
    assert answer.headers["content-type"].startswith("text/html")
    assert "served by old" in answer.text
    assert Tags(answer.text).open == []
