"""The table of decisions before and after: printed, and as CSV and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dipguard.files import write_text
from dipguard.reporting.canvas import short
from dipguard.reporting.tables import write_csv

COLUMNS = (
    "picture",
    "output",
    "before",
    "before_confidence",
    "after",
    "after_confidence",
    "changed",
    "crossings",
    "why",
    "index",
    "problem",
)
"""Of decisions.csv: names of classes, the victim's softmax confidence in them, on-boundary images that were stitched
and the reason (empty for a defence that stitches none), the index that settled the draws, what a bad picture has."""
_HEADS = ("picture", "before", "after", "")
MOST_PRINTED = 40


def write_decisions(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write decisions.csv and decisions.md; ``rows`` lack what a picture does not have."""
    write_csv(folder / "decisions.csv", [{column: row.get(column, "") for column in COLUMNS} for row in rows])
    lines = [_bars((*_HEADS[:3], "changed")), _bars(["---"] * 4)]
    lines += [_bars([cell.replace("|", "\\|") for cell in _cells(row)]) for row in rows]
    write_text(folder / "decisions.md", "\n".join(lines) + "\n")


def format_decisions(rows: Sequence[Mapping[str, Any]], *, most: int = MOST_PRINTED) -> str:
    """The first ``most`` rows as aligned text for a terminal."""
    table = [_HEADS, *(_cells(row, most=28) for row in rows[:most])]
    widths = [max(len(line[i]) for line in table) for i in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, [*widths, 0], strict=True)) for line in table]
    if len(rows) > most:
        lines.append(f"... and {len(rows) - most} more in decisions.csv")
    return "\n".join(line.rstrip() for line in lines)


def _cells(row: Mapping[str, Any], *, most: int = 1000) -> tuple[str, str, str, str]:
    name = _plain(row["picture"])
    # The end of a path tells more than its start.
    name = name if len(name) <= 40 or most >= 1000 else f"\N{HORIZONTAL ELLIPSIS}{name[-39:]}"
    if row.get("problem"):
        return name, "not read:", _plain(row["problem"]), ""
    return name, _decision(row, "before", most), _decision(row, "after", most), "changed" if row["changed"] else ""


def _decision(row: Mapping[str, Any], when: str, most: int) -> str:
    return f"{short(_plain(row[when]), most)} {row[f'{when}_confidence']:.0%}"


def _plain(text: Any) -> str:
    """Without what would move a terminal's cursor or break a line: names of files may hold anything."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def _bars(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
