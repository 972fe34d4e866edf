"""From the settings to a matrix: everything that can be checked is checked before the work starts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra.utils
import torch
from torch import nn

from dipguard.attacks import ATTACKS, Attack, Cost, DefendedVictim, build_attack
from dipguard.checks import check_choice, check_int, check_labels
from dipguard.config import RunConfig
from dipguard.data import ImageSet, load_data
from dipguard.defenses import DEFENSES, Defense, build_defense
from dipguard.defenses.dip import DIPDefense
from dipguard.evaluation.cell import BASELINE, CHECKS, CLEAN, WORST, Cell, Target, fitting_options, name_of
from dipguard.evaluation.matrix import Matrix
from dipguard.evaluation.metrics import decide, similarity
from dipguard.files import tensor_digest
from dipguard.registry import lookup, options_of, table_of
from dipguard.store import Store, digest_of, numerics, open_store, victim_digest
from dipguard.victims import build_victim, check_victim

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
"""A label of an attack or a defence becomes the name of a folder."""
PROGRAM_KEYS = ("accelerator", "enable_progress_bar")
"""Keys of ``trainer`` that concern the whole run; the others go to the Trainers of the fits."""


def prepare(config: RunConfig, folder: str | Path) -> Matrix:
    """Check the settings and build data, victim, defences and attacks. Nothing is written.

    Args:
        config: The settings.
        folder: The run folder. What an earlier run left in its store is not done again.

    Raises:
        TypeError, ValueError, FileNotFoundError, ImportError, RuntimeError: A setting or a file is not as it must be;
            the message names the key as on the command line.
    """
    path = Path(folder)
    attacks = _checked_attacks(config)
    _check_labels("defenses", config.defenses)
    if config.baseline is not None and BASELINE in config.defenses:
        raise ValueError(f"`defenses` must not name one {BASELINE!r} if `baseline` is set")
    shared = open_store(config.store, keep_samples=config.store_samples)
    device = choose_device(str(config.trainer.get("accelerator", "auto")))
    data = {key: value for key, value in config.data.items() if key != "mirrors"}
    with keys_named("data", data):
        clean: ImageSet = _build(data, load_data)
    similarity(clean.images[:1], clean.images[:1])  # an image that is too small for SSIM
    victims = {
        key: _victim(key, node, clean, device)
        for key in ("victim", "surrogate", "baseline")
        if (node := getattr(config, key)) is not None
    }
    asked = victims.get("surrogate", victims["victim"])
    made_with = {
        "versions": numerics(),
        "device": device.type,
        "callbacks": config.callbacks,
        "surrogate": victim_digest(asked) if "surrogate" in victims else None,
    }
    targets = {}
    for label, node in {**config.defenses, **({BASELINE: {"name": "none"}} if "baseline" in victims else {})}.items():
        key = "baseline" if "baseline" in victims and label == BASELINE else "victim"
        bare = _defense(label, node, asked if key == "victim" else victims[key], config, clean)
        defense = bare
        if shared is not None and hasattr(bare, "store") and not config.callbacks:  # callbacks may change a fit
            defense = _defense(label, node, asked, config, clean, store=shared, store_T=tuple(config.store_T))
        targets[label] = Target(
            label=label,
            victim=victims[key],
            victim_name=name_of(getattr(config, key)),
            surrogate=name_of(config.surrogate) if config.surrogate is not None and key == "victim" else "",
            defense=defense,
            bare=bare,
            depends={**made_with, "victim": victim_digest(victims[key]), "defense": bare.settings},
            decisions_clean=decide(victims[key], clean.images),
            cut=_cut(node, bare),
        )
    cells = _cells(config, attacks, targets, clean)
    own = Store(path / "store") if shared is None else shared
    return Matrix(config, path, clean, device, own, targets, cells)


def choose_device(accelerator: str) -> torch.device:
    """The device of ``trainer.accelerator``; ``auto`` is the GPU if there is one.

    Raises:
        ValueError: Not ``auto``, ``cpu`` or ``gpu``, or ``gpu`` without one.
    """
    check_choice(accelerator, ("auto", "cpu", "gpu", "cuda"), name="trainer.accelerator")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(f"`trainer.accelerator` must be auto or cpu on a machine without a GPU, got {accelerator!r}")
    use_gpu = accelerator != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if use_gpu else torch.device("cpu")


@contextmanager
def keys_named(group: str, names: Iterable[str]) -> Iterator[None]:
    """Give the arguments in an error's message the names that they have on the command line.

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


