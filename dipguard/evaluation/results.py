"""Results as files: results.csv (all cells), images.csv (all images of all cells), checks.csv (the suite's checks)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from dipguard.config import name_of
from dipguard.evaluation.cell import CLEAN, DONE, FIGURES, JUDGED, NOT_RUN, WORST, CellResult, Target, text_of
from dipguard.evaluation.masking import masking_checks, randomness_of
from dipguard.evaluation.matrix import Matrix
from dipguard.evaluation.metrics import wilson
from dipguard.files import csv_text, write_text
from dipguard.fit import FitOptions

FIELDS = (
    "data", "victim", "surrogate", "attack", "attack_name", "number", "check", "eps_255", "budget", "defense",
    "defense_name", "seed", "n", "correct", "accuracy", "low", "high", "ssim", "psnr", "seconds_per_image",
    "purifications", "dip_steps", "victim_queries", "gradients", "attack_seconds", "status", "options", "cut", "note",
    "key",
)  # fmt: skip
"""Columns of results.csv: a row for each cell and, for attacks with several budgets, for each of them."""
JUDGE_FIELDS = (
    "judge", "worst", "worst_low", "worst_high", "vote", "vote_low", "vote_high", "known", "known_low", "known_high",
    "judge_dip_steps", "judge_queries", "judge_seconds", "defense_options",
)  # fmt: skip
"""Further columns where images are judged by several draws."""
IMAGE_FIELDS = (
    "attack", "defense", "eps_255", "budget", "index", "label", "decision_clean", "decision_given",
    "decision_defended", "ssim_given", "ssim", "psnr", "used", "why",
)  # fmt: skip
CHECK_FIELDS = ("defense", "check", "verdict", "figures")


def write_results(matrix: Matrix, *, images: bool = True) -> None:
    """Write all tables from what is stored, or all but images.csv; nothing is run."""
    matrix.load()
    rows = [result_row(matrix, result) for cell in matrix.cells for result in matrix.results[cell.place]]
    tables: dict[str, tuple[Sequence[str], list[dict[str, Any]]]] = {
        "results.csv": ((*FIELDS, *(JUDGE_FIELDS if matrix.config.judge > 1 else ())), rows)
    }
    if any(cell.suite for cell in matrix.cells):
        rows += [_worst_row(matrix, target) for target in matrix.targets.values()]
        checks = [row for target in matrix.targets.values() for row in _checks(matrix, target)]
        tables["checks.csv"] = CHECK_FIELDS, checks
    if images:
        lines = [line for cell in matrix.cells for line in _image_rows(matrix.results[cell.place])]
        tables["images.csv"] = IMAGE_FIELDS, lines
    for name, (fields, lines) in tables.items():
        write_text(matrix.folder / name, csv_text(fields, lines))


def suite_results(matrix: Matrix, target: Target) -> list[CellResult]:
    """The results of the suite's attacks on a target, without clean images; with several budgets, the last one."""
    cells = [cell for cell in matrix.cells if cell.target is target and cell.suite and cell.label != CLEAN]
    return [matrix.results[cell.place][-1] for cell in cells]


def worst_case(
    results: Iterable[CellResult], clean: CellResult | None = None, *, by: str = "accuracy"
) -> Tensor | None:
    """How right each image is under the attack that is worst for it, [n]; None without an attack.

    n is the number of images of the attack on most of them; one on fewer counts for those alone. ``by`` is a figure of
    `JUDGED`. Checks do not count. Not to attack is within every budget: the result on ``clean`` images counts too, if
    it is done.
    """
    attacks = [result for result in results if result.attacks]
    if not attacks:
        return None
    right = torch.ones(max(len(result.right) for result in attacks), dtype=torch.float64)
    for result in attacks if clean is None or not clean.done else [clean, *attacks]:
        own = result.judged(by)[: len(right)]
        right[: len(own)] = torch.minimum(right[: len(own)], own)
    return right


def _checks(matrix: Matrix, target: Target) -> list[dict[str, Any]]:
    found = suite_results(matrix, target)
    checks = masking_checks(found, randomness_of(matrix, target)) if any(result.done for result in found) else []
    return [{"defense": target.label, **asdict(check)} for check in checks]


