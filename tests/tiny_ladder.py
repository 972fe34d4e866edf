"""Small real ladders for the tests: a few digits, a few rows, short fits, attacks of a few steps."""

from __future__ import annotations

from pathlib import Path

import evaluate
from dipguard.evaluation.matrix import Matrix, prepare_matrix
from tests.tiny_matrix import compose_matrix, typed_matrix

SMALL = (
    "data=digits",
    "victim=digits_cnn",
    "data.limit=4",
    "chunk=4",
    "figures=0",
    "ladder_eps_255=24",
    "trainer.accelerator=cpu",
    "trainer.progress=false",
    "rows.dipguard.options.T=20",
    "rows.dipguard.options.t0=5",
    "rows.dipguard.options.every=5",
    "rows.dipdefend.options.T=20",
    "ladder.transfer.options.steps=5",
    "ladder.identity.options.steps=2",
    "ladder.identity_eot.options.steps=1",
    "ladder.identity_eot.options.eot_iter=2",
    "ladder.unrolled.options.T=4",
    "ladder.autoattack_rand.options.steps=1",
    "ladder.square.options.n_queries=4",
    "ladder.hopskipjump.options.queries=12",
    "ladder.hopskipjump.options.init_size=4",
    "ladder.hopskipjump.options.init_eval=3",
)
"""Overrides of experiment=adaptive for a run of a minute."""

DIP_ROWS = ("~rows.dipdefend", "~rows.dipguard")
"""Left out where only feed-forward rows are needed."""


def ladder_overrides(*overrides: str, rungs: tuple[str, ...] | None = None, dip: bool = True) -> list[str]:
    """experiment=adaptive, made small: only ``rungs`` (None: all), with the DIP rows or without."""
    rows = [] if dip else [text for text in SMALL if text.startswith("rows.dip")]
    names = list(typed_matrix("experiment=adaptive").ladder)
    dropped = [] if rungs is None else [name for name in names if name not in rungs]
    kept = [
        text
        for text in SMALL
        if text not in rows and not any(text.startswith(f"ladder.{name}.") for name in dropped if name != "identity")
    ]
    leave = [f"~ladder.{name}" for name in dropped if name != "identity"]
    return ["experiment=adaptive", *kept, *leave, *([] if dip else DIP_ROWS), *overrides]


def tiny_ladder(folder: Path, *overrides: str, rungs: tuple[str, ...] | None = None, dip: bool = True) -> Matrix:
    """A checked ladder, not run yet."""
    return prepare_matrix(typed_matrix(*ladder_overrides(*overrides, rungs=rungs, dip=dip)), folder)


def run_tiny_ladder(
    folder: Path, *overrides: str, rungs: tuple[str, ...] | None = None, dip: bool = True
) -> list[Path]:
    """Run evaluate.py's work in this process; return the report's files."""
    return evaluate.run(compose_matrix(*ladder_overrides(*overrides, rungs=rungs, dip=dip)), folder)
