"""From the settings to a matrix: everything that can be checked is checked before the work starts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import hydra.utils
import torch
from torch import nn

from dipguard.attacks import Attack, Cost, DefendedVictim, build_attack
from dipguard.checks import check_labels
from dipguard.classifier import class_names, input_size
from dipguard.config import RunConfig, name_of, names_of
from dipguard.data import ImageSet, load_data
from dipguard.data.base import shift_warning
from dipguard.decision.quality import SMALLEST_SIDE
from dipguard.defenses import Defense, DIPGuard, build_defense
from dipguard.defenses.dip import DIPDefense
from dipguard.evaluation.cell import BASELINE, CLEAN, WORST, Cell, Target, fitting_options, victim_name
from dipguard.evaluation.matrix import Matrix
from dipguard.evaluation.metrics import decide
from dipguard.evaluation.sweep_job import targets_in
from dipguard.files import as_json, tensor_digest
from dipguard.fit import isolated_trainer, make_trainer
from dipguard.fit.module import check_trainer_made
from dipguard.registry import foreign_class
from dipguard.store import Store, digest_of, numerics, open_store, victim_digest
from dipguard.victims import build_victim, check_victim

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")  # it becomes the name of a folder
PROGRAM_KEYS = ("accelerator", "enable_progress_bar")
"""Keys of ``trainer`` that concern the whole run; the others go to the Trainers of the fits."""
Made = TypeVar("Made")
NAMED = (FileNotFoundError, TypeError, ValueError, OSError, RuntimeError)
"""Errors whose messages may name an argument."""


def prepare(config: RunConfig, folder: str | Path) -> Matrix:
    """Check the settings and build data, victim, defences and attacks. Nothing is written.

    What an earlier run left in the store of the run folder ``folder`` is not done again.

    Raises:
        TypeError, ValueError, FileNotFoundError, ImportError, RuntimeError: A setting or a file is not as it must be;
            the message names the key as on the command line.
    """
    attacks = _checked_attacks(config)
    _check_labels("defenses", config.defenses)
    if config.baseline is not None and BASELINE in config.defenses:
        raise ValueError(f"`defenses` must not name one {BASELINE!r} if `baseline` is set")
    # Several rows of `paper` mostly differ in the stitch alone: one fit serves all.
    several = sum(node.get("name") == "paper" for node in config.defenses.values()) > 1
    place = str(Path(folder) / "store") if config.store is None and several else config.store
    shared = open_store(place, keep_samples=config.store_samples)
    device = choose_device(str(config.trainer.get("accelerator", "auto")))
    callbacks = _check_callbacks(config)
    _trainer(config)
    data = {key: value for key, value in config.data.items() if key != "mirrors"}
    with keys_named("data", data):
        clean = _made(_build(_nested(data), load_data), ImageSet, name="data")
    if min(clean.images.shape[-2:]) < SMALLEST_SIDE:
        height, width = clean.images.shape[-2:]
        least = f"at least {SMALLEST_SIDE} pixels a side for SSIM"
        raise ValueError(f"`data` must have images of {least} (`data.size`), got {height}x{width}")
    nodes = {key: getattr(config, key) for key in ("victim", "surrogate", BASELINE)}
    built = {key: _victim(key, node, clean, device) for key, node in nodes.items() if node is not None}
    victims = {key: victim for key, (victim, _) in built.items()}
    with keys_named("data", data):
        judges = {key: one for key, one in built.items() if key != "surrogate"}
        labelled = {key: clean.labelled_for(class_names(one), outputs=number) for key, (one, number) in judges.items()}
    clean = labelled["victim"]
    for key, images in labelled.items():
        check_labels(images.labels, count=len(clean), num_classes=built[key][1])
        if not torch.equal(images.labels, clean.labels):
            raise ValueError(f"`{key}` must have the classes of `victim` in the same order, but its labels differ")
    digests = {key: _digest(one, nodes[key]) for key, one in victims.items()}
    decisions = {key: decide(one, clean.images) for key, (one, _) in judges.items()}
    shifted = shift_warning(clean.labels, decisions["victim"], outputs=built["victim"][1])
    if shifted is not None:
        warnings.warn(shifted, UserWarning, stacklevel=2)
    made_with = {
        "versions": numerics(),
        "device": device.type,
        "callbacks": callbacks,
        "surrogate": digests.get("surrogate"),
    }
    targets = {}
    for label, node in (config.defenses | ({BASELINE: {"name": "none"}} if BASELINE in victims else {})).items():
        key = BASELINE if label == BASELINE and BASELINE in victims else "victim"
        asked = "surrogate" if key == "victim" and "surrogate" in victims else key
        bare = defense = _defense(label, node, victims[asked], config, clean)
        if shared is not None and isinstance(bare, DIPGuard) and not config.callbacks:  # callbacks may change a fit
            defense = _defense(label, node, victims[asked], config, clean, store=shared, store_T=tuple(config.store_T))
        targets[label] = Target(
            label=label,
            node=config.defenses.get(label),
            victim=victims[key],
            victim_name=victim_name(nodes[key]),
            surrogate=victim_name(nodes[asked]) if asked == "surrogate" else "",
            defense=defense,
            bare=bare,
            depends={**made_with, "victim": digests[key], "defense": bare.settings},
            decisions_clean=decisions[key],
        )
    _check_store_options(config, targets)
    cells = _cells(config, attacks, targets, clean)
    own = Store(Path(folder) / "store") if shared is None else shared
    return Matrix(config, Path(folder), clean, device, own, targets, cells)


def choose_device(accelerator: str) -> torch.device:
    """The device of ``trainer.accelerator``; ``auto`` is the GPU if there is one. ValueError for a GPU without one."""
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(f"`trainer.accelerator` must be auto or cpu on a machine without a GPU, got {accelerator!r}")
    use_gpu = accelerator != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if use_gpu else torch.device("cpu")


@contextmanager
def keys_named(group: str, names: Iterable[str]) -> Iterator[None]:
    """Give the arguments in an error's message their names on the command line: ``data.path`` for ``path``."""
    try:
        yield
    except NAMED as error:
        message = str(error)
        for name in names:
            message = message.replace(f"`{name}`", f"`{group}.{name}`")
        if group in ("surrogate", BASELINE):  # they are victims, whose messages say so
            message = message.replace("`victim.", f"`{group}.")
        raise next(kind for kind in NAMED if isinstance(error, kind))(message) from error


