"""The stored results of a run, read and checked: results.csv and checks.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dipguard.evaluation.cell import DONE, WORST

_COUNTS = ("budget", "seed", "correct", "gradients", "purifications", "dip_steps", "victim_queries")
NUMBERS: dict[str, tuple[float, float]] = {
    **dict.fromkeys((*_COUNTS, "seconds_per_image", "attack_seconds"), (0, float("inf"))),
    **dict.fromkeys(("accuracy", "low", "high"), (0, 1)),
    "n": (1, float("inf")),
    "eps_255": (0, 255),
    "ssim": (-1, 1),
    "psnr": (-1000, float("inf")),
}
"""The columns of results.csv that are read as numbers, with their ranges."""
JUDGED = {by: (by, f"{by}_low", f"{by}_high") for by in ("worst", "vote", "known")}
JUDGE_NUMBERS: dict[str, tuple[float, float]] = {
    **dict.fromkeys((name for names in JUDGED.values() for name in names), (0, 1)),
    **dict.fromkeys(("judge", "judge_dip_steps", "judge_queries", "judge_seconds"), (0, float("inf"))),
}
"""The same of the columns that are there if images were judged by several draws of the defence."""
FILLED = ("data", "victim", "attack", "defense", "seed", "status")
COLUMNS = (
    *FILLED, "surrogate", "attack_name", "number", "check", "defense_name", *NUMBERS, "options", "cut", "note", "key",
)  # fmt: skip
KEY = ["data", "victim", "surrogate", "attack", "defense", "seed", "eps_255", "budget"]
"""What distinguishes the rows."""


def read_results(path: str | Path) -> pd.DataFrame:
    """Read and check a results.csv: its rows in their order, indexed by their lines in the file.

    Text is stripped and empty where there is none; numbers are floats, NaN where there are none. Further columns stay
    as text. ValueError, with the line, if it is no CSV, lacks a column, or has a value out of range or a row twice.
    """
    path = Path(path)
    text = _read_text(path, COLUMNS, KEY)
    table, done = text.copy(), text["status"] == DONE

    def refuse(bad: pd.Series, name: str, expected: str) -> None:
        if bad.any():
            line = bad.idxmax()
            raise ValueError(f"{path}, line {line}: `{name}` must be {expected}, got {text.loc[line, name]!r}")

    for name in (*FILLED, "n", "correct", "accuracy", "low", "high"):
        refuse((text[name] == "") & (done | (name in FILLED)), name, "filled in")
    numbers = NUMBERS | {name: ends for name, ends in JUDGE_NUMBERS.items() if name in text}
    for name, (low, high) in numbers.items():
        table[name] = pd.to_numeric(text[name], errors="coerce")
        bad = (text[name] != "") & ~table[name].between(low, high)
        refuse(bad, name, f"a number from {low:g} to {high:g}")
    off = (table["accuracy"] - table["correct"] / table["n"]).abs() > 1e-3  # stored shares are rounded
    refuse(off, "accuracy", "the share of `correct` in `n`")
    return table


def read_checks(path: str | Path) -> pd.DataFrame:
    """Read a checks.csv, all text; errors are those of `read_results`."""
    return _read_text(Path(path), ("defense", "check", "verdict", "figures"), ["defense", "check"])


def in_suite(results: pd.DataFrame) -> pd.Series:
    """Which rows belong to the attack suite alone: its numbered attacks, its checks, and the worst case."""
    return (results["number"] != "") | (results["check"] != "") | (results["attack"] == WORST)


def images_text(counts: pd.Series) -> str:
    """Numbers of images in words: ``16 images``, ``1 to 20 images``."""
    ends = dict.fromkeys(f"{n:.0f}" for n in (counts.min(), counts.max()) if n == n)
    return f"{' to '.join(ends) or 'no'} image{'s' * (list(ends) != ['1'])}"


def interval_text(value: float, low: float, high: float) -> str:
    """A share with its interval, in percent: ``93.8 (72–99)``."""
    return f"{100 * value:.1f} ({100 * low:.0f}–{100 * high:.0f})"


def flatten(settings: Mapping[str, Any], prefix: str = "", *, sep: str = ".") -> dict[str, Any]:
    """Nested settings as one dict with dotted keys, or those with another ``sep``."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}{sep}", sep=sep) if nested else {f"{prefix}{key}": value}
    return flat


def _read_text(path: Path, columns: Sequence[str], key: list[str]) -> pd.DataFrame:
    """The file's rows as text, indexed by their lines."""
    try:
        reader = csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""), strict=True)
        lines = [(reader.line_num, [value.strip() for value in row]) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} must be a CSV file in UTF-8, but it is damaged: {error}") from error
    head = lines.pop(0)[1] if lines else []
    missing = [name for name in columns if name not in head]
    if missing:
        raise ValueError(f"{path} must have the columns {', '.join(columns)}; it lacks {', '.join(missing)}")
    for line, row in lines:
        if len(row) != len(head):
            raise ValueError(f"{path}, line {line}: must have {len(head)} values, as its head has, got {len(row)}")
    table = pd.DataFrame.from_dict(dict(lines), orient="index", columns=head, dtype=str)
    twins = table[table.duplicated(key)]
    if len(twins):
        what = ", ".join(f"{name} {value}" for name, value in twins.iloc[0][key].items() if value)
        raise ValueError(f"{path}, line {twins.index[0]}: the same as an earlier line: {what}")
    return table
