"""The decision trace of one image, drawn like Figure 10 of Ding et al. 2021, and that of `MirrorGuard`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dipguard.decision import DecisionTrace, Reconstruction
from dipguard.reporting.canvas import DPI, Picture, plain_axes, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRUE, GIVEN = "#c1272d", "#0b62a4"
"""The paper's colours: red is the true class, blue the class of the given image."""
OTHERS = ("#1b8a5a", "#8457a8", "#5bb5c9")
REST = "#b8b8b8"
STITCHED, UNUSED = "#d98c00", "#aaaaaa"


def draw_trace(
    trace: DecisionTrace,
    reconstruction: Reconstruction,
    *,
    decision: int,
    label: int | None = None,
    clean: Tensor | None = None,
    name_of: Callable[[int], str] = str,
) -> Figure:
    """How one image was defended: decisions, class confidences and quality over the optimiser steps.

    The quality threshold and the end of the warm-up are those of ``trace.settings``.

    Args:
        trace: The image's decision trace.
        reconstruction: What was stitched from it.
        decision: The victim's decision on the reconstruction.
        label: The true class, if known.
        clean: The clean image [3, H, W], if known.
        name_of: Gives a class's name by its number.
    """
    last = (trace.last[-1], int(trace.decisions[-1]))
    shown: dict[str, tuple[Tensor, int | str]] = {f"last sample, t = {int(trace.steps[-1])}": last}
    if len(reconstruction.used):
        used = int(reconstruction.used[-1])
        at = int(trace.crossing_at[used])
        pair = " | ".join(short(name_of(int(y)), 10) for y in trace.decisions[at : at + 2])
        shown = {f"on the boundary, t = {int(trace.steps[at])}": (trace.on_boundary[used], pair)}
    shown["reconstruction"] = (reconstruction.image, decision)
    figure, (_, top, bottom) = _open_figure(trace, shown, (0.16, 2, 1), label=label, clean=clean, name_of=name_of)
    _draw_classes(top, trace, trace.scores, label=label, name_of=name_of)
    top.set(ylim=(-0.03, 1.1), ylabel="class confidence")
    _draw_quality(bottom, trace)
    _mark_crossings(top, bottom, trace, reconstruction)
    figure.suptitle(f"Decision trace of image {trace.index}", fontsize=12, fontweight="bold")
    return figure


def draw_mirror_trace(
    trace: DecisionTrace,
    reconstruction: Reconstruction,
    *,
    decision: int,
    label: int | None = None,
    clean: Tensor | None = None,
    name_of: Callable[[int], str] = str,
) -> Figure:
    """How one image was defended: decisions, confidences on plain and mirrored windows, and quality, by window.

    The arguments are those of :func:`draw_trace`.

    Raises:
        ValueError: The trace has no samples or no mirrored readings.
    """
    if trace.mirrored_logits is None or trace.samples is None:
        raise ValueError("`trace` must hold samples and their mirrored readings, got one without")
    networks = len(trace.last)
    windows = len(trace.steps) // networks
    lasts = [(n + 1) * windows - 1 for n in range(networks)]
    shown: dict[str, tuple[Tensor, int | str]] = {
        f"network {n}, last window": (trace.samples[i], int(trace.decisions[i])) for n, i in enumerate(lasts, start=1)
    }
    shown["reconstruction"] = (reconstruction.image, decision)
    figure, axes = _open_figure(trace, shown, (0.16, 1, 1, 0.8), label=label, clean=clean, name_of=name_of)
    # Without the mirror the second reading is of a shifted copy.
    second = "mirrored reading" if trace.settings.get("mirror", True) else "shifted reading"
    for ax, logits, kind in zip(axes[1:], (trace.scores, trace.mirrored_logits), ("reading", second), strict=False):
        _draw_classes(ax, trace, logits, label=label, name_of=name_of, means=True)
        ax.set(ylim=(-0.03, 1.03), ylabel=f"confidence,\n{kind}")
        _finish_axes(ax)
    ax, steps, quality = axes[3], trace.steps.numpy(), trace.quality.numpy()
    ax.plot(steps, quality, color="black", linewidth=1.3, label="quality v(t)")
    used = sorted(set(reconstruction.used.tolist()))
    if used:
        ax.plot(steps[used], quality[used], "o", color=STITCHED, markersize=4, label=f"averaged ({len(used)})")
    low = min(0.5, float(quality.min()))
    ax.set(ylim=(low - 0.03, 1.02), xlabel="optimiser step, of all networks", ylabel="SSIM to given")
    _finish_axes(ax)
    for at in lasts[:-1]:
        for ax in axes:
            ax.axvline(float(trace.steps[at] + trace.steps[at + 1]) / 2, color="black", linewidth=0.8)
    figure.suptitle(f"{second.capitalize()} of image {trace.index}", fontsize=12, fontweight="bold")
    return figure


