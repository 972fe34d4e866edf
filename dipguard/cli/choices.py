"""From the words of the command line to a victim and a defence."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dipguard.cli.errors import CommandError, at_the_door
from dipguard.defenses import DEFENSES, Purifier, build_defense
from dipguard.registry import resolve
from dipguard.victims import VICTIMS, build_victim, check_victim

_LARGE = 128
_FOR_LARGE: dict[str, dict[str, Any]] = {
    "network": {"network": "imagenet", "T": 3000},
    "preset": {"preset": "imagenet"},
}
"""What pictures of ImageNet's kind are given (section 4.1, appendix B), by the option that the defence has."""


def parse_options(pairs: Sequence[str], *, argument: str) -> dict[str, Any]:
    """``["T=500", "rule=above"]`` as ``{"T": 500, "rule": "above"}``; values are JSON where they can be.

    Raises:
        CommandError: A word without ``=``, or a key given twice.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key or key in options:
            problem = "given twice" if key in options else "not of the form KEY=VALUE"
            raise CommandError(f"{argument}: {pair!r} is {problem}")
        try:
            options[key] = json.loads(text)
        except json.JSONDecodeError:
            options[key] = text
    return options


def choose_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one.

    Raises:
        CommandError: ``cuda`` on a machine without.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch sees no GPU here; `dipguard doctor` says more")
    return torch.device("cuda" if torch.cuda.is_available() and name != "cpu" else "cpu")


def make_victim(name: str, *, weights: str | None, options: Mapping[str, Any], device: torch.device) -> nn.Module:
    """The victim ``NAME`` or ``NAME:MODEL``; MODEL is its ``arch`` where it has one, its ``weights`` elsewhere.

    Raises:
        CommandError: An unknown name, bad options, no weights, or a missing library.
    """
    key, colon, model = name.partition(":")
    given = dict(options)
    with at_the_door():
        if colon:
            build = resolve({victim: row[0] for victim, row in VICTIMS.items()}, key, argument="--victim")
            by_arch = "arch" in inspect.signature(build).parameters
            if ("arch" in given) if by_arch else (weights is not None):
                raise CommandError(f"--victim {name}: the model is given twice")
            if by_arch:
                given["arch"] = model
            else:
                weights = model
        return build_victim(key, weights=weights, **given).to(device)


def choose_size(victim: nn.Module, size: int | None) -> tuple[int, int]:
    """Height and width of what the victim reads; checked by letting it read a grey picture.

    Raises:
        CommandError: Nobody knows the size, or the victim cannot read it.
    """
    own: tuple[int, int] | None = getattr(victim, "size", None) if size is None else (size, size)
    if size is not None and size < 1:
        raise CommandError(f"--size must be at least 1, got {size}")
    if own is None:
        raise CommandError("--size: this victim does not say which size it reads, so it must be given")
    height, width = own
    with at_the_door(f"--size: the victim cannot read {height}x{width} pixels: "):
        check_victim(victim, torch.full((1, 3, height, width), 0.5))
    return height, width


def make_defense(
    name: str,
    victim: nn.Module,
    *,
    seed: int,
    options: Mapping[str, Any],
    size: tuple[int, int],
    progress: bool,
) -> Purifier:
    """The defence, ready for pictures of ``size``, which settles what is neither given nor the same for all sizes.

    Raises:
        CommandError: An unknown name, bad options, a size that it cannot take, missing weights or a missing library.
    """
    with at_the_door():
        known = inspect.signature(resolve(DEFENSES, name, argument="--defense")).parameters
        suited: dict[str, Any] = {"progress": progress} if "progress" in known else {}
        for option, values in _FOR_LARGE.items():
            suited |= values if option in known and min(size) >= _LARGE else {}
        defense = build_defense(name, victim, seed=seed, **(suited | dict(options)))
        if defense.unavailable is not None:
            raise CommandError(f"--defense {name} cannot run: {defense.unavailable}; give --option weights=PATH")
        defense.output_size(*size)
    return defense
