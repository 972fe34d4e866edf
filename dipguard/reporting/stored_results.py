"""The stored results of a matrix, read and checked line by line: results.csv and curves.csv of a run folder."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from dipguard.reporting.stored_lines import StoredLine, read_rows

DONE = "done"
CURVE_ATTACKS = ("bpda", "hopskipjump")


@dataclass(frozen=True)
class ResultRow:
    """A cell of the matrix of attacks and defences.

    Attributes:
        data: Data set.
        victim: The attacked classifier.
        judge: The one that reads the reconstructions; most often the victim.
        column: The attack column's label.
        attack: The attack's name, ``none`` for clean images.
        eps_255: Its L-inf budget in levels of 0 to 255; None where it has none.
        row: The defence row's label.
        defense: The defence's name.
        seed: Of all random draws.
        n: Number of images.
        correct: How many of them the judge read rightly.
        accuracy: Their share, in [0, 1].
        low: Lower end of its 95 % Wilson interval.
        high: Upper end.
        ssim: Mean SSIM to the clean image; None where the sizes differ.
        psnr: Mean PSNR to the clean image, dB; infinite for equal images.
        seconds_per_image: What the defence took.
        status: ``done``, or why there are no figures (which are then all None).
        key: Digest of all that the cell depends on.
    """

    data: str
    victim: str
    judge: str
    column: str
    attack: str
    eps_255: float | None
    row: str
    defense: str
    seed: int
    n: int | None
    correct: int | None
    accuracy: float | None
    low: float | None
    high: float | None
    ssim: float | None
    psnr: float | None
    seconds_per_image: float | None
    status: str
    key: str

    @property
    def done(self) -> bool:
        """Whether the cell has figures."""
        return self.status == DONE


@dataclass(frozen=True)
class CurveRow:
    """A point of a curve of a defence-aware attack.

    Attributes:
        data: Data set.
        victim: The attacked classifier.
        attack: ``bpda`` or ``hopskipjump``.
        row: The defence row's label.
        defense: The defence's name.
        eps_255: L-inf budget in levels of 0 to 255.
        budget: Iterations (BPDA), or queries an image (HopSkipJump).
        n: Number of images.
        correct: How many of them are still read rightly.
        accuracy: Their share, in [0, 1].
        low: Lower end of its 95 % Wilson interval.
        high: Upper end.
    """

    data: str
    victim: str
    attack: str
    row: str
    defense: str
    eps_255: float
    budget: int
    n: int
    correct: int
    accuracy: float
    low: float
    high: float


def read_results(path: str | Path) -> list[ResultRow]:
    """The cells of a results.csv, in its order; further columns are passed over.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is damaged: no CSV, a column is missing, or a line holds what it cannot hold (the message names
            the line and the value), or a cell comes twice.
    """
    columns = [field.name for field in fields(ResultRow)]
    return read_rows(Path(path), columns, _result, key=("data", "victim", "judge", "seed", "column", "row"))


def read_curves(path: str | Path) -> list[CurveRow]:
    """The points of a curves.csv, in its order; further columns (its costs) are passed over.

    Raises:
        FileNotFoundError, ValueError: as in `read_results`.
    """
    columns = [field.name for field in fields(CurveRow)]
    return read_rows(Path(path), columns, _curve, key=("data", "victim", "attack", "row", "eps_255", "budget"))


def _result(line: StoredLine) -> ResultRow:
    text, optional = line.text, line.optional
    status = text("status")
    n: int | None = None
    correct: int | None = None
    accuracy = low = high = None
    if status == DONE:
        n, correct, accuracy, low, high = line.shares()
    else:
        for name in ("correct", "accuracy", "low", "high", "ssim", "psnr"):
            if line.values[name].strip():
                raise line.wrong(name, f"empty where `status` is {status!r}")
    return ResultRow(
        text("data"),
        text("victim"),
        line.values["judge"].strip() or text("victim"),
        text("column"),
        line.values["attack"].strip() or "none",
        optional("eps_255", 0, 255),
        text("row"),
        text("defense"),
        line.whole("seed", 0),
        n,
        correct,
        accuracy,
        low,
        high,
        optional("ssim", -1, 1),
        optional("psnr", -1000),
        optional("seconds_per_image", 0),
        status,
        line.values["key"].strip(),
    )


def _curve(line: StoredLine) -> CurveRow:
    text = line.text
    attack = text("attack")
    if attack not in CURVE_ATTACKS:
        raise line.wrong("attack", " or ".join(CURVE_ATTACKS))
    eps_255, budget = line.number("eps_255", 0, 255), line.whole("budget", 0)
    names = text("data"), text("victim"), attack, text("row"), text("defense")
    return CurveRow(*names, eps_255, budget, *line.shares())
