"""Defences: images in, purified images out. docs/new_defense.md shows how to add one."""

from __future__ import annotations

from typing import Any

from torch import nn

from dipguard.defenses.base import Defense, DefenseResult
from dipguard.defenses.mirror import MirrorGuard
from dipguard.defenses.paper import DIPGuard
from dipguard.registry import check_options, lookup, table_of

__all__ = ["DEFENSES", "DIPGuard", "Defense", "DefenseResult", "MirrorGuard", "build_defense"]

DEFENSES: dict[str, str] = {
    "none": "dipguard.defenses.transforms:NoDefense",
    "jpeg": "dipguard.defenses.transforms:JPEG",
    "median": "dipguard.defenses.transforms:Median",
    "total_variation": "dipguard.defenses.transforms:TotalVariation",
    "bit_depth": "dipguard.defenses.transforms:BitDepth",
    "comdefend": "dipguard.defenses.comdefend:ComDefend",
    "sr": "dipguard.defenses.super_resolution:SuperResolution",
    "nrp": "dipguard.defenses.nrp:NRP",
    "dip_fixed": "dipguard.defenses.stopped:FixedStepDIP",
    "dipdefend": "dipguard.defenses.stopped:DIPDefend",
    "mirror": "dipguard.defenses.mirror:MirrorGuard",
    "paper": "dipguard.defenses.paper:DIPGuard",
}
"""Name -> class; the libraries of a defence are imported only when it is built."""


def build_defense(name: str, victim: nn.Module, *, seed: int | None = 0, **options: Any) -> Defense:
    """Return the defence called ``name`` (a key of `DEFENSES` or an installed entry point) for ``victim``.

    ``seed`` is that of `Defense`, ``options`` are the defence's own. A defence with trained weights takes their path or
    https address as ``weights``; without, it can be built, but is `unavailable`.

    TypeError for an option that the defence does not have or that has a wrong type; ValueError for an unknown name, an
    option out of range, or weights that are damaged or do not fit; FileNotFoundError if a weights file is missing,
    RuntimeError if a download fails; ImportError if a library of the defence is not installed.
    """
    make = lookup(table_of("defenses", DEFENSES), name, argument="defense")
    check_options(make, options, owner=f"the defence {name!r}", hidden=("seed",))
    return make(victim, seed=seed, **options)
