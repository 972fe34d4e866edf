"""Attacks on a victim, and on a victim with its defence.

A new one is one `Attack` (or `DefenseAwareAttack`) subclass in a file of its own, and one row in `ATTACKS` (or
`DEFENSE_AWARE`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dipguard.attacks.base import Attack
from dipguard.attacks.cost import Cost
from dipguard.attacks.defense_aware import DefenseAwareAttack, Purifies
from dipguard.attacks.report import AttackReport
from dipguard.registry import check_options, resolve

__all__ = [
    "ATTACKS",
    "DEFENSE_AWARE",
    "Attack",
    "AttackReport",
    "Cost",
    "DefenseAwareAttack",
    "build_attack",
    "build_defense_aware_attack",
]

ATTACKS: dict[str, str] = {
    "none": "dipguard.attacks.none:NoAttack",
    "fgsm": "dipguard.attacks.torchattacks_linf:FGSM",
    "pgd": "dipguard.attacks.torchattacks_linf:PGD",
    "bim": "dipguard.attacks.torchattacks_linf:BIM",
    "mifgsm": "dipguard.attacks.torchattacks_mifgsm:MIFGSM",
    "cw": "dipguard.attacks.torchattacks_cw:CW",
    "ddn": "dipguard.attacks.foolbox_ddn:DDN",
    "autoattack": "dipguard.attacks.torchattacks_auto:AutoAttack",
    "square": "dipguard.attacks.torchattacks_auto:Square",
    "eotpgd": "dipguard.attacks.torchattacks_linf:EOTPGD",
    "noise": "dipguard.attacks.noise:Noise",
}
"""Name -> class, imported (with its library) only when that attack is built."""

DEFENSE_AWARE: dict[str, str] = {
    "bpda": "dipguard.attacks.bpda:BPDA",
    "hopskipjump": "dipguard.attacks.hopskipjump:HopSkipJump",
    "adaptive_pgd": "dipguard.attacks.adaptive:AdaptivePGD",
    "unrolled": "dipguard.attacks.unrolled:Unrolled",
    "defended_autoattack": "dipguard.attacks.defended_auto:DefendedAutoAttack",
    "defended_square": "dipguard.attacks.defended_auto:DefendedSquare",
}
"""The same for the attacks that are built with the defence that they are to break."""


def build_attack(
    name: str,
    victim: nn.Module,
    *,
    eps_255: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    **options: Any,
) -> Attack:
    """Return the attack called ``name`` (a key of `ATTACKS`) on ``victim``.

    Args:
        name: attack.
        victim: classifier of images [B, 3, H, W] in [0, 1], logits [B, C].
        eps_255: L-inf budget in levels of 0 to 255, above 0; None for the attack's default. Only for attacks that have
            one.
        seed: of the attack's random draws, at least 0.
        batch_size: images attacked together, at least 1.
        options: the attack's own options.

    Raises:
        TypeError: an option that the attack does not have (also ``eps_255`` where there is no L-inf budget).
        ValueError: an unknown name, or a value out of range.
        ImportError: the attack's library is not installed.
    """
    if name in DEFENSE_AWARE:
        raise ValueError(f"`attack` {name!r} is made for one defence: build_defense_aware_attack builds it")
    make, given = _row(ATTACKS, name, eps_255=eps_255, options=options)
    attack: Attack = make(victim, seed=seed, batch_size=batch_size, **given)
    return attack


def build_defense_aware_attack(
    name: str,
    victim: nn.Module,
    defense: Purifies,
    *,
    eps_255: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    **options: Any,
) -> DefenseAwareAttack:
    """Return the attack called ``name`` (a key of `DEFENSE_AWARE`) on ``victim`` behind ``defense``.

    Args:
        name: attack.
        victim: classifier of images [B, 3, H, W] in [0, 1], logits [B, C].
        defense: has ``purify(images, *, indices=None)``; any of `dipguard.defenses`.
        eps_255: as in `build_attack`.
        seed: of the attack's random draws, at least 0.
        batch_size: images attacked together, at least 1.
        options: the attack's own options.

    Raises:
        TypeError: an option that the attack does not have, or a ``defense`` without ``purify``.
        ValueError: an unknown name, or a value out of range.
        ImportError: the attack's library is not installed.
    """
    make, given = _row(DEFENSE_AWARE, name, eps_255=eps_255, options=options)
    attack: DefenseAwareAttack = make(victim, defense, seed=seed, batch_size=batch_size, **given)
    return attack


def _row(
    table: dict[str, str], name: str, *, eps_255: float | None, options: dict[str, Any]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The class called ``name`` and its options, checked."""
    make = resolve(table, name, argument="attack")
    given = dict(options) if eps_255 is None else {**options, "eps_255": eps_255}
    check_options(make, given, owner=f"the attack {name!r}", hidden=("seed", "batch_size"))
    return make, given
