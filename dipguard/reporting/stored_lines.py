"""CSV files of a run, read and checked line by line."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import TypeVar

ROUNDING = 1e-3
"""How far stored shares may be from what they were rounded from."""


class StoredLine:
    """A line of a file, whose values are taken one by one; what they must not be is an error that names them.

    Attributes:
        place: File and line.
        values: By column.
    """

    def __init__(self, place: str, values: dict[str, str]) -> None:
        self.place = place
        self.values = values

    def wrong(self, name: str, expected: str) -> ValueError:
        """An error that names place, column and value."""
        return ValueError(f"{self.place}: `{name}` must be {expected}, got {self.values[name]!r}")

    def text(self, name: str) -> str:
        """A value that must be there."""
        if not self.values[name].strip():
            raise self.wrong(name, "filled in")
        return self.values[name].strip()

    def number(self, name: str, low: float, high: float = float("inf")) -> float:
        """A number in range."""
        try:
            value = float(self.values[name])
        except ValueError:
            value = float("nan")
        if not low <= value <= high:  # false for NaN
            raise self.wrong(name, f"a number from {low:g} to {high:g}")
        return value

    def whole(self, name: str, low: int, high: int = 2**63) -> int:
        """A whole number in range."""
        value = self.number(name, low, high)
        if value != int(value):
            raise self.wrong(name, "a whole number")
        return int(value)

    def optional(self, name: str, low: float, high: float = float("inf")) -> float | None:
        """A number in range, or None where there is none."""
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


Row = TypeVar("Row")


def read_rows(path: Path, columns: list[str], parse: Callable[[StoredLine], Row], *, key: tuple[str, ...]) -> list[Row]:
    """The lines of a CSV file, each parsed; ``key`` are the fields that tell them apart.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is damaged; the message names the line.
    """
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


def _lines(path: Path, columns: list[str]) -> Iterator[StoredLine]:
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
            yield StoredLine(place, values)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} must be a CSV file in UTF-8, but it is damaged: {error}") from error
