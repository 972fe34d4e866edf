"""``dipguard purify``: pictures in; purified PNGs, figures and a table of decisions out. Goes on where it stopped."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dipguard.cli.decisions import format_decisions, write_decisions
from dipguard.cli.figures import class_name, draw_decisions, draw_pair, figures_problem
from dipguard.cli.job import MARK, Job, prepare
from dipguard.cli.pictures import Source, read_picture, read_record, write_picture
from dipguard.decision import DecisionTrace
from dipguard.files import tensor_digest, write_json
from dipguard.victims import check_victim

WINDOW = 256
"""Pictures that are in memory at once."""
_Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class _Given:
    """A picture that was read: uint8 [3, H, W], what its result is known by, and the index that settles its draws."""

    source: Source
    pixels: Tensor
    key: str
    index: int


def run(args: argparse.Namespace) -> int:
    """Carry out the command; return its exit code."""
    job = prepare(args)
    _say(_introduction(job, args))
    problem = figures_problem() if job.figures else None
    if problem is not None:
        _say(problem)
    write_json(job.out / MARK, job.settings)
    rows: dict[str, _Row] = {}
    drawable = {} if problem else {source.name: source for source in job.sources[: job.figures]}
    try:
        for first in range(0, len(job.sources), WINDOW):
            window = job.sources[first : first + WINDOW]
            if len(job.sources) > WINDOW:
                _say(f"pictures {first + 1} to {first + len(window)} of {len(job.sources)}")
            _work_through(job, window, rows, drawable)
    finally:
        ordered = [rows[source.name] for source in job.sources if source.name in rows]
        if ordered:
            write_decisions(job.out, ordered)
    print(format_decisions(ordered))
    bad = [row for row in ordered if row.get("problem")]
    changed = sum(bool(row.get("changed")) for row in ordered)
    _say(f"{len(ordered) - len(bad)} pictures, {changed} decisions changed; {job.out / 'decisions.md'}")
    undrawn = sum(
        not figure_path(job.out, source).is_file() for name, source in drawable.items() if "key" in rows[name]
    )
    if undrawn:
        _say(f"{undrawn} of the pictures that were done earlier have no figure; --redo makes them again, with figures")
    for row in bad:
        _say(f"not purified: {row['picture']}: {row['problem']}")
    return 1 if bad else 0


def _work_through(job: Job, window: Sequence[Source], rows: dict[str, _Row], drawable: dict[str, Source]) -> None:
    """Purify what is not done yet; enter each picture into ``rows``."""
    pending: list[_Given] = []
    for source in window:
        try:
            given = _read(job, source)
            record = read_record(source.target)
        except ValueError as error:
            rows[source.name] = {"picture": source.name, "problem": str(error)}
            continue
        if record is not None and record.get("key") == given.key and not job.redo:
            rows[source.name] = record
        else:
            pending.append(given)
    done = sum("key" in rows[source.name] for source in window if source.name in rows)
    if done:
        _say(f"{done} pictures were done earlier")
    if not pending:
        return
    before = _read_by_victim(job, torch.stack([given.pixels for given in pending]))
    for given, first, (image, trace) in zip(pending, before, _purified(job, pending), strict=True):
        rows[given.source.name] = _keep(job, given, first, image, trace, draw=given.source.name in drawable)


def _keep(
    job: Job, given: _Given, before: tuple[int, float], image: Tensor, trace: DecisionTrace | None, *, draw: bool
) -> _Row:
    """Write the purified ``image`` [3, H, W] and its figure; return the row for the table."""
    # What counts is the picture as it is kept: in 8 bits.
    pixels = (image * 255).round().to(torch.uint8).cpu()
    (after,) = _read_by_victim(job, pixels[None])
    row = {
        "key": given.key,
        "picture": given.source.name,
        "output": given.source.target.relative_to(job.out).as_posix(),
        "index": given.index,
        "before": class_name(before[0], job.classes),
        "before_confidence": before[1],
        "after": class_name(after[0], job.classes),
        "after_confidence": after[1],
        "changed": after[0] != before[0],
    }
    path = figure_path(job.out, given.source)
    if trace is not None and job.guard is not None:
        rebuilt = job.guard.rebuild(trace)
        row |= {"crossings": len(rebuilt.used), "why": rebuilt.reason}
        if draw:
            draw_decisions(path, trace, job.guard, decision=after[0], classes=job.classes, title=given.source.name)
    elif draw:
        seen = given.pixels / 255, pixels / 255
        draw_pair(path, *seen, decisions=(before[0], after[0]), classes=job.classes, title=given.source.name)
    # Last: whoever finds the picture finds the rest.
    write_picture(given.source.target, pixels, row)
    return row


def figure_path(out: Path, source: Source) -> Path:
    """Where it is drawn how a picture came about."""
    return (out / "figures" / source.target.relative_to(out)).with_suffix(".figure.png")


def _read(job: Job, source: Source) -> _Given:
    pixels = read_picture(source.path, size=job.size, resize=job.resize, interpolation=job.interpolation)
    digest = tensor_digest([pixels])
    # By its content: the draws then change neither with its name nor with the pictures beside it.
    return _Given(source, pixels, job.key(digest), int(digest[:8], 16) >> 1)


def _purified(job: Job, givens: Sequence[_Given]) -> Iterator[tuple[Tensor, DecisionTrace | None]]:
    """Each picture's purified image [3, H, W] in [0, 1], with its trace where the defence leaves one."""
    images = torch.stack([given.pixels for given in givens]).float() / 255
    indices = torch.tensor([given.index for given in givens])
    if job.guard is not None:
        for result in job.guard.defend_stacks(images, indices=indices, stack_size=job.batch):
            yield from zip(result.reconstructions, result.traces, strict=True)
        return
    batch = job.batch or len(givens)
    # One bar that knows all: the defence's own, which counts steps, or, over several batches, ours.
    own_bar = hasattr(job.defense, "progress") and len(givens) <= batch
    if hasattr(job.defense, "progress"):
        job.defense.progress = own_bar and job.progress
    with tqdm(total=len(givens), desc="purify", unit="picture", disable=own_bar or not job.progress) as bar:
        for part, positions in zip(images.split(batch), indices.split(batch), strict=True):
            for image in job.defense.purify(part, indices=positions):
                yield image, None
                bar.update()


def _read_by_victim(job: Job, pixels: Tensor) -> list[tuple[int, float]]:
    """The victim's decisions on uint8 pictures [N, 3, H, W], each with its softmax confidence."""
    logits = torch.cat([check_victim(job.victim, part.float() / 255) for part in pixels.split(32)])
    confidence, decision = logits.double().softmax(dim=1).max(dim=1)
    return list(zip(decision.tolist(), confidence.tolist(), strict=True))


def _introduction(job: Job, args: argparse.Namespace) -> str:
    height, width = job.size
    steps = f", {job.defense.steps_per_image} steps" if job.defense.steps_per_image else ""
    return (
        f"{len(job.sources)} pictures, brought to {height}x{width} ({job.resize}, {job.interpolation}); "
        f"victim {args.victim}; defence {args.defense}{steps}, seed {args.seed}"
    )


def _say(text: str) -> None:
    """To the person, not into the table, which goes to the standard output."""
    print(text, file=sys.stderr)
