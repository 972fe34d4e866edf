"""Defences: images in, purified images out. docs/new_defense.md shows how to add one."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipguard.registry import check_options, lookup, table_of

if TYPE_CHECKING:
    from torch import nn

    from dipguard.defenses.base import Defense, DefenseResult
    from dipguard.defenses.mirror import MirrorGuard
    from dipguard.defenses.paper import DIPGuard

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
"""Name -> class, imported (with its libraries) only when that defence is built."""

_HOMES = {"Defense": "base", "DefenseResult": "base", "DIPGuard": "paper", "MirrorGuard": "mirror"}


def build_defense(
    name: str, victim: nn.Module, *, seed: int | None = 0, weights: str | Path | None = None, **options: Any
) -> Defense:
    """Return the defence called ``name`` (a key of `DEFENSES` or an installed entry point) for ``victim``.

    ``seed`` is that of `Defense`, ``options`` are the defence's own. ``weights`` is the path or https address of its
    weights, only for defences that have any; without them such a defence can be built, but is `unavailable`.

    TypeError for an option that the defence does not have (also ``weights`` where there is nothing to load), ValueError
    for an unknown name, an option out of range, or weights that are damaged or do not fit, FileNotFoundError or
    RuntimeError without a weights file or a download, ImportError if a library of the defence is not installed.
    """
    make = lookup(table_of("defenses", DEFENSES), name, argument="defense")
    given = dict(options) if weights is None else {**options, "weights": weights}
    check_options(make, given, owner=f"the defence {name!r}", hidden=("seed",))
    return make(victim, seed=seed, **given)


def __getattr__(name: str) -> Any:
    """Import a class when it is first asked for: the table alone needs neither torch nor Lightning."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
