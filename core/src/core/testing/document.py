"""What a document says to do, for tests that follow it word for word: its commands and the files that it shows."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

FENCE = re.compile(r"^```(\w*)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(document: Path) -> list[list[str]]:
    """The words of every command: of each line, or lines joined by a backslash, in a fence without a language."""
    lines = [line for language, _, text in fences(document) if not language for line in text.splitlines()]
    return [shlex.split(line) for line in "\n".join(lines).replace("\\\n", "").splitlines() if line]


def shown_files(document: Path) -> dict[str, str]:
    """The text of every file, by the name behind the language of its fence: ```python src/mine/configs.py."""
    return {name: text for _, name, text in fences(document) if name}


def fences(document: Path) -> Iterator[tuple[str, str, str]]:
    """Every fence: its language, the name of a file, and what is in it."""
    for match in FENCE.finditer(document.read_text(encoding="utf-8")):
        yield match[1], match[2] or "", match[3]
