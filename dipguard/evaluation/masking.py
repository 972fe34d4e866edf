"""Signs that a defence only hides its gradients (Athalye et al. 2018; Carlini et al. 2019; Croce et al. 2022).

Each check has a verdict: ``ok``; ``WARNING``, if the suite's figures for this defence cannot be trusted as they stand;
or ``not checked``, if the attacks that it needs were not run. A check that is ok proves nothing: it is one sign fewer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dipguard.classifier import Decider
from dipguard.data import ImageSet
from dipguard.evaluation.cell import BLACK_BOX, CLEAN, CONTROL, LARGE_EPS, CellResult, Target
from dipguard.evaluation.matrix import Matrix
from dipguard.evaluation.metrics import wilson
from dipguard.store import Entry

OK, WARNING, NOT_CHECKED = "ok", "WARNING", "not checked"
OTHER_DRAWS = 1_000_003  # added to an image's index to get draws that are not those of its evaluation
SAME = 1e-4  # logits that differ by at most this differ by rounding


@dataclass(frozen=True)
class Check:
    """A masking check of a defence: its name, its verdict, and the figures that it rests on, in words."""

    check: str
    verdict: str
    figures: str


def masking_checks(results: Sequence[CellResult], randomness: Randomness | None) -> list[Check]:
    """All checks of one defence from the suite's attacks on it; ``randomness`` is None if it was not checked."""
    done = [result for result in results if result.done]
    drawn = [randomised(done, randomness), dynamic(done, randomness)]
    return [more_steps(done), large_eps(done), black_box(done), *drawn, gradients(done), control(done)]


def more_steps(done: Sequence[CellResult]) -> Check:
    """More steps never weaken an attack: neither its best so far, nor (beyond what n images can tell) its last step."""
    name, seen, bad = "more steps never weaken it", [r for r in done if r.history], []
    if not seen:
        return Check(name, NOT_CHECKED, "no attack kept its course")
    for result in seen:
        if any(later > earlier + 1e-9 for earlier, later in pairwise(result.history)):
            bad.append(f"{result.cell.label}: its best so far gets worse")
        # A search by questions looks at much that it does not keep.
        if result.last_history and result.cell.kind not in BLACK_BOX:
            n, best, last = len(result.right), min(result.last_history), result.last_history[-1]
            # The smallest of many shares is low by luck.
            if last > wilson(round(best * n), n, looks=len(result.last_history))[1]:
                bad.append(f"{result.cell.label}: {best:.0%} right at its best step, {last:.0%} at its last")
    held = f"held by {', '.join(result.cell.label for result in seen)}"
    return Check(name, WARNING if bad else OK, "; ".join(bad) or held)


def large_eps(done: Sequence[CellResult]) -> Check:
    """An attack that may do almost anything must always succeed."""
    name, found = "a large eps reaches 0 %", [r for r in done if r.cell.check == LARGE_EPS]
    if not found:
        return Check(name, NOT_CHECKED, "no attack with check: large_eps was run")
    at = ["" if r.eps_255 is None else f" at {r.eps_255:g}/255" for r in found]
    figures = ", ".join(f"{_right(r):g} of {len(r.right)} right{eps}" for r, eps in zip(found, at, strict=True))
    return Check(name, WARNING if all(_right(r) for r in found) else OK, figures)


def black_box(done: Sequence[CellResult]) -> Check:
    """An attacker who knows less must not achieve more."""
    name, attacks = "black box does not beat white box", [result for result in done if result.attacks]
    white, black = (_longest([r for r in attacks if r.cell.white_box == side]) for side in (True, False))
    if not white or not black:
        return Check(name, NOT_CHECKED, f"no {'black' if white else 'white'}-box attack was run")
    n = min(len(white[0].right), len(black[0].right))
    aimed = [{r.cell.label: _aimed(r)[:n] for r in side} for side in (white, black)]
    sums = [[(round(float(right.sum()), 6), label) for label, right in side.items()] for side in aimed]
    (best_white, by_white), (best_black, by_black) = map(min, sums)
    # An image is broken if it is read rightly in less than half of the draws that the attack aims at.
    withstood = [torch.stack(list(side.values())).amin(dim=0) >= 0.5 for side in aimed]
    alone = int((withstood[0] & ~withstood[1]).sum())
    figures = (
        f"black box at best {best_black:g} of {n} right ({by_black}), white box {best_white:g} ({by_white}); "
        f"{alone} broken by black box alone"
    )
    return Check(name, WARNING if best_black < best_white else OK, figures)