def _checked_attacks(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The attacks' nodes, checked; an attack suite begins with clean images."""
    _check_labels("attacks", config.attacks)
    if WORST in config.attacks:
        raise ValueError(f"`attacks` must not name one {WORST!r}: the tables have a row of that name")
    labels = {**config.defenses, **({} if config.baseline is None else {BASELINE: None})}
    for label, node in config.attacks.items():
        key = f"attacks.{label}"
        if node.get("limit") is not None:
            check_int(node["limit"], name=f"{key}.limit", low=1)
        if node.get("check") is not None:
            check_choice(node["check"], CHECKS, name=f"{key}.check")
        for defense in node.get("only") or ():
            check_choice(defense, labels, name=f"{key}.only")
    attacks = dict(config.attacks)
    if any(node.get("number") for node in attacks.values()):
        if attacks.get(CLEAN, {"name": "none"}).get("name") != "none":
            raise ValueError(f"`attacks.{CLEAN}` must be the attack 'none' beside attacks with a `number`")
        attacks = {CLEAN: {"name": "none"}, **attacks}
    return attacks


def _check_labels(group: str, labels: Mapping[str, Any]) -> None:
    if not labels:
        raise ValueError(f"`{group}` must name at least one, got none")
    for label in labels:
        if not LABEL.fullmatch(label):
            raise ValueError(f"`{group}` must be named by letters, digits and _ . + - alone, got {label!r}")


def _build(node: Mapping[str, Any], by_name: Any, *args: Any, **more: Any) -> Any:
    """What a node of the config describes: an entry of a table, or the class that ``_target_`` points to."""
    options = {key: value for key, value in node.items() if key not in ("name", "_target_")}
    if "_target_" in node:
        return hydra.utils.get_object(str(node["_target_"]))(*args, **options, **more)
    return by_name(node["name"], *args, **options, **more)


def _victim(key: str, node: Mapping[str, Any], clean: ImageSet, device: torch.device) -> nn.Module:
    with keys_named(key, node):
        victim: nn.Module = _build(node, build_victim)
    victim = victim.to(device)
    try:
        classes = check_victim(victim, clean.images[:2]).shape[1]
    except RuntimeError as error:
        size = "x".join(map(str, clean.images.shape[-2:]))
        raise ValueError(f"`{key}` {name_of(node)} cannot read images of {size} pixels: {error}") from error
    if key == "victim":
        check_labels(clean.labels, count=len(clean), num_classes=classes)
    return victim


def _defense(
    label: str, node: Mapping[str, Any], victim: nn.Module, config: RunConfig, clean: ImageSet, **own: Any
) -> Defense:
    with keys_named(f"defenses.{label}", node):
        kind = _class_of(node, "defenses", DEFENSES)
        if isinstance(kind, type) and issubclass(kind, DIPDefense):
            trainer = {key: value for key, value in config.trainer.items() if key not in PROGRAM_KEYS}
            own |= {"progress": False, "trainer": hydra.utils.instantiate(trainer, _convert_="all") or None}
        defense: Defense = _build(node, build_defense, victim, seed=config.seed, **own)
        if defense.unavailable is None:
            defense.output_size(*clean.images.shape[-2:])
    return defense


def _class_of(node: Mapping[str, Any], group: str, table: Mapping[str, str]) -> Any:
    if "_target_" in node:
        return hydra.utils.get_object(str(node["_target_"]))
    return lookup(table_of(group, table), str(node.get("name")), argument="name")


def _cut(node: Mapping[str, Any], defense: Defense) -> str:
    """Whether a fit is shorter than its defence's default, in words."""
    T, steps = node.get("T"), defense.steps_per_image
    if "name" not in node or T is None or not steps:
        return ""
    default = options_of(table_of("defenses", DEFENSES)[str(node["name"])]).get("T")
    if not isinstance(default, int) or T >= default:
        return ""
    return f"{steps:,} of {steps * default // T:,} DIP steps an image"


def _cells(
    config: RunConfig, attacks: Mapping[str, dict[str, Any]], targets: Mapping[str, Target], clean: ImageSet
) -> list[Cell]:
    """All cells, attack by attack, each with its attack built and its keys."""
    cells = []
    for label, node in attacks.items():
        adaptive = bool(_class_of(node, "attacks", ATTACKS).adaptive)
        part = clean.select(limit=node.get("limit"))
        data = tensor_digest([part.images, part.labels, part.indices])
        for target in targets.values():
            options, why = fitting_options(node, target, adaptive=adaptive)
            attack: Attack | None = None
            if why is None:
                with keys_named(f"attacks.{label}", [*node, *options]):
                    victim = DefendedVictim(target.victim, target.bare) if adaptive else target.victim
                    named = {key: node[key] for key in ("name", "_target_") if key in node}
                    attack = _build(named | options, build_attack, victim, seed=config.seed)
            eps_255 = _budget(options, attack)
            cell = Cell(label, node, target, part, options, attack, why, eps_255, _in_suite(label, node, config))
            if attack is not None:
                _check_suite(cell, config)
                depends = target.depends
                own = depends if adaptive else [depends[key] for key in ("versions", "device", "victim")]
                attacked = digest_of([attack.settings, data, own])
                cost = attack.estimate(len(part)) if adaptive else Cost()
                cell = replace(cell, attack_key=attacked, key=digest_of([attacked, depends]), cost=cost)
            cells.append(cell)
    return cells


def _budget(options: Mapping[str, Any], attack: Attack | None) -> float | None:
    """The attack's L-infinity budget in levels of 0 to 255, the largest if there are several; None without one."""
    own = options.get("eps_255") if attack is None else attack.eps_255
    return max(options.get("radii_255") or [own])


def _in_suite(label: str, node: Mapping[str, Any], config: RunConfig) -> bool:
    """Whether an attack belongs to the suite: clean images, and attacks with a number or a check."""
    suite = any(other.get("number") for other in config.attacks.values())
    return suite and bool(label == CLEAN or node.get("number") or node.get("check"))


def _check_suite(cell: Cell, config: RunConfig) -> None:
    """Refuse a worst case over attacks of different budgets."""
    if cell.suite and not cell.check and cell.label != CLEAN and cell.eps_255 != config.eps_255:
        got = "none" if cell.eps_255 is None else f"{cell.eps_255:g}"
        raise ValueError(
            f"`attacks.{cell.label}.eps_255` must be `eps_255`={config.eps_255:g}, got {got}; only an attack with a "
            "`check`, or without a `number`, may have another"
        )
