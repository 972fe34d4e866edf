"""The matrix of attacks and defences: everything that can be checked before the work starts."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dipguard.attacks import ATTACKS, DEFENSE_AWARE, Attack, build_attack
from dipguard.checks import check_choice, check_float, check_int, check_labels
from dipguard.config import AttackConfig, VictimConfig
from dipguard.config_checks import check_attack, check_data, keys_named
from dipguard.config_matrix import MatrixConfig, RivalConfig
from dipguard.data import ImageSet, load_data
from dipguard.defenses import DEFENSES, build_defense
from dipguard.evaluation.cells import BASELINE, CLEAN, WORST, MatrixFolder, check_label, key_of
from dipguard.evaluation.metrics import decide, similarity
from dipguard.evaluation.riders import serve_all_rows
from dipguard.evaluation.settings import choose_device, data_options, number_of_classes
from dipguard.files import tensor_digest
from dipguard.registry import resolve
from dipguard.store import TraceStore, open_store
from dipguard.victims import build_victim


@dataclass(frozen=True, eq=False)
class Matrix:
    """A checked matrix, ready to run.

    Attributes:
        config: Its settings.
        clean: The images.
        victim: Attacked, and judge of every reconstruction.
        rows: The defences, by label.
        device: Where attacks and fits run.
        folder: Its files.
        decisions_clean: The victim's decisions on the clean images, [N].
        digests: Of data, victim, guide and baseline.
        store: Fits and attacked images that other runs made, if there is one.
        baseline: A classifier that meets the ladder undefended, if there is one.
    """

    config: MatrixConfig
    clean: ImageSet
    victim: nn.Module
    rows: dict[str, Any]
    device: torch.device
    folder: MatrixFolder
    decisions_clean: Tensor
    digests: dict[str, str]
    store: TraceStore | None = None
    baseline: nn.Module | None = None

    def attack(self, column: str) -> Attack:
        """The attack of a column."""
        return _attack(column, self.config.columns[column], self.victim, seed=self.config.seed)

    def column_key(self, column: str) -> str:
        """What a column's attacked images depend on."""
        return key_of(attack=self.attack(column).settings, data=self.digests["data"], victim=self.digests["victim"])

    def cell_key(self, column: str, row: str) -> str:
        """What a cell depends on."""
        guide = self.digests.get("guide", self.digests["victim"])
        return key_of(column=self.column_key(column), defense=self.rows[row].settings, guide=guide)


def prepare_matrix(config: MatrixConfig, path: Path) -> Matrix:
    """Check the settings and build data, victim and rows.

    Raises:
        TypeError, ValueError, FileNotFoundError, ImportError, RuntimeError: A setting or a file is not as it must be;
            the message names the key as the command line does.
    """
    check_int(config.seed, name="seed", low=0, high=2**32 - 1)
    check_int(config.chunk, name="chunk", low=1)
    check_int(config.processes, name="processes", low=1)
    check_int(config.figures, name="figures", low=0)
    check_data(config.data)
    for T in config.store_T:
        check_int(T, name="store_T", low=1)
    store = open_store(config.store, keep_samples=config.store_samples)
    for group in ("columns", "rows"):
        if not getattr(config, group):
            raise ValueError(f"`{group}` must name at least one, got none")
        for label in getattr(config, group):
            check_label(label, name=group)
    _check_aware(config)
    _check_ladder(config)
    device = choose_device(str(config.trainer.accelerator))
    with keys_named("data", data_options(config)), keys_named("data.options", config.data.options):
        clean = load_data(config.data.name, **data_options(config))
    victim = _victim("victim", config.victim, device)
    classes = number_of_classes(victim, clean, config.victim.name)
    check_labels(clean.labels, count=len(clean), num_classes=classes)
    similarity(clean.images[:1], clean.images[:1])
    digests = {
        "data": tensor_digest([clean.images, clean.labels, clean.indices]),
        "victim": tensor_digest(victim.state_dict().values()),
    }
    guide = victim
    if config.guide is not None:
        guide = _victim("guide", config.guide, device)
        number_of_classes(guide, clean, config.guide.name)
        digests["guide"] = tensor_digest(guide.state_dict().values())
    baseline = None
    if config.baseline is not None:
        baseline = _victim("baseline", config.baseline, device)
        number_of_classes(baseline, clean, config.baseline.name)
        digests["baseline"] = tensor_digest(baseline.state_dict().values())
    for label, attack in config.columns.items():
        check_attack(attack, name=f"columns.{label}")
        _attack(label, attack, victim, seed=config.seed)
    rows = {label: _row(label, row, guide, config, clean, store) for label, row in config.rows.items()}
    serve_all_rows(rows)
    decisions = decide(victim, clean.images)
    return Matrix(config, clean, victim, rows, device, MatrixFolder(path), decisions, digests, store, baseline)


