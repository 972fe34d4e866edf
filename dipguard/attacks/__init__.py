"""Attacks on a victim, and adaptive attacks on a victim behind a defence.

A new one is a subclass of `Attack` and a row of `ATTACKS`, or an entry point of the group ``dipguard.attacks``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dipguard.attacks.base import Attack, Cost, Snapshot
from dipguard.attacks.target import AdaptiveAttack, DefendedVictim
from dipguard.registry import check_options, lookup, table_of

__all__ = ["ATTACKS", "AdaptiveAttack", "Attack", "Cost", "DefendedVictim", "Snapshot", "build_attack"]

ATTACKS: dict[str, str] = {
    "none": "dipguard.attacks.static:NoAttack",
    "fgsm": "dipguard.attacks.static:FGSM",
    "pgd": "dipguard.attacks.static:PGD",
    "bim": "dipguard.attacks.static:BIM",
    "mifgsm": "dipguard.attacks.static:MIFGSM",
    "cw": "dipguard.attacks.static:CW",
    "ddn": "dipguard.attacks.static:DDN",
    "autoattack": "dipguard.attacks.static:AutoAttack",
    "square": "dipguard.attacks.static:Square",
    "noise": "dipguard.attacks.static:Noise",
    "bpda": "dipguard.attacks.defended_torchattacks:BPDA",
    "hopskipjump": "dipguard.attacks.hopskipjump:HopSkipJump",
    "adaptive_pgd": "dipguard.attacks.adaptive_pgd:AdaptivePGD",
    "unrolled": "dipguard.attacks.adaptive_pgd:Unrolled",
    "defended_autoattack": "dipguard.attacks.defended_torchattacks:DefendedAutoAttack",
    "defended_square": "dipguard.attacks.defended_torchattacks:DefendedSquare",
}
"""Name -> class, imported (and its library with it) only when it is built. From ``bpda`` on the attacks are adaptive:
their target is a `DefendedVictim`."""


def build_attack(name: str, target: nn.Module | DefendedVictim, *, seed: int = 0, **options: Any) -> Attack:
    """Return the attack called ``name`` (a key of `ATTACKS` or an installed entry point) on ``target``.

    ``seed`` is that of `Attack`; ``options`` are the attack's own, such as ``eps_255`` or ``batch_size``. An adaptive
    attack's target is a `DefendedVictim`.

    Raises:
        TypeError, ValueError: An unknown name or option, a value out of range, or a target of the wrong kind.
        ImportError: The attack's library is not installed.
    """
    make = lookup(table_of("attacks", ATTACKS), name, argument="attack")
    check_options(make, options, owner=f"the attack {name!r}", hidden=("seed",))
    return make(target, seed=seed, **options)
