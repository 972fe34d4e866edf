"""Reads the CSV files that runs leave behind."""

import csv
from pathlib import Path


def read_csv(path: Path) -> list[dict[str, str]]:
    """Its lines, by the names of the head."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
