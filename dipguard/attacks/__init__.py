"""Attacks on a victim. A new one is one `Attack` subclass in a file of its own, and one row in `ATTACKS`."""

from __future__ import annotations

from typing import Any

from torch import nn

from dipguard.attacks.base import Attack
from dipguard.registry import check_options, resolve

__all__ = ["ATTACKS", "Attack", "build_attack"]

ATTACKS: dict[str, str] = {
    "none": "dipguard.attacks.none:NoAttack",
    "fgsm": "dipguard.attacks.torchattacks_attacks:FGSM",
    "pgd": "dipguard.attacks.torchattacks_attacks:PGD",
    "cw": "dipguard.attacks.torchattacks_attacks:CW",
}
"""Name -> class, imported (with its library) only when that attack is built."""


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
    make = resolve(ATTACKS, name, argument="attack")
    given = dict(options) if eps_255 is None else {**options, "eps_255": eps_255}
    check_options(make, given, owner=f"the attack {name!r}", hidden=("seed", "batch_size"))
    attack: Attack = make(victim, seed=seed, batch_size=batch_size, **given)
    return attack
