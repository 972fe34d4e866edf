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
from dipguard.reporting.canvas import Picture, class_name, save_figure
from dipguard.reporting.escape import escape_csv
from dipguard.reporting.image_figures import draw_grid
from dipguard.reporting.trace_figure import draw_trace

COLUMNS = (
    "picture", "output", "before", "before_confidence", "after", "after_confidence", "changed", "used", "why", "index",
    "problem",
)  # fmt: skip
"""Columns of decisions.csv. Decisions are class names with the victim's softmax confidence; ``used`` and ``why`` are
those of :class:`~dipguard.DefenseResult`; ``index`` seeds the random draws; ``problem`` is that of a bad picture."""


def write_decisions(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write decisions.csv; ``rows`` hold some of `COLUMNS`."""
    lines = [{k: escape_csv(plain(v)) if isinstance(v, str) else v for k, v in row.items()} for row in rows]
    write_text(folder / "decisions.csv", csv_text(COLUMNS, lines))


def decision_line(row: Mapping[str, Any]) -> str:
    """A row in words, for a terminal."""
    name = plain(row["picture"])
    if row.get("problem"):
        return f"{name}: not purified: {plain(row['problem'])}"
    before, after = (f"{plain(row[w])} {row[f'{w}_confidence']:.0%}" for w in ("before", "after"))
    return f"{name}: {before} -> {after}{', changed' if row['changed'] else ''}"


def plain(text: str) -> str:
    """Text on one line. File names may hold anything, such as characters that move a terminal's cursor."""
    return "".join(c if c.isprintable() else "?" for c in text)


def draw_picture(
    path: Path,
    given: Tensor,
    purified: Tensor,
    decisions: tuple[int, int],
    *,
    trace: DecisionTrace | None,
    defense: Defense,
    classes: Sequence[str],
    title: str,
    **known: Any,
) -> None:
    """Draw a picture's decision trace or, without one, the picture before and after, as the PNG ``path``.

    ``given`` [3, H, W] and ``purified`` [3, H', W'] are in [0, 1]; ``decisions`` are the victim's before and after,
    ``known`` the true label and the clean image, if they are known.
    """
    if trace is not None:
        name_of = partial(class_name, classes=classes)
        figure = draw_trace(trace, defense.rebuild(trace), decision=decisions[1], name_of=name_of, **known)
    else:
        names = [class_name(decision, classes) for decision in decisions]
        figure = draw_grid(("given", "purified"), {"": [Picture(given, names[0]), Picture(purified, names[1])]})
    figure.suptitle(plain(title), fontsize=12, fontweight="bold")
    save_figure(figure, path)
