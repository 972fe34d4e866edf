"""The reports of a run: what `train.py` and `evaluate.py` leave to be read, made from their stored results."""

from __future__ import annotations

import json
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from dipguard.decision import DecisionTrace
from dipguard.evaluation.cell import CLEAN, DONE, NOT_RUN, WORST, CellResult
from dipguard.evaluation.matrix import Matrix
from dipguard.evaluation.results import write_results
from dipguard.files import write_json, write_npz, write_text
from dipguard.reporting.canvas import Picture, class_name, draw_grid, draw_panel, save_figure
from dipguard.reporting.curves_figure import is_drawn, write_curves
from dipguard.reporting.paper_figures import head_of
from dipguard.reporting.results import in_suite, read_checks, read_results
from dipguard.reporting.suite import suite_rows, suite_text, write_suite
from dipguard.reporting.tables import tables_text, write_tables
from dipguard.reporting.trace_figure import draw_trace

if TYPE_CHECKING:
    from dipguard.reporting.loggers import RunLog

AVERAGED = dict.fromkeys(("crossings", "no_crossing"), "crossings_stitched")
AVERAGED |= dict.fromkeys(("class_scores", "moved", "not_reached"), "windows_averaged")
"""What a reconstruction was averaged from, by its reason."""


def write_train_report(matrix: Matrix, *, log: RunLog | None = None) -> dict[str, Any]:
    """Write the report of a finished matrix's first cell, enter it into the ``log`` too, and return its metrics.

    The run folder gets report.md, figures/, reconstructions.npz (``images`` float32 [N, 3, H', W'] in [0, 1],
    ``indices`` and ``labels`` int64 [N]) and, last of all, metrics.json. RuntimeError if the cell has no result.
    """
    if matrix.config.rebuild:
        write_results(matrix)
    result = matrix.results[matrix.cells[0].place][-1]
    cell, folder = result.cell, matrix.folder
    if not result.done:
        raise RuntimeError(f"attack {cell.label} on defence {cell.target.label}: {result.status}")
    figures, metrics = draw_cell(matrix, result, ""), _metrics(result)
    metrics["settings"] = {**matrix.config.to_dict(), "defense": cell.defense.settings}
    images = matrix.reconstructions(*cell.place).float().numpy()
    labels, indices = cell.clean.labels.numpy(), cell.clean.indices.numpy()
    write_npz(folder / "reconstructions.npz", images=images, indices=indices, labels=labels)
    traced = next(matrix.traces(cell), None) is not None
    write_text(folder / "report.md", _page(result, metrics, traced=traced) + _links(folder, figures))
    # JSON has neither NaN nor infinity: null stands for them.
    write_json(folder / "metrics.json", json.loads(json.dumps(metrics), parse_constant=lambda word: None))
    if log is not None:
        log.results({name: value for name, value in metrics.items() if name != "settings"}, figures)
    return metrics


def write_matrix_report(matrix: Matrix, *, log: RunLog | None = None) -> list[Path]:
    """Write the report of a matrix, finished or not, and enter it into the ``log`` too; returns its files.

    Tables 1 and 2 hold the attacks that are not part of an attack suite, if there are any; suite.md and suite.png the
    suite; figure4_bpda.png and figure5_hopskipjump.png the adaptive attacks with several budgets; figure9_<attack>.png
    the first images of an attack that is the same for all defences; of a single cell with a DIP, panel and decision
    traces are drawn too. report.md, the first file, holds all of it.
    ValueError if a stored file is damaged.
    """
    folder = matrix.folder
    if matrix.config.rebuild:
        write_results(matrix)
    results, main, suite, checks = _read(folder)
    if not len(results):
        return [write_text(folder / "report.md", "No cell is finished yet.\n")]
    made = write_tables(folder, main) if len(main) else []
    made += write_curves(folder, results[~in_suite(results)])
    made += write_suite(folder, suite, checks) if len(suite) else []
    made += _comparisons(matrix)
    if len(matrix.cells) == 1:
        result = matrix.results[matrix.cells[0].place][-1]
        made += draw_cell(matrix, result, "") if result.done and result.cell.defense.steps_per_image else []
    pages = [path.read_text(encoding="utf-8") for path in made if path.suffix == ".md"]
    report = "\n".join(pages) + _links(folder, [path for path in made if path.suffix == ".png"])
    if log is not None:
        worst = results[(results["attack"] == WORST) & (results["status"] == DONE)].set_index("defense")
        figures = {name: {WORST: row.to_dict()} for name, row in worst[["accuracy", "low", "high", "n"]].iterrows()}
        log.results(figures, [path for path in made if path.suffix == ".png"])
    return [write_text(folder / "report.md", report), *made]


