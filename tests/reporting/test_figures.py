from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from dipguard.decision import DecisionTrace, Reconstruction, stitch
from dipguard.evaluation import Matrix
from dipguard.reporting.canvas import DPI, Picture, class_name, save_figure, short
from dipguard.reporting.image_figures import FACTORS, amplification, draw_panel
from dipguard.reporting.trace_figure import GIVEN, TRUE, class_colours, draw_mirror_trace, draw_trace


def traces_of(matrix: Matrix) -> list[DecisionTrace]:
    place = matrix.cells[0].place
    return [DecisionTrace.load(matrix.traces_path(*place, int(index))) for index in matrix.clean.indices]


def with_settings(trace: DecisionTrace, **settings: object) -> DecisionTrace:
    return replace(trace, settings={**trace.settings, **settings})


@pytest.fixture(scope="module")
def crossed(finished: Matrix) -> tuple[DecisionTrace, Reconstruction]:
    """A trace with crossings that were stitched, and some that were not."""
    for trace in traces_of(finished):
        if int((trace.decisions.diff() != 0).sum()) > 1:
            options = {"tau": 0.0, "t0": 0, "K": 1, "beta": 0.5}
            return with_settings(trace, **options), stitch(trace, **options)
    pytest.fail("no trace crossed the boundary twice")


def legend_of(figure: object) -> list[str]:
    axes = [ax for sub in figure.subfigs for ax in sub.axes if ax.get_legend() is not None]  # type: ignore[attr-defined]
    return [text.get_text() for ax in axes for text in ax.get_legend().get_texts()]


def test_trace_figure_marks_every_crossing(crossed: tuple[DecisionTrace, Reconstruction]) -> None:
    trace, rebuilt = crossed
    changes = int((trace.decisions.diff() != 0).sum())
    names = legend_of(draw_trace(trace, rebuilt, decision=1, label=1))
    assert "crossing, stitched (1)" in names
    assert f"crossing, not stitched ({changes - 1})" in names
    assert "$\\tau$ = 0" in names


@pytest.mark.parametrize(("unit", "end"), [("steps", 4), ("samples", None)])
def test_threshold_and_warm_up_are_those_of_the_trace(finished: Matrix, unit: str, end: int | None) -> None:
    trace = with_settings(traces_of(finished)[0], tau=0.35, t0=4, t0_unit=unit)
    rebuilt = stitch(trace, tau=1.0, t0=0, K=1, beta=0.5)
    names = legend_of(draw_trace(trace, rebuilt, decision=0))
    assert "$\\tau$ = 0.35" in names
    assert f"warm-up, $t_0$ = {int(trace.steps[4]) if end is None else end}" in names


@pytest.mark.parametrize("known", [True, False])
def test_trace_figure_without_crossings_is_as_large_as_any(finished: Matrix, tmp_path: Path, known: bool) -> None:
    trace = traces_of(finished)[0]
    rebuilt = stitch(trace, tau=1.0, t0=0, K=1, beta=0.5)
    assert rebuilt.reason == "no_crossing"
    label, clean = (int(finished.clean.labels[0]), finished.clean.images[0]) if known else (None, None)
    figure = draw_trace(trace, rebuilt, decision=0, label=label, clean=clean)
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


@pytest.mark.parametrize(("mirror", "reading"), [(True, "mirrored reading"), (False, "shifted reading")])
def test_mirror_figure_shows_both_readings_and_what_was_averaged(
    crossed: tuple[DecisionTrace, Reconstruction], mirror: bool, reading: str
) -> None:
    trace, rebuilt = crossed
    count = len(trace.steps) // 2 * 2
    short_trace = replace(
        trace,
        **{name: getattr(trace, name)[:count] for name in ("steps", "scores", "quality", "loss")},
        crossing_at=trace.crossing_at[:0],
        alpha=trace.alpha[:0],
        on_boundary=trace.on_boundary[:0],
        last=trace.given.expand(2, -1, -1, -1),
        samples=trace.given.expand(count, -1, -1, -1),
        mirrored_logits=trace.scores[:count].flip(1),
        settings={"mirror": mirror},
    )
    used = Reconstruction(rebuilt.image, "class_scores", torch.arange(3))
    figure = draw_mirror_trace(short_trace, used, decision=1, label=1, clean=trace.given)
    axes = figure.subfigs[1].axes
    assert [ax.get_ylabel() for ax in axes[1:3]] == ["confidence,\nreading", f"confidence,\n{reading}"]
    assert "averaged (3)" in legend_of(figure)
    captions = [ax.get_xlabel() for ax in figure.subfigs[0].axes]
    assert captions == ["clean", "given", "network 1, last window", "network 2, last window", "reconstruction"]
    lines = {line.get_label().split(":")[0]: line.get_ydata() for line in axes[2].get_lines()}
    mean = short_trace.mirrored_logits.double().softmax(1)[:, 1]
    assert np.asarray(lines["1 (true)" if trace.given_decision != 1 else "1 (true, of given)"]) == pytest.approx(mean)


def test_mirror_figure_needs_mirrored_readings(crossed: tuple[DecisionTrace, Reconstruction]) -> None:
    with pytest.raises(ValueError, match="`trace` must hold samples and their mirrored readings"):
        draw_mirror_trace(*crossed, decision=0)


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


def test_panel_of_a_reconstruction_of_another_size() -> None:
    given, rebuilt = torch.full((3, 16, 16), 0.5), torch.full((3, 32, 32), 0.46)
    figure = draw_panel({"one": (Picture(given, "a"), Picture(given, "b"), Picture(rebuilt, "a"))})
    assert np.asarray(figure.axes[3].images[0].get_array()) == pytest.approx(0.9, abs=1e-5)


def test_empty_panel_is_refused() -> None:
    with pytest.raises(ValueError, match="`rows` must hold at least one image"):
        draw_panel({})


def test_long_names_are_cut() -> None:
    assert short("tench") == "tench"
    assert len(short("great white shark, Carcharodon carcharias")) == 22


def test_classes_without_a_name_are_numbers() -> None:
    assert [class_name(number, ("cat", "dog")) for number in (1, 2, -1)] == ["dog", "2", "-1"]
