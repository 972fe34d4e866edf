from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from dipguard.decision import DecisionTrace, Reconstruction, stitch
from dipguard.reporting.canvas import DPI, RIGHT, save_figure
from dipguard.reporting.trace_figure import GIVEN, attack_inside, class_colours, draw_trace


@pytest.fixture(scope="module")
def trace() -> DecisionTrace:
    """Twelve samples that cross the boundary four times; the given image is read as 0 from the last crossing on."""
    read = torch.tensor([3, 3, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0])
    draw, crossing_at = torch.Generator().manual_seed(0), torch.nonzero(read.diff()).flatten()
    images = torch.rand(8, 3, 16, 16, generator=draw)
    return DecisionTrace(
        index=7,
        given=images[0],
        given_scores=torch.eye(10)[0],
        steps=2 * torch.arange(12) + 1,
        scores=4 * torch.eye(10)[read],
        quality=torch.linspace(0.1, 0.9, 12),
        loss=torch.zeros(12),
        crossing_at=crossing_at,
        alpha=torch.full((4,), 0.5),
        on_boundary=images[1:5],
        last=images[5:],
        settings={"tau": 0.0, "t0": 0, "K_max": 3},
    )


def with_settings(trace: DecisionTrace, **settings: object) -> DecisionTrace:
    return replace(trace, settings={**trace.settings, **settings})


def legend_of(figure: object) -> list[str]:
    axes = [ax for sub in figure.subfigs for ax in sub.axes if ax.get_legend() is not None]  # type: ignore[attr-defined]
    return [text.get_text() for ax in axes for text in ax.get_legend().get_texts()]


def test_trace_figure_marks_every_crossing(trace: DecisionTrace) -> None:
    rebuilt = stitch(trace, tau=0.0, t0=0, K=1, beta=0.5)
    figure = draw_trace(trace, rebuilt, decision=1, label=1)
    names = legend_of(figure)
    assert "crossing, stitched (1)" in names
    assert "crossing, not stitched (3)" in names
    assert "τ = 0" in names
    assert "attack inside from\nt = 17 on" in names
    unattacked = legend_of(draw_trace(trace, rebuilt, decision=1, label=1, clean=trace.given))
    assert not any("attack" in name for name in unattacked), "a clean image that the victim misreads"
    captions = [ax.get_xlabel() for ax in figure.subfigs[0].axes]
    assert captions == ["given", "on the boundary, t = 15", "reconstruction"]


@pytest.mark.parametrize(("unit", "end"), [("steps", 4), ("samples", 9)])
def test_threshold_and_warm_up_are_those_of_the_trace(trace: DecisionTrace, unit: str, end: int) -> None:
    trace = with_settings(trace, tau=0.35, t0=4, t0_unit=unit)
    names = legend_of(draw_trace(trace, stitch(trace, tau=1.0, t0=0, K=1, beta=0.5), decision=0))
    assert "τ = 0.35" in names
    assert f"warm-up, t₀ = {end}" in names


def test_trace_figure_without_crossings_is_as_large_as_any(trace: DecisionTrace, tmp_path: Path) -> None:
    rebuilt = stitch(trace, tau=1.0, t0=0, K=1, beta=0.5)
    assert rebuilt.reason == "no_crossing"
    figure = draw_trace(trace, rebuilt, decision=0, label=0, clean=trace.given)
    assert not any("stitched (" in name and "not" not in name for name in legend_of(figure))
    picture = matplotlib.image.imread(save_figure(figure, tmp_path / "a.png"))
    assert picture.shape[:2] == (round(7.6 * DPI), 10 * DPI)
    plots = figure.subfigs[1].axes
    assert plots[1].get_window_extent().height > 200, "the layout collapsed"