def results_text(folder: str | Path) -> str:
    """Tables 1 and 2 and the attack suite's accuracies and verdicts, for a terminal."""
    _, main, suite, checks = _read(Path(folder))
    parts = [tables_text(main)] if len(main) else []
    return "\n\n".join([*parts, *([f"The attack suite\n\n{suite_text(suite, checks)}"] if len(suite) else [])])


def _read(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The results of the cells that were run, the rows of Tables 1 and 2, those of the attack suite, and its checks."""
    results = read_results(folder / "results.csv")
    run = results[results["status"] != NOT_RUN]
    suite = suite_rows(run)
    curves = run.loc[is_drawn(run), "attack"]  # also where a cell failed
    main = run[~in_suite(run) & ~run["attack"].isin(curves)]
    main = main.drop_duplicates(["attack", "defense"], keep="last")  # the largest budget
    if len(suite) and (main["attack"] == CLEAN).all():
        main = main[:0]  # the suite has the clean images too
    return run, main, suite, read_checks(folder / "checks.csv") if len(suite) else suite


def _links(folder: Path, figures: list[Path]) -> str:
    return "".join(f"\n![{path.stem.replace('_', ' ')}]({path.relative_to(folder).as_posix()})\n" for path in figures)


def _metrics(result: CellResult) -> dict[str, Any]:
    """The figures of metrics.json; ``images_per_second`` does not count the attack's time."""
    cell, n = result.cell, len(result.decisions)
    spent = sum(value for name, value in result.seconds.items() if name != "attack")
    found = {"clean": cell.target.decisions_clean[:n], "undefended": result.decisions_given}
    found["defended"] = result.decisions
    figures = {
        "n": n,
        "accuracy": {name: float((y == cell.clean.labels).double().mean()) for name, y in found.items()},
        "ssim": {"given": float(result.ssim_given.mean()), "defended": float(result.ssim.mean())},
        "seconds": dict(result.seconds),
        "images_per_second": n / spent if spent else None,
    }
    if kinds := [AVERAGED[reason] for reason in result.reasons if reason in AVERAGED]:
        without = sum(reason in ("no_crossing", "not_reached") for reason in result.reasons)
        figures |= {kinds[0]: float(result.used.double().mean()), "images_without": without}
    return figures


def _page(result: CellResult, metrics: dict[str, Any], *, traced: bool) -> str:
    """report.md of `train.py`: the result in words."""
    cell, n, right, ssim = result.cell, metrics["n"], metrics["accuracy"], metrics["ssim"]
    eps = "" if result.eps_255 is None else f" at {result.eps_255:g}/255"
    steps = f" ({cell.defense.steps_per_image:,} DIP steps an image)" if cell.defense.steps_per_image else ""
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in metrics["seconds"].items())
    speed = f"; {metrics['images_per_second']:.3g} images a second" if metrics["images_per_second"] else ""
    traces = ", `traces/` (decision traces, from which images are stitched again without a new fit)" if traced else ""
    return f"""# dipguard run

{n} images of `{cell.clean.name}`, victim `{cell.target.victim_name}`, attack `{cell.name}`{eps}, defence \
`{cell.target.label}`{steps}.

| | clean | given (undefended) | defended |
|---|---|---|---|
| accuracy | {right["clean"]:.1%} | {right["undefended"]:.1%} | {right["defended"]:.1%} |
| SSIM to the clean image | 1 | {ssim["given"]:.3f} | {ssim["defended"]:.3f} |

Time: {seconds}{speed}.

Files: `metrics.json` (figures and settings), `images.csv` (a row for each image), `reconstructions.npz`{traces}, \
`config.yaml`.
"""