def randomised(done: Sequence[CellResult], randomness: Randomness | None) -> Check:
    """A system that draws must be attacked in expectation (AutoAttack's first flag)."""
    name = "randomised: attacked in expectation"
    if randomness is None:
        return Check(name, NOT_CHECKED, "the randomness check was not run yet")
    change = f"logits differ by {randomness.drawn:.3g} with other draws"
    if randomness.drawn <= SAME:
        return Check(name, OK, f"not randomised: {change}")
    options = [(r.cell.label, r.cell.options) for r in done if r.attacks and r.cell.white_box]
    over = [label for label, o in options if o.get("eot_iter", 1) > 1 and o.get("draws") == "fresh"]
    figures = f"randomised: {change}; EOT with fresh draws in {', '.join(over) or 'no attack'}"
    return Check(name, OK if over else WARNING, figures)


def dynamic(done: Sequence[CellResult], randomness: Randomness | None) -> Check:
    """A system that optimises while it reads needs attacks that know it (AutoAttack's flag of dynamic defences)."""
    name = "dynamic: attacked as such"
    if randomness is None:
        return Check(name, NOT_CHECKED, "the randomness check was not run yet")
    if randomness.backward == 0:
        return Check(name, OK, "not dynamic: no backward pass in a purification")
    adaptive = [r.cell.label for r in done if r.attacks and r.cell.adaptive and r.cell.white_box]
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
    name, noise = "noise harms less than the attacks", [result for result in done if result.cell.check == CONTROL]
    attacks = [result for result in done if result.attacks]
    if not noise or not attacks:
        return Check(name, NOT_CHECKED, f"no {'attack' if noise else 'attack with check: control'} was run")
    noise, attacks = _longest(noise), _longest(attacks)
    n = min(len(noise[0].right), len(attacks[0].right))
    least = min(_right(result, n) for result in noise)
    best = min(attacks, key=lambda result: _right(result, n))
    weak = [result.cell.label for result in attacks if _right(result, n) >= least > 0]
    figures = f"{least:g} of {n} right under noise, {_right(best, n):g} under {best.cell.label}"
    figures += f"; no better than noise: {', '.join(weak)}" if weak else ""
    return Check(name, OK if _right(best, n) < least or not _right(best, n) else WARNING, figures)


def _aimed(result: CellResult) -> Tensor:
    """Share of right draws of each image, [n].

    Of what the attack aims at: the known draw, if it asked about that one alone, else all draws.
    """
    attack: Any = result.cell.attack
    fixed = getattr(attack, "draws", "") == "fixed" and not getattr(attack, "final_looks", 0)
    known = fixed and result.cell.source is result.cell.target
    return result.judged("known" if known else "accuracy")


def _longest(results: Sequence[CellResult]) -> list[CellResult]:
    """Those on most images: an attack on fewer would narrow a comparison to its own."""
    most = max((len(result.right) for result in results), default=0)
    return [result for result in results if len(result.right) == most]


def _right(result: CellResult, n: int | None = None) -> float:
    return round(float(result.right[:n].sum()), 6)


class Randomness(NamedTuple):
    """Whether a defended classifier draws, and whether it optimises while it classifies.

    ``drawn`` is the largest change of a logit with other draws, ``backward`` the number of calls of autograd's engine
    in one purification. AutoAttack asks the same before it trusts its own result (Croce et al. 2022).
    """

    drawn: float
    backward: int


def randomness_of(matrix: Matrix, target: Target, *, find: bool = False) -> Randomness | None:
    """The stored result for a target of a matrix. Without one: with ``find`` it is found and stored now, else None."""

    def make() -> Entry:
        found = check_randomness(target, matrix.clean.select(limit=1), matrix.device)
        return Entry({}, {"what": f"randomness of {target.label}", **found._asdict()})

    def parse(entry: Entry) -> Randomness:
        return Randomness(entry.header["drawn"], entry.header["backward"])

    key = matrix.cell(CLEAN, target.label).sub_key("randomness of a noisy image")
    if find:
        return parse(matrix.store.arrays("cells", key, make))
    return matrix.store.read_as("cells", key, parse)


def check_randomness(target: Target, one: ImageSet, device: torch.device) -> Randomness:
    """Purify the image of a set on a device twice: with its own draws and with others.

    With noise of 8/255, as an attacked image has: what a defence draws may show only there.
    """
    noise = torch.rand(one.images.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    images = (one.images + 16 / 255 * noise.to(one.images)).clamp(0, 1).to(device)

    def logits(indices: Tensor) -> Tensor:
        return Decider(target.victim)(target.bare.purify(images, indices=indices)).cpu()

    with counting_backward() as calls:
        first = logits(one.indices)
    return Randomness(float((logits(one.indices + OTHER_DRAWS) - first).abs().max()), calls[0])


@contextmanager
def counting_backward() -> Iterator[list[int]]:
    """Count the calls of autograd's engine on this thread; yields a list that holds the count so far.

    Like AutoAttack, it watches the interpreter; a running profiler is restored afterwards.
    """
    count = [0]

    def watch(frame: FrameType, event: str, what: Any) -> None:
        count[0] += event == "c_call" and getattr(what, "__name__", "") == "run_backward"

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield count
    finally:
        sys.setprofile(before)
