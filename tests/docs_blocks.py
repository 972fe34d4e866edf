"""Runs the Python of a Markdown document, block after block, as a reader would paste it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FENCE = re.compile(r"^```([\w-]*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its code, and the line of the document that the code begins at."""

    language: str
    code: str
    line: int


def blocks(document: Path) -> list[Block]:
    """All fenced blocks of a document, in order."""
    text = document.read_text(encoding="utf-8")
    found = [Block(m[1], m[2], text.count("\n", 0, m.start()) + 2) for m in FENCE.finditer(text)]
    assert 2 * len(found) == len(re.findall(r"^```", text, flags=re.MULTILINE)), f"{document.name}: an open fence"
    return found


def run_python(document: Path, *, instead: dict[str, str]) -> int:
    """Run a document's Python blocks in one namespace, in the current folder; return how many there were.

    ``instead`` says what stands in for which part of the text, where the text as it is would download something or take
    minutes. Each part must still be there, so that what is run cannot drift away from what is read.
    """
    python = [block for block in blocks(document) if block.language == "python"]
    whole = "".join(block.code for block in python)
    missing = [part for part in instead if part not in whole]
    assert not missing, f"{document.name} no longer has {missing}"
    namespace: dict[str, Any] = {"__name__": "docs"}
    for block in python:
        code = block.code
        for part, other in instead.items():
            code = code.replace(part, other)
        # Empty lines in front, so that a traceback names the document's own line.
        exec(compile("\n" * (block.line - 1) + code, str(document), "exec"), namespace)
    return len(python)
