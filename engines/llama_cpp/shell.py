"""Shell text, read and never executed: its simple commands with their words, variables and working directory.

Quotes, line continuations, comments, pipes, redirections, `export`, `cd`, arrays and the variables that the text sets
itself are followed. What only a shell could answer (`$(...)`, a variable set elsewhere) stays in the word as it stands,
and the word is listed as open.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

NAME = re.compile(r"[A-Za-z_]\w*")
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
PARAMETER = re.compile(r"([A-Za-z_]\w*)(?:\[[@*]\])?(?::?([-=?+])(.*))?", re.DOTALL)
OPERATOR = re.compile(r"\n|;;?|&&|\|\||\|&|\||\(|\)|&(?!>)")
REDIRECTION = re.compile(r"(?:\d*|&)(?:>>|>&|<&|<<<|<<-?|>\||<>|>|<)(?:\d+|-)?")
BEFORE_A_COMMAND = frozenset(
    ["then", "do", "else", "elif", "if", "while", "until", "!", "{", "}", "time", "exec", "command", "builtin", "nohup"]
)
EXPORTS = frozenset({"export", "declare", "typeset", "local", "readonly"})


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

    def value(self, name: str) -> str | None:
        return " ".join(self.variables[name]) if name in self.variables else None

    def run(self, words: list[str], prefix: Mapping[str, list[str]]) -> None:
        """Follow one simple command."""
        if not words:
            self.variables |= prefix
            self.exported |= set(prefix) if self.exports_all else set()
            return
        program, rest = os.path.basename(words[0]), words[1:]
        if program in EXPORTS:
            self._export(rest, is_exported=program == "export" or any("x" in word for word in rest if word[:1] == "-"))
        elif program == "set" and (rest[:1] == ["-a"] or "allexport" in rest):
            self.exports_all = True
        elif program in ("set", "setenv"):  # fish: set -gx NAME value; csh: setenv NAME value
            names = [word for word in rest if not word.startswith("-")]
            if names and (program == "setenv" or any("x" in word for word in rest if word.startswith("-"))):
                self.variables[names[0]] = names[1:]
                self.exported.add(names[0])
        elif program == "cd" and rest:
            self.cwd = (self.cwd or Path()) / Path(rest[-1]).expanduser()
        elif program in (".", "source"):
            self.notes.append(f"{' '.join(words)}: another file, which is not read")
        else:
            env = {name: " ".join(self.variables[name]) for name in self.exported if name in self.variables}
            env |= {name: " ".join(value) for name, value in prefix.items()}
            self.commands.append(Command(words, env, self.cwd, self.open))

    def _export(self, words: list[str], *, is_exported: bool) -> None:
        for word in words:
            name, _, value = word.partition("=")
            if NAME.fullmatch(name):
                if "=" in word:
                    self.variables[name] = [value]
                self.exported |= {name} if is_exported else set()


def read_shell(text: str, variables: Mapping[str, str], env: Mapping[str, str], cwd: Path | None = None) -> Shell:
    """Every simple command of `text`; `variables` are known beforehand, those of `env` are exported as well.

    Raises ValueError for an open quote.
    """
    known = {name: [value] for name, value in (*variables.items(), *env.items())}
    shell = Shell(known, cwd, set(env))
    _Reader(text.replace("\r\n", "\n").replace("\\\n", " "), shell).read()
    return shell


class _Reader:
    """Goes through the text once, and hands each simple command to the shell before it reads on."""

    def __init__(self, text: str, shell: Shell) -> None:
        self._text, self._at, self._shell = text, 0, shell
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
        pieces, is_word, start = [""], False, self._at
        opened = False
        while self._at < len(self._text):
            char = self._text[self._at]
            if char in " \t\n;&|()<>" and not (char == "&" and self._at == start):
                break
            if char == "'":
                end = self._text.index("'", self._at + 1)
                pieces[-1] += self._text[self._at + 1 : end]
                self._at, is_word = end + 1, True
            elif char == '"':
                opened |= self._quoted(pieces)
                is_word = True
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
                pieces[-1] += char
                self._at, is_word = self._at + 1, True
        if self._at == start:
            self._at += 1
        if opened:
            self._shell.open |= {piece.partition("=")[2] if ASSIGNMENT.fullmatch(piece) else piece for piece in pieces}
        return pieces if is_word else []

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
        if text[start] == "`":
            end = text.index("`", start + 1) + 1
        elif text.startswith("$(", start):
            end = self._closing(start + 1, "(", ")")
        elif text.startswith("${", start):
            end = self._closing(start + 1, "{", "}")
            if (found := PARAMETER.fullmatch(text[start + 2 : end - 1])) is not None:
                self._at = end
                return self._parameter(found[1], found[2], found[3], text[start:end])
        elif (found := NAME.match(text, start + 1)) is not None:
            self._at = found.end()
            return self._parameter(found[0], None, None, text[start : found.end()])
        elif text.startswith("$'", start):
            self._at = start + 1
            return [""], True
        else:
            self._at += 1
            return ["$"], True
        self._at = end
        return [text[start:end]], False

    def _parameter(self, name: str, operator: str | None, word: str | None, text: str) -> tuple[list[str], bool]:
        values = self._shell.variables.get(name)
        self._shell.expanded.add(name)
        if operator == "+":
            return [word or ""] if values else [], True
        if values is None and operator in ("-", "="):
            return [word or ""], True
        return ([text], False) if values is None else (values, True)

    def _closing(self, at: int, opening: str, closing: str) -> int:
        depth = 0
        for position in range(at, len(self._text)):
            depth += (self._text[position] == opening) - (self._text[position] == closing)
            if depth == 0:
                return position + 1
        raise ValueError(f"no closing {closing}")
