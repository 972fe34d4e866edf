"""The decision trace of one image, in the manner of Figure 10 of Ding et al. 2021."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dipguard.decision import DecisionTrace, Reconstruction
from dipguard.reporting.canvas import DPI, Picture, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

TRUE, GIVEN = "#c1272d", "#0b62a4"
"""The paper's colours: red is the true class, blue the one that the given image is taken for."""
OTHERS = ("#1b8a5a", "#8457a8", "#5bb5c9")
REST = "#b8b8b8"
STITCHED, UNUSED = "#d98c00", "#aaaaaa"


def draw_trace(
    trace: DecisionTrace,
    reconstruction: Reconstruction,
    *,
    tau: float,
    t0_step: int,
    decision: int,
    label: int | None = None,
    clean: Tensor | None = None,
    name_of: Callable[[int], str] = str,
) -> Figure:
    """How one image was defended: decisions, class confidences and quality over the optimiser steps.

    Args:
        trace: The image's decision trace.
        reconstruction: What was stitched from it.
        tau: The quality threshold that was used.
        t0_step: The end of the warm-up, in optimiser steps.
        decision: The victim's decision on the reconstruction.
        label: The true class, where it is known.
        clean: The clean image [3, H, W], where it is known.
        name_of: A class's name by its number.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.2), dpi=DPI, layout="constrained")
    pictures, plots = np.asarray(figure.subfigures(2, 1, height_ratios=(1, 2.5))).tolist()
    shown = _thumbnails(trace, reconstruction, decision=decision, label=label, clean=clean, name_of=name_of)
    draw_thumbnails(pictures, shown)
    strip, top, bottom = plots.subplots(3, 1, sharex=True, height_ratios=(0.16, 2, 1))
    colours = class_colours(trace, label)
    draw_strip(strip, trace, colours)
    _draw_confidences(top, trace, colours, label=label, name_of=name_of)
    _draw_quality(bottom, trace, tau=tau, t0_step=t0_step)
    _mark_crossings(top, bottom, trace, reconstruction)
    figure.suptitle(f"Decision trace of image {trace.index}", fontsize=12, fontweight="bold")
    return figure


def class_colours(trace: DecisionTrace, label: int | None) -> dict[int, str]:
    """The classes worth a line, with their colours.

    These are the true class, that of the given image, and up to three others that x(t) was taken for most often.
    """
    colours: dict[int, str] = {}
    if label is not None:
        colours[label] = TRUE
    colours.setdefault(trace.given_decision, GIVEN)
    values, counts = trace.decisions.unique(return_counts=True)
    often = [int(values[i]) for i in counts.argsort(descending=True, stable=True)]
    rest = [c for c in often if c not in colours]
    return colours | dict(zip(rest, OTHERS, strict=False))


def draw_thumbnails(area: SubFigure, shown: Mapping[str, Picture]) -> None:
    """Pictures side by side, by what stands below them."""
    for ax, (head, picture) in zip(area.subplots(1, len(shown)), shown.items(), strict=True):
        picture.draw_on(ax)
        ax.set_xlabel(head, fontsize=9)


def _thumbnails(
    trace: DecisionTrace,
    reconstruction: Reconstruction,
    *,
    decision: int,
    label: int | None,
    clean: Tensor | None,
    name_of: Callable[[int], str],
) -> dict[str, Picture]:
    def picture(image: Tensor, y: int) -> Picture:
        return Picture(image, name_of(y), None if label is None else y == label)

    shown: dict[str, Picture] = {}
    if clean is not None:
        shown["clean"] = Picture(clean, "" if label is None else name_of(label))
    shown["given"] = picture(trace.given, trace.given_decision)
    if len(reconstruction.used):
        last = int(reconstruction.used[-1])
        at = int(trace.crossing_at[last])
        pair = " | ".join(short(name_of(int(y)), 10) for y in trace.decisions[at : at + 2])
        shown[f"on the boundary, t = {int(trace.steps[at])}"] = Picture(trace.on_boundary[last], pair)
    else:
        shown[f"last sample, t = {int(trace.steps[-1])}"] = picture(trace.last[-1], int(trace.decisions[-1]))
    shown["reconstruction"] = picture(reconstruction.image, decision)
    return shown


def _edges(trace: DecisionTrace) -> Tensor:
    # Each sample owns the steps half-way to its neighbours, so a change of colour falls where the crossing is marked.
    steps = trace.steps.double()
    middle = (steps[1:] + steps[:-1]) / 2
    return torch.cat([steps[:1], middle, steps[-1:]])


def draw_strip(ax: Axes, trace: DecisionTrace, colours: dict[int, str]) -> None:
    """The decisions y(t) as a band of colours."""
    edges = _edges(trace)
    starts, widths = edges[:-1], edges.diff()
    ax.bar(
        starts.numpy(),
        1,
        widths.numpy(),
        align="edge",
        linewidth=0,
        color=[colours.get(int(y), REST) for y in trace.decisions],
    )
    ax.set(ylim=(0, 1), yticks=[])
    ax.set_ylabel("y(t)", rotation=0, ha="right", va="center", fontsize=9)
    ax.tick_params(labelbottom=False, bottom=False)


def _draw_confidences(
    ax: Axes, trace: DecisionTrace, colours: dict[int, str], *, label: int | None, name_of: Callable[[int], str]
) -> None:
    confidence = trace.scores.double().softmax(dim=1).numpy()
    steps = trace.steps.numpy()
    for rank, (c, colour) in enumerate(colours.items()):
        roles = [name for name, is_it in (("true", c == label), ("of given", c == trace.given_decision)) if is_it]
        name = short(name_of(c)) + (f" ({', '.join(roles)})" if roles else "")
        ax.plot(steps, confidence[:, c], color=colour, linewidth=1.4, label=name, zorder=3 - 0.1 * rank)
    others = [c for c in range(confidence.shape[1]) if c not in colours]
    if others:
        rest = confidence[:, others].sum(axis=1)
        ax.plot(steps, rest, color=REST, linewidth=1, label="all others", zorder=1)
    ax.set(ylim=(-0.03, 1.1), ylabel="class confidence")


def _draw_quality(ax: Axes, trace: DecisionTrace, *, tau: float, t0_step: int) -> None:
    steps = trace.steps.numpy()
    ax.plot(steps, trace.quality.numpy(), color="black", linewidth=1.3, label="quality v(t)")
    ax.axhline(tau, color="#777777", linewidth=1, linestyle="--", label=f"$\\tau$ = {tau:g}")
    if t0_step > 0:
        ax.axvspan(
            0, min(t0_step, steps[-1]), color="#eeeeee", linewidth=0, label=f"warm-up, $t_0$ = {t0_step}", zorder=0
        )
    low = min(0.0, float(trace.quality.min()))
    ax.set(ylim=(low - 0.03, 1.05), xlim=(0, max(1, steps[-1])), xlabel="optimiser step t", ylabel="SSIM to given")


def _mark_crossings(top: Axes, bottom: Axes, trace: DecisionTrace, reconstruction: Reconstruction) -> None:
    # Every change of y(t) is a crossing; the trace keeps on-boundary images only of those that a replay can ask for.
    between = _edges(trace)[1:-1]
    stitched = trace.crossing_at[reconstruction.used]
    other = trace.decisions.diff() != 0
    other[stitched] = False
    for at, name, colour, size, alpha in (
        (between[other].numpy(), "not stitched", UNUSED, 4, 0.35),
        (between[stitched].numpy(), "stitched", STITCHED, 6, 0.8),
    ):
        if len(at) == 0:
            continue
        for ax in (top, bottom):
            ax.vlines(at, *ax.get_ylim(), color=colour, linewidth=0.12 * size, alpha=alpha, zorder=0.5)
        label = f"crossing, {name} ({len(at)})"
        marks = [1.06] * len(at)
        top.plot(at, marks, "v", label=label, color=colour, markersize=size, markeredgewidth=0, clip_on=False)
    for ax in (top, bottom):
        ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.005, 0.5), frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#eeeeee", linewidth=0.6)
        ax.set_axisbelow(True)
