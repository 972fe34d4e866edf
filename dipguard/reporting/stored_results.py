"""The stored results of a matrix, read and checked line by line: results.csv and curves.csv of a run folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

DONE = "done"
CURVE_ATTACKS = ("bpda", "hopskipjump")
ROUNDING = 1e-3
"""How far stored shares may be from what they were rounded from."""


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
    return _read(Path(path), columns, _result, key=("data", "victim", "judge", "seed", "column", "row"))


def read_curves(path: str | Path) -> list[CurveRow]:
    """The points of a curves.csv, in its order; further columns (its costs) are passed over.

    Raises:
        FileNotFoundError, ValueError: as in `read_results`.
    """
    columns = [field.name for field in fields(CurveRow)]
    return _read(Path(path), columns, _curve, key=("data", "victim", "attack", "row", "eps_255", "budget"))


class _Line:
    """A line of a file, whose values are taken one by one."""

    def __init__(self, place: str, values: dict[str, str]) -> None:
        self.place = place
        self.values = values

    def wrong(self, name: str, expected: str) -> ValueError:
        return ValueError(f"{self.place}: `{name}` must be {expected}, got {self.values[name]!r}")

    def text(self, name: str) -> str:
        if not self.values[name].strip():
            raise self.wrong(name, "filled in")
        return self.values[name].strip()

    def number(self, name: str, low: float, high: float = float("inf")) -> float:
        try:
            value = float(self.values[name])
        except ValueError:
            value = float("nan")
        if not low <= value <= high:  # false for NaN
            raise self.wrong(name, f"a number from {low:g} to {high:g}")
        return value

    def whole(self, name: str, low: int, high: int = 2**63) -> int:
        value = self.number(name, low, high)
        if value != int(value):
            raise self.wrong(name, "a whole number")
        return int(value)

    def optional(self, name: str, low: float, high: float = float("inf")) -> float | None:
        return self.number(name, low, high) if self.values[name].strip() else None

    def shares(self) -> tuple[int, int, float, float, float]:
        """Return n, correct, accuracy, low and high, which must agree."""
        n = self.whole("n", 1)
        correct = self.whole("correct", 0, n)
        accuracy, low, high = (self.number(name, 0, 1) for name in ("accuracy", "low", "high"))
        if abs(accuracy - correct / n) > ROUNDING:
            raise self.wrong("accuracy", f"{correct} of {n}")
        if not low - ROUNDING <= accuracy <= high + ROUNDING:
            raise self.wrong("accuracy", f"in its interval from {low:g} to {high:g}")
        return n, correct, accuracy, low, high


def _result(line: _Line) -> ResultRow:
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


def _curve(line: _Line) -> CurveRow:
    text = line.text
    attack = text("attack")
    if attack not in CURVE_ATTACKS:
        raise line.wrong("attack", " or ".join(CURVE_ATTACKS))
    eps_255, budget = line.number("eps_255", 0, 255), line.whole("budget", 0)
    names = text("data"), text("victim"), attack, text("row"), text("defense")
    return CurveRow(*names, eps_255, budget, *line.shares())


Row = TypeVar("Row")


def _read(path: Path, columns: list[str], parse: Callable[[_Line], Row], *, key: tuple[str, ...]) -> list[Row]:
    rows: list[Row] = []
    places: dict[Hashable, str] = {}
    for line in _lines(path, columns):
        row = parse(line)
        cell = tuple(getattr(row, name) for name in key)
        if cell in places:
            what = ", ".join(f"{name} {value}" for name, value in zip(key, cell, strict=True))
            raise ValueError(f"{line.place}: the same as {places[cell]}: {what}")
        places[cell] = line.place
        rows.append(row)
    return rows


def _lines(path: Path, columns: list[str]) -> Iterator[_Line]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        names = list(reader.fieldnames or ())
        missing = [name for name in columns if name not in names]
        if missing:
            raise ValueError(f"{path} must have the columns {', '.join(columns)}; it lacks {', '.join(missing)}")
        for values in reader:
            place = f"{path}, line {reader.line_num}"
            if None in values or None in values.values():
                raise ValueError(f"{place}: must have {len(names)} values, as its head has")
            yield _Line(place, values)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} must be a CSV file in UTF-8, but it is damaged: {error}") from error
