"""``dipguard purify``: pictures in; purified PNGs, figures and a table of decisions out. Resumes where it stopped."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dipguard.classifier import Decider
from dipguard.cli import locked
from dipguard.cli.job import MARK, Job, prepare
from dipguard.cli.pictures import Source, read_picture, read_png, write_png
from dipguard.decision import DecisionTrace
from dipguard.defenses import Defense
from dipguard.files import csv_text, tensor_digest, write_json, write_text
from dipguard.fit import FitProgress
from dipguard.reporting.canvas import Picture, class_name, draw_grid, save_figure
from dipguard.reporting.escape import escape_csv
from dipguard.reporting.trace_figure import draw_trace
from dipguard.store.keys import digest_of

WINDOW = 256  # pictures in memory at once
MOST_PRINTED = 40
LAYER = "cells"
"""Layer of the store for finished pictures, and for the files of ``OUT`` that this command has written."""
COLUMNS = (
    "picture", "output", "before", "before_confidence", "after", "after_confidence", "changed", "used", "why", "index",
    "problem",
)  # fmt: skip
"""Columns of decisions.csv. Decisions are class names with the victim's softmax confidence; ``used`` and ``why`` are
those of :class:`~dipguard.DefenseResult`; ``index`` seeds the random draws; ``problem`` is that of a bad picture."""
_Row = dict[str, Any]


class _Given(NamedTuple):
    """A picture that was read: uint8 [3, H, W], its key in the store, and the index that seeds its draws."""

    source: Source
    pixels: Tensor
    key: str
    draw: int


def run(args: argparse.Namespace) -> int:
    """Carry out the command; return its exit code."""
    job = prepare(args)
    height, width = job.settings["size"]
    steps = f", {job.defense.steps_per_image} steps" if job.defense.steps_per_image else ""
    _say(
        f"pictures: {len(job.sources)}, brought to {height}x{width} ({args.resize}, {job.settings['interpolation']}); "
        f"victim {args.victim}; defence {args.defense}{steps}, seed {args.seed}"
    )
    can_draw = find_spec("matplotlib") is not None
    if job.figures and not can_draw:
        _say("no figures: matplotlib is not installed (pip install 'dipguard[app]')")
    rows: dict[str, _Row] = {}
    drawn = {source.name: _figure(job, source) for source in job.sources[: job.figures]} if can_draw else {}
    with locked(job.out):
        write_json(job.out / MARK, job.settings)
        try:
            for first in range(0, len(job.sources), WINDOW):
                _work_through(job, job.sources[first : first + WINDOW], rows, drawn)
        finally:
            ordered = [rows[source.name] for source in job.sources if source.name in rows]
            if ordered:
                write_decisions(job.out, ordered)
    print(*map(decision_line, ordered[:MOST_PRINTED]), sep="\n")
    bad = [row for row in ordered if row.get("problem")]
    changed = sum(bool(row.get("changed")) for row in ordered)
    _say(f"decisions changed: {changed} of {len(ordered) - len(bad)}; all in {job.out / 'decisions.csv'}")
    for row in bad:
        _say(decision_line(row))
    return 1 if bad else 0


def _work_through(job: Job, window: Sequence[Source], rows: dict[str, _Row], drawn: dict[str, Path]) -> None:
    """Purify the pictures that are not done yet, and add a row for each picture."""
    pending: list[_Given] = []
    kept = restored = 0
    for source in window:
        target = job.out / source.output
        try:
            given = _read(job, source)
            if target.exists() and job.store.read(LAYER, _file_key(source)) is None:
                raise ValueError(f"{target} was not written by this command, and is not overwritten")
        except (ValueError, OSError) as error:  # such as a name that is too long for the output's
            rows[source.name] = {"picture": source.name, "problem": str(error)}
            continue
        done = job.store.read_as(LAYER, given.key, lambda entry: (entry.arrays["pixels"], dict(entry.header["row"])))
        if done is None:
            pending.append(given)
            continue
        pixels = torch.from_numpy(done[0])
        whole = False
        with suppress(ValueError, OSError):
            whole = torch.equal(read_png(target), pixels)
        kept, restored = kept + whole, restored + (not whole)
        if not whole:
            _write(job, source, pixels)
        rows[source.name] = {"picture": source.name, "output": source.output, **done[1]}
    for count, what in ((kept, ""), (restored, ", and written again")):
        if count:
            _say(f"pictures done earlier{what}: {count}")
    if not pending:
        return
    before = read_by_victim(job.victim, torch.stack([given.pixels for given in pending]))
    for given, first, (image, about, trace) in zip(pending, before, _purified(job, pending), strict=True):
        source = given.source
        pixels = (image * 255).round().to(torch.uint8).cpu()
        (after,) = read_by_victim(job.victim, pixels[None])  # on the picture as it is saved, in 8 bits
        row = {
            "index": given.draw,
            "before": class_name(first[0], job.classes),
            "before_confidence": first[1],
            "after": class_name(after[0], job.classes),
            "after_confidence": after[1],
            "changed": after[0] != first[0],
            **about,
        }
        # Before the figure, which may fail: a fit is worth more.
        job.store.write(LAYER, given.key, {"pixels": pixels.numpy()}, {"row": row})
        _write(job, source, pixels)
        rows[source.name] = {"picture": source.name, "output": source.output, **row}
        if source.name in drawn:
            how: dict[str, Any] = {"trace": trace, "defense": job.defense, "classes": job.classes, "title": source.name}
            try:
                draw_picture(drawn[source.name], given.pixels / 255, pixels / 255, (first[0], after[0]), **how)
            except OSError as error:
                _say(f"no figure of {plain(source.name)}: {error}")


def _read(job: Job, source: Source) -> _Given:
    how = {name: job.settings[name] for name in ("size", "resize", "interpolation")}
    pixels = read_picture(source.path, **how)
    digest = tensor_digest([pixels])
    # The index comes from the content, so that draws depend neither on the name nor on the other pictures.
    return _Given(source, pixels, digest_of([job.settings, digest]), int(digest[:8], 16) >> 1)


def _write(job: Job, source: Source, pixels: Tensor) -> None:
    # The file is registered first: a killed run must not take its own pictures for foreign ones.
    job.store.write(LAYER, _file_key(source), {}, {"file": source.output})
    write_png(job.out / source.output, pixels)


def _file_key(source: Source) -> str:
    return digest_of(["file", source.output])


def _figure(job: Job, source: Source) -> Path:
    return (job.out / "figures" / source.output.removeprefix("../")).with_suffix(".figure.png")


def _purified(job: Job, givens: Sequence[_Given]) -> Iterator[tuple[Tensor, _Row, DecisionTrace | None]]:
    """Yield each picture's purified image [3, H, W] in [0, 1], ``used`` and ``why``, and its trace if there is one."""
    steps = job.defense.steps_per_image
    unit = "step" if steps else "picture"
    total = len(givens) * max(1, steps)
    with tqdm(total=total, desc="purify", unit=unit, unit_scale=bool(steps), disable=not job.progress) as bar:
        watch = [FitProgress(bar)] if steps else []
        for first in range(0, len(givens), job.batch):
            part = givens[first : first + job.batch]
            images = torch.stack([given.pixels for given in part]).float() / 255
            made = job.defense.defend(images, indices=[given.draw for given in part], callbacks=watch)
            if not steps:
                bar.update(len(part))
            traces: Sequence[DecisionTrace | None] = made.traces or [None] * len(part)
            for image, used, why, trace in zip(made.reconstructions, made.used, made.reasons, traces, strict=True):
                yield image, {"used": used, "why": why}, trace