def _pictures(matrix: Matrix, result: CellResult) -> list[list[Picture]]:
    """Clean, attacked and purified picture of each image that is drawn."""
    clean, place, count = result.cell.clean, result.cell.place, matrix.config.figures
    images = (clean.images, matrix.attacked(*place), matrix.reconstructions(*place))
    decisions = (result.cell.target.decisions_clean, result.decisions_given, result.decisions)
    columns = []
    for shown, found, ssim in zip(images, decisions, (None, result.ssim_given, result.ssim), strict=True):
        captions = [f"SSIM {x:.3f}" if x == x else "" for x in ([] if ssim is None else ssim[:count].tolist())]
        # A copy: a view would keep all images of the cell in memory.
        rows = zip(shown[:count].clone(), found.tolist(), clean.labels.tolist(), captions or [""] * count, strict=False)
        columns.append([Picture(x, class_name(y, clean.classes), y == label, text) for x, y, label, text in rows])
    return [list(row) for row in zip(*columns, strict=False)]


def draw_cell(matrix: Matrix, result: CellResult, name: str) -> list[Path]:
    """A panel of a cell's first images and the decision trace of each, as far as it is kept, in ``figures/``."""
    if not matrix.config.figures:
        return []
    clean, folder = result.cell.clean, matrix.folder / "figures"
    traces = dict(islice(matrix.traces(result.cell), matrix.config.figures))
    rows, paths = {}, []
    for i, pictures in enumerate(_pictures(matrix, result)):
        index, label = int(clean.indices[i]), int(clean.labels[i])
        rows[f"image {index}\ntrue: {class_name(label, clean.classes)}"] = pictures
        if i in traces:
            trace = DecisionTrace.load(traces[i])
            known: dict[str, Any] = {"decision": int(result.decisions[i]), "label": label, "clean": clean.images[i]}
            name_of = partial(class_name, classes=clean.classes)
            figure = draw_trace(trace, result.cell.defense.rebuild(trace), name_of=name_of, **known)
            paths.append(save_figure(figure, folder / f"trace{name}_{index:06d}.png"))
    return [save_figure(draw_panel(rows), folder / f"panel{name}.png"), *paths]


def _comparisons(matrix: Matrix) -> list[Path]:
    """figure9_<attack>.png for each attack that is the same for all defences."""
    made: list[Path] = []
    done = [results[-1] for results in matrix.results.values() if results[-1].done]
    alike = [r for r in done if not (r.cell.adaptive or r.cell.node.get("number") or r.cell.check)]
    # The undefended victim would show the attacked image a second time.
    alike = [r for r in alike if r.cell.target.defense.name != "none"] if matrix.config.figures else []
    for attack in dict.fromkeys(cell.label for cell in matrix.cells):
        found = [r for r in alike if r.cell.label == attack]
        if not found:
            continue
        given = [] if attack == "clean" else [f"attacked: {head_of(attack)}"]
        heads = ["clean", *given, *(r.cell.target.label for r in found)]
        first, *others = (_pictures(matrix, result) for result in found)
        rows = {
            f"image {int(index)}": [pictures[0], *pictures[1 : 1 + len(given)], pictures[2], *(o[i][2] for o in others)]
            for i, (index, pictures) in enumerate(zip(found[0].cell.clean.indices, first, strict=False))
        }
        made.append(save_figure(draw_grid(heads, rows), matrix.folder / f"figure9_{attack}.png"))
    return made
