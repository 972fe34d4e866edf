"""The curves of a chunk's fits: kept with the chunk, and shown to the run's log while the fits run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from pytorch_lightning.loggers import Logger

Row: TypeAlias = Callable[[int, Mapping[str, float]], None]
"""Takes the step of a fit and its metrics."""


class Curves(Logger):
    """A Lightning logger that keeps all ``rows``, and passes each one on."""

    name = version = property(lambda self: None)

    def __init__(self, row: Row | None = None) -> None:
        super().__init__()
        self.row = row
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Keep one row."""
        self.rows.append((step or 0, {name: float(value) for name, value in metrics.items()}))
        if self.row is not None:
            self.row(*self.rows[-1])

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: a run's log has the run's settings, not those of each Trainer."""
