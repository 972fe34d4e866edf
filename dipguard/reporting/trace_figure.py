"""The decision trace of one image, drawn like Figure 10 of Ding et al. 2021."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dipguard.decision import DecisionTrace, Reconstruction
from dipguard.reporting.canvas import DPI, RIGHT, Picture, plain_axes, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GIVEN = "#0b62a4"
"""The class of the given image is blue, as in the paper; the true class is green, as right decisions are."""
OTHERS = ("#8457a8", "#5bb5c9", "#9c6b30")
REST = "#b8b8b8"
USED, UNUSED = "#d98c00", "#aaaaaa"


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

    A trace with mirrored readings has a second plot of confidences, on the mirrored copies. If the image was attacked,
    by its label or else by the defence's decision, a line marks from where on x(t) is read as the given image.

    ``decision`` is the victim's on the reconstruction, ``label`` the true class and ``clean`` the clean image, if they
    are known; ``name_of`` gives a class's name by its number.
    """
    from matplotlib.figure import Figure

    parts, mirrored, used = _parts(trace), trace.mirrored_logits is not None, reconstruction.used

    def picture(caption: str, image: Tensor, y: int) -> Picture:
        return Picture(image, name_of(y), None if label is None else y == label, caption)

    pictures = [] if clean is None else [Picture(clean, "" if label is None else name_of(label), caption="clean")]
    attacked = clean is not None and not torch.equal(clean, trace.given)
    pictures.append(picture("given: attacked" if attacked else "given", trace.given, trace.given_decision))
    if len(used) and not mirrored:
        at = int(trace.crossing_at[used[-1]])
        pair = " | ".join(short(name_of(int(y)), 10) for y in trace.decisions[at : at + 2])
        pictures.append(
            Picture(trace.on_boundary[used[-1]], pair, caption=f"on the boundary, t = {int(trace.steps[at])}")
        )
    else:
        ends = [int(part[-1]) for part in parts]
        for number, (end, image) in enumerate(zip(ends, trace.last[-len(ends) :], strict=True), start=1):
            caption = f"network {number}" if len(ends) > 1 else "end of the fit"
            pictures.append(picture(f"{caption}, t = {int(trace.steps[end])}", image, int(trace.decisions[end])))
    pictures.append(picture("reconstruction", reconstruction.image, decision))
    heights = (0.16, 1, 1, 0.8) if mirrored else (0.16, 2, 1)
    figure = Figure(figsize=(10, 7.6), dpi=DPI, layout="constrained")
    above, below = np.asarray(figure.subfigures(2, 1, height_ratios=(1, 2.5))).tolist()
    for ax, shown in zip(above.subplots(1, len(pictures)), pictures, strict=True):
        shown.draw_on(ax)
    band, *plots, bottom = below.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    _draw_band(band, trace, class_colours(trace, label))
    readings = {"reading of x(t)": trace.scores}
    if trace.mirrored_logits is not None:
        kind = "mirrored" if trace.settings.get("mirror", True) else "shifted"
        readings[f"{kind} reading"] = trace.mirrored_logits
    for ax, (name, logits) in zip(plots, readings.items(), strict=True):
        _draw_classes(ax, trace, logits, label=label, name_of=name_of, means=mirrored)
        ax.set(ylim=(-0.03, 1.03 if mirrored else 1.1), ylabel=f"class confidence,\n{name}")
    _draw_quality(bottom, trace)
    if not mirrored:
        _mark_crossings(plots[0], bottom, trace, reconstruction)
    elif len(used):
        style = {"color": USED, "markersize": 4, "label": f"averaged windows ({len(used)})"}
        bottom.plot(trace.steps[used], trace.quality[used], "o", **style)
    entered = attack_inside(trace, decision if label is None else label) if attacked or clean is None else []
    inside = trace.steps[entered].tolist()
    text = f"attack inside from\nt = {', '.join(map(str, inside))} on" if inside else ""
    for ax in (*plots, bottom):
        dotted = {"colors": GIVEN, "linewidth": 1, "linestyles": ":", "label": text if ax is bottom else ""}
        ax.vlines(inside, 0, 1, transform=ax.get_xaxis_transform(), **dotted)
    for number, part in enumerate(parts[:-1], start=2):
        border = int(trace.steps[part[-1]]) + 0.5
        for ax in (band, *plots, bottom):
            ax.axvline(border, color="black", linewidth=0.8)
        bottom.annotate(
            f"network {number}", (border, 0), (3, 3), ("data", "axes fraction"), "offset points", fontsize=8
        )
    for ax in (*plots, bottom):
        ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.005, 0.5), frameon=False)
        plain_axes(ax)
    figure.suptitle(f"Decision trace of image {trace.index}", fontsize=12, fontweight="bold")
    return figure


def class_colours(trace: DecisionTrace, label: int | None) -> dict[int, str]:
    """Colours of the true class, that of the given image, and the three others that x(t) is most often read as."""
    colours = {trace.given_decision: GIVEN} if label is None else {label: RIGHT}
    colours.setdefault(trace.given_decision, GIVEN)
    values, counts = trace.decisions.unique(return_counts=True)
    often = values[counts.argsort(descending=True, stable=True)].tolist()
    return colours | dict(zip([c for c in often if c not in colours], OTHERS, strict=False))


def attack_inside(trace: DecisionTrace, truth: int) -> list[int]:
    """The sample of each network's fit, but its first, from which on x(t) is read as the given image, not the truth."""
    found = []
    for part in _parts(trace):
        (others,) = np.nonzero(trace.decisions[part].numpy() != trace.given_decision)
        if truth != trace.given_decision and len(others) and others[-1] + 1 < len(part):
            found.append(int(part[others[-1] + 1]))
    return found


