"""Small real attack suites for the tests: a few digits, a few defences, short fits, attacks of a few steps."""

from functools import cache
from pathlib import Path

from dipguard.cli.programs import evaluate
from dipguard.evaluation.matrix import Matrix
from dipguard.evaluation.plan import prepare
from tests.tiny_matrix import compose_matrix, typed_matrix

SMALL = (
    "data=digits", "victim=digits_cnn", "data.limit=4", "chunk=4", "figures=0", "eps_255=24", "judge=1",
    "trainer.accelerator=cpu", "trainer.enable_progress_bar=false",
    "defenses.mirror.networks=[small,small,small]", "defenses.mirror.T=20", "defenses.mirror.t0=5",
    "defenses.mirror.every=5", "defenses.dipdefend.T=20", "defenses.paper.network=small", "defenses.paper.T=20",
    "defenses.paper.decisions=10", "defenses.paper.t0=2", "defenses.paper.tau=0.2",
    "attacks.transfer.steps=5", "attacks.identity.steps=2", "attacks.identity_eot.steps=1",
    "attacks.identity_eot.eot_iter=2", "attacks.identity_eot.final_looks=1", "attacks.unrolled.T=4",
    "attacks.autoattack_rand.steps=1", "attacks.autoattack_rand.eot_iter=2", "attacks.autoattack_rand.final_looks=0",
    "attacks.square.n_queries=4", "attacks.square_500.n_queries=2", "attacks.hopskipjump.queries=12",
    "attacks.hopskipjump.init_size=4", "attacks.hopskipjump.init_eval=3", "attacks.hopskipjump_500.queries=6",
    "attacks.hopskipjump_500.init_size=2", "attacks.hopskipjump_500.init_eval=2",
)  # fmt: skip
"""Overrides of experiment=adaptive ladder=full for a run of a minute."""

DIP_DEFENSES = ("~defenses.dipdefend", "~defenses.mirror", "~defenses.paper")
"""Left out if only feed-forward defences are needed."""


@cache
def attack_names() -> list[str]:
    """The attacks of experiment=adaptive, without the clean images."""
    return [name for name in typed_matrix("experiment=adaptive", "ladder=full").attacks if name != "clean"]


def suite_overrides(*overrides: str, attacks: tuple[str, ...] | None = None, dip: bool = True) -> list[str]:
    """experiment=adaptive ladder=full, made small: only ``attacks`` (None: all), with the DIP defences or without."""
    defenses = [] if dip else [text for text in SMALL if text.startswith("defenses.")]
    made_on = [] if dip else [name for name in attack_names() if name.startswith("from_")]
    dropped = made_on if attacks is None else [name for name in attack_names() if name not in attacks]
    # The steps of others are taken from identity, so it is never dropped.
    kept = [
        text
        for text in SMALL
        if text not in defenses
        and not any(text.startswith(f"attacks.{name}.") for name in dropped if name != "identity")
    ]
    leave = [f"~attacks.{name}" for name in dropped if name != "identity"]
    return ["experiment=adaptive", "ladder=full", *kept, *leave, *([] if dip else DIP_DEFENSES), *overrides]


def tiny_suite(folder: Path, *overrides: str, attacks: tuple[str, ...] | None = None, dip: bool = True) -> Matrix:
    """A checked suite, not run yet."""
    return prepare(typed_matrix(*suite_overrides(*overrides, attacks=attacks, dip=dip)), folder)


def run_tiny_suite(folder: Path, *overrides: str) -> list[Path]:
    """Run evaluate.py's work with all attacks in this process; return the report's files."""
    return evaluate(compose_matrix(*suite_overrides(*overrides)), folder)
