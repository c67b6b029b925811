"""Secrets in all their marks and surroundings go; digests and what only looks like a secret stay."""

import hashlib
import json
import string
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.redaction import REDACTED, redacted, redacted_text

WORD = string.ascii_letters + string.digits


def drawn(length: int, alphabet: str = WORD) -> st.SearchStrategy[str]:
    return st.text(alphabet, min_size=length, max_size=length)


MARKED = st.one_of(
    *(
        drawn(length, alphabet).map(mark.format)
        for mark, length, alphabet in (
            ("sk-{}", 32, WORD),
            ("sk-proj-{}", 48, WORD + "_-"),
            ("sk-ant-api03-{}", 60, WORD + "_-"),
            ("sk_live_{}", 24, WORD),
            ("ghp_{}", 36, WORD),
            ("gho_{}", 36, WORD),
            ("github_pat_{}", 60, WORD + "_"),
            ("glpat-{}", 20, WORD),
            ("xoxb-{}", 40, WORD + "-"),
            ("hf_{}", 34, WORD),
            ("AKIA{}", 16, string.ascii_uppercase + string.digits),
            ("AIza{}", 35, WORD + "_-"),
            ("npm_{}", 36, WORD),
            ("gsk_{}", 50, WORD),
            ("nvapi-{}", 60, WORD),
            ("pnu_{}", 36, WORD),
        )
    )
)
# any value that follows a name which says what it is
NAMED = drawn(12).filter(lambda text: not text.startswith("-"))
AROUND_MARKED = (
    "incorrect API key provided: {}.",
    '{{"error": {{"message": "bad key {}", "code": 401}}}}',
    '{{"error": "first line\\n{}\\u0022 refused"}}',
    "GET https://host/v1?key={}&x=1",
    "https://{}@github.com/a/b",
    "error: ['--token', '{}']",
    "KEY={} ./serve",
    "\x1b[0m {}\n",
    "'{}'",
)
AROUND_NAMED = (
    "password: {}",
    '{{"api_key": "{}"}}',
    '"{{\\"api_key\\": \\"{}\\"}}"',
    "OPENAI_API_KEY={} llama-server",
    "export HF_TOKEN='{}'",
    "llama-server --api-key {} --port 8080",
    "mistralrs --hf-token={}",
    "llama-server -hft {}",
    "['llama-server', '--api-key', '{}']",
    "postgresql://joe:{}@db/x",
    "https://host/v1?token={}&x=1",
    "Authorization: Bearer {}",
    "'proxy-authorization': 'ApiKey {}'",
    "x-api-key: {}",
    "Cookie: session={}; a=b",
    "--token-source literal:{}",
)


@settings(max_examples=400, deadline=None)
@given(MARKED, st.sampled_from(AROUND_MARKED))
def test_a_marked_key_goes_wherever_it_stands(secret: str, around: str) -> None:
    text = around.format(secret)
    told = redacted_text(text)
    assert secret not in told
    assert REDACTED in told
    assert redacted_text(told) == told
    assert secret not in json.dumps(redacted({"a": [text, {"b": text}]}))


@settings(max_examples=400, deadline=None)
@given(NAMED, st.sampled_from(AROUND_NAMED))
def test_what_a_name_gives_away_goes(secret: str, around: str) -> None:
    told = redacted_text(around.format(secret))
    assert secret not in told
    assert redacted_text(told) == told


@given(MARKED)
def test_in_the_path_of_a_url_too(secret: str) -> None:
    """Which is where a folder of that name would stand: without digits and capitals it could be one."""
    if secret.startswith("sk") and not (any(c.isdigit() for c in secret) and any(c.isupper() for c in secret)):
        return
    if not secret[-1].isalnum():
        return
    assert secret not in redacted_text(f"GET https://host/{secret}/x failed")
    assert secret not in redacted_text(f"GET /x?next={quote(f' {secret}')} failed")


@given(st.binary(max_size=20))
def test_digests_stay(data: bytes) -> None:
    """The records need them: models, plans, commits."""
    for digest in (hashlib.sha256(data).hexdigest(), hashlib.sha1(data).hexdigest(), hashlib.md5(data).hexdigest()):
        for text in (digest, f"sha256:{digest}", f"plan {digest[:12]}, commit {digest}", f'{{"digest": "{digest}"}}'):
            assert redacted_text(text) == text
        assert digest not in redacted_text(f"see {digest} here", strict=True)


@pytest.mark.parametrize(
    "text",
    [
        "/home/ann/models/sk-learn-models/q4.gguf",
        "eos_token_id = 2, bos_token: 12345, max_tokens: 4096, n_tokens = 512, prompt_tokens=12345",
        "llama-server --max-tokens 4096 --port 8080 --token-source cache",
        "print_info: EOS token        = 2 '<|im_end|>'",
        "TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=4",
        "basic understanding of bearer responsibilities",
        "task-scheduler, risk-adjusted-performance-measures, desk-top-publishing-software",
        "http://127.0.0.1:8080/v1/chat/completions?model=a&stream=true",
        'curl -H "Authorization: Bearer $NANOBOT_KEY" --api-key $KEY --hf-token ${HF_TOKEN} http://x',
        "",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted_text(text) == text


def test_the_words_of_a_command_line() -> None:
    words = ["serve", "--api-key", "k", "--hf-token=k", "-hft", "k", "--port", "1", "--max-tokens", "5"]
    hidden = ["serve", "--api-key", REDACTED, f"--hf-token={REDACTED}", "-hft", REDACTED]
    assert redacted(list(words)) == [*hidden, "--port", "1", "--max-tokens", "5"]


def test_an_unset_value_and_a_number_are_no_secret() -> None:
    value = {"api_key": None, "token": "", "password": 5, "first_token": "word", "token_count": 3}
    assert redacted(value) == value
