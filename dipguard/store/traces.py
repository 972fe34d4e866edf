"""Fits and traces as entries of the store, and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dipguard.decision import DecisionTrace, needed_for_replay
from dipguard.fit.samples import FitSamples
from dipguard.store.entry import Entry
from dipguard.store.folder import TraceStore

SAMPLED = ("steps", "images", "quality", "loss")


@dataclass(frozen=True, eq=False)
class Kept:
    """A trace from the store, and what it cost when it was made.

    Attributes:
        trace: Shared with whoever else replays it in this process: never to be changed.
        seconds: Of its fit and its decisions.
    """

    trace: DecisionTrace
    seconds: float


def write_samples(store: TraceStore, key: str, fitted: FitSamples, about: dict[str, Any]) -> None:
    """Keep a fit as no victim has seen it."""
    what = f"{len(fitted.steps)} samples up to step {int(fitted.steps[-1])}"
    store.write("fits", key, {name: getattr(fitted, name).numpy() for name in SAMPLED}, {**about, "what": what})


def read_samples(store: TraceStore, key: str) -> tuple[FitSamples, float] | None:
    """A fit with its seconds, or None where there is none."""
    entry = store.read("fits", key)
    if entry is None:
        return None
    fitted = FitSamples(**{name: torch.from_numpy(entry.arrays[name]) for name in SAMPLED})
    return fitted, _seconds(entry)


def write_trace(store: TraceStore, key: str, trace: DecisionTrace, about: dict[str, Any], seconds: float) -> Kept:
    """Keep a fit as a victim saw it, without the given image, which whoever asks has, and without all samples."""
    bare = replace(trace, samples=None)
    arrays = {name: tensor.cpu().numpy() for name, tensor in bare.tensors().items() if name != "given"}
    what = f"{len(trace.steps)} decisions, {len(trace.alpha)} crossings kept"
    store.write("traces", key, arrays, {**about, "what": what, "settings": trace.settings, "seconds": seconds})
    return _remember(store, key, Kept(bare, seconds))


def read_trace(store: TraceStore, key: str, *, given: Tensor, index: int) -> Kept | None:
    """A trace, or None where there is none.

    Args:
        store: Where.
        key: Its key.
        given: The given image, [3, H, W]; its digest is a part of the key.
        index: The image's index.
    """
    kept: Kept | None = store.cache.get(("traces", key))
    if kept is not None:
        return kept
    entry = store.read("traces", key)
    if entry is None:
        return None
    tensors = {name: torch.from_numpy(np.atleast_1d(array)) for name, array in entry.arrays.items()}
    given = given.detach().to(device="cpu", dtype=tensors["last"].dtype, copy=True)
    trace = DecisionTrace(index=index, given=given, settings=entry.header["settings"], **tensors)
    return _remember(store, key, Kept(trace, _seconds(entry)))


def as_asked(trace: DecisionTrace, settings: dict[str, Any]) -> DecisionTrace:
    """The trace that a fit with these settings would have left; they name a ``K_max`` no larger than the trace's.

    A crossing that the larger K_max had no use for has as many later crossings of at least its quality that were kept,
    so that the smaller one has none for it either: nothing is lost by pruning twice.
    """
    if trace.settings == settings:
        return trace
    K_max = int(settings["K_max"])
    if K_max == trace.K_max:
        return replace(trace, settings=settings)
    kept = needed_for_replay(trace.quality[trace.crossing_at].double(), K_max=K_max)
    return replace(
        trace,
        crossing_at=trace.crossing_at[kept],
        alpha=trace.alpha[kept],
        on_boundary=trace.on_boundary[kept],
        last=trace.last[-K_max:],
        settings=settings,
    )


def _remember(store: TraceStore, key: str, kept: Kept) -> Kept:
    size = sum(tensor.numel() * tensor.element_size() for tensor in kept.trace.tensors().values())
    store.cache.put(("traces", key), kept, size=size)
    return kept


def _seconds(entry: Entry) -> float:
    return float(entry.header.get("seconds", 0.0))
