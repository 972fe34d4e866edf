"""From the ladder's stored cells to the lines of ladder.csv, with the worst case for each image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dipguard.attacks import Cost
from dipguard.evaluation.cells import CLEAN, WORST, key_of
from dipguard.evaluation.ladder_plan import Planned, Target
from dipguard.evaluation.matrix import Matrix
from dipguard.evaluation.results import DONE
from dipguard.evaluation.statistics import wilson
from dipguard.files import read_json

FIELDS = (
    "data", "victim", "row", "defense", "rung", "number", "attack", "check", "eps_255", "n", "correct", "accuracy",
    "low", "high", "status", "purifications", "dip_steps", "victim_queries", "gradients", "seconds", "options", "cut",
    "note",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Cell:
    """A cell of the ladder as far as it is stored.

    Attributes:
        planned: What it is.
        status: ``done``, or why there are no figures.
        right: Whether each image is still read rightly, bool [n]; None where it is not done.
        spent: What the attack cost.
        seconds: What it took.
        history: Share still withstood after each step, the best so far counting.
        last_history: The same, each step for itself.
        flat: Share of the gradients that were exactly zero; None where the attack does not say.
    """

    planned: Planned
    status: str
    right: npt.NDArray[np.bool_] | None = None
    spent: Cost = field(default_factory=Cost)
    seconds: float = 0.0
    history: list[float] = field(default_factory=list)
    last_history: list[float] = field(default_factory=list)
    flat: float | None = None

    @property
    def attacks(self) -> bool:
        """Whether it counts for the worst case: done, and no check."""
        return self.right is not None and self.planned.config.check is None


def load_cells(matrix: Matrix, plan: Sequence[Planned]) -> list[Cell]:
    """The planned cells with what is stored of them."""
    return [_load(matrix, planned) for planned in plan]


def _load(matrix: Matrix, planned: Planned) -> Cell:
    if planned.why is not None:
        return Cell(planned, planned.why)
    path = matrix.folder.path / "ladder" / planned.rung / f"{planned.target.label}.npz"
    arrays = matrix.folder.load(path, key=planned.key)
    if arrays is not None:
        flat = float(arrays["flat"][0]) if len(arrays["flat"]) else None
        history, last = arrays["history"].tolist(), arrays["last_history"].tolist()
        spent = Cost(*arrays["spent"].tolist())
        return Cell(planned, DONE, arrays["right"].astype(bool), spent, float(arrays["seconds"]), history, last, flat)
    note = path.with_suffix(".json")
    failure = read_json(note) if note.is_file() else {}
    return Cell(planned, f"failed: {failure['error']}" if failure.get("key") == planned.key else "not run yet")


def load_clean(matrix: Matrix, target: Target) -> dict[str, Any] | None:
    """What is stored of a target's clean images; None where that is nothing."""
    path = matrix.folder.path / "ladder" / CLEAN / f"{target.label}.npz"
    return matrix.folder.load(path, key=clean_key(target))


def clean_key(target: Target) -> str:
    """What the figures of the clean images depend on."""
    return key_of(rung=CLEAN, **target.depends)


def worst_case(
    cells: Sequence[Cell], count: int, clean: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.bool_] | None:
    """Whether each of ``count`` images is read rightly under every attack; None where there is none.

    A rung of fewer images speaks for those alone. Checks (the control, the large eps) have no part in it. Not to attack
    is within every budget, so an image that is misread when ``clean`` [count] is not withstood.
    """
    attacks = [cell.right for cell in cells if cell.attacks and cell.right is not None]
    if not attacks:
        return None
    right = np.ones(count, dtype=bool) if clean is None else clean.astype(bool)
    for each in attacks:
        right[: len(each)] &= each
    return right


def lines_of(
    matrix: Matrix, target: Target, cells: Sequence[Cell], clean: dict[str, Any] | None
) -> Iterator[dict[str, Any]]:
    """A target's lines of ladder.csv: the clean images, each rung, the worst case.

    Args:
        matrix: The matrix.
        target: The target.
        cells: Its cells.
        clean: What `load_clean` says of it.
    """
    common = {
        "data": matrix.config.data.name,
        "victim": target.victim_name,
        "row": target.label,
        "defense": target.defense,
    }
    unavailable = target.row.unavailable
    status = "not run yet" if unavailable is None else "unavailable"
    own = {"status": status} if clean is None else {**_share(clean["right"]), "seconds": _short(clean["seconds"])}
    yield {**common, "rung": CLEAN, "attack": "none", "cut": target.cut, "note": unavailable or "", **own}
    for cell in cells:
        yield {**common, **_line(cell)}
    worst = worst_case(cells, len(matrix.clean), None if clean is None else clean["right"])
    over = sum(cell.attacks for cell in cells)
    own = {"status": "not run yet"} if worst is None else {**_share(worst), "note": f"over {over} rungs"}
    yield {**common, "rung": WORST, "number": "9", "attack": "", "eps_255": matrix.config.ladder_eps_255, **own}


def _line(cell: Cell) -> dict[str, Any]:
    planned, config = cell.planned, cell.planned.config
    values = {
        "rung": planned.rung,
        "number": config.number,
        "attack": config.attack,
        "check": config.check or "",
        "eps_255": planned.eps_255,
        "status": cell.status,
        "options": ", ".join(f"{name} {_text(value)}" for name, value in planned.options.items()),
        "cut": planned.cut,
        "note": config.note,
    }
    if cell.right is None:
        return values
    spent = {name: getattr(cell.spent, name) for name in Cost.__dataclass_fields__}
    return {**values, **_share(cell.right), **spent, "seconds": _short(cell.seconds)}


def _share(right: npt.NDArray[np.bool_]) -> dict[str, Any]:
    n, correct = len(right), int(right.sum())
    low, high = wilson(correct, n)
    shares = {"accuracy": correct / n, "low": low, "high": high}
    return {"n": n, "correct": correct, "status": DONE, **{name: _short(value) for name, value in shares.items()}}


def _short(value: Any) -> float:
    return round(float(value), 6)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
