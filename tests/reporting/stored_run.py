"""Writes results.csv, checks.csv as a run stores them: the input of all reports."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from dipguard.evaluation.results import FIELDS

LINF = {f"{attack}_{eps}": (attack, eps) for attack in ("fgsm", "pgd", "bim", "mifgsm") for eps in (2, 4, 8)}
PAPER_ATTACKS: dict[str, tuple[str, Any]] = {"clean": ("none", ""), **LINF, "cw": ("cw", ""), "ddn": ("ddn", "")}
NO_WEIGHTS = "weights not supplied. Give `weights`, the path of a state dict; the authors' file"


def shares(correct: int, n: int) -> dict[str, Any]:
    interval = binomtest(correct, n).proportion_ci(method="wilson")
    return {"n": n, "correct": correct, "accuracy": correct / n, "low": interval.low, "high": interval.high}


def cell(
    attack: str, defense: str, correct: int | None, *, n: int = 32, ssim: float = 0.9, **changes: Any
) -> dict[str, Any]:
    """A line of results.csv; ``correct`` None is a defence whose weights were not supplied."""
    name, eps = PAPER_ATTACKS.get(attack, (attack, ""))
    values = {
        "data": "cifar10", "victim": "cifar10_resnet56", "attack": attack, "attack_name": name, "eps_255": eps,
        "defense": defense, "defense_name": defense, "seed": 0, "key": "0123456789abcdef",
    }  # fmt: skip
    if correct is None:
        values |= {"n": n, "status": NO_WEIGHTS}
    else:
        values |= shares(correct, n) | {"ssim": ssim, "psnr": 30.5, "seconds_per_image": 0.25, "status": "done"}
    return values | changes


def point(
    attack: str, defense: str, eps: float, budget: int, correct: int, *, n: int = 16, **changes: Any
) -> dict[str, Any]:
    """A line of results.csv at one of an attack's budgets."""
    costs = {"purifications": 9, "dip_steps": 9000, "victim_queries": 9, "gradients": 0, "attack_seconds": 1.5}
    return cell(attack, defense, correct, n=n, eps_255=eps, budget=budget, **costs) | changes


def write_lines(path: Path, fields: Iterable[str], lines: Iterable[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(fields))
        writer.writeheader()
        writer.writerows(lines)
    return path


def write_results(folder: Path, lines: Iterable[dict[str, Any]]) -> Path:
    return write_lines(folder / "results.csv", FIELDS, lines)