def read_by_victim(victim: nn.Module, pixels: Tensor) -> list[tuple[int, float]]:
    """Return the victim's decisions on uint8 pictures [N, 3, H, W], each with its softmax confidence."""
    decider = Decider(victim)
    parts = pixels.split(decider.batch(*pixels.shape[-2:]))  # one at a time: floats take four times the memory
    logits = torch.cat([decider(part.float() / 255) for part in parts])
    confidence, decision = logits.double().softmax(dim=1).max(dim=1)
    return list(zip(decision.tolist(), confidence.tolist(), strict=True))


def write_decisions(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write decisions.csv; ``rows`` hold some of `COLUMNS`."""
    lines = [{k: escape_csv(plain(v)) if isinstance(v, str) else v for k, v in row.items()} for row in rows]
    write_text(folder / "decisions.csv", csv_text(COLUMNS, lines))


def decision_line(row: Mapping[str, Any]) -> str:
    """A row in words, for a terminal."""
    name = plain(row["picture"])
    if row.get("problem"):
        return f"{name}: not purified: {plain(row['problem'])}"
    before, after = (f"{plain(row[w])} {row[f'{w}_confidence']:.0%}" for w in ("before", "after"))
    return f"{name}: {before} -> {after}{', changed' if row['changed'] else ''}"


def plain(text: str) -> str:
    """Text on one line. File names may hold anything, such as characters that move a terminal's cursor."""
    return "".join(c if c.isprintable() else "?" for c in text)


def draw_picture(
    path: Path,
    given: Tensor,
    purified: Tensor,
    decisions: tuple[int, int],
    *,
    trace: DecisionTrace | None,
    defense: Defense,
    classes: Sequence[str],
    title: str,
    **known: Any,
) -> None:
    """Draw a picture's decision trace or, without one, the picture before and after, as the PNG ``path``.

    ``given`` [3, H, W] and ``purified`` [3, H', W'] are in [0, 1]; ``decisions`` are the victim's before and after,
    ``known`` the true label and the clean image, if they are known.
    """
    if trace is not None:
        name_of = partial(class_name, classes=classes)
        figure = draw_trace(trace, defense.rebuild(trace), decision=decisions[1], name_of=name_of, **known)
    else:
        names = [class_name(decision, classes) for decision in decisions]
        figure = draw_grid(("given", "purified"), {"": [Picture(given, names[0]), Picture(purified, names[1])]})
    figure.suptitle(plain(title), fontsize=12, fontweight="bold")
    save_figure(figure, path)


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # the table goes to standard output
