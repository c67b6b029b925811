"""Texts of cmd.exe and PowerShell, as a shell of Unix would have them."""

from __future__ import annotations

import re
import shlex

from engines.errors import BadInput

DRIVE = re.compile(r"(?<![A-Za-z])[A-Za-z]:\\")
CONTINUED = re.compile(r"[ \t][\^`][ \t]*\r?\n")
CMD = re.compile(
    r"^\s*@?(echo\s+off|rem\s|set\s+\"?\w+=|start\s+\")|\.exe\b.*\w\\\w|[ \t]\^[ \t]*\r?$", re.IGNORECASE | re.MULTILINE
)
POWERSHELL = re.compile(
    r"\$env:\w|^\s*\$\w+\s*=|^\s*&\s|[ \t]`[ \t]*\r?$|^\s*Start-Process\b", re.IGNORECASE | re.MULTILINE
)
SET = re.compile(r"set\s+(\"?)(\w+)=(.*?)\1\s*$", re.IGNORECASE)
START = re.compile(r'start\s+("[^"]*"\s+)?(/\w+\s+)*', re.IGNORECASE)
LIST = re.compile(r"=\s*@\((.*?)\)", re.DOTALL)
BETWEEN = re.compile(r"""(?<=["'\w])\s*,\s*(?=["'$\w-])""")


def as_shell(text: str) -> str:
    """`text`, translated where it is one of these; a Windows path is refused in one line."""
    if DRIVE.search(text):
        raise BadInput("the command names a Windows path (C:\\...); write it with the paths of this machine")
    if POWERSHELL.search(text):
        return _powershell(CONTINUED.sub(" ", text))
    if CMD.search(text):
        return "\n".join(map(_cmd, CONTINUED.sub(" ", text).splitlines()))
    return text


def _cmd(line: str) -> str:
    line = re.sub(r'\\(?!")', "/", line.strip().removeprefix("@"))
    if re.match(r"rem\b|::", line, re.IGNORECASE):
        return ""
    if (found := SET.match(line)) is not None:
        line = (
            f"export {found[2]}={shlex.quote(found[3])}" if "%" not in found[3] else f'export {found[2]}="{found[3]}"'
        )
    return re.sub(r"%(\w+)%", r"${\1}", START.sub("", line))


def _powershell(text: str) -> str:
    if re.search(r"^\s*Start-Process\b", text, re.IGNORECASE | re.MULTILINE):
        raise BadInput("Start-Process is not read; give the command line itself: llama-server ...")
    text = re.sub(r'\\(?!")', "/", text)
    text = LIST.sub(lambda found: f"=({BETWEEN.sub(' ', found[1])})", text)
    text = re.sub(r"^(\s*)\$env:(\w+)\s*=\s*", r"\1export \2=", text, flags=re.IGNORECASE | re.MULTILINE)
    text = re.sub(r"^(\s*)\$(\w+)\s*=\s*", r"\1\2=", text, flags=re.MULTILINE)
    text = re.sub(r"\$env:(\w+)", r"${\1}", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<=\s)@(\w+)", r'"${\1[@]}"', text)
    return re.sub(r"^(\s*)&\s+", r"\1", text, flags=re.MULTILINE)
