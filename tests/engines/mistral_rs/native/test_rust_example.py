"""docs/native-rust.md quotes the crate of examples/native-rust; `cargo test` there runs it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
DOCS = ROOT / "docs" / "native-rust.md"
SOURCES = [path.read_text() for path in (ROOT / "examples" / "native-rust").rglob("*.rs")]


@pytest.mark.parametrize("quote", re.findall(r"```rust\n(.*?)\n```", DOCS.read_text(), re.S))
def test_the_guide_shows_the_code_that_its_tests_run(quote: str) -> None:
    """A change of the crate is one of its page."""
    assert any(quote in source for source in SOURCES)


def test_the_guide_pins_what_the_crate_pins() -> None:
    """The dependencies in the guide are those of Cargo.toml."""
    quoted = re.search(r"```toml\n(.*?)\n```", DOCS.read_text(), re.S)
    assert quoted is not None
    assert quoted[1] in (ROOT / "examples" / "native-rust" / "Cargo.toml").read_text()
