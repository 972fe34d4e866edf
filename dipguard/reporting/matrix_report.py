"""All that is made from a matrix's stored results: tables, curves, the visual comparison, one page."""

from __future__ import annotations

from pathlib import Path

from dipguard.data import ImageSet
from dipguard.files import write_text
from dipguard.reporting.comparison_figure import write_comparison
from dipguard.reporting.curves_figure import write_curves
from dipguard.reporting.ladder_figure import write_ladder_figure
from dipguard.reporting.ladder_tables import write_ladder_table
from dipguard.reporting.matrix_tables import write_tables
from dipguard.reporting.stored_results import read_results

PAGES = ("table1.md", "table2.md", "ladder.md")


def write_matrix_report(folder: Path, *, clean: ImageSet, count: int) -> list[Path]:
    """Write tables and figures from the run folder's files, and report.md, which shows them; returns all paths.

    Args:
        folder: The run folder.
        clean: The run's images.
        count: Images in the visual comparison; 0 draws none.

    Raises:
        ValueError: A stored file is damaged.
    """
    results = read_results(folder / "results.csv")
    if not results:
        return [write_text(folder / "report.md", "No cell is finished yet.\n")]
    made = write_tables(folder)
    if (folder / "curves.csv").is_file():
        made += write_curves(folder)
    if (folder / "ladder.csv").is_file():
        made += [write_ladder_table(folder), write_ladder_figure(folder)]
    done = [result for result in results if result.status == "done"]
    for column in dict.fromkeys(result.column for result in done if count > 0):
        # The row "none" would show the attacked image a second time.
        rows = [result.row for result in done if result.column == column and result.defense != "none"]
        if not rows:
            continue
        made.append(
            write_comparison(
                folder,
                column=column,
                rows=rows,
                clean=clean.images,
                classes=clean.classes,
                count=count,
                labels=clean.labels,
            )
        )
    pages = [path.read_text(encoding="utf-8").strip() for path in made if path.name in PAGES]
    pages += [f"![{path.stem}]({path.relative_to(folder).as_posix()})" for path in made if path.suffix == ".png"]
    return [write_text(folder / "report.md", "\n\n".join(pages) + "\n"), *made]
