"""The ladder's cells before they are run: which attack meets which system, why some do not apply, what each costs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dipguard.attacks import ATTACKS, DEFENSE_AWARE, Cost, build_attack, build_defense_aware_attack
from dipguard.attacks.frame import AttackFrame
from dipguard.config_checks import keys_named
from dipguard.config_matrix import RungConfig
from dipguard.defenses import build_defense
from dipguard.evaluation.cells import BASELINE, key_of
from dipguard.evaluation.matrix import Matrix
from dipguard.evaluation.results import defense_name
from dipguard.evaluation.riders import unstored
from dipguard.registry import resolve

AUTO_ATTACK = "defended_autoattack"
BLACK_BOX = ("defended_square", "hopskipjump")
"""Attacks on the defended system that ask it questions and take no gradient."""
BLIND = ("none", "noise", "square")
"""Attacks on a victim that take no gradient."""


@dataclass(frozen=True, eq=False)
class Target:
    """What is attacked: a classifier behind a defence.

    Attributes:
        label: The row's label, or ``baseline``.
        victim: The classifier.
        victim_name: Its name.
        row: The defence.
        defense: The defence's name.
        depends: What a result depends on, besides the attack.
        cut: In what its defence falls short of its own defaults, in words; mostly empty.
    """

    label: str
    victim: nn.Module
    victim_name: str
    row: Any
    defense: str
    depends: dict[str, Any]
    cut: str = ""


@dataclass(frozen=True, eq=False)
class Planned:
    """A cell of the ladder.

    Attributes:
        rung: The rung's name.
        config: Its settings.
        target: Whom it attacks.
        options: The attack's options for this target.
        eps_255: Its budget in levels of 0 to 255.
        attack: The attack; None where the rung does not apply.
        why: Why it does not; None where it does.
        count: Number of images.
        key: Digest of all that its result depends on.
        cost: What the attack will cost, at most.
    """

    rung: str
    config: RungConfig
    target: Target
    options: dict[str, Any]
    eps_255: float
    attack: AttackFrame | None
    why: str | None
    count: int
    key: str = ""
    cost: Cost = field(default_factory=Cost)

    @property
    def cut(self) -> str:
        """What ``full`` has more of than the options, in words; empty where nothing was cut."""
        given = {name: self.options.get(name) for name in self.config.full if name in self.options}
        # A deterministic system has one draw: more looks at it would be the same look.
        if not getattr(self.target.row, "random", False):
            given.pop("eot_iter", None)
        return ", ".join(f"{n} {v} of {self.config.full[n]}" for n, v in given.items() if v != self.config.full[n])


def targets_of(matrix: Matrix) -> list[Target]:
    """The rows of a matrix, and its baseline where it has one."""
    common = {"data": matrix.digests["data"]}
    guide = matrix.digests.get("guide", matrix.digests["victim"])
    found = []
    for label, row in matrix.rows.items():
        depends = {**common, "victim": matrix.digests["victim"], "guide": guide, "defense": row.settings}
        name = defense_name(matrix, label)
        cut = _row_cut(matrix, label)
        found.append(Target(label, matrix.victim, matrix.config.victim.name, unstored(row), name, depends, cut))
    if matrix.baseline is not None and matrix.config.baseline is not None:
        row = build_defense("none", matrix.baseline, seed=matrix.config.seed)
        depends = {**common, "victim": matrix.digests["baseline"], "defense": row.settings}
        found.append(Target(BASELINE, matrix.baseline, matrix.config.baseline.name, row, "none", depends))
    return found


def plan_ladder(matrix: Matrix, targets: list[Target] | None = None) -> list[Planned]:
    """All cells, rung by rung.

    Raises:
        TypeError, ValueError, ImportError: An attack's settings are out of range, or its library is missing.
    """
    targets = targets_of(matrix) if targets is None else targets
    return [_plan(matrix, name, rung, target) for name, rung in matrix.config.ladder.items() for target in targets]


def _plan(matrix: Matrix, name: str, rung: RungConfig, target: Target) -> Planned:
    count = min(len(matrix.clean), rung.limit or len(matrix.clean))
    eps = matrix.config.ladder_eps_255 if rung.eps_255 is None else rung.eps_255
    options, why = fitting_options(rung, target)
    attack: AttackFrame | None = None
    if why is None:
        with keys_named(f"ladder.{name}", ("eps_255", "attack")), keys_named(f"ladder.{name}.options", options):
            attack = _build(matrix, rung, target, options, eps)
    if attack is None:
        return Planned(name, rung, target, options, eps, None, why, count)
    key = key_of(attack=attack.settings, options=options, eps=eps, count=count, **target.depends)
    cost = attack.estimate(count) if hasattr(attack, "estimate") else Cost()
    return Planned(name, rung, target, options, eps, attack, None, count, key, cost)


def fitting_options(rung: RungConfig, target: Target) -> tuple[dict[str, Any], str | None]:
    """A rung's options for a target, and why it does not apply to it (None: it does)."""
    row, options = target.row, dict(rung.options)
    if row.unavailable is not None:
        return options, "unavailable"
    if rung.rows is not None and target.label not in rung.rows:
        return options, "left out"
    if rung.readout:
        known = getattr(row, "readout_views", {"stitched": 1})
        name = next((readout for readout in rung.readout if readout in known), None)
        if name is None:
            return options, "no such readout"
        options["readout"] = name
    if options.get("eot_iter", 1) > 1 and not row.random:
        if rung.attack != AUTO_ATTACK:
            return options, "deterministic"  # the rung without EOT is the same attack
        options["eot_iter"] = 1
    if not row.steps_per_image and (rung.attack == "unrolled" or options.get("stand_in") == "short_dip"):
        return options, "no DIP"
    return options, None


def _build(matrix: Matrix, rung: RungConfig, target: Target, options: dict[str, Any], eps: float) -> AttackFrame:
    common: dict[str, Any] = {"seed": matrix.config.seed, "batch_size": rung.batch_size, **options}
    if rung.attack in ATTACKS:
        return build_attack(rung.attack, target.victim, eps_255=eps, **common)
    # A search for the nearest image has no budget: what it finds is held against eps afterwards.
    known = inspect.signature(resolve(DEFENSE_AWARE, rung.attack, argument="attack")).parameters
    own = eps if "eps_255" in known else None
    return build_defense_aware_attack(rung.attack, target.victim, target.row, eps_255=own, **common)


def is_white_box(cell: Planned) -> bool:
    """Whether an attack takes gradients of the very system that it meets: the victim's are that without a defence."""
    attack = cell.config.attack
    if attack in ATTACKS:
        return bool(cell.target.row.name == "none") and attack not in BLIND
    return attack not in BLACK_BOX


def _row_cut(matrix: Matrix, label: str) -> str:
    """Whether a row's fit is shorter than its defence's own default, in words."""
    config, row = matrix.config.rows[label], matrix.rows[label]
    if row.unavailable is not None or not row.steps_per_image:
        return ""
    options = {name: value for name, value in config.options.items() if name != "T"}
    try:
        default = build_defense(config.name, row.victim, weights=config.weights, **options)
    except (TypeError, ValueError):  # the other options go with this T alone
        return ""
    if row.steps_per_image >= default.steps_per_image:
        return ""
    return f"{row.steps_per_image:,} of {default.steps_per_image:,} DIP steps an image"