def _check_callbacks(config: RunConfig) -> dict[str, Any]:
    """The callbacks, checked, with what a result depends on besides their arguments: the source of a class."""
    checked = {}
    for label, node in config.callbacks.items():
        try:
            made = hydra.utils.instantiate(node)
        except Exception as error:  # whatever the class raises
            raise ValueError(f"`callbacks.{label}` cannot be made: {error}") from error
        if not hasattr(made, "on_train_start"):
            raise TypeError(f"`callbacks.{label}._target_` must be a callback of Lightning, got {node['_target_']}")
        checked[label] = {**node, **foreign_class(made)}
    return checked


def _check_store_options(config: RunConfig, targets: Mapping[str, Target]) -> None:
    """Refuse options of stored fits without a store; warn where no defence of this run stores its fits.

    Other jobs of the same sweep may have one that does.
    """
    stored = any(target.defense is not target.bare for target in targets.values())
    for key in ("store_T", "store_samples"):
        value = getattr(config, key)
        if value and config.store is None:
            raise ValueError(f"`{key}` needs a `store`, the folder of the fits that it is about, got {key}={value}")
        if value and not stored:
            text = f"`{key}`={value} changes nothing: only fits of `paper` without `callbacks` are stored"
            warnings.warn(text, UserWarning, stacklevel=3)


