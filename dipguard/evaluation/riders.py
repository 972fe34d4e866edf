"""Rows that share a fit: where two fit alike, one fit serves both.

A stopping rule only looks on while the proposed defence is fitted; the proposed defence with other tau, t0, K or beta
replays the decision traces. What a rider gives is what it would give alone.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dipguard.defenses.guard_row import GuardRow
from dipguard.defenses.guard_stack import fit_or_find
from dipguard.defenses.stopped_dip import StoppedDIP
from dipguard.fit.out_of_memory import is_out_of_memory
from dipguard.fit.stop_rules import StopRules
from dipguard.store import StoredResult


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

    Seconds of a shared fit are entered for each of its rows: each would have taken them alone. So are those of a fit
    that comes from a store.
    """
    riders = [row for row in group.riders if row in todo]
    stored = isinstance(rows[group.leader], GuardRow) and rows[group.leader].guard.store is not None
    if group.leader in todo and (riders or stored):
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
    asked = {row: rows[row].asked for row in watching}
    looking = guard.store is None and bool(watching)
    rules = [StopRules({row: one.make() for row, one in asked.items()})] if looking else []
    start = time.perf_counter()
    result = fit_or_find(guard, images, indices.tolist(), callbacks=rules, rules=asked)
    whole = time.perf_counter() - start - sum(rule.seconds for rule in rules)
    alone = result.seconds["start"] + result.seconds["fit"]
    if isinstance(result, StoredResult):
        stopped = result.stopped
        whole, alone = whole + result.spared, alone + result.spared
    else:
        stopped = rules[0].stopped if rules else {}
    made = {leader: torch.stack([reconstruction.image for reconstruction in result.reconstructions])}
    for row in riders:
        if row in watching:
            made[row] = stopped[row].images
        else:
            stitched = [rows[row].guard.stitch_options.apply(trace) for trace in result.traces]
            made[row] = torch.stack([reconstruction.image for reconstruction in stitched])
    return {row: (x.to(images), alone if row in watching else whole) for row, x in made.items()}


def serve_all_rows(rows: Mapping[str, Any]) -> None:
    """Let a fit that is made for the store serve all rows of the proposed defence that fit alike, whatever their T."""
    guards = [row.guard for row in rows.values() if isinstance(row, GuardRow) and row.guard.store is not None]
    for guard in guards:
        alike = [other for other in guards if other.fit_options == guard.fit_options]
        asked = dict.fromkeys(options for other in alike for options in (*other.also, other.decide_options))
        guard.also = tuple(options for options in asked if options != guard.decide_options)


def unstored(row: Any) -> Any:
    """The same row without a store: an attack that asks it again and again would fill one with fits for one use."""
    if not isinstance(row, GuardRow | StoppedDIP):
        return row
    plain = copy.copy(row)
    if isinstance(plain, GuardRow):
        plain.guard = copy.copy(plain.guard)
        plain.guard.store, plain.guard.also = None, ()
    else:
        plain.store = None
    return plain