def _open_figure(
    trace: DecisionTrace,
    shown: Mapping[str, tuple[Tensor, int | str]],
    heights: Sequence[float],
    *,
    label: int | None,
    clean: Tensor | None,
    name_of: Callable[[int], str],
) -> tuple[Figure, list[Axes]]:
    """A figure with pictures in a row and axes below, the first of them with the decisions y(t) as a band of colours.

    ``shown`` holds the pictures besides the clean and the given image: image and decision by caption; ``heights`` are
    relative.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.2 if len(heights) == 3 else 7.6), dpi=DPI, layout="constrained")
    pictures, plots = np.asarray(figure.subfigures(2, 1, height_ratios=(1, 2.5))).tolist()
    first = {} if clean is None else {"clean": (clean, "" if label is None else name_of(label))}
    shown = {**first, "given": (trace.given, trace.given_decision), **shown}
    for ax, (caption, (image, y)) in zip(pictures.subplots(1, len(shown)), shown.items(), strict=True):
        right = None if label is None or isinstance(y, str) else y == label
        Picture(image, y if isinstance(y, str) else name_of(y), right).draw_on(ax)
        ax.set_xlabel(caption, fontsize=9)
    axes = plots.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    edges, colours = _edges(trace), class_colours(trace, label)
    shades = [colours.get(int(y), REST) for y in trace.decisions]
    axes[0].bar(edges[:-1].numpy(), 1, edges.diff().numpy(), align="edge", linewidth=0, color=shades)
    axes[0].set(ylim=(0, 1), yticks=[])
    axes[0].set_ylabel("y(t)", rotation=0, ha="right", va="center", fontsize=9)
    axes[0].tick_params(labelbottom=False, bottom=False)
    return figure, list(axes)


def class_colours(trace: DecisionTrace, label: int | None) -> dict[int, str]:
    """The classes that get a line, with their colours.

    These are the true class, that of the given image, and the three others that x(t) was most often classified as.
    """
    colours = {trace.given_decision: GIVEN} if label is None else {label: TRUE}
    colours.setdefault(trace.given_decision, GIVEN)
    values, counts = trace.decisions.unique(return_counts=True)
    often = values[counts.argsort(descending=True, stable=True)].tolist()
    return colours | dict(zip([c for c in often if c not in colours], OTHERS, strict=False))


def _draw_classes(
    ax: Axes,
    trace: DecisionTrace,
    logits: Tensor,
    *,
    label: int | None,
    name_of: Callable[[int], str],
    means: bool = False,
) -> None:
    """Draw the confidences of the classes, with the mean of each in the legend if asked for."""
    confidence, colours = logits.double().softmax(dim=1), class_colours(trace, label)

    def line(name: str, colour: str, width: float, order: float, values: Tensor) -> None:
        text = f"{name}: {values.mean():.2f}" if means else name
        ax.plot(trace.steps.numpy(), values.numpy(), color=colour, linewidth=width, zorder=order, label=text)

    for i, (c, colour) in enumerate(colours.items()):
        roles = [name for name, is_it in (("true", c == label), ("of given", c == trace.given_decision)) if is_it]
        name = short(name_of(c)) + (f" ({', '.join(roles)})" if roles else "")
        line(name, colour, 1.4, 3 - 0.1 * i, confidence[:, c])
    others = [c for c in range(confidence.shape[1]) if c not in colours]
    if others:
        line("all others", REST, 1.0, 1.0, confidence[:, others].sum(dim=1))


def _finish_axes(ax: Axes) -> None:
    """Plain axes with the legend at their right."""
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.005, 0.5), frameon=False)
    plain_axes(ax)


def _edges(trace: DecisionTrace) -> Tensor:
    # Each sample owns the steps half-way to its neighbours, so a change of colour falls where the crossing is marked.
    steps = trace.steps.double()
    middle = (steps[1:] + steps[:-1]) / 2
    return torch.cat([steps[:1], middle, steps[-1:]])


def _draw_quality(ax: Axes, trace: DecisionTrace) -> None:
    steps, settings = trace.steps.numpy(), trace.settings
    ax.plot(steps, trace.quality.numpy(), color="black", linewidth=1.3, label="quality v(t)")
    if "tau" in settings:
        tau = settings["tau"]
        ax.axhline(tau, color="#777777", linewidth=1, linestyle="--", label=f"$\\tau$ = {tau:g}")
    warm_up = int(settings.get("t0", 0))
    if settings.get("t0_unit") == "samples":
        warm_up = int(trace.steps[min(warm_up, len(steps) - 1)])
    if warm_up > 0:
        text = f"warm-up, $t_0$ = {warm_up}"
        ax.axvspan(0, min(warm_up, steps[-1]), color="#eeeeee", linewidth=0, label=text, zorder=0)
    low = min(0.0, float(trace.quality.min()))
    ax.set(ylim=(low - 0.03, 1.05), xlim=(0, max(1, steps[-1])), xlabel="optimiser step t", ylabel="SSIM to given")


def _mark_crossings(top: Axes, bottom: Axes, trace: DecisionTrace, reconstruction: Reconstruction) -> None:
    # Every change of y(t) is a crossing; the trace keeps on-boundary images only of those that a replay can ask for.
    between = _edges(trace)[1:-1]
    stitched = trace.crossing_at[reconstruction.used]
    other = trace.decisions.diff() != 0
    other[stitched] = False
    kinds = (other, "not stitched", UNUSED, 4, 0.35), (stitched, "stitched", STITCHED, 6, 0.8)
    for chosen, name, colour, size, alpha in kinds:
        at = between[chosen].numpy()
        if len(at) == 0:
            continue
        for ax in (top, bottom):
            ax.vlines(at, *ax.get_ylim(), color=colour, linewidth=0.12 * size, alpha=alpha, zorder=0.5)
        style: dict[str, Any] = {"color": colour, "markersize": size, "markeredgewidth": 0, "clip_on": False}
        top.plot(at, [1.06] * len(at), "v", label=f"crossing, {name} ({len(at)})", **style)
    for ax in (top, bottom):
        _finish_axes(ax)
