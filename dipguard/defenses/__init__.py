"""Defences: images in, images out. A new one is one `Purifier` in a file of its own, and one row in `DEFENSES`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from dipguard.defenses.base import Defense, Purifier
from dipguard.defenses.dipguard import DIPGuard
from dipguard.defenses.result import DefenseResult
from dipguard.registry import check_options, resolve

__all__ = ["DEFENSES", "DIPGuard", "Defense", "DefenseResult", "Purifier", "build_defense"]

DEFENSES: dict[str, str] = {
    "none": "dipguard.defenses.none:NoDefense",
    "jpeg": "dipguard.defenses.transforms:JPEG",
    "median": "dipguard.defenses.transforms:Median",
    "total_variation": "dipguard.defenses.transforms:TotalVariation",
    "bit_depth": "dipguard.defenses.transforms:BitDepth",
    "blur": "dipguard.defenses.blur:Blur",
    "comdefend": "dipguard.defenses.comdefend:ComDefend",
    "sr": "dipguard.defenses.super_resolution:SuperResolution",
    "nrp": "dipguard.defenses.nrp:NRP",
    "dip_fixed": "dipguard.defenses.stopped_dip:FixedStepDIP",
    "dip_es_wmv": "dipguard.defenses.stopped_dip:WindowedVarianceDIP",
    "dipdefend_rule": "dipguard.defenses.dipdefend:SmoothedPSNRDIP",
    "dipdefend": "dipguard.defenses.dipdefend:DIPDefend",
    "dipguard": "dipguard.defenses.mirror_guard:MirrorGuard",
    "paper": "dipguard.defenses.guard_row:GuardRow",
}
"""Name -> class, imported (with its libraries) only when that defence is built."""


def build_defense(
    name: str, victim: nn.Module, *, seed: int = 0, weights: str | Path | None = None, **options: Any
) -> Purifier:
    """Return the defence called ``name`` (a key of `DEFENSES`) for ``victim``.

    Args:
        name: defence.
        victim: classifier of images [B, 3, H, W] in [0, 1], logits [B, C].
        seed: of the defence's random draws, at least 0.
        weights: path or https address of the defence's own weights, only for defences that have any. Without them such
            a defence can be built, but is `unavailable`.
        options: the defence's own options.

    Raises:
        TypeError: an option that the defence does not have (also ``weights`` where there is nothing to load).
        ValueError: an unknown name, an option out of range, or weights that are damaged or do not fit.
        FileNotFoundError, RuntimeError: no weights file, or no download.
        ImportError: a library of the defence is not installed.
    """
    make = resolve(DEFENSES, name, argument="defense")
    given = dict(options) if weights is None else {**options, "weights": weights}
    check_options(make, given, owner=f"the defence {name!r}", hidden=("seed",))
    defense: Purifier = make(victim, seed=seed, **given)
    return defense
