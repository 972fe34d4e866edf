"""Signs that a defence only hides its gradients (Athalye et al. 2018; Carlini et al. 2019; Croce et al. 2022).

Each check has a verdict: ``ok``; ``WARNING``, which says that the ladder's figures for this row are not to be trusted
as they stand; or ``not checked``, where the rungs that it needs were not run. A check that is ok proves nothing: it is
one sign fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dipguard.attacks import DEFENSE_AWARE
from dipguard.config_choices import RungCheck
from dipguard.evaluation.ladder_plan import BLACK_BOX, is_white_box
from dipguard.evaluation.ladder_results import Cell
from dipguard.evaluation.probes import Probe
from dipguard.evaluation.statistics import wilson

OK, WARNING, NOT_CHECKED = "ok", "WARNING", "not checked"


@dataclass(frozen=True)
class Check:
    """A masking check of one row: which, its verdict, and the figures that it rests on, in words."""

    check: str
    verdict: str
    figures: str

    def to_dict(self) -> dict[str, str]:
        """As a line of ladder_checks.csv."""
        return {"check": self.check, "verdict": self.verdict, "figures": self.figures}


def check_target(cells: Sequence[Cell], probe: Probe | None) -> list[Check]:
    """All checks of one row.

    Args:
        cells: Its cells, those without figures too.
        probe: What was found out about the system itself; None where that was not run.
    """
    done = [cell for cell in cells if cell.right is not None]
    return [
        more_steps(done),
        large_eps(done),
        black_box(done),
        randomised(done, probe),
        dynamic(done, probe),
        gradients(done),
        control(done),
    ]


def more_steps(done: Sequence[Cell]) -> Check:
    """More steps never weaken an attack: neither its best so far, nor (beyond what n images can tell) its last step."""
    bad, seen = [], []
    for cell in done:
        if not cell.history:
            continue
        seen.append(cell.planned.rung)
        if any(later > earlier + 1e-9 for earlier, later in zip(cell.history, cell.history[1:], strict=False)):
            bad.append(f"{cell.planned.rung}: its best so far gets worse")
        # A search by questions looks at much that it does not keep.
        if cell.last_history and cell.planned.config.attack not in BLACK_BOX:
            n, best, last = cell.planned.count, min(cell.last_history), cell.last_history[-1]
            if last > wilson(round(best * n), n)[1]:
                bad.append(f"{cell.planned.rung}: {best:.0%} right at its best step, {last:.0%} at its last")
    if not seen:
        return Check("more steps never weaken it", NOT_CHECKED, "no rung kept its course")
    figures = "; ".join(bad) or f"held by {', '.join(seen)}"
    return Check("more steps never weaken it", WARNING if bad else OK, figures)


def large_eps(done: Sequence[Cell]) -> Check:
    """An attack that may do almost anything must always succeed."""
    name, cells = "a large eps reaches 0 %", [c for c in done if c.planned.config.check is RungCheck.large_eps]
    if not cells:
        return Check(name, NOT_CHECKED, "no rung with check: large_eps was run")
    figures = ", ".join(f"{_right(c)} of {c.planned.count} right at {c.planned.eps_255:g}/255" for c in cells)
    return Check(name, WARNING if all(_right(cell) for cell in cells) else OK, figures)


def black_box(done: Sequence[Cell]) -> Check:
    """Who knows less must not achieve more."""
    name = "black box does not beat white box"
    attacks = [cell for cell in done if cell.attacks]
    white = [c for c in attacks if is_white_box(c.planned)]
    black = [cell for cell in attacks if cell not in white]
    if not white or not black:
        return Check(name, NOT_CHECKED, f"no {'black' if white else 'white'}-box attack was run")
    # Rungs of fewer images are compared on those.
    n = min(cell.planned.count for cell in (*white, *black))
    best_white, best_black = (min(side, key=lambda c: _right(c, n)) for side in (white, black))
    alone = sum(any(not _at(c, i) for c in black) and all(_at(c, i) for c in white) for i in range(n))
    figures = (
        f"black box at best {_right(best_black, n)} of {n} right ({best_black.planned.rung}), white box "
        f"{_right(best_white, n)} ({best_white.planned.rung}); {alone} broken by black box alone"
    )
    return Check(name, WARNING if _right(best_black, n) < _right(best_white, n) else OK, figures)


def randomised(done: Sequence[Cell], probe: Probe | None) -> Check:
    """A system that draws must be attacked in expectation (AutoAttack's first flag)."""
    name = "randomised: attacked in expectation"
    if probe is None:
        return Check(name, NOT_CHECKED, "the clean images were not run")
    change = f"logits differ by {probe.drawn:.3g} with other draws, {probe.repeated:.3g} with the same"
    if not probe.randomised:
        return Check(name, OK, f"not randomised: {change}")
    over = [c.planned.rung for c in done if c.attacks and _in_expectation(c)]
    figures = f"randomised: {change}; EOT with fresh draws in {', '.join(over) or 'no rung'}"
    return Check(name, OK if over else WARNING, figures)


def dynamic(done: Sequence[Cell], probe: Probe | None) -> Check:
    """A system that optimises while it reads needs attacks that know it (AutoAttack's flag of dynamic defences)."""
    name = "dynamic: attacked as such"
    if probe is None:
        return Check(name, NOT_CHECKED, "the clean images were not run")
    if not probe.dynamic:
        return Check(name, OK, "not dynamic: no backward pass in a purification")
    aware = [c.planned.rung for c in done if c.attacks and _knows(c)]
    figures = (
        f"dynamic: {probe.backward:,} backward passes in a purification; attacked by {', '.join(aware) or 'no rung'}"
    )
    return Check(name, OK if aware else WARNING, figures)


def gradients(done: Sequence[Cell]) -> Check:
    """A gradient of zero moves nothing (AutoAttack's third flag)."""
    name, cells = "no gradient vanishes", [(cell, cell.flat) for cell in done if cell.flat is not None]
    if not cells:
        return Check(name, NOT_CHECKED, "no rung counted its gradients")
    bad = [f"{flat:.0%} exactly zero in {cell.planned.rung}" for cell, flat in cells if flat > 0]
    return Check(name, WARNING if bad else OK, "; ".join(bad) or f"none exactly zero in {len(cells)} rungs")


def control(done: Sequence[Cell]) -> Check:
    """Noise as large as an attack must harm less than the attack."""
    name = "noise harms less than the attacks"
    noise = [cell for cell in done if cell.planned.config.check is RungCheck.control]
    attacks = [cell for cell in done if cell.attacks]
    if not noise or not attacks:
        return Check(name, NOT_CHECKED, f"no {'attack' if noise else 'rung with check: control'} was run")
    n = min(cell.planned.count for cell in (*noise, *attacks))
    least = min(_right(cell, n) for cell in noise)
    best = min(attacks, key=lambda cell: _right(cell, n))
    weak = [cell.planned.rung for cell in attacks if _right(cell, n) >= least > 0]
    figures = f"{least} of {n} right under noise, {_right(best, n)} under {best.planned.rung}"
    figures += f"; no better than noise: {', '.join(weak)}" if weak else ""
    return Check(name, OK if _right(best, n) < least or not _right(best, n) else WARNING, figures)


def _in_expectation(cell: Cell) -> bool:
    options = cell.planned.options
    return options.get("eot_iter", 1) > 1 and options.get("draws") == "fresh"


def _knows(cell: Cell) -> bool:
    attack = cell.planned.config.attack
    return attack in DEFENSE_AWARE and attack not in BLACK_BOX


def _right(cell: Cell, n: int | None = None) -> int:
    assert cell.right is not None
    return int(cell.right[:n].sum())


def _at(cell: Cell, image: int) -> bool:
    assert cell.right is not None
    return bool(cell.right[image])
