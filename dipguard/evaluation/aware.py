"""Defence-aware attacks on each row (section 4.3): the curves of Figures 4 and 5, cell by cell, with what they cost."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from dipguard.attacks import Cost, DefenseAwareAttack, build_defense_aware_attack
from dipguard.attacks.bpda import BPDA
from dipguard.attacks.hopskipjump import HopSkipJump
from dipguard.config_matrix import AwareConfig
from dipguard.evaluation.cells import key_of
from dipguard.evaluation.matrix import Matrix
from dipguard.evaluation.results import csv_text, defense_name
from dipguard.evaluation.riders import unstored
from dipguard.evaluation.statistics import wilson
from dipguard.files import read_json, write_json, write_text

_log = logging.getLogger(__name__)

FIELDS = (
    "data", "victim", "attack", "row", "defense", "eps_255", "budget", "n", "correct", "accuracy", "low", "high",
    "purifications", "dip_steps", "victim_queries", "seconds",
)  # fmt: skip


def estimate_aware(matrix: Matrix) -> dict[str, Cost]:
    """What each defence-aware attack will cost on each row, by ``name x row``; nothing is run.

    Raises:
        TypeError, ValueError: An attack's settings are out of range.
    """
    costs = {}
    for name, config in matrix.config.aware.items():
        count = min(len(matrix.clean), config.limit or len(matrix.clean))
        for row in _rows(matrix):
            cost = Cost()
            for eps in _runs(config):
                attack = _attack(matrix, config, row, eps)
                if isinstance(attack, BPDA):
                    cost += attack.estimate(count, iterations=max(config.budgets))
                elif isinstance(attack, HopSkipJump):
                    cost += attack.estimate(count, queries=max(config.budgets))
            costs[f"{name} x {row}"] = cost
    return costs


def run_aware(matrix: Matrix) -> None:
    """Run what the folder does not hold yet, and write curves.csv after each cell."""
    for name, config in matrix.config.aware.items():
        for row in _rows(matrix):
            for eps in _runs(config):
                path = matrix.folder.path / "curves" / name / row / f"{'all' if eps is None else f'{eps:g}'}.json"
                attack = _attack(matrix, config, row, eps)
                key = _key(matrix, config, attack, row)
                if path.is_file() and read_json(path).get("key") == key:
                    continue
                _log.info("%s x %s, eps %s", name, row, "all" if eps is None else f"{eps:g}")
                points = _run(matrix, config, attack, row, eps)
                write_json(path, {"key": key, "attack": attack.settings, "points": points})
                write_curves_csv(matrix)


def write_curves_csv(matrix: Matrix) -> None:
    """Write curves.csv from the stored cells of these settings."""
    rows: list[dict[str, Any]] = []
    for name, config in matrix.config.aware.items():
        for row in _rows(matrix):
            for eps in _runs(config):
                path = matrix.folder.path / "curves" / name / row / f"{'all' if eps is None else f'{eps:g}'}.json"
                key = _key(matrix, config, _attack(matrix, config, row, eps), row)
                saved = read_json(path) if path.is_file() else {}
                if saved.get("key") == key:
                    rows += saved["points"]
    if rows:
        write_text(matrix.folder.path / "curves.csv", csv_text(FIELDS, rows))


def _rows(matrix: Matrix) -> list[str]:
    return [label for label, row in matrix.rows.items() if row.unavailable is None]


def _runs(config: AwareConfig) -> list[float | None]:
    """One run a budget for BPDA; HopSkipJump's one run serves all."""
    return [None] if config.attack == "hopskipjump" else list(config.eps_255)


def _attack(matrix: Matrix, config: AwareConfig, row: str, eps: float | None) -> DefenseAwareAttack:
    options = dict(config.options)
    options["queries" if eps is None else "steps"] = max(config.budgets)
    return build_defense_aware_attack(
        config.attack,
        matrix.victim,
        unstored(matrix.rows[row]),
        eps_255=eps,
        seed=matrix.config.seed,
        batch_size=config.batch_size,
        **options,
    )


def _key(matrix: Matrix, config: AwareConfig, attack: DefenseAwareAttack, row: str) -> str:
    digests = {name: matrix.digests[name] for name in ("data", "victim")}
    guide = matrix.digests.get("guide", matrix.digests["victim"])
    reads = {"budgets": list(config.budgets), "eps": list(config.eps_255), "limit": config.limit}
    return key_of(attack=attack.settings, defense=matrix.rows[row].settings, guide=guide, reads=reads, **digests)


def _run(
    matrix: Matrix, config: AwareConfig, attack: DefenseAwareAttack, row: str, eps: float | None
) -> list[dict[str, Any]]:
    clean = matrix.clean if config.limit is None else matrix.clean.select(limit=config.limit)
    images, labels = clean.images.to(matrix.device), clean.labels.to(matrix.device)
    start = time.perf_counter()
    found = list(_points(attack, config, images, labels, clean.indices, eps))
    seconds = round(time.perf_counter() - start, 3)
    spent = attack.spent
    points = []
    for value, budget, correct in found:
        low, high = wilson(correct, len(clean))
        points.append({
            "data": matrix.config.data.name,
            "victim": matrix.config.victim.name,
            "attack": config.attack,
            "row": row,
            "defense": defense_name(matrix, row),
            "eps_255": value,
            "budget": budget,
            "n": len(clean),
            "correct": correct,
            "accuracy": round(correct / len(clean), 6),
            "low": round(low, 6),
            "high": round(high, 6),
            "purifications": spent.purifications,
            "dip_steps": spent.dip_steps,
            "victim_queries": spent.victim_queries,
            "seconds": seconds,
        })  # fmt: skip
    return points


def _points(
    attack: DefenseAwareAttack, config: AwareConfig, images: Tensor, labels: Tensor, indices: Tensor, eps: float | None
) -> Iterator[tuple[float, int, int]]:
    """eps, budget and number of images that are still read rightly."""
    if isinstance(attack, BPDA):
        assert eps is not None
        for budget, attacked in attack.curve(images, labels, iterations=config.budgets, indices=indices).items():
            yield eps, budget, int((~attack.fooled(attacked, labels, indices=indices)).sum())
    elif isinstance(attack, HopSkipJump):
        curve = attack.curve(images, labels, budgets=config.budgets, indices=indices)
        for budget in sorted(config.budgets):
            for value in config.eps_255:
                yield value, budget, round(curve.accuracy(budget=budget, eps_255=value) * len(images))
