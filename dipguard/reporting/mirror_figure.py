"""How `MirrorGuard` came to its image: the readings of each network's windows, plain and mirrored."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dipguard.decision import DecisionTrace, Reconstruction
from dipguard.reporting.trace_figure import STITCHED, draw_classes, finish_axes, open_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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

    Args:
        trace: The image's trace, with ``samples`` and ``mirrored_logits``.
        reconstruction: The image made from it.
        decision: The victim's decision on the reconstruction.
        label: The true class, if known.
        clean: The clean image [3, H, W], if known.
        name_of: Gives a class's name by its number.

    Raises:
        ValueError: The trace has no mirrored readings.
    """
    if trace.mirrored_logits is None or trace.samples is None:
        raise ValueError("`trace` must hold samples and their mirrored readings, got one without")
    networks = len(trace.last)
    windows = len(trace.steps) // networks
    lasts = [(n + 1) * windows - 1 for n in range(networks)]
    shown: dict[str, tuple[Tensor, int | str]] = {
        f"network {n}, last window": (trace.samples[at], int(trace.decisions[at]))
        for n, at in enumerate(lasts, start=1)
    }
    shown["reconstruction"] = (reconstruction.image, decision)
    figure, axes = open_figure(trace, shown, (0.16, 1, 1, 0.8), label=label, clean=clean, name_of=name_of)
    # Without the mirror the second reading is of a shifted copy.
    second = "mirrored reading" if trace.settings.get("mirror", True) else "shifted reading"
    for ax, logits, kind in zip(axes[1:], (trace.scores, trace.mirrored_logits), ("reading", second), strict=False):
        draw_classes(ax, trace, logits, label=label, name_of=name_of, means=True)
        ax.set(ylim=(-0.03, 1.03), ylabel=f"confidence,\n{kind}")
        finish_axes(ax)
    _draw_quality(axes[3], trace, reconstruction)
    for at in lasts[:-1]:
        for ax in axes:
            ax.axvline(float(trace.steps[at] + trace.steps[at + 1]) / 2, color="black", linewidth=0.8)
    figure.suptitle(f"{second.capitalize()} of image {trace.index}", fontsize=12, fontweight="bold")
    return figure


def _draw_quality(ax: Axes, trace: DecisionTrace, reconstruction: Reconstruction) -> None:
    steps, quality = trace.steps.numpy(), trace.quality.numpy()
    ax.plot(steps, quality, color="black", linewidth=1.3, label="quality v(t)")
    used = torch.zeros(len(steps), dtype=torch.bool)
    used[reconstruction.used] = True
    if bool(used.any()):
        text = f"averaged ({int(used.sum())})"
        ax.plot(steps[used.numpy()], quality[used.numpy()], "o", color=STITCHED, markersize=4, label=text)
    low = min(0.5, float(quality.min()))
    ax.set(ylim=(low - 0.03, 1.02), xlabel="optimiser step, of all networks", ylabel="SSIM to given")
    finish_axes(ax)
