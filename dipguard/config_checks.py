"""Ranges of the settings, checked before anything runs. Kinds of values and choices are checked by Hydra already."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

from dipguard.checks import check_float, check_int
from dipguard.config import AttackConfig, DataConfig, DefenseConfig, FitConfig, NetworkConfig, TrainConfig
from dipguard.config_choices import DefenseName

_log = logging.getLogger(__name__)

MIRROR_ONLY = ("trust", "mirror", "beta_step")
"""Keys of ``defense`` that ``dipguard`` alone has."""
MIRROR = ("T", "t0", "every", "beta", *MIRROR_ONLY)
"""Keys of ``defense`` that ``dipguard`` has; the others are ``paper``'s."""

MOST_STEPS = 1_000_000
"""Upper bound of ``defense.T``: a value beyond it is a slip of the pen."""


def validate(config: TrainConfig) -> TrainConfig:
    """Return ``config`` if every value can be worked with.

    Raises:
        TypeError, ValueError: One cannot; the message names the key as the command line does, such as ``defense.tau``,
            the value and what is allowed.
    """
    check_int(config.seed, name="seed", low=0, high=2**32 - 1)
    check_data(config.data)
    check_attack(config.attack, name="attack")
    if config.defense.name == DefenseName.dipguard:
        _check_mirror(config)
    else:
        _check_defense(config.defense)
        papers = tuple(field.name for field in fields(DefenseConfig) if field.name not in MIRROR_ONLY)
        _refuse(config.defense, DefenseConfig(), keep=papers, group="defense", owner="dipguard")
    _check_fit(config.fit)
    check_int(config.report.figures, name="report.figures", low=0)
    return config


def check_attack(attack: AttackConfig, *, name: str) -> None:
    """Check what every attack has; see :func:`validate`."""
    if attack.eps_255 is not None:
        _check_positive(attack.eps_255, name=f"{name}.eps_255", high=255.0)
    check_int(attack.batch_size, name=f"{name}.batch_size", low=1)


def check_data(data: DataConfig) -> None:
    """Check what every data set has; see :func:`validate`."""
    if data.limit is not None:
        check_int(data.limit, name="data.limit", low=1)
    check_int(data.offset, name="data.offset", low=0)
    if data.size is not None:
        check_int(data.size, name="data.size", low=1)
    if data.label_base is not None:
        check_int(data.label_base, name="data.label_base", low=0, high=1)


def _check_defense(defense: DefenseConfig) -> None:
    from dipguard.decision import sampled_steps

    check_int(defense.T, name="defense.T", low=1, high=MOST_STEPS)
    with keys_named("defense", ("T", "decisions", "every")):
        steps = sampled_steps(defense.T, decisions=defense.decisions, every=defense.every)
    check_float(defense.tau, name="defense.tau", low=0.0, high=1.0)
    check_int(defense.t0, name="defense.t0", low=0)
    check_int(defense.K, name="defense.K", low=1)
    check_float(defense.beta, name="defense.beta", low=0.0)
    check_int(defense.N, name="defense.N", low=1)
    if defense.K_max is not None:
        check_int(defense.K_max, name="defense.K_max", low=1)
        if defense.K > defense.K_max:
            raise ValueError(f"`defense.K` must be at most `defense.K_max`={defense.K_max}, got {defense.K}")
    end = len(steps) if defense.t0_unit == "samples" else defense.T
    if defense.t0 >= end:
        # Allowed, since the paper's own fallback covers it, but hardly ever meant: a short trial with the default t0.
        _log.warning(
            "`defense.t0`=%d is past the end of the fit (%d %s): no crossing can count",
            defense.t0,
            end,
            defense.t0_unit,
        )


def _check_mirror(config: TrainConfig) -> None:
    defense = config.defense
    T = check_int(defense.T, name="defense.T", low=2, high=MOST_STEPS)
    t0 = check_int(defense.t0, name="defense.t0", low=0, high=T - 1)
    check_int(defense.every, name="defense.every", low=1, high=T - t0)
    check_float(defense.trust, name="defense.trust", low=0.0, high=1.0)
    check_float(defense.beta, name="defense.beta", low=0.0)
    check_float(defense.beta_step, name="defense.beta_step", low=1e-3)
    _refuse(defense, DefenseConfig(), keep=("name", *MIRROR), group="defense", owner="paper")
    _refuse(config.network, NetworkConfig(), keep=(), group="network", owner="paper")
    for key, value in (("fit.patience", config.fit.patience), ("store", config.store)):
        if value is not None:
            raise ValueError(f"`{key}` must be null with defense=dipguard, got {value}; defense=paper has it")


def _refuse(given: Any, unset: Any, *, keep: tuple[str, ...], group: str, owner: str) -> None:
    """Refuse what only the other defence knows: it would be ignored without a word."""
    for field in fields(given):
        value, default = getattr(given, field.name), getattr(unset, field.name)
        if field.name not in keep and value != default:
            raise ValueError(
                f"`{group}.{field.name}` is a setting of defense={owner}, got {value} with another defence"
            )


def _check_fit(fit: FitConfig) -> None:
    for name, value in (("stack_size", fit.stack_size), ("patience", fit.patience)):
        if value is not None:
            check_int(value, name=f"fit.{name}", low=1)
    _check_positive(fit.lr, name="fit.lr")
    if fit.z_scale is not None:
        _check_positive(fit.z_scale, name="fit.z_scale")
    check_float(fit.jitter, name="fit.jitter", low=0.0)


def _check_positive(value: float, *, name: str, high: float | None = None) -> None:
    if check_float(value, name=name, low=0.0, high=high) == 0:
        raise ValueError(f"`{name}` must be above 0, got {value}")


@contextlib.contextmanager
def keys_named(group: str, names: Iterable[str]) -> Iterator[None]:
    """Give the arguments in an error of a lower room the names that they have on the command line.

    Args:
        group: The config group, such as ``data``.
        names: The arguments, such as ``path``, which is ``data.path`` on the command line.
    """
    try:
        yield
    except (TypeError, ValueError, OSError) as error:
        message = str(error)
        for name in names:
            message = message.replace(f"`{name}`", f"`{group}.{name}`")
        kind = next(kind for kind in (FileNotFoundError, TypeError, ValueError, OSError) if isinstance(error, kind))
        raise kind(message) from error
