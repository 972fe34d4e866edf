"""How a purified picture came about, as a figure, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from dipguard.decision import DecisionTrace
from dipguard.defenses import DIPGuard
from dipguard.defenses.mirror_stacks import MirrorStacks


def figures_problem() -> str | None:
    """Why no figures can be drawn; None if they can."""
    if find_spec("matplotlib") is None:
        return "no figures: matplotlib is not installed (pip install 'dipguard[app]')"
    return None


def draw_decisions(
    path: Path,
    trace: DecisionTrace,
    guard: DIPGuard | MirrorStacks,
    *,
    decision: int,
    classes: Sequence[str],
    title: str,
) -> None:
    """Draw the decision trace that a guard left.

    Args:
        path: The PNG to write.
        trace: What the guard's fit left.
        guard: The guard.
        decision: The victim's decision on the purified picture.
        classes: The classes' names; empty: their numbers are shown.
        title: The picture's name.
    """
    from dipguard.reporting.canvas import save_figure
    from dipguard.reporting.evidence_figure import draw_evidence
    from dipguard.reporting.trace_figure import draw_trace

    rebuilt = guard.rebuild(trace)
    seen: dict[str, Any] = {"decision": decision, "name_of": lambda number: class_name(number, classes)}
    if isinstance(guard, DIPGuard):
        options = guard.stitch_options
        by_sample = options.t0_unit == "samples"
        t0_step = int(trace.steps[min(options.t0, len(trace.steps) - 1)]) if by_sample else options.t0
        figure = draw_trace(trace, rebuilt, tau=options.tau, t0_step=t0_step, **seen)
    else:
        figure = draw_evidence(trace, rebuilt, **seen)
    # A dollar sign in a file's name is no formula.
    figure.suptitle(title, fontsize=12, fontweight="bold", parse_math=False)
    save_figure(figure, path)


def draw_pair(
    path: Path, given: Tensor, purified: Tensor, *, decisions: tuple[int, int], classes: Sequence[str], title: str
) -> None:
    """Draw a picture before and after, and the difference, for a defence that leaves no trace.

    Args:
        path: The PNG to write.
        given: [3, H, W] in [0, 1].
        purified: [3, H', W'] in [0, 1]; where its size is another one, the difference is left out.
        decisions: The victim's, before and after.
        classes: As in `draw_decisions`.
        title: The picture's name.
    """
    from matplotlib.figure import Figure

    from dipguard.reporting.canvas import DPI, Picture, save_figure, show
    from dipguard.reporting.panel_figure import amplification

    figure = Figure(figsize=(8, 3.4), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, 3 if given.shape == purified.shape else 2)
    heads = ("given", "purified")
    for ax, image, decision, head in zip(axes, (given, purified), decisions, heads, strict=False):
        Picture(image, class_name(decision, classes)).draw_on(ax)
        ax.set_xlabel(head, fontsize=9)
    if len(axes) == 3:
        factor = amplification(given - purified)
        show(axes[2], 0.5 + factor * (given - purified))
        axes[2].set_xlabel(f"given - purified, × {factor}; grey is none", fontsize=9)
    figure.suptitle(title, fontsize=12, fontweight="bold", parse_math=False)
    save_figure(figure, path)


def class_name(number: int, classes: Sequence[str]) -> str:
    """A class as a person reads it; its number where it has no name."""
    return classes[number] if 0 <= number < len(classes) else str(number)