def _image_rows(results: Iterable[CellResult]) -> Iterator[dict[str, Any]]:
    for result in results:
        cell = result.cell
        first = {"attack": cell.label, "defense": cell.target.label, "eps_255": result.eps_255, "budget": result.budget}
        columns = [cell.clean.indices, cell.clean.labels, cell.target.decisions_clean]
        columns += [getattr(result, name) for name in FIGURES]
        for *values, why in zip(*(column.tolist() for column in columns), result.reasons, strict=False):
            yield {**first, **dict(zip(IMAGE_FIELDS[4:-1], map(_short, values), strict=True)), "why": why}


def result_row(matrix: Matrix, result: CellResult) -> dict[str, Any]:
    """A row of results.csv."""
    cell = result.cell
    row = {
        **_of_target(matrix, cell.target),
        "attack": cell.label,
        "attack_name": cell.name,
        "number": cell.node.get("number") or "",
        "check": cell.check,
        "eps_255": result.eps_255,
        "budget": result.budget,
        "status": result.status,
        "options": _in_words(cell.options, "eps_255", "batch_size"),
        "cut": cell.cut,
        "key": cell.key,
    }
    if not result.done:
        return row
    # An image that comes back unchanged has an infinite PSNR: the mean is over the others.
    finite = result.psnr[result.psnr.isfinite()]
    spent = sum(value for name, value in result.seconds.items() if name not in ("attack", "judge"))
    cost = {"dip_steps": cell.judging.dip_steps, "queries": cell.judging.victim_queries}
    judging = {**cost, "seconds": _short(spent + result.seconds.get("judge", 0))}
    # With several budgets, one run of the largest one serves all of them.
    attacking = {"attack_seconds": _short(result.seconds["attack"]), **asdict(result.spent)}
    return {
        **row,
        **_shares(matrix, cell.judge, {by: result.judged(by) for by in JUDGED}),
        **({f"judge_{name}": value for name, value in judging.items()} if matrix.config.judge > 1 else {}),
        "ssim": _short(float(result.ssim.double().mean())),
        "psnr": _short(float(finite.mean())),
        "seconds_per_image": _short(spent / len(result.right)),
        **(attacking if result is matrix.results[cell.place][-1] else {}),
    }


def _worst_row(matrix: Matrix, target: Target) -> dict[str, Any]:
    results = suite_results(matrix, target)
    (clean,) = matrix.results[CLEAN, target.label]
    worst = ((by, worst_case(results, clean, by=by)) for by in JUDGED)
    rights = {by: right for by, right in worst if right is not None}
    over = len({result.cell.key for result in results if result.attacks})
    row = {**_of_target(matrix, target), "attack": WORST, "eps_255": matrix.config.eps_255, "number": "9"}
    if not rights:
        return row | {"status": NOT_RUN}
    lacking = [r.cell.label for r in results if not r.done and r.cell.why is None and not r.cell.check]
    note = f"over {over} attacks" + (f", without {', '.join(lacking)}" if lacking else "")
    return row | _shares(matrix, clean.cell.judge, rights) | {"note": note}


def _of_target(matrix: Matrix, target: Target) -> dict[str, Any]:
    row: dict[str, Any] = {
        "data": name_of(matrix.config.data),
        "victim": target.victim_name,
        "surrogate": target.surrogate,
        "defense": target.label,
        "defense_name": target.defense.name if target.node is None else name_of(target.node),
        "seed": matrix.config.seed,
    }
    if matrix.config.judge > 1:
        aside = ("name", "code", "versions", "fit", *FitOptions.__dataclass_fields__)  # those of the fits are many
        row["defense_options"] = _in_words(target.bare.settings, *aside)
    return row


def _in_words(options: Mapping[str, Any], *aside: str) -> str:
    return ", ".join(f"{n} {text_of(v)}" for n, v in options.items() if n not in aside and v is not None)


def _shares(matrix: Matrix, judge: int, rights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The figures of `JUDGED` with their intervals, from how right each image is by each; ``judge`` draws of it."""
    n, correct = len(rights["accuracy"]), round(float(rights["accuracy"].sum()), 6)
    row: dict[str, Any] = {"n": n, "correct": int(correct) if correct == int(correct) else correct, "status": DONE}
    for by, right in rights.items():
        ends = (_short(bound) for bound in wilson(float(right.sum()), n))
        row |= {by: _short(float(right.mean())), **dict(zip((f"{by}_low", f"{by}_high"), ends, strict=True))}
    row |= {"judge": judge, "low": row.pop("accuracy_low"), "high": row.pop("accuracy_high")}
    return row if matrix.config.judge > 1 else {name: value for name, value in row.items() if name in FIELDS}


def _short(value: float) -> float | None:
    return round(value, 6) if isfinite(value) else None  # integers stay integers
