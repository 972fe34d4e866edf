"""Signs that a defence only hides its gradients (Athalye et al. 2018; Carlini et al. 2019; Croce et al. 2022).

Each check has a verdict: ``ok``; ``WARNING``, if the suite's figures for this defence cannot be trusted as they stand;
or ``not checked``, if the attacks that it needs were not run. A check that is ok proves nothing: it is one sign fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dipguard.evaluation.cell import BLACK_BOX, CONTROL, LARGE_EPS, CellResult
from dipguard.evaluation.metrics import wilson
from dipguard.evaluation.randomness import Randomness

OK, WARNING, NOT_CHECKED = "ok", "WARNING", "not checked"


@dataclass(frozen=True)
class Check:
    """A masking check of a defence: its name, its verdict, and the figures that it rests on, in words."""

    check: str
    verdict: str
    figures: str


def masking_checks(results: Sequence[CellResult], randomness: Randomness | None) -> list[Check]:
    """All checks of one defence.

    Args:
        results: The results of the suite's attacks on it, also those without figures.
        randomness: Whether it draws and optimises; None if that was not checked.
    """
    done = [result for result in results if result.done]
    return [
        more_steps(done),
        large_eps(done),
        black_box(done),
        randomised(done, randomness),
        dynamic(done, randomness),
        gradients(done),
        control(done),
    ]


def more_steps(done: Sequence[CellResult]) -> Check:
    """More steps never weaken an attack: neither its best so far, nor (beyond what n images can tell) its last step."""
    bad, seen = [], []
    for result in done:
        if not result.history:
            continue
        seen.append(result.cell.label)
        if any(later > earlier + 1e-9 for earlier, later in zip(result.history, result.history[1:], strict=False)):
            bad.append(f"{result.cell.label}: its best so far gets worse")
        # A search by questions looks at much that it does not keep.
        if result.last_history and result.cell.name not in BLACK_BOX:
            n, best, last = len(result.right), min(result.last_history), result.last_history[-1]
            if last > wilson(round(best * n), n)[1]:
                bad.append(f"{result.cell.label}: {best:.0%} right at its best step, {last:.0%} at its last")
    if not seen:
        return Check("more steps never weaken it", NOT_CHECKED, "no attack kept its course")
    figures = "; ".join(bad) or f"held by {', '.join(seen)}"
    return Check("more steps never weaken it", WARNING if bad else OK, figures)


def large_eps(done: Sequence[CellResult]) -> Check:
    """An attack that may do almost anything must always succeed."""
    name, found = "a large eps reaches 0 %", [c for c in done if c.cell.check == LARGE_EPS]
    if not found:
        return Check(name, NOT_CHECKED, "no attack with check: large_eps was run")
    figures = ", ".join(f"{_right(c)} of {len(c.right)} right at {c.eps_255:g}/255" for c in found)
    return Check(name, WARNING if all(_right(result) for result in found) else OK, figures)


def black_box(done: Sequence[CellResult]) -> Check:
    """An attacker who knows less must not achieve more."""
    name = "black box does not beat white box"
    attacks = [result for result in done if result.attacks]
    white = [c for c in attacks if c.cell.white_box]
    black = [result for result in attacks if result not in white]
    if not white or not black:
        return Check(name, NOT_CHECKED, f"no {'black' if white else 'white'}-box attack was run")
    # Attacks on fewer images are compared on those.
    n = min(len(result.right) for result in (*white, *black))
    best_white, best_black = (min(side, key=lambda c: _right(c, n)) for side in (white, black))
    alone = sum(any(not c.right[i] for c in black) and all(c.right[i] for c in white) for i in range(n))
    figures = (
        f"black box at best {_right(best_black, n)} of {n} right ({best_black.cell.label}), white box "
        f"{_right(best_white, n)} ({best_white.cell.label}); {alone} broken by black box alone"
    )
    return Check(name, WARNING if _right(best_black, n) < _right(best_white, n) else OK, figures)


def randomised(done: Sequence[CellResult], randomness: Randomness | None) -> Check:
    """A system that draws must be attacked in expectation (AutoAttack's first flag)."""
    name = "randomised: attacked in expectation"
    if randomness is None:
        return Check(name, NOT_CHECKED, "the clean images were not run")
    change = f"logits differ by {randomness.drawn:.3g} with other draws, {randomness.repeated:.3g} with the same"
    if not randomness.randomised:
        return Check(name, OK, f"not randomised: {change}")
    over = [c.cell.label for c in done if c.attacks and _in_expectation(c)]
    figures = f"randomised: {change}; EOT with fresh draws in {', '.join(over) or 'no attack'}"
    return Check(name, OK if over else WARNING, figures)


def dynamic(done: Sequence[CellResult], randomness: Randomness | None) -> Check:
    """A system that optimises while it reads needs attacks that know it (AutoAttack's flag of dynamic defences)."""
    name = "dynamic: attacked as such"
    if randomness is None:
        return Check(name, NOT_CHECKED, "the clean images were not run")
    if not randomness.dynamic:
        return Check(name, OK, "not dynamic: no backward pass in a purification")
    adaptive = [c.cell.label for c in done if c.attacks and c.cell.adaptive and c.cell.white_box]
    by = ", ".join(adaptive) or "no attack"
    figures = f"dynamic: {randomness.backward:,} backward passes in a purification; attacked by {by}"
    return Check(name, OK if adaptive else WARNING, figures)


def gradients(done: Sequence[CellResult]) -> Check:
    """A gradient of zero moves nothing (AutoAttack's third flag)."""
    name, found = "no gradient vanishes", [(result, result.flat) for result in done if result.flat is not None]
    if not found:
        return Check(name, NOT_CHECKED, "no attack counted its gradients")
    bad = [f"{flat:.0%} exactly zero in {result.cell.label}" for result, flat in found if flat > 0]
    return Check(name, WARNING if bad else OK, "; ".join(bad) or f"none exactly zero in {len(found)} attacks")


def control(done: Sequence[CellResult]) -> Check:
    """Noise as large as an attack must harm less than the attack."""
    name = "noise harms less than the attacks"
    noise = [result for result in done if result.cell.check == CONTROL]
    attacks = [result for result in done if result.attacks]
    if not noise or not attacks:
        return Check(name, NOT_CHECKED, f"no {'attack' if noise else 'attack with check: control'} was run")
    n = min(len(result.right) for result in (*noise, *attacks))
    least = min(_right(result, n) for result in noise)
    best = min(attacks, key=lambda result: _right(result, n))
    weak = [result.cell.label for result in attacks if _right(result, n) >= least > 0]
    figures = f"{least} of {n} right under noise, {_right(best, n)} under {best.cell.label}"
    figures += f"; no better than noise: {', '.join(weak)}" if weak else ""
    return Check(name, OK if _right(best, n) < least or not _right(best, n) else WARNING, figures)


def _in_expectation(result: CellResult) -> bool:
    options = result.cell.options
    return options.get("eot_iter", 1) > 1 and options.get("draws") == "fresh"


def _right(result: CellResult, n: int | None = None) -> int:
    return int(result.right[:n].sum())
