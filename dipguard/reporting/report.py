"""Everything that a finished run leaves to be read: tables, figures, a page, and the log's copy of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from dipguard.config import TrainConfig
from dipguard.decision import DecisionTrace
from dipguard.evaluation.outcome import Outcome
from dipguard.reporting.canvas import Picture, save_figure
from dipguard.reporting.evidence_figure import draw_evidence
from dipguard.reporting.loggers import RunLog
from dipguard.reporting.panel_figure import draw_panel
from dipguard.reporting.tables import write_page, write_tables
from dipguard.reporting.trace_figure import draw_trace


def write_report(outcome: Outcome, config: TrainConfig, *, log: RunLog | None = None) -> dict[str, Any]:
    """Write all results of a run into its folder, and into its log; return the metrics.

    metrics.json comes last: whoever finds it finds the rest.
    """
    figures = draw_figures(outcome, config)
    write_page(outcome.folder / "report.md", outcome, figures)
    metrics = write_tables(outcome)
    if log is not None:
        log.log_results(metrics, outcome.rows(), figures)
    return metrics


def draw_figures(outcome: Outcome, config: TrainConfig) -> list[Path]:
    """A panel of the first ``report.figures`` images and the decision trace of each, in ``figures/``."""
    positions = range(min(config.report.figures, len(outcome)))
    if not positions:
        return []
    folder = outcome.folder / "figures"
    return [_panel(outcome, positions, folder / "panel.png"), *(_trace(outcome, i, config, folder) for i in positions)]


def _panel(outcome: Outcome, positions: range, path: Path) -> Path:
    def picture(image: Tensor, decision: Tensor, label: Tensor) -> Picture:
        return Picture(image, outcome.class_name(int(decision)), bool(decision == label))

    rows = {}
    for i in positions:
        label = outcome.clean.labels[i]
        rows[f"image {int(outcome.clean.indices[i])}\ntrue: {outcome.class_name(int(label))}"] = (
            picture(outcome.clean.images[i], outcome.decision_clean[i], label),
            picture(outcome.given[i], outcome.decision_given[i], label),
            picture(outcome.reconstructions[i].image, outcome.decision_defended[i], label),
        )
    return save_figure(draw_panel(rows), path)


def _trace(outcome: Outcome, position: int, config: TrainConfig, folder: Path) -> Path:
    trace = DecisionTrace.load(outcome.trace_path(position))
    defense, path = config.defense, folder / f"trace_{trace.index:06d}.png"
    seen: dict[str, Any] = {
        "decision": int(outcome.decision_defended[position]),
        "label": int(outcome.clean.labels[position]),
        "clean": outcome.clean.images[position],
        "name_of": outcome.class_name,
    }
    if trace.turned is not None:
        return save_figure(draw_evidence(trace, outcome.reconstructions[position], **seen), path)
    samples = defense.t0_unit == "samples" and len(trace.steps) > 0
    t0_step = int(trace.steps[min(defense.t0, len(trace.steps) - 1)]) if samples else defense.t0
    figure = draw_trace(trace, outcome.reconstructions[position], tau=defense.tau, t0_step=t0_step, **seen)
    return save_figure(figure, path)