def _parts(trace: DecisionTrace) -> Sequence[np.ndarray]:
    """The samples of each network's fit: between two of them there are steps without samples."""
    networks = 1 if trace.mirrored_logits is None else len(trace.last)
    return np.array_split(np.arange(len(trace.steps)), networks)


def _plot(ax: Axes, trace: DecisionTrace, values: Tensor, **style: Any) -> None:
    """A line over the steps that is broken between two networks."""
    breaks = [part[0] for part in _parts(trace)[1:]]
    x, y = (np.insert(line.double().numpy(), breaks, np.nan) for line in (trace.steps, values))
    ax.plot(x, y, **style)


def _draw_band(ax: Axes, trace: DecisionTrace, colours: dict[int, str]) -> None:
    """The decisions y(t) as a band of colours."""
    for part in _parts(trace):
        edges = _edges(trace.steps[part])
        shades = [colours.get(int(y), REST) for y in trace.decisions[part]]
        ax.bar(edges[:-1], 1, np.diff(edges), align="edge", linewidth=0, color=shades)
    ax.set(ylim=(0, 1), yticks=[])
    ax.set_ylabel("decision\ny(t)", rotation=0, ha="right", va="center", fontsize=9)
    ax.tick_params(labelbottom=False, bottom=False)


def _edges(steps: Tensor) -> np.ndarray:
    # Each sample owns the steps half-way to its neighbours, so a change of colour falls where the crossing is marked.
    at = steps.double().numpy()
    middle = (at[1:] + at[:-1]) / 2
    half = (at[1] - at[0]) / 2 if len(at) > 1 else 0.5
    return np.concatenate([at[:1] - half, middle, at[-1:] + 0.5])


def _draw_classes(
    ax: Axes, trace: DecisionTrace, logits: Tensor, *, label: int | None, name_of: Callable[[int], str], means: bool
) -> None:
    """Draw the confidences of the classes, with the mean of each in the legend if asked for."""
    confidence, colours = logits.double().softmax(dim=1), class_colours(trace, label)

    def line(name: str, values: Tensor, **style: Any) -> None:
        _plot(ax, trace, values, label=f"{name}: mean {values.mean():.2f}" if means else name, **style)

    for i, (c, colour) in enumerate(colours.items()):
        roles = [name for name, is_it in (("true", c == label), ("of given", c == trace.given_decision)) if is_it]
        name = short(name_of(c)) + (f" ({', '.join(roles)})" if roles else "")
        line(name, confidence[:, c], color=colour, linewidth=1.4, zorder=3 - 0.1 * i)
    others = [c for c in range(confidence.shape[1]) if c not in colours]
    if others:
        line(f"{len(others)} others together", confidence[:, others].sum(dim=1), color=REST, linewidth=1.0, zorder=1.0)


def _draw_quality(ax: Axes, trace: DecisionTrace) -> None:
    """The quality v(t) with the threshold tau and the warm-up, as far as the trace's settings have them."""
    settings, last = trace.settings, int(trace.steps[-1])
    _plot(ax, trace, trace.quality, color="black", linewidth=1.3, label="quality v(t)")
    if "tau" in settings:
        ax.axhline(settings["tau"], color="#777777", linewidth=1, linestyle="--", label=f"τ = {settings['tau']:g}")
    warm_up = int(settings.get("t0", 0))
    if settings.get("t0_unit") == "samples":
        warm_up = int(trace.steps[min(warm_up, len(trace.steps) - 1)])
    if warm_up > 0:
        starts = [0, *(int(trace.steps[part[-1]]) + 1 for part in _parts(trace)[:-1])]
        grey: dict[str, Any] = {"color": "#eeeeee", "linewidth": 0, "zorder": 0, "label": f"warm-up, t₀ = {warm_up}"}
        spans = [(start, min(warm_up, last - start)) for start in starts]
        ax.broken_barh(spans, (0, 1), transform=ax.get_xaxis_transform(), **grey)
    low = min(0.5 if trace.mirrored_logits is not None else 0.0, float(trace.quality.min()))
    step = "optimiser step t" if len(_parts(trace)) == 1 else "optimiser step t, one network after the other"
    ax.set(ylim=(low - 0.03, 1.05), xlim=(0, max(1, last)), xlabel=step, ylabel="SSIM to given")


def _mark_crossings(top: Axes, bottom: Axes, trace: DecisionTrace, reconstruction: Reconstruction) -> None:
    # Every change of y(t) is a crossing; the trace keeps on-boundary images only of those that a replay can ask for.
    between = _edges(trace.steps)[1:-1]
    stitched = trace.crossing_at[reconstruction.used]
    other = trace.decisions.diff() != 0
    other[stitched] = False
    kinds = (other, "not stitched", UNUSED, 4, 0.35), (stitched, "stitched", USED, 6, 0.8)
    for chosen, name, colour, size, alpha in kinds:
        at = between[chosen.numpy()]
        if len(at) == 0:
            continue
        for ax in (top, bottom):
            ax.vlines(at, *ax.get_ylim(), color=colour, linewidth=0.12 * size, alpha=alpha, zorder=0.5)
        style: dict[str, Any] = {"color": colour, "markersize": size, "markeredgewidth": 0, "clip_on": False}
        top.plot(at, [1.06] * len(at), "v", label=f"crossing, {name} ({len(at)})", **style)
