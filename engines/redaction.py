"""Secrets taken out of text, JSON values and command lines: one list, in two strengths, for all that is kept or shown.

What is taken out everywhere, with `[redacted]` in its place:

- keys by their maker's mark: `sk-`, `pk-`, `rk-` (OpenAI, Anthropic, Stripe), GitHub, GitLab, Slack, Hugging Face, AWS,
  Google, npm, PyPI and others; JSON web tokens; private keys in PEM
- bearer and basic credentials, the values of Authorization, Cookie and `x-api-key` headers
- what follows a name such as `password`, `api_key`, `access_token`, `OPENAI_API_KEY`, in prose, code, JSON, a URL's
  query, an environment assignment, a command line, and as the value of such a key in a mapping
- the password in a URL

`strict` is for what people wrote (captured requests): e-mail addresses, the user in a URL, hexadecimal of 32 digits and
more, base64 of 40 characters and more go too. Without it digests and commit ids stay, which the records need.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

REDACTED = "[redacted]"

_NAMES = (
    r"(?:api[_-]?keys?|apikey|passwd|password|passphrase|secret|client[_-]?secret|secret[_-]?(?:access[_-]?)?key"
    r"|private[_-]?key|access[_-]?key|(?:access|auth|api|refresh|bearer|session|hf|id|github|gitlab|slack|bot)[_-]?token"
    r"|credentials?|hft)"
)
_SECRET_NAME = re.compile(
    rf"(?:[\w-]*{_NAMES}|token|(?:proxy[_-])?authorization|(?:set[_-])?cookie)", re.IGNORECASE | re.ASCII
)
# BOS_TOKEN and MONKEY are not meant; `key: value` without a prefix is no secret
_ENV_NAME = (
    r"(?:(?:[A-Z][A-Z0-9]{0,32}_){1,6}(?:KEY|PASS|PAT)"
    r"|(?:[A-Z][A-Z0-9_]{0,64})?(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|APIKEY))"
)
_ENVIRONMENT = re.compile(_ENV_NAME)
_ASSIGNED = r"""\\{0,3}["']?\s{0,4}[:=]\s{0,4}"""
_NEXT_WORD = r"""(?:=|\s{1,4}|\\{0,3}["'],?\s{0,4})"""

# what stands in a secret's place, by us or by the name of a shell's variable: `Bearer $KEY`
_NONE = r"\[redacted|\$\{?[A-Z_][A-Z0-9_]{0,64}\}?(?![\w$-])"
# where a word begins, also behind what JSON and URLs put in place of a space or a quote: \\n, \\u0022, %20
_START = r"(?:(?<![\w-])|(?<=\\[nrtbf])|(?<=\\u[0-9a-fA-F]{4})|(?<=%[0-9a-fA-F]{2}))"
# the beginnings of keys, and what follows
_MARKS = {
    "ghp_ gho_ ghu_ ghs_ ghr_ github_pat_ pplx- lsv2_ whsec_ dop_v1_ doo_v1_ dor_v1_ glsa_ lin_api_": r"\w{20,255}",
    "glpat- glptt- gldt- glrt- glsoat- glcbt- glft- glimt- glagent-": r"[\w-]{16,255}",
    "xoxa- xoxb- xoxc- xoxe- xoxe. xoxo- xoxp- xoxr- xoxs- xapp-": r"[\w.-]{10,255}",
    "hf_ api_org_ gsk_ xai- r8_ pnu_ pnb_ npm_ ntn_": r"[A-Za-z0-9]{20,255}",
    "pypi- nvapi- dckr_pat_ GOCSPX- ya29. hvs. AIza": r"[\w-]{20,512}",
    "AKIA ASIA": r"[0-9A-Z]{16}",
    "dapi shpat_ shpca_ shppa_ shpss_": r"[0-9a-fA-F]{32}",
    "SG.": r"[\w-]{16,60}\.[\w-]{16,90}",
    "sntrys_": r"[\w=+/-]{20,512}",
    "eyJ": r"[\w-]{8,4096}\.[\w-]{8,4096}\.[\w-]{0,4096}",
}
_NAMED = ("key", "passw", "passphrase", "secret", "token", "credential", "hft")  # a part of each of _NAMES

# any of these in the text in lower case; else the pattern is not tried: it would cost fifty times as much
Rule = tuple[tuple[str, ...], re.Pattern[str], str]


def _rule(triggers: Sequence[str], pattern: str, replacement: str = REDACTED) -> Rule:
    return tuple(trigger.lower() for trigger in triggers), re.compile(pattern), replacement


def _after(triggers: Sequence[str], name: str, separator: str, least: int) -> tuple[Rule, Rule]:
    """The value after `name`: up to the end of its quotes (`\\"` in JSON within JSON), else a word."""
    quoted = rf"""({name}{separator})(\\{{0,3}}["'])(?!{_NONE})(?:(?!\2)(?:\\.|[^\n])){{1,4096}}"""
    word = rf"""({name}{separator})(?!{_NONE}|\\{{0,3}}["']|-)[^\s"',;&]{{{least},4096}}"""
    return _rule(triggers, quoted, rf"\1\2{REDACTED}"), _rule(triggers, word, rf"\1{REDACTED}")


# every repetition has an end, and none begins inside a word: time grows with the text, not with its square
MILD: tuple[Rule, ...] = (
    _rule(
        ["private key"],
        r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----[^-]{0,16384}(?:-----END [A-Z ]{0,30}PRIVATE KEY-----)?",
    ),
    _rule(
        ["authorization"],
        r"""(\b(?i:(?:proxy-)?authorization)\\{0,3}["']?\s{0,4}[:=]\s{0,4}\\{0,3}["']?)"""
        r"""(?:((?i:bearer|basic|token|digest|negotiate|ntlm|api-?key|hmac))(\s{1,4}))?+"""
        rf"""(?!{_NONE})[^\s"'\\,;]{{1,4096}}""",
        rf"\1\2\3{REDACTED}",
    ),
    _rule(["cookie"], r"(?i)(\b(?:set-)?cookie\s{0,4}:\s{0,4})[^\n]{1,4096}", rf"\1{REDACTED}"),
    _rule(
        ["bearer", "basic"],
        r"(?i)\b(bearer|basic)(\s{1,4})(?=[^\s\d]{0,64}\d)[\w.~+/=-]{8,4096}",
        rf"\1\2{REDACTED}",
    ),
    _rule(["bearer"], r"(?i)\b(bearer)(\s{1,4})[\w.~+/=-]{20,4096}", rf"\1\2{REDACTED}"),
    # a folder may be called sk-something: after a slash it has to look like a key
    _rule(["sk-", "sk_", "pk-", "pk_", "rk-", "rk_"], rf"{_START}(?<!(?<!/)/)(?:sk|pk|rk)[-_][\w-]{{16,512}}"),
    _rule(
        ["/sk-", "/sk_", "/pk-", "/pk_", "/rk-", "/rk_"],
        r"(?<=/)(?:sk|pk|rk)[-_](?=[\w-]{0,128}[A-Z])(?=[\w-]{0,128}\d)[\w-]{20,512}(?![\w.-])",
    ),
    *(
        _rule(begins.split(), rf"{_START}(?:{'|'.join(map(re.escape, begins.split()))}){rest}")
        for begins, rest in _MARKS.items()
    ),
    _rule([":aa"], r"(?<!\d)\d{8,10}:AA[\w-]{30,40}"),  # Telegram
    *_after(_NAMED, rf"{_START}(?i:[\w-]{{0,32}}{_NAMES})", _ASSIGNED, 4),
    *_after([*_NAMED, "_pass", "_pat"], rf"{_START}{_ENV_NAME}", _ASSIGNED, 4),
    *_after(_NAMED, rf"{_START}--?(?i:[\w-]{{0,32}}(?:{_NAMES}|token))", _NEXT_WORD, 1),
    _rule(
        ["key=", "token=", "sig=", "signature=", "auth=", "secret=", "pass=", "pwd="],
        r"""(?i)([?&](?:key|token|sig|signature|auth|secret|pass|pwd)=)(?!\[redacted)[^\s&#"'\\<>]{1,4096}""",
        rf"\1{REDACTED}",
    ),
    # mistral.rs: --token-source literal:<token>
    _rule(["literal:"], r"""\b(literal:)[^\s"',;]{1,4096}""", rf"\1{REDACTED}"),
    _rule(
        ["://"],
        r"(\b[a-zA-Z][\w+.-]{1,15}://[^\s/@:]{0,128}:)(?!\[redacted)[^\s/@]{1,256}(?=@)",
        rf"\1{REDACTED}",
    ),
)
STRICT: tuple[Rule, ...] = (
    *MILD,
    _rule(["://"], r"(\b[a-zA-Z][\w+.-]{1,15}://)[^\s/@:]{0,128}(?::[^\s/@]{1,256})?@", rf"\1{REDACTED}@"),
    _rule(["@"], r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}"),
    _rule([""], r"(?<![\w-])[0-9a-fA-F]{32,}(?![\w-])"),
)
LONG = re.compile(r"(?<![\w+/=-])[\w+/-]{40,}={0,2}", re.ASCII)
PATH_SHARE = 1 / 12  # of slashes; base64 has one in 64
SHORTEST = 8  # characters: less holds no secret with its mark, and most strings of the records are single tokens
PIECE = 8 * 1024  # a regular expression holds the interpreter until it is through: short ones delay nobody


def redacted_text(text: str, *, strict: bool = False) -> str:
    """`text` without the secrets listed at the head of this file."""
    if len(text) < SHORTEST:
        return text
    cleaned = []
    for piece in _pieces(text):
        # half a surrogate pair is no text: whoever reads the line would refuse the file
        piece = piece.encode("utf-8", "replace").decode() if strict else piece
        # counts and ids of tokens are in every other line of a log, and no secrets
        lowered = piece.lower().replace("tokens", "").replace("token_id", "").replace("tokeniz", "")
        for triggers, pattern, replacement in STRICT if strict else MILD:
            if any(trigger in lowered for trigger in triggers):
                piece = pattern.sub(replacement, piece)
        cleaned.append(LONG.sub(_without_token, piece) if strict else piece)
    return "".join(cleaned)


def redacted(value: Any, *, strict: bool = False) -> Any:
    """The same JSON value without secrets; a list of texts is also read as a command line."""
    if isinstance(value, str):
        return redacted_text(value, strict=strict)
    if isinstance(value, Mapping):
        return {
            key: REDACTED if isinstance(item, str) and item and is_secret_name(key) else redacted(item, strict=strict)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [
            redacted_word(item, value[at - 1] if at else None, strict=strict)
            if isinstance(item, str)
            else redacted(item, strict=strict)
            for at, item in enumerate(value)
        ]
    return value


def redacted_word(word: str, before: Any = None, *, strict: bool = False) -> str:
    """One word of what may be a command line; `before` is the word before it."""
    name, equals, _ = word.partition("=")
    if equals and name.startswith("-") and is_secret_name(name):
        return f"{name}={REDACTED}"
    if isinstance(before, str) and before.startswith("-") and "=" not in before and is_secret_name(before):
        return REDACTED
    return redacted_text(word, strict=strict)


class RedactingFormatter(logging.Formatter):
    """A formatter of log lines, tracebacks included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted_text(super().format(record))


def is_secret_name(name: object) -> bool:
    """Whether a key, a flag or a variable called `name` holds a secret: `api_key`, `--hf-token`, `OPENAI_API_KEY`."""
    if not isinstance(name, str) or len(name) > 128:
        return False
    bare = name.lstrip("-")
    return _SECRET_NAME.fullmatch(bare) is not None or _ENVIRONMENT.fullmatch(bare) is not None


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces that end between words; the interpreter is free for others after each."""
    begin = 0
    while begin < len(text):
        end = begin + PIECE
        if end < len(text):
            cut = max(text.rfind(" ", begin, end), text.rfind("\n", begin, end))
            end = cut + 1 if cut > begin else end
        yield text[begin:end]
        begin = end
        if begin < len(text):
            time.sleep(0)


def _without_token(found: re.Match[str]) -> str:
    text = found.group()
    mixed = any(map(str.isdigit, text)) and any(map(str.isupper, text)) and any(map(str.islower, text))
    return REDACTED if mixed and text.count("/") <= len(text) * PATH_SHARE else text
