"""The ladder as a page: accuracy of each row under each rung, what it cost, what was cut, and the masking checks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dipguard.files import write_text
from dipguard.reporting.ladder_lines import (
    CLEAN,
    WORST,
    CheckRow,
    LadderRow,
    read_checks,
    read_ladder,
    rows_of,
    rungs_of,
)
from dipguard.reporting.matrix_tables import NONE, aligned, escaped


def write_ladder_table(folder: str | Path) -> Path:
    """Write ladder.md from the folder's ladder.csv and ladder_checks.csv.

    Raises:
        FileNotFoundError: One of them is missing.
        ValueError: It is damaged, or there is no cell.
    """
    folder = Path(folder)
    cells = read_ladder(folder / "ladder.csv")
    if not cells:
        raise ValueError(f"{folder / 'ladder.csv'} holds no cell yet: there is nothing to put into a table")
    return write_text(folder / "ladder.md", ladder_page(cells, read_checks(folder / "ladder_checks.csv")))


def ladder_page(cells: Sequence[LadderRow], checks: Sequence[CheckRow]) -> str:
    """The whole page, Markdown."""
    parts = ["# The ladder: accuracy under attack, %", escaped(_head(cells)), accuracy_table(cells), _reasons(cells)]
    parts += ["## Masking checks", checks_table(checks), *_details(checks)]
    parts += ["## What it cost", "DIP steps / purified images read / seconds, as counted.", cost_table(cells)]
    parts += ["## Settings, and what was cut", settings_table(cells), *_row_cuts(cells)]
    return "\n\n".join(part for part in parts if part) + "\n"


def ladder_summary(folder: str | Path) -> str:
    """Accuracies and verdicts alone, as text for a terminal."""
    folder = Path(folder)
    cells, checks = read_ladder(folder / "ladder.csv"), read_checks(folder / "ladder_checks.csv")
    return "\n\n".join([_head(cells), accuracy_table(cells), checks_table(checks)])


def accuracy_table(cells: Sequence[LadderRow]) -> str:
    """Rungs x rows: accuracy in percent with its 95 % interval, or a word that says why there is none."""
    rows, by = rows_of(cells), _by_place(cells)
    lines = [[_title(cells, rung), *(_accuracy(by.get((rung, row))) for row in rows)] for rung in rungs_of(cells)]
    return aligned(["rung", *(_row_title(cells, row) for row in rows)], lines)


def cost_table(cells: Sequence[LadderRow]) -> str:
    """Rungs x rows: what each attack spent."""
    rows, by = rows_of(cells), _by_place(cells)
    rungs = [rung for rung in rungs_of(cells) if rung not in (CLEAN, WORST)]
    lines = [[_title(cells, rung), *(_cost(by.get((rung, row))) for row in rows)] for rung in rungs]
    mine = {row: [c for c in cells if c.row == row and c.done and c.dip_steps is not None] for row in rows}
    totals = [
        _costs(*(sum(getattr(c, name) or 0 for c in mine[row]) for name in ("dip_steps", "victim_queries", "seconds")))
        for row in rows
    ]
    return aligned(["rung", *(_row_title(cells, row) for row in rows)], [*lines, ["sum", *totals]])


def settings_table(cells: Sequence[LadderRow]) -> str:
    """A line a rung: its options, and in what they fall short of an uncut run."""
    lines = []
    for rung in rungs_of(cells):
        mine = [cell for cell in cells if cell.rung == rung]
        if rung in (CLEAN, WORST):
            continue
        # What was cut may differ from row to row (a deterministic one has no draws): the fullest is said.
        shown = max((cell for cell in mine if cell.done), key=lambda cell: len(cell.cut), default=mine[0])
        eps = f"eps {shown.eps_255:g}/255"
        words = [shown.attack, ", ".join(filter(None, (eps, shown.options))), shown.cut or NONE, shown.note or NONE]
        lines.append([_title(cells, rung), *words])
    return "\n".join(_left(aligned(["rung", "attack", "options", "cut to", "note"], lines)))


def checks_table(checks: Sequence[CheckRow]) -> str:
    """Checks x rows: the verdicts."""
    rows = list(dict.fromkeys(check.row for check in checks))
    verdicts = {(check.check, check.row): check.verdict for check in checks}
    names = dict.fromkeys(check.check for check in checks)
    lines = [[name, *(verdicts.get((name, row), NONE) for row in rows)] for name in names]
    return aligned(["check", *rows], lines) if lines else "No rung was run yet."


def _head(cells: Sequence[LadderRow]) -> str:
    worst = next((cell for cell in cells if cell.rung == WORST), cells[0])
    counts = {cell.n for cell in cells if cell.n is not None}
    images = "no images yet" if not counts else " to ".join(map(str, sorted({min(counts), max(counts)}))) + " images"
    eps = "" if worst.eps_255 is None else f", L-inf eps {worst.eps_255:g}/255, untargeted, white box"
    return (
        f"{cells[0].data}, victim {cells[0].victim}, {images}{eps}. In brackets: 95 % intervals (Wilson). Every "
        "attacked image is read once more with the evaluation's own draws. The worst case is for each image over all "
        "attacks and no attack; the control and the large eps have no part in it."
    )


def _by_place(cells: Sequence[LadderRow]) -> dict[tuple[str, str], LadderRow]:
    return {(cell.rung, cell.row): cell for cell in cells}


def _title(cells: Sequence[LadderRow], rung: str) -> str:
    return next(cell.title for cell in cells if cell.rung == rung)


def _row_title(cells: Sequence[LadderRow], row: str) -> str:
    cell = next(cell for cell in cells if cell.row == row)
    return row if cell.victim == cells[0].victim else f"{row}: {cell.victim}"


def _accuracy(cell: LadderRow | None) -> str:
    if cell is None or not cell.done:
        return NONE if cell is None else cell.status.split(":")[0]
    share, low, high = (100 * (value or 0.0) for value in (cell.accuracy, cell.low, cell.high))
    return f"{share:.1f} ({low:.0f}{NONE}{high:.0f})"


def _cost(cell: LadderRow | None) -> str:
    if cell is None or not cell.done or cell.dip_steps is None:
        return NONE
    return _costs(cell.dip_steps, cell.victim_queries or 0, cell.seconds or 0.0)


def _costs(steps: float, queries: float, seconds: float) -> str:
    return f"{steps:,.0f} / {queries:,.0f} / {seconds:,.0f} s"


def _reasons(cells: Sequence[LadderRow]) -> str:
    """What went wrong, in full: the table itself has room for a word."""
    failed = [f"- {c.title}, {c.row}: {c.status}" for c in cells if c.status.startswith("failed")]
    missing = [f"- {c.row}: {c.note}" for c in cells if c.rung == CLEAN and c.status == "unavailable"]
    return "\n".join(escaped(line) for line in [*failed, *missing])


def _details(checks: Sequence[CheckRow]) -> list[str]:
    rows = dict.fromkeys(check.row for check in checks)
    return [
        "\n".join(
            [f"{row}:", "", *(f"- {c.check}: **{c.verdict}**. {escaped(c.figures)}" for c in checks if c.row == row)]
        )
        for row in rows
    ]


def _row_cuts(cells: Sequence[LadderRow]) -> list[str]:
    return [f"- {cell.row}: {escaped(cell.cut)}" for cell in cells if cell.rung == CLEAN and cell.cut]


def _left(table: str) -> list[str]:
    """The same table, all columns to the left: they hold words."""
    lines = table.splitlines()
    lines[1] = lines[1].replace("-:", "--")
    return lines
