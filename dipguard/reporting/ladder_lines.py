"""The ladder's stored results, read and checked: ladder.csv and ladder_checks.csv of a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from dipguard.reporting.stored_lines import StoredLine, read_rows
from dipguard.reporting.stored_results import DONE

CLEAN, WORST = "clean", "worst_case"
COSTS = ("purifications", "dip_steps", "victim_queries", "gradients")


@dataclass(frozen=True)
class LadderRow:
    """A cell of the ladder, or a row's clean images, or its worst case.

    Attributes:
        data: Data set.
        victim: The attacked classifier.
        row: The defence row's label.
        defense: The defence's name.
        rung: The rung, ``clean`` or ``worst_case``.
        number: As it stands before the rung's name; may be empty.
        attack: The attack's name.
        check: ``control`` or ``large_eps`` where the rung is no attack of its own; else empty.
        eps_255: L-inf budget in levels of 0 to 255; None for clean images.
        n: Number of images; None where it is not done.
        correct: How many of them are read rightly.
        accuracy: Their share, in [0, 1].
        low: Lower end of its 95 % Wilson interval.
        high: Upper end.
        status: ``done``, or why there are no figures.
        purifications: Images that the defence purified for the attack.
        dip_steps: Optimiser steps of deep image priors for it.
        victim_queries: Purified images that the victim read for it.
        gradients: Images for which the victim was differentiated.
        seconds: What it took.
        options: The attack's options, in words.
        cut: What was cut, in words; most often empty.
        note: Anything else.
    """

    data: str
    victim: str
    row: str
    defense: str
    rung: str
    number: str
    attack: str
    check: str
    eps_255: float | None
    n: int | None
    correct: int | None
    accuracy: float | None
    low: float | None
    high: float | None
    status: str
    purifications: int | None
    dip_steps: int | None
    victim_queries: int | None
    gradients: int | None
    seconds: float | None
    options: str
    cut: str
    note: str

    @property
    def done(self) -> bool:
        """Whether it has figures."""
        return self.status == DONE

    @property
    def title(self) -> str:
        """The rung's number and name, and whether it is no attack of its own."""
        kind = {"": "", "control": "(control)"}.get(self.check, "(check)")
        return f"{self.number} {self.rung} {kind}".strip().replace("_", " ")


@dataclass(frozen=True)
class CheckRow:
    """A masking check: of which row, what, its verdict, and the figures it rests on."""

    row: str
    check: str
    verdict: str
    figures: str


def read_ladder(path: str | Path) -> list[LadderRow]:
    """The cells of a ladder.csv, in its order.

    Raises:
        FileNotFoundError, ValueError: as in :func:`~dipguard.reporting.stored_lines.read_rows`.
    """
    return read_rows(Path(path), [field.name for field in fields(LadderRow)], _cell, key=("row", "rung"))


def read_checks(path: str | Path) -> list[CheckRow]:
    """The lines of a ladder_checks.csv, in its order.

    Raises:
        FileNotFoundError, ValueError: as in :func:`~dipguard.reporting.stored_lines.read_rows`.
    """

    def check(line: StoredLine) -> CheckRow:
        return CheckRow(*(line.text(field.name) for field in fields(CheckRow)))

    return read_rows(Path(path), [field.name for field in fields(CheckRow)], check, key=("row", "check"))


def rungs_of(cells: Sequence[LadderRow]) -> list[str]:
    """The rungs in order: clean images first, the worst case last."""
    return list(dict.fromkeys(cell.rung for cell in sorted(cells, key=lambda cell: cell.rung == WORST)))


def rows_of(cells: Sequence[LadderRow]) -> list[str]:
    """The rows in order."""
    return list(dict.fromkeys(cell.row for cell in cells))


def _cell(line: StoredLine) -> LadderRow:
    text, values = line.text, line.values
    status = text("status")
    n: int | None = None
    correct: int | None = None
    accuracy = low = high = None
    if status == DONE:
        n, correct, accuracy, low, high = line.shares()
    elif values["accuracy"].strip():
        raise line.wrong("accuracy", f"empty where `status` is {status!r}")
    costs = {name: line.whole(name, 0) if values[name].strip() else None for name in COSTS}
    return LadderRow(
        data=text("data"),
        victim=text("victim"),
        row=text("row"),
        defense=text("defense"),
        rung=text("rung"),
        number=values["number"].strip(),
        attack=values["attack"].strip(),
        check=values["check"].strip(),
        eps_255=line.optional("eps_255", 0, 255),
        n=n,
        correct=correct,
        accuracy=accuracy,
        low=low,
        high=high,
        status=status,
        seconds=line.optional("seconds", 0),
        options=values["options"],
        cut=values["cut"],
        note=values["note"],
        **costs,
    )
