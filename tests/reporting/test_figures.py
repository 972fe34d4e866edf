from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from dipguard.evaluation.outcome import Outcome
from dipguard.reporting.panel_figure import FACTORS, amplification, draw_panel

from dipguard.decision import DecisionTrace, Reconstruction, stitch
from dipguard.reporting.canvas import DPI, Picture, save_figure, short
from dipguard.reporting.report import draw_figures
from dipguard.reporting.trace_figure import GIVEN, TRUE, class_colours, draw_trace
from tests.tiny_run import TINY, typed_config


@pytest.fixture(scope="module")
def crossed(outcome: Outcome) -> tuple[DecisionTrace, Reconstruction]:
    """A trace with crossings that were stitched, and some that were not."""
    for i, _ in enumerate(outcome.reconstructions):
        trace = DecisionTrace.load(outcome.trace_path(i))
        rebuilt = stitch(trace, tau=0.0, t0=0, K=1, beta=0.5)
        if int((trace.decisions.diff() != 0).sum()) > 1:
            return trace, rebuilt
    pytest.fail("no trace crossed the boundary twice")


def legend_of(figure: object) -> list[str]:
    axes = [ax for sub in figure.subfigs for ax in sub.axes if ax.get_legend() is not None]  # type: ignore[attr-defined]
    return [text.get_text() for ax in axes for text in ax.get_legend().get_texts()]


def test_trace_figure_marks_every_crossing(crossed: tuple[DecisionTrace, Reconstruction]) -> None:
    trace, rebuilt = crossed
    changes = int((trace.decisions.diff() != 0).sum())
    figure = draw_trace(trace, rebuilt, tau=0.0, t0_step=0, decision=1, label=1)
    names = legend_of(figure)
    assert "crossing, stitched (1)" in names
    assert f"crossing, not stitched ({changes - 1})" in names
    assert "$\\tau$ = 0" in names


@pytest.mark.parametrize("known", [True, False])
def test_trace_figure_without_crossings_is_as_large_as_any(outcome: Outcome, tmp_path: Path, known: bool) -> None:
    trace = DecisionTrace.load(outcome.trace_path(0))
    rebuilt = stitch(trace, tau=1.0, t0=0, K=1, beta=0.5)
    assert rebuilt.reason == "no_crossing"
    label, clean = (int(outcome.clean.labels[0]), outcome.clean.images[0]) if known else (None, None)
    figure = draw_trace(trace, rebuilt, tau=1.0, t0_step=4, decision=0, label=label, clean=clean)
    assert not any("stitched (" in name and "not" not in name for name in legend_of(figure))
    picture = matplotlib.image.imread(save_figure(figure, tmp_path / "a.png"))
    assert picture.shape[:2] == (round(7.2 * DPI), 10 * DPI)
    plots = figure.subfigs[1].axes
    assert plots[1].get_window_extent().height > 200, "the layout collapsed"


def test_true_class_is_red_and_that_of_the_given_image_blue(crossed: tuple[DecisionTrace, Reconstruction]) -> None:
    trace, _ = crossed
    other = (trace.given_decision + 1) % 10
    colours = class_colours(trace, other)
    assert (colours[other], colours[trace.given_decision]) == (TRUE, GIVEN)
    assert class_colours(trace, trace.given_decision)[trace.given_decision] == TRUE
    assert class_colours(trace, None)[trace.given_decision] == GIVEN
    assert len(set(colours.values())) == len(colours) <= 5


@pytest.mark.parametrize(("size", "factor"), [(0.6, 1), (0.3, 1), (0.2, 2), (0.04, 10), (0.001, 50), (0.0, 50)])
def test_difference_is_amplified_as_far_as_it_fits(size: float, factor: int) -> None:
    assert amplification(torch.full((2, 3, 8, 8), -size)) == factor
    assert factor in FACTORS


def test_panel_shows_the_amplified_difference() -> None:
    given, rebuilt = torch.full((3, 16, 16), 0.5), torch.full((3, 16, 16), 0.46)
    pictures = (Picture(given, "a", True), Picture(given, "b", False), Picture(rebuilt, "a", True))
    figure = draw_panel({"one": pictures, "two": pictures})
    assert len(figure.axes) == 8
    shown = np.asarray(figure.axes[3].images[0].get_array())
    assert shown == pytest.approx(0.5 + 10 * 0.04, abs=1e-5)
    assert "difference × 10" in [text.get_text() for text in figure.axes[3].texts]
    assert [ax.get_title()[-1] for ax in figure.axes[:3]] == ["\N{CHECK MARK}", "\N{BALLOT X}", "\N{CHECK MARK}"]


def test_empty_panel_is_refused() -> None:
    with pytest.raises(ValueError, match="`rows` must hold at least one image"):
        draw_panel({})


def test_long_names_are_cut() -> None:
    assert short("tench") == "tench"
    assert len(short("great white shark, Carcharodon carcharias")) == 22


@pytest.mark.parametrize(("wanted", "drawn"), [(0, 0), (1, 2), (8, 4)])
def test_as_many_figures_as_wanted(outcome: Outcome, tmp_path: Path, wanted: int, drawn: int) -> None:
    (tmp_path / "traces").symlink_to(outcome.folder / "traces")
    config = typed_config(*TINY, f"report.figures={wanted}")
    paths = draw_figures(replace(outcome, folder=tmp_path), config)
    assert len(paths) == drawn
    assert all(matplotlib.image.imread(path).shape[2] == 4 for path in paths)