def test_true_class_is_green_and_that_of_the_given_image_blue(trace: DecisionTrace) -> None:
    other = (trace.given_decision + 1) % 10
    colours = class_colours(trace, other)
    assert (colours[other], colours[trace.given_decision]) == (RIGHT, GIVEN)
    assert class_colours(trace, trace.given_decision)[trace.given_decision] == RIGHT
    assert class_colours(trace, None)[trace.given_decision] == GIVEN
    assert len(set(colours.values())) == len(colours) <= 5


@pytest.fixture(scope="module")
def windows(trace: DecisionTrace) -> DecisionTrace:
    """Three windows of each of two networks; the given image's class (0) is read in the first network's last two."""
    scores = 5 * torch.eye(10)[[1, 0, 0, 2, 2, 1]]
    none = {name: getattr(trace, name)[:0] for name in ("crossing_at", "alpha", "on_boundary")}
    return replace(
        trace,
        steps=torch.tensor([9, 14, 19, 109, 114, 119]),
        scores=scores,
        quality=torch.linspace(0.5, 0.9, 6),
        loss=torch.zeros(6),
        last=trace.last[:2],
        samples=trace.given.expand(6, -1, -1, -1),
        mirrored_logits=scores.flip(1),
        settings={"mirror": True},
        **none,
    )


@pytest.mark.parametrize(("mirror", "reading"), [(True, "mirrored"), (False, "shifted")])
def test_mirrored_figure_shows_both_readings_and_what_was_averaged(
    windows: DecisionTrace, mirror: bool, reading: str
) -> None:
    trace = replace(windows, settings={"mirror": mirror})
    used = Reconstruction(trace.given, "class_scores", torch.arange(3))
    figure = draw_trace(trace, used, decision=1, label=1, clean=trace.given / 2)
    axes = figure.subfigs[1].axes
    assert [ax.get_ylabel() for ax in axes[1:3]] == [
        f"class confidence,\n{which}" for which in ("reading of x(t)", f"{reading} reading")
    ]
    assert "averaged windows (3)" in legend_of(figure)
    captions = [ax.get_xlabel() for ax in figure.subfigs[0].axes]
    assert captions == ["clean", "given: attacked", "network 1, t = 19", "network 2, t = 119", "reconstruction"]
    lines = {line.get_label().split(":")[0]: np.asarray(line.get_ydata()) for line in axes[2].get_lines()}
    wanted = trace.mirrored_logits.double().softmax(1)[:, 1].numpy()
    drawn = lines["1 (true)"]
    assert drawn[np.isfinite(drawn)] == pytest.approx(wanted)


def test_nothing_is_drawn_across_the_gap_between_two_networks(windows: DecisionTrace) -> None:
    used = Reconstruction(windows.given, "class_scores", torch.arange(3))
    axes = draw_trace(windows, used, decision=1).subfigs[1].axes
    spans = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes[0].patches]
    assert spans == [(6.5, 11.5), (11.5, 16.5), (16.5, 19.5), (106.5, 111.5), (111.5, 116.5), (116.5, 119.5)]
    lines = [line for ax in axes[1:] for line in ax.get_lines() if len(line.get_xdata()) == 7]
    assert len(lines) >= 7
    assert all(np.isnan(line.get_ydata()[3]) for line in lines)


def test_the_moment_from_which_the_attack_is_inside_is_marked(windows: DecisionTrace) -> None:
    assert attack_inside(windows, truth=1) == [1]
    assert attack_inside(windows, truth=0) == []
    used = Reconstruction(windows.given, "class_scores", torch.arange(3))
    assert "attack inside from\nt = 14 on" in legend_of(draw_trace(windows, used, decision=1))
    assert not any("attack" in name for name in legend_of(draw_trace(windows, used, decision=0)))


def test_names_that_look_like_formulas_break_no_trace(windows: DecisionTrace, tmp_path: Path) -> None:
    used = Reconstruction(windows.given, "class_scores", torch.arange(3))
    figure = draw_trace(windows, used, decision=1, name_of=lambda y: r"$\bad{$")
    assert save_figure(figure, tmp_path / "a.png").is_file()
