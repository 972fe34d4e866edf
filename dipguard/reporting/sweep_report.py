"""All that is made from a sweep's folder: the long CSV, plots, tables, and a page that shows them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from dipguard.files import write_text
from dipguard.reporting.canvas import save_figure
from dipguard.reporting.sweep_figures import draw_column_lines, draw_map, draw_mean_lines
from dipguard.reporting.sweep_folder import Sweep, read_sweep
from dipguard.reporting.sweep_grid import crossed_pairs, ranking
from dipguard.reporting.sweep_tables import (
    best_section,
    long_csv,
    pair_section,
    pair_stem,
    sensitivity_section,
    state_section,
)

_log = logging.getLogger(__name__)


def write_sweep_report(folder: str | Path, *, everything: bool = False) -> list[Path]:
    """Write sweep.csv, the plots and report.md into a sweep's folder, finished or not; returns their paths.

    - ``sweep.csv``: a line a job, row and column;
    - ``figure6_mean.png``, ``figure7_columns.png``: accuracy against each parameter, mean and by column;
    - ``table3_T_network.png``, ``map_<a>_<b>.png``: parameters that were varied together;
    - ``report.md``: these, tables with intervals, best settings, sensitivities, and what is missing or failed.

    Args:
        folder: The sweep's folder.
        everything: Take in jobs of earlier starts that the last start's grid does not have.

    Raises:
        FileNotFoundError: The folder is not a sweep's.
    """
    folder = Path(folder)
    sweep = read_sweep(folder, everything=everything)
    made = [write_text(folder / "sweep.csv", long_csv(sweep))]
    parts = [f"# Sweep {sweep.name}", state_section(sweep)]
    for row in sweep.rows:
        if len(sweep.rows) > 1:
            parts.append(f"# Row {row}")
        ending = f"_{row}" if len(sweep.rows) > 1 else ""
        parts += ["## Best settings", best_section(sweep, row=row)]
        parts += ["## Sensitivity", sensitivity_section(sweep, row=row)]
        for title, body, path in _figures(sweep, folder, row=row, ending=ending):
            made.append(path)
            parts += [f"## {title}", *([body] if body else []), f"![{path.stem}]({path.name})"]
    return [write_text(folder / "report.md", "\n\n".join(parts) + "\n"), *made]


def _figures(sweep: Sweep, folder: Path, *, row: str, ending: str) -> Iterator[tuple[str, str, Path]]:
    for stem, title, draw in (
        ("figure6_mean", "Mean accuracy (Figure 6)", draw_mean_lines),
        ("figure7_columns", "Accuracy by column (Figure 7)", draw_column_lines),
    ):
        figure = draw(sweep, row=row)
        if figure is not None:
            yield title, "", save_figure(figure, folder / f"{stem}{ending}.png")
    for pair, tables in crossed_pairs(sweep).items():
        stem = pair_stem(sweep, pair)
        title = " x ".join(sweep.labels[key] for key in pair) + (" (Table 3)" if stem.startswith("table3") else "")
        path = save_figure(draw_map(sweep, pair, tables, row=row), folder / f"{stem}{ending}.png")
        yield title, pair_section(sweep, pair, tables, row=row), path


def summary(folder: str | Path, *, everything: bool = False) -> str:
    """The sweep in some lines, for a terminal: how many jobs are done, what failed, the best setting."""
    folder = Path(folder)
    sweep = read_sweep(folder, everything=everything)
    lines = [f"sweep {sweep.name}: {state_section(sweep)}"]
    for row in sweep.rows:
        ranked = ranking(sweep, row=row)
        if ranked:
            job, share = ranked[0]
            lines.append(f"best mean accuracy of row {row}: {share.value:.1%} at {sweep.setting(job)}")
    return "\n".join([*lines, f"report: {folder / 'report.md'}"])
