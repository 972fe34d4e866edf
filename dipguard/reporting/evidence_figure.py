"""How MirrorGuard came to its image: the readings of each network's windows, straight and in the mirror."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dipguard.decision import DecisionTrace, Reconstruction
from dipguard.reporting.canvas import DPI, Picture, short
from dipguard.reporting.trace_figure import REST, STITCHED, class_colours, draw_strip, draw_thumbnails

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_evidence(
    trace: DecisionTrace,
    reconstruction: Reconstruction,
    *,
    decision: int,
    label: int | None = None,
    clean: Tensor | None = None,
    name_of: Callable[[int], str] = str,
) -> Figure:
    """How one image was defended: decisions, straight and mirrored confidences, and quality, window by window.

    Args:
        trace: The image's trace, with ``samples`` and ``turned``.
        reconstruction: What was made of it.
        decision: The victim's decision on the reconstruction.
        label: The true class, where it is known.
        clean: The clean image [3, H, W], where it is known.
        name_of: A class's name by its number.

    Raises:
        ValueError: The trace has no mirrored readings.
    """
    from matplotlib.figure import Figure

    if trace.turned is None or trace.samples is None:
        raise ValueError("`trace` must hold samples and their mirrored readings, got one without")
    figure = Figure(figsize=(10, 7.6), dpi=DPI, layout="constrained")
    pictures, plots = np.asarray(figure.subfigures(2, 1, height_ratios=(1, 2.7))).tolist()

    def picture(image: Tensor, y: int) -> Picture:
        return Picture(image, name_of(y), None if label is None else y == label)

    networks = len(trace.last)
    ends = len(trace.steps) // networks
    shown = {} if clean is None else {"clean": Picture(clean, "" if label is None else name_of(label))}
    shown["given"] = picture(trace.given, trace.given_decision)
    for n in range(networks):
        at = (n + 1) * ends - 1
        shown[f"network {n + 1}, last window"] = picture(trace.samples[at], int(trace.decisions[at]))
    shown["reconstruction"] = picture(reconstruction.image, decision)
    draw_thumbnails(pictures, shown)
    strip, straight, turned, bottom = plots.subplots(4, 1, sharex=True, height_ratios=(0.16, 1, 1, 0.8))
    colours = class_colours(trace, label)
    draw_strip(strip, trace, colours)
    second = "mirrored" if trace.settings.get("mirror", True) else "moved"
    for ax, logits, kind in ((straight, trace.scores, "straight"), (turned, trace.turned, second)):
        _draw_readings(ax, trace, logits, colours, kind=kind, label=label, name_of=name_of)
    _draw_quality(bottom, trace, reconstruction)
    for ax in (strip, straight, turned, bottom):
        for n in range(1, networks):
            ax.axvline(float(trace.steps[n * ends - 1] + trace.steps[n * ends]) / 2, color="black", linewidth=0.8)
    figure.suptitle(f"Evidence on image {trace.index}", fontsize=12, fontweight="bold")
    return figure


def _draw_readings(
    ax: Axes,
    trace: DecisionTrace,
    logits: Tensor,
    colours: dict[int, str],
    *,
    kind: str,
    label: int | None,
    name_of: Callable[[int], str],
) -> None:
    confidence = logits.double().softmax(dim=1)
    mean, steps = confidence.mean(dim=0), trace.steps.numpy()
    for c, colour in colours.items():
        roles = [name for name, is_it in (("true", c == label), ("of given", c == trace.given_decision)) if is_it]
        name = short(name_of(c)) + (f" ({', '.join(roles)})" if roles else "")
        ax.plot(steps, confidence[:, c].numpy(), color=colour, linewidth=1.4, label=f"{name}: {mean[c]:.2f}")
    others = [c for c in range(confidence.shape[1]) if c not in colours]
    if others:
        rest = confidence[:, others].sum(dim=1).numpy()
        ax.plot(steps, rest, color=REST, linewidth=1, label=f"all others: {mean[others].sum():.2f}", zorder=1)
    ax.set(ylim=(-0.03, 1.03), ylabel=f"confidence,\n{kind}")
    _finish(ax)


def _draw_quality(ax: Axes, trace: DecisionTrace, reconstruction: Reconstruction) -> None:
    steps = trace.steps.numpy()
    ax.plot(steps, trace.quality.numpy(), color="black", linewidth=1.3, label="quality v(t)")
    used = torch.zeros(len(steps), dtype=torch.bool)
    used[reconstruction.used] = True
    if bool(used.any()):
        at = used.numpy()
        ax.plot(
            steps[at], trace.quality.numpy()[at], "o", color=STITCHED, markersize=4, label=f"averaged ({used.sum()})"
        )
    low = min(0.5, float(trace.quality.min()))
    ax.set(ylim=(low - 0.03, 1.02), xlabel="optimiser step, of all networks", ylabel="SSIM to given")
    _finish(ax)


def _finish(ax: Axes) -> None:
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.005, 0.5), frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#eeeeee", linewidth=0.6)
    ax.set_axisbelow(True)
