"""Shell text, read and never executed: its simple commands with their words, variables and working directory.

Quotes, line continuations, comments, pipes, redirections, `export`, `cd`, arrays, braces and the variables that the
text sets itself are followed; so are files it sources and the few commands in `$(...)` that only change a path. What
only a shell could answer (another `$(...)`, a variable set elsewhere) stays in the word as it stands, and the word is
listed as open.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

NAME = re.compile(r"[A-Za-z_]\w*")
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
PARAMETER = re.compile(r"([A-Za-z_]\w*|\d)(\[0\]|\[[@*]\])?(?::?([-=?+])(.*)|(%%?|##?)(.*))?", re.DOTALL)
SPECIAL = re.compile(r"\$[@*#?$!\d]")
UNQUOTED = {char: chr(0xE000 + ord(char)) for char in "{},*?["}  # what an unquoted one is until its word is whole
QUOTED = {ord(mark): char for char, mark in UNQUOTED.items()}
BLANK = "\ue020"  # one that is quoted inside `${NAME:-"..."}`: no word ends there
OPERATOR = re.compile(r"\n|;;?|&&|\|\||\|&|\||\(|\)|&(?!>)")
REDIRECTION = re.compile(r"(?:\d*|&)(?:>>|>&|<&|<<<|<<-?|>\||<>|>|<)(?:\d+|-)?")
# with a prompt that was copied as well, and a line of a crontab
# fmt: off
BEFORE_A_COMMAND = frozenset((
    "then", "do", "else", "elif", "if", "while", "until", "!", "{", "}", "time", "exec", "command", "builtin", "nohup",
    "$", "@reboot",
))
# fmt: on
EXPORTS = frozenset({"export", "declare", "typeset", "local", "readonly"})
# commands in $(...) that read nothing but paths, by what they print for their last word
PATHS: dict[str, Callable[[str], str | None]] = {
    "dirname": lambda path: os.path.dirname(path) or ".",
    "basename": os.path.basename,
    "readlink": os.path.realpath,
    "realpath": os.path.realpath,
    "echo": str,
    "which": shutil.which,
    "-v": shutil.which,  # command -v
}
DEEPEST = 5  # files that source one another


@dataclass
class Command:
    """One simple command: its words, and the variables and the directory that it runs with."""

    words: list[str]
    env: dict[str, str]
    cwd: Path | None
    open: set[str]  # words, or values of variables, that hold what was not resolved


@dataclass
class Shell:
    """What the commands so far have set."""

    variables: dict[str, list[str]]
    cwd: Path | None = None
    exported: set[str] = field(default_factory=set)
    exports_all: bool = False
    open: set[str] = field(default_factory=set)
    commands: list[Command] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    expanded: set[str] = field(default_factory=set)  # variables that the text itself uses
    depth: int = 0
    n_branches: int = 0  # ifs, loops and cases around the place
    branched: set[str] = field(default_factory=set)  # variables that are set in one of these

    def value(self, name: str) -> str | None:
        return " ".join(self.variables[name]) if name in self.variables else None

    def run(self, words: list[str], prefix: Mapping[str, list[str]]) -> None:
        """Follow one simple command."""
        if not words:
            self.variables |= prefix
            self.branched |= set(prefix) if self.n_branches else set()
            self.exported |= set(prefix) if self.exports_all else set()
            return
        program, rest = os.path.basename(words[0]), words[1:]
        if program in EXPORTS:
            self._export(rest, is_exported=program == "export" or any("x" in word for word in rest if word[:1] == "-"))
        elif program == "set" and (rest[:1] == ["-a"] or "allexport" in rest):
            self.exports_all = True
        elif program in ("set", "setenv"):  # fish: set -gx NAME value; csh: setenv NAME value
            names = [word for word in rest if not word.startswith("-")]
            if len(names) > 1:
                self.variables[names[0]] = names[1:]
                is_exported = program == "setenv" or any("x" in word for word in rest if word.startswith("-"))
                self.exported |= {names[0]} if is_exported else set()
        elif program in ("cd", "pushd") and rest:
            self.cwd = (self.cwd or Path()) / Path(rest[-1]).expanduser()
        elif program in ("case", "for", "select"):
            self.n_branches += 1
        elif program in ("fi", "done", "esac"):
            self.n_branches -= 1
        elif program in (".", "source"):
            self._source(" ".join(words), rest)
        else:
            env = {name: " ".join(self.variables[name]) for name in self.exported if name in self.variables}
            env |= {name: " ".join(value) for name, value in prefix.items()}
            self.commands.append(Command(words, env, self.cwd, self.open))

    def _source(self, text: str, files: list[str]) -> None:
        path = (self.cwd or Path()) / Path(files[0]).expanduser() if files else Path()
        if self.depth == DEEPEST or not path.is_file():
            self.notes.append(f"{text}: another file, which is not read")
            return
        self.depth += 1
        _Reader(path.read_text(encoding="utf-8", errors="replace"), self).read()
        self.depth -= 1

    def _export(self, words: list[str], *, is_exported: bool) -> None:
        for word in words:
            name, _, value = word.partition("=")
            if NAME.fullmatch(name):
                if "=" in word:
                    self.variables[name] = [value]
                    self.branched |= {name} if self.n_branches else set()
                self.exported |= {name} if is_exported else set()


def read_shell(text: str, variables: Mapping[str, str], env: Mapping[str, str], cwd: Path | None = None) -> Shell:
    """Every simple command of `text`; `variables` are known beforehand, those of `env` are exported as well.

    Raises ValueError for an open quote.
    """
    known = {name: [value] for name, value in (*variables.items(), *env.items())}
    shell = Shell(known, cwd, set(env))
    _Reader(text, shell).read()
    return shell


def read_env_file(name: str, cwd: Path | None) -> dict[str, str] | None:
    """The variables of a file with lines NAME=value, as systemd and containers read them; None where it is not here."""
    path = (cwd or Path()) / Path(name.removeprefix("-")).expanduser()
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = (line.strip().removeprefix("export ").partition("=") for line in lines)
    return {
        name.strip(): value.strip().strip("\"'") for name, equals, value in pairs if equals and name[:1] not in "#;"
    }


class _Reader:
    """Goes through the text once, and hands each simple command to the shell before it reads on."""

    def __init__(self, text: str, shell: Shell, *, is_default: bool = False) -> None:
        self._text, self._at, self._shell = text.replace("\r\n", "\n").replace("\\\n", " "), 0, shell
        self._is_default = is_default
        self._words: list[str] = []
        self._prefix: dict[str, list[str]] = {}

    def read(self) -> None:
        while self._at < len(self._text):
            char = self._text[self._at]
            if char in " \t":
                self._at += 1
            elif char == "#":
                self._at = self._end_of_line()
            elif redirection := REDIRECTION.match(self._text, self._at):
                self._redirect(redirection)
            elif operator := OPERATOR.match(self._text, self._at):
                self._at = operator.end()
                self._end_command()
            else:
                self._take(self._word())
        self._end_command()

    def _end_of_line(self) -> int:
        end = self._text.find("\n", self._at)
        return len(self._text) if end < 0 else end

    def _end_command(self) -> None:
        self._shell.run(self._words, self._prefix)
        self._words, self._prefix = [], {}

    def _take(self, pieces: list[str]) -> None:
        """Add the words that one word of the text stands for; before the program they may set variables."""
        found = ASSIGNMENT.fullmatch(pieces[0]) if pieces and not self._words else None
        if found is None:
            if self._words or pieces[:1] not in [[word] for word in BEFORE_A_COMMAND]:
                self._words += pieces
            self._shell.n_branches += not self._words and pieces[:1] in (["if"], ["while"], ["until"])
            return
        name, adds, value = found.groups()
        values = [value, *pieces[1:]]
        if not value and self._text[self._at : self._at + 1] == "(":
            values = self._array()
        self._prefix[name] = [*(self._shell.variables.get(name, []) if adds else []), *values]

    def _array(self) -> list[str]:
        values: list[str] = []
        self._at += 1
        while self._at < len(self._text) and self._text[self._at] != ")":
            if self._text[self._at].isspace():
                self._at += 1
            elif self._text[self._at] == "#":
                self._at = self._end_of_line()
            else:
                values += self._word()
        self._at += 1
        return values

    def _redirect(self, found: re.Match[str]) -> None:
        self._at = found.end()
        if found[0][-1].isdigit() or found[0].endswith("-"):
            return
        while self._text[self._at : self._at + 1] in (" ", "\t"):
            self._at += 1
        target = self._word() if self._at < len(self._text) and self._text[self._at] != "\n" else []
        if "<<" in found[0] and found[0] != "<<<" and target:
            lines = self._text[self._end_of_line() :]
            end = re.search(rf"^\s*{re.escape(target[0])}\s*$", lines, re.MULTILINE)
            self._text = self._text[: self._end_of_line()] + (lines[end.end() :] if end else "")

    def _word(self) -> list[str]:
        """The words that the text at this place stands for: an unquoted variable may hold several, or none."""
        start = self._at
        pieces, is_word, opened = self._pieces(" \t\n;&|()<>")
        if self._at == start:
            self._at += 1
        sets = not self._words and ASSIGNMENT.fullmatch(pieces[0])
        pieces = [piece.translate(QUOTED) for piece in pieces] if sets else [w for p in pieces for w in self._files(p)]
        pieces = [piece.replace(BLANK, " ") for piece in pieces]
        if opened:
            self._shell.open |= {piece.partition("=")[2] if ASSIGNMENT.fullmatch(piece) else piece for piece in pieces}
        return pieces if is_word else []

    def _files(self, piece: str) -> list[str]:
        """The words that its unquoted braces stand for, then the files that its unquoted wildcards find."""
        found = []
        for word in filter(None, _braces(piece)) if piece else [piece]:
            pattern = "".join(QUOTED.get(ord(char)) or glob.escape(char) for char in word)
            is_pattern = any(UNQUOTED[char] in word for char in "*?[")
            names = sorted(glob.glob(pattern, root_dir=self._shell.cwd)) if is_pattern else []
            found += names or [word.translate(QUOTED)]
        return found

    def _pieces(self, stops: str) -> tuple[list[str], bool, bool]:
        """Words up to one of `stops`; whether there is one, if only an empty one; whether it holds what is open."""
        pieces, is_word, opened, start = [""], False, False, self._at
        while self._at < len(self._text):
            char = self._text[self._at]
            if char in stops and not (char == "&" and self._at == start):
                break
            if char == "'":
                end = self._text.index("'", self._at + 1)
                pieces[-1] += self._kept(self._text[self._at + 1 : end])
                self._at, is_word = end + 1, True
            elif char == '"':
                opened |= self._quoted(pieces)
                pieces[-1], is_word = self._kept(pieces[-1]), True
            elif char == "\\":
                pieces[-1] += self._text[self._at + 1 : self._at + 2]
                self._at, is_word = self._at + 2, True
            elif char in "$`":
                values, closed = self._expansion()
                opened |= not closed
                split = [word for value in values for word in value.split()] if closed else values
                if split:
                    pieces[-1] += split[0]
                    pieces += split[1:]
                    is_word = True
            elif char == "~" and (self._at == start or self._is_value(pieces)):
                self._at += 1
                home = (
                    self._shell.value("HOME")
                    if self._text[self._at : self._at + 1] in ("", *"/: \t\n;&|()<>")
                    else None
                )
                pieces[-1] += home or "~"
                is_word = True
            else:
                pieces[-1] += UNQUOTED.get(char, char)
                self._at, is_word = self._at + 1, True
        return pieces, is_word, opened

    def _kept(self, quoted: str) -> str:
        return quoted.replace(" ", BLANK) if self._is_default else quoted

    def _is_value(self, pieces: list[str]) -> bool:
        """True where `~` begins the value of a variable, or one of several paths in it."""
        sets = not self._words or self._words[0] in EXPORTS
        return sets and self._text[self._at - 1] in "=:" and ASSIGNMENT.match(pieces[0]) is not None

    def _quoted(self, pieces: list[str]) -> bool:
        """Adds what stands in double quotes; True when it holds what was not resolved."""
        opened = False
        self._at += 1
        while self._text[self._at : self._at + 1] != '"':
            if self._at >= len(self._text):
                raise ValueError("no closing quotation")
            char = self._text[self._at]
            if char == "\\" and self._text[self._at + 1 : self._at + 2] in ('"', "\\", "$", "`", "\n"):
                pieces[-1] += self._text[self._at + 1]
                self._at += 2
            elif char in "$`":
                is_array = re.compile(r"\$\{\w+\[@\]\}").match(self._text, self._at) is not None
                values, closed = self._expansion()
                opened |= not closed
                pieces[-1] += (values[0] if values else "") if is_array else " ".join(values)
                pieces += values[1:] if is_array else []
            else:
                pieces[-1] += char
                self._at += 1
        self._at += 1
        return opened

    def _expansion(self) -> tuple[list[str], bool]:
        """What `$...` or a command in backquotes stands for; the text itself and False where only a shell knows."""
        text, start = self._text, self._at
        printed = None
        if text[start] == "`":
            end = text.index("`", start + 1) + 1
            printed = self._printed(text[start + 1 : end - 1])
        elif text.startswith("$(", start):
            end = self._closing(start + 1, "(", ")")
            printed = self._printed(text[start + 2 : end - 1])
        elif text.startswith("${", start):
            end = self._closing(start + 1, "{", "}")
            if (found := PARAMETER.fullmatch(text[start + 2 : end - 1])) is not None:
                self._at = end
                if found[5]:
                    return self._without(found[1], found[5], found[6], text[start:end])
                values, closed = self._parameter(found[1], found[3], found[4], text[start:end])
                return (values[:1] if found[2] == "[0]" else values), closed
        elif (found := NAME.match(text, start + 1)) is not None:
            self._at = found.end()
            return self._parameter(found[0], None, None, text[start : found.end()])
        elif text.startswith("$'", start):
            self._at = start + 1
            return [""], True
        elif (found := SPECIAL.match(text, start)) is not None:
            self._at = found.end()
            return self._parameter(found[0][1], None, None, found[0])
        else:
            self._at += 1
            return ["$"], True
        self._at = end
        return ([text[start:end]], False) if printed is None else ([printed], True)

    def _printed(self, text: str) -> str | None:
        """What the commands in `$(...)` print, where they only follow folders and change a path; None for others."""
        shell = Shell(dict(self._shell.variables), self._shell.cwd)
        _Reader(text, shell).read()
        words = shell.commands[0].words if len(shell.commands) == 1 and not shell.open else []
        if words[:1] == ["pwd"]:
            return str((shell.cwd or Path()).absolute())
        return PATHS[words[0]](words[-1]) if len(words) > 1 and words[0] in PATHS else None

    def _without(self, name: str, operator: str, pattern: str, text: str) -> tuple[list[str], bool]:
        """`${NAME%pattern}` and its kin: the value without what the pattern matches at its end or its beginning."""
        value = self._shell.value(name)
        if value is None or "$" in pattern:
            return [text], False
        cuts = range(len(value) + 1)
        if operator in ("%", "##"):  # the shortest end, the longest beginning
            cuts = cuts[::-1]
        if operator[0] == "%":
            return [next((value[:at] for at in cuts if fnmatchcase(value[at:], pattern)), value)], True
        return [next((value[at:] for at in cuts if fnmatchcase(value[:at], pattern)), value)], True

    def _parameter(self, name: str, operator: str | None, word: str | None, text: str) -> tuple[list[str], bool]:
        values = self._shell.variables.get(name)
        self._shell.expanded.add(name)
        if values is None and name == "PWD":
            values = [str((self._shell.cwd or Path()).absolute())]
        if (operator == "+" and any(values or ())) or (operator in ("-", "=") and values is None):
            pieces, _, opened = _Reader(word or "", self._shell, is_default=True)._pieces("")
            return [" ".join(pieces).translate(QUOTED)], not opened
        if operator == "+":
            return [], True
        return ([text], False) if values is None else (values, True)

    def _closing(self, at: int, opening: str, closing: str) -> int:
        depth = 0
        for position in range(at, len(self._text)):
            depth += (self._text[position] == opening) - (self._text[position] == closing)
            if depth == 0:
                return position + 1
        raise ValueError(f"no closing {closing}")


def _braces(word: str) -> list[str]:
    """`a{b,c}` as `ab` and `ac`, `a{1..3}` as `a1`, `a2`, `a3`; braces without either stay."""
    opening, comma, closing = UNQUOTED["{"], UNQUOTED[","], UNQUOTED["}"]
    start = word.find(opening)
    while start >= 0:
        depth, cuts = 0, [start]
        for at in range(start, len(word)):
            depth += (word[at] == opening) - (word[at] == closing)
            if depth == 0 or (depth == 1 and word[at] == comma):
                cuts.append(at)
            if depth == 0:
                parts = _counted(word[start + 1 : at]) or [word[a + 1 : b] for a, b in itertools.pairwise(cuts)]
                if len(parts) > 1:
                    rest = _braces(word[at + 1 :])
                    return [word[:start] + one + end for part in parts for one in _braces(part) for end in rest]
                break
        start = word.find(opening, start + 1)
    return [word]


def _counted(text: str) -> list[str]:
    """The numbers of `1..3`; none for anything else."""
    if (found := re.fullmatch(r"(\d{1,4})\.\.(\d{1,4})", text)) is None:
        return []
    first, last = int(found[1]), int(found[2])
    return [str(number) for number in range(first, last + 1)] or [str(number) for number in range(first, last - 1, -1)]