def _checked_attacks(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The attacks' nodes, checked; an attack suite begins with clean images."""
    _check_labels("attacks", config.attacks)
    if WORST in config.attacks:
        raise ValueError(f"`attacks` must not name one {WORST!r}: the tables have a row of that name")
    if not any(node.get("number") for node in config.attacks.values()):
        for label, node in config.attacks.items():
            if node.get("check"):
                raise ValueError(f"`attacks.{label}.check` needs attacks with a `number`, got {node['check']!r} alone")
        return config.attacks
    if config.attacks.get(CLEAN, {"name": "none"}).get("name") != "none":
        raise ValueError(f"`attacks.{CLEAN}` must be the attack 'none' beside attacks with a `number`")
    return {CLEAN: {"name": "none"}, **config.attacks}


def _check_labels(group: str, labels: Mapping[str, Any]) -> None:
    if not labels:
        raise ValueError(f"`{group}` must name at least one, got none")
    for label in labels:
        if not LABEL.fullmatch(label):
            raise ValueError(f"`{group}` must be named by letters, digits and _ . + - alone, got {label!r}")


def _build(node: Mapping[str, Any], by_name: Any, *args: Any, **more: Any) -> Any:
    """What a node of the config describes: an entry of a table, or what ``_target_`` points to makes."""
    options = {key: value for key, value in node.items() if key not in ("name", "_target_")}
    if "_target_" in node:
        return hydra.utils.get_object(str(node["_target_"]))(*args, **options, **more)
    return by_name(node["name"], *args, **options, **more)


def _nested(node: Mapping[str, Any]) -> dict[str, Any]:
    """A node of data or a victim, whose options with a ``_target_`` of their own are made.

    The keys of results hold the images and the classifier themselves; of defences and attacks they hold the options.
    """
    make = partial(hydra.utils.instantiate, _convert_="all")
    return {key: make(value) if isinstance(value, dict) else value for key, value in node.items()}


def _made(what: Any, kind: type[Made], *, name: str) -> Made:
    """Return what a node has made; TypeError if it is no ``kind``."""
    if not isinstance(what, kind):
        raise TypeError(f"`{name}` must make a {kind.__module__}.{kind.__qualname__}, got a {type(what).__name__}")
    return what


def _victim(key: str, node: Mapping[str, Any], clean: ImageSet, device: torch.device) -> tuple[nn.Module, int]:
    """The victim, and the number of its classes."""
    with keys_named(key, node):
        victim = _made(_build(_nested(node), build_victim), nn.Module, name=key).to(device)
    (height, width), own = clean.images.shape[-2:], input_size(victim)
    if own not in (None, (height, width)):
        text = f"`{key}` was made for images of {own[0]}x{own[1]} pixels and gets {height}x{width} (`data.size`)"
        warnings.warn(text, UserWarning, stacklevel=3)
    return victim, check_victim(victim, clean.images[:2], name=key).shape[1]


def _digest(victim: nn.Module, node: Mapping[str, Any]) -> str:
    """The victim's digest; of a class that is not ours with its settings, which the digest may not find in it."""
    named = [] if "_target_" in node else [names_of("victim")[node["name"]]]
    ours, found = all(path.startswith("dipguard.") for path in [*named, *targets_in(node)]), victim_digest(victim)
    return found if ours else digest_of([found, as_json(node)])


def _defense(
    label: str, node: Mapping[str, Any], victim: nn.Module, config: RunConfig, clean: ImageSet, **own: Any
) -> Defense:
    with keys_named(f"defenses.{label}", node):
        made = _build(node, build_defense, victim, seed=config.seed, **own)
        defense: Defense = _made(made, Defense, name=f"defenses.{label}")
        if isinstance(defense, DIPDefense):
            defense.trainer = _trainer(config)
            defense.progress = False  # the run has a bar of its own
        if defense.unavailable is None:
            defense.output_size(*clean.images.shape[-2:])
    return defense


def _trainer(config: RunConfig) -> dict[str, Any]:
    """Arguments for the fits' Trainers, of which one is made to check them."""
    cpu, given = torch.device("cpu"), {key: value for key, value in config.trainer.items() if key not in PROGRAM_KEYS}
    try:
        with isolated_trainer(cpu):
            made: dict[str, Any] = hydra.utils.instantiate(given, _convert_="all")
            check_trainer_made(make_trainer(1, device=cpu, trainer=made))
    except Exception as error:  # Lightning's have no common base
        raise ValueError(f"`trainer` holds what a fit cannot have: {error}") from error
    return made


def _cells(
    config: RunConfig, attacks: Mapping[str, dict[str, Any]], targets: Mapping[str, Target], clean: ImageSet
) -> list[Cell]:
    """All cells, attack by attack, each with its attack built and its keys."""
    cells = []
    suite = any(node.get("number") for node in attacks.values())
    limits = {node.get("limit") for node in attacks.values()}
    parts = {limit: clean.select(limit=limit) if limit else clean for limit in limits}
    digests = {limit: tensor_digest([part.images, part.labels, part.indices]) for limit, part in parts.items()}
    for label, node in attacks.items():
        path = node.get("_target_") or names_of("attack")[node["name"]].replace(":", ".")
        kind: type[Attack] = hydra.utils.get_object(path)
        if not (isinstance(kind, type) and issubclass(kind, Attack)):
            raise TypeError(f"`attacks.{label}` must be a subclass of dipguard.attacks.Attack, got {path}")
        adaptive = kind.adaptive
        if adaptive and config.callbacks:  # a callback may change a fit, and an attack on the defence makes its own
            raise ValueError(f"`callbacks` do not reach the fits that `attacks.{label}` attacks; remove one of them")
        for key in ("made_on", "intermediate"):
            if node.get(key) and not adaptive:
                raise ValueError(f"`attacks.{label}.{key}` is for adaptive attacks, got it for {name_of(node)!r}")
        if node.get("made_on") and node.get("only") is not None and node["made_on"] not in node["only"]:
            raise ValueError(f"`attacks.{label}.only` must have {node['made_on']!r}, on which it is made")
        limit = node.get("limit")
        in_suite = suite and bool(label == CLEAN or node.get("number") or node.get("check"))
        for target in targets.values():
            source = targets.get(node.get("made_on") or "", target)
            options, why = fitting_options(node, target, kind=kind, source=source)
            attack: Attack | None = None
            if why is None:
                with keys_named(f"attacks.{label}", [*node, *options]):
                    victim = DefendedVictim(source.victim, source.bare) if adaptive else target.victim
                    named = {key: node[key] for key in ("name", "_target_") if key in node}
                    attack = _build(named | options, build_attack, victim, seed=config.seed)
            # The largest budget, if there are several.
            eps_255 = options.get("eps_255") if attack is None else max(options.get("radii_255") or [attack.eps_255])
            judge = config.judge if in_suite and target.defense.random and not node.get("check") else 1
            cell = Cell(label, node, target, parts[limit], options, attack, why, eps_255, in_suite, source, judge=judge)
            if attack is not None:
                _check_suite(cell, config)
                depends = target.depends
                own = source.depends if adaptive else [depends[key] for key in ("versions", "device", "victim")]
                attacked = digest_of([attack.settings, digests[limit], own])
                cost = attack.estimate(len(cell.clean)) if adaptive and source is target else Cost()
                cell = replace(cell, attack_key=attacked, key=digest_of([attacked, depends]), cost=cost)
            cells.append(cell)
    return cells


def _check_suite(cell: Cell, config: RunConfig) -> None:
    """Refuse a worst case over attacks of different budgets."""
    if cell.suite and not cell.check and cell.label != CLEAN and cell.eps_255 != config.eps_255:
        got = "none" if cell.eps_255 is None else f"{cell.eps_255:g}"
        raise ValueError(
            f"`attacks.{cell.label}.eps_255` must be `eps_255`={config.eps_255:g}, got {got}; only an attack with a "
            "`check`, or without a `number`, may have another"
        )
