"""Rows that share a fit: where two fit alike, one fit serves both.

A stopping rule only looks on while the proposed defence is fitted; the proposed defence with other tau, t0, K or beta
replays the decision traces. What a rider gives is what it would give alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dipguard.defenses.guard_row import GuardRow
from dipguard.defenses.stopped_dip import StoppedDIP
from dipguard.fit import fit_device, fit_stack
from dipguard.fit.out_of_memory import is_out_of_memory
from dipguard.fit.stop_rules import StopRules


@dataclass(frozen=True)
class Group:
    """Rows purified together: one that leads, and those that ride on its fit."""

    leader: str
    riders: tuple[str, ...] = ()

    @property
    def rows(self) -> tuple[str, ...]:
        """All rows, the leader first."""
        return (self.leader, *self.riders)


def groups_of(rows: Mapping[str, Any]) -> list[Group]:
    """Rows in groups that share a fit; the first of the proposed defence's rows among them leads."""
    riders: dict[str, list[str]] = {}
    for label, row in rows.items():
        if isinstance(row, GuardRow) and not any(_replays(rows[leader], row) for leader in riders):
            riders[label] = []
    alone: list[str] = []
    for label, row in rows.items():
        if label in riders:
            continue
        leader = next((name for name in riders if _replays(rows[name], row) or _watches(rows[name], row)), None)
        (alone if leader is None else riders[leader]).append(label)
    return [Group(label, tuple(riders.get(label, ()))) for label in rows if label in riders or label in alone]


def _replays(leader: GuardRow, row: Any) -> bool:
    """Whether a row's result follows from the leader's traces."""
    if not isinstance(row, GuardRow):
        return False
    mine, theirs = leader.guard, row.guard
    same = (mine.fit_options, mine.decide_options) == (theirs.fit_options, theirs.decide_options)
    return same and mine.decide_options.patience is None  # which images are retired depends on tau, t0 and K


def _watches(leader: GuardRow, row: Any) -> bool:
    """Whether a row's stopping rule can look on at the leader's fit."""
    guard = leader.guard
    if not isinstance(row, StoppedDIP) or guard.decide_options.patience is not None:
        return False
    return (guard.fit_options, guard.decide_options.T) == (row.fit_options, row.T)


def purify_group(
    rows: Mapping[str, Any], group: Group, todo: list[str], images: Tensor, indices: Tensor
) -> dict[str, tuple[Tensor, float]]:
    """Purify images by those rows of a group that are asked for: reconstructions and seconds by row.

    Seconds of a shared fit are entered for each of its rows: each would have taken them alone.
    """
    riders = [row for row in group.riders if row in todo]
    if group.leader in todo and riders:
        try:
            return _purify_together(rows, group.leader, riders, images, indices)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
    done = {}
    for row in todo:  # each in stacks as small as it needs
        start = time.perf_counter()
        done[row] = (rows[row].purify(images, indices=indices), time.perf_counter() - start)
    return done


def _purify_together(
    rows: Mapping[str, Any], leader: str, riders: list[str], images: Tensor, indices: Tensor
) -> dict[str, tuple[Tensor, float]]:
    guard = rows[leader].guard
    watching = [row for row in riders if isinstance(rows[row], StoppedDIP)]
    rules = [StopRules({row: rows[row].make_rule() for row in watching})] if watching else []
    start = time.perf_counter()
    result = fit_stack(
        images,
        victim=guard.victim,
        indices=indices.tolist(),
        fit=guard.fit_options,
        decide=guard.decide_options,
        stitch=guard.stitch_options,
        device=fit_device(guard.accelerator, victim=guard.victim, images=images),
        callbacks=rules,
    )
    whole = time.perf_counter() - start - sum(rule.seconds for rule in rules)
    made = {leader: torch.stack([reconstruction.image for reconstruction in result.reconstructions])}
    for row in riders:
        if row in watching:
            made[row] = rules[0].stopped[row].images
        else:
            stitched = [rows[row].guard.stitch_options.apply(trace) for trace in result.traces]
            made[row] = torch.stack([reconstruction.image for reconstruction in stitched])
    alone = result.seconds["start"] + result.seconds["fit"]
    return {row: (x.to(images), alone if row in watching else whole) for row, x in made.items()}
