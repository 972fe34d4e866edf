"""The stored results of a run, read: results.csv and checks.csv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dipguard.evaluation.cell import WORST
from dipguard.evaluation.results import CHECK_FIELDS, FIELDS, JUDGE_FIELDS

TEXT = (
    "data", "victim", "surrogate", "attack", "attack_name", "number", "check", "defense", "defense_name", "status",
    "options", "cut", "note", "key", "defense_options",
)  # fmt: skip
"""The columns of results.csv that are read as text; the others are numbers."""


def read_results(path: str | Path) -> pd.DataFrame:
    """Read a results.csv: text is empty where there is none; numbers are NaN where there are none.

    ValueError if it is no CSV in UTF-8, lacks a column, or has text where a number is expected.
    """
    table = _read_text(Path(path), FIELDS)
    for name in [name for name in (*FIELDS, *JUDGE_FIELDS) if name in table and name not in TEXT]:
        try:
            table[name] = pd.to_numeric(table[name])
        except ValueError as error:
            raise ValueError(f"{path}: `{name}` must hold numbers: {error}") from error
    return table


def read_checks(path: str | Path) -> pd.DataFrame:
    """Read a checks.csv, all text; errors are those of `read_results`."""
    return _read_text(Path(path), CHECK_FIELDS)


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


def _read_text(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except ValueError as error:  # also those of pandas' parser
        raise ValueError(f"{path} must be a CSV file in UTF-8, but it is damaged: {error}") from error
    if missing := [name for name in columns if name not in table]:
        raise ValueError(f"{path} must have the columns {', '.join(columns)}; it lacks {', '.join(missing)}")
    return table
