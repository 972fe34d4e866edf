"""The results of ``dipguard purify`` besides the pictures: the table of decisions, and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dipguard.decision import DecisionTrace
from dipguard.defenses import Defense
from dipguard.files import csv_text, write_text
from dipguard.reporting.canvas import DPI, Picture, class_name, save_figure, short, show
from dipguard.reporting.escape import escape_csv, escape_markdown
from dipguard.reporting.image_figures import amplification
from dipguard.reporting.trace_figure import draw_trace

COLUMNS: tuple[str, ...] = (
    "picture",
    "output",
    "before",
    "before_confidence",
    "after",
    "after_confidence",
    "changed",
    "used",
    "why",
)
COLUMNS += ("index", "problem")
"""Columns of decisions.csv. Decisions are class names with the victim's softmax confidence; ``used`` and ``why`` are
those of :class:`~dipguard.DefenseResult`; ``index`` seeds the random draws; ``problem`` is that of a bad picture."""
_HEADS = ("picture", "before", "after", "")
MOST_PRINTED = 40


def write_decisions(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write decisions.csv and decisions.md; ``rows`` hold some of `COLUMNS`."""
    safe = [{k: escape_csv(value) if isinstance(value, str) else value for k, value in row.items()} for row in rows]
    write_text(folder / "decisions.csv", csv_text(COLUMNS, safe))
    cells = [[escape_markdown(cell) for cell in _cells(row)] for row in rows]
    lines = [f"| {' | '.join(line)} |" for line in [(*_HEADS[:3], "changed"), ["---"] * 4, *cells]]
    write_text(folder / "decisions.md", "\n".join(lines) + "\n")


def format_decisions(rows: Sequence[Mapping[str, Any]], *, most: int = MOST_PRINTED) -> str:
    """Return the first ``most`` rows as aligned text for a terminal."""
    table = [_HEADS, *(_cells(row, most=28) for row in rows[:most])]
    widths = [max(len(line[i]) for line in table) for i in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, [*widths, 0], strict=True)) for line in table]
    if len(rows) > most:
        lines.append(f"... and {len(rows) - most} more in decisions.csv")
    return "\n".join(line.rstrip() for line in lines)


def _cells(row: Mapping[str, Any], *, most: int = 1000) -> tuple[str, str, str, str]:
    name = _plain(row["picture"])
    # The end of a path is more informative than its start.
    name = name if len(name) <= 40 or most >= 1000 else f"\N{HORIZONTAL ELLIPSIS}{name[-39:]}"
    if row.get("problem"):
        return name, "not read:", _plain(row["problem"]), ""
    before, after = (f"{short(_plain(row[w]), most)} {row[f'{w}_confidence']:.0%}" for w in ("before", "after"))
    return name, before, after, "changed" if row["changed"] else ""


def _plain(text: Any) -> str:
    # File names may hold anything, also characters that move a terminal's cursor or break a line.
    return "".join(c if c.isprintable() else "?" for c in str(text))


def draw_picture(
    path: Path,
    given: Tensor,
    purified: Tensor,
    *,
    trace: DecisionTrace | None,
    defense: Defense,
    decisions: tuple[int, int],
    classes: Sequence[str],
    title: str,
) -> None:
    """Draw how a picture was purified: its decision trace or, without one, the picture before and after.

    Args:
        path: The PNG to write.
        given: [3, H, W] in [0, 1].
        purified: [3, H', W'] in [0, 1].
        trace: The trace, if the defence leaves one.
        defense: The defence.
        decisions: The victim's decisions before and after.
        classes: Class names; empty shows their numbers.
        title: Title of the figure.
    """
    names = [class_name(decision, classes) for decision in decisions]
    from matplotlib.figure import Figure

    if trace is not None:
        name_of = partial(class_name, classes=classes)
        figure = draw_trace(trace, defense.rebuild(trace), decision=decisions[1], name_of=name_of)
    else:
        figure = Figure(figsize=(8, 3.4), dpi=DPI, layout="constrained")
        # Another size leaves no difference to show.
        axes = figure.subplots(1, 3 if given.shape == purified.shape else 2)
        for ax, image, name, head in zip(axes, (given, purified), names, ("given", "purified"), strict=False):
            Picture(image, name).draw_on(ax)
            ax.set_xlabel(head, fontsize=9)
        if len(axes) == 3:
            factor = amplification(given - purified)
            show(axes[2], 0.5 + factor * (given - purified))
            axes[2].set_xlabel(f"given - purified, × {factor}; grey is none", fontsize=9)
    # A dollar sign in a file name is not a formula.
    figure.suptitle(title, fontsize=12, fontweight="bold", parse_math=False)
    save_figure(figure, path)