def _check_aware(config: MatrixConfig) -> None:
    attacks = [aware.attack for aware in config.aware.values()]
    if len(set(attacks)) != len(attacks):
        # Their points would be told apart by nothing in curves.csv.
        raise ValueError(f"`aware` must name each attack once, got {', '.join(attacks)}: take a run folder for each")
    for label, aware in config.aware.items():
        check_label(label, name="aware")
        check_choice(aware.attack, DEFENSE_AWARE, name=f"aware.{label}.attack")
        for name in ("eps_255", "budgets"):
            if not getattr(aware, name):
                raise ValueError(f"`aware.{label}.{name}` must hold at least one number, got none")
        for budget in aware.budgets:
            check_int(budget, name=f"aware.{label}.budgets", low=1)
        for eps in aware.eps_255:
            check_float(eps, name=f"aware.{label}.eps_255", low=0, high=255)
        if aware.limit is not None:
            check_int(aware.limit, name=f"aware.{label}.limit", low=1)


def _check_ladder(config: MatrixConfig) -> None:
    check_float(config.ladder_eps_255, name="ladder_eps_255", low=0, high=255)
    if config.baseline is not None and BASELINE in config.rows:
        raise ValueError(f"`rows` must not name one {BASELINE!r} where `baseline` is set")
    for label, rung in config.ladder.items():
        check_label(label, name="ladder")
        if label in (CLEAN, WORST):
            raise ValueError(f"`ladder` must not name a rung {label!r}: the tables have a line of that name")
        check_choice(rung.attack, {**ATTACKS, **DEFENSE_AWARE}, name=f"ladder.{label}.attack")
        check_int(rung.batch_size, name=f"ladder.{label}.batch_size", low=1)
        if rung.limit is not None:
            check_int(rung.limit, name=f"ladder.{label}.limit", low=1)
        for row in rung.rows or ():
            check_choice(row, {**config.rows, BASELINE: None}, name=f"ladder.{label}.rows")
        if rung.eps_255 is not None:
            check_float(rung.eps_255, name=f"ladder.{label}.eps_255", low=0, high=255)
            if rung.check is None and rung.eps_255 != config.ladder_eps_255:
                # The worst case over attacks of different budgets would be nobody's.
                raise ValueError(
                    f"`ladder.{label}.eps_255` must be `ladder_eps_255`={config.ladder_eps_255:g} or null, got "
                    f"{rung.eps_255:g}; only a rung with a `check` may have another"
                )


def _victim(key: str, config: VictimConfig, device: torch.device) -> nn.Module:
    with keys_named(key, ("weights",)), keys_named(f"{key}.options", config.options):
        return build_victim(config.name, weights=config.weights, **config.options).to(device)


def _attack(label: str, config: AttackConfig, victim: nn.Module, *, seed: int) -> Attack:
    with keys_named(f"columns.{label}", ("eps_255",)), keys_named(f"columns.{label}.options", config.options):
        options = {"seed": seed, "batch_size": config.batch_size, **config.options}
        return build_attack(config.name, victim, eps_255=config.eps_255, **options)


def _row(label: str, config: RivalConfig, guide: nn.Module, matrix: MatrixConfig, clean: ImageSet, store: Any) -> Any:
    options = dict(config.options)
    with keys_named(f"rows.{label}", ("name", "weights")), keys_named(f"rows.{label}.options", options):
        known = inspect.signature(resolve(DEFENSES, config.name, argument="name")).parameters
        # Results depend on none of these; the matrix keeps them for all rows.
        own = {"stack_size": matrix.chunk, "progress": False, "accelerator": str(matrix.trainer.accelerator)}
        if store is not None and options.get("patience") is None:  # a fit that tau and K can shorten is nobody else's
            own |= {"store": store, "store_T": tuple(matrix.store_T)}
        options |= {name: value for name, value in own.items() if name in known}
        row = build_defense(config.name, guide, seed=matrix.seed, weights=config.weights, **options)
        if row.unavailable is None:
            row.output_size(*clean.images.shape[-2:])
    return row
