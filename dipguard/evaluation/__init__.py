"""Attacks x defences: prepare a matrix, run its cells, write their results. Names are imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dipguard.evaluation.cell import CellResult
    from dipguard.evaluation.matrix import Matrix
    from dipguard.evaluation.plan import prepare
    from dipguard.evaluation.results import write_results
    from dipguard.evaluation.runner import run

__all__ = ["CellResult", "Matrix", "prepare", "run", "write_results"]

_HOMES = {"CellResult": "cell", "Matrix": "matrix", "prepare": "plan", "run": "runner", "write_results": "results"}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: :mod:`dipguard.evaluation.sweep_job` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
