"""The results as files: metrics.json, images.csv, reconstructions.npz, and a page that a person can open."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dipguard.evaluation.outcome import Outcome
from dipguard.files import write_json, write_npz, write_text


def write_tables(outcome: Outcome) -> dict[str, Any]:
    """Write metrics.json, images.csv and reconstructions.npz into the run folder; return the metrics.

    reconstructions.npz holds ``images`` (float32 [N, 3, H, W] in [0, 1]), ``indices`` and ``labels`` ([N] int64).
    """
    metrics = outcome.metrics()
    images = torch.stack([reconstruction.image.float() for reconstruction in outcome.reconstructions])
    write_npz(
        outcome.folder / "reconstructions.npz",
        images=images.numpy(),
        indices=outcome.clean.indices.numpy(),
        labels=outcome.clean.labels.numpy(),
    )
    write_csv(outcome.folder / "images.csv", outcome.rows())
    write_json(outcome.folder / "metrics.json", metrics)
    return metrics


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows of the same keys as a CSV file with a header.

    Raises:
        ValueError: No rows.
    """
    if not rows:
        raise ValueError("`rows` must hold at least one row, got none")
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_text(path, text.getvalue())


def write_page(path: Path, outcome: Outcome, figures: Sequence[Path]) -> Path:
    """Write report.md: the result in words and figures. ``figures`` are linked relative to ``path``."""
    metrics, rows = outcome.metrics(), outcome.rows()
    n, right, ssim, seconds = metrics["n"], metrics["accuracy"], metrics["ssim"], metrics["seconds"]
    settings = outcome.settings
    lines = [
        "# dipguard run",
        "",
        f"{n} images of `{settings['data']['name']}`, victim `{settings['victim']['name']}`, "
        f"attack {_attack(settings)}, defence `{settings['defense']['name']}` ({_fit(settings)}).",
        "",
        "| | clean | given (undefended) | defended |",
        "|---|---|---|---|",
        f"| accuracy | {right['clean']:.1%} | {right['undefended']:.1%} | {right['defended']:.1%} |",
        f"| SSIM to the clean image | 1 | {ssim['given']:.3f} | {ssim['defended']:.3f} |",
        "",
        _stitched(metrics, rows),
        "",
        f"Time: attack {seconds['attack']:.1f} s, start-up of the fits {seconds['start']:.1f} s, "
        f"fit {seconds['fit']:.1f} s, decide {seconds['decide']:.1f} s; "
        f"{metrics['images_per_second']:.3g} images a second.",
        "",
        "Files: `metrics.json` (figures and settings), `images.csv` (a row an image), `reconstructions.npz`, `traces/` "
        "(decision traces, which can be replayed without a new fit), `config.yaml`.",
    ]
    for figure in figures:
        name = figure.relative_to(path.parent).as_posix()
        lines += ["", f"![{figure.stem.replace('_', ' ')}]({name})"]
    return write_text(path, "\n".join(lines) + "\n")


def _fit(settings: Mapping[str, Any]) -> str:
    T = f"T = {settings['defense']['T']}"
    if settings["defense"]["name"] == "dipguard":
        return f"{len(settings['guard']['fit'])} networks, {T} each"
    return f"network {settings['network']['name']}, {T}"


def _stitched(metrics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    if metrics["settings"]["defense"]["name"] == "dipguard":
        none = sum(row["why"] == "no_reader" for row in rows)
        return (
            f"Windows averaged: {metrics['crossings']:.1f} an image on average; for {none} of {len(rows)} images the "
            "victim read none as the class with the most evidence (all windows were averaged)."
        )
    none = sum(row["why"] == "no_crossing" for row in rows)
    return (
        f"Stitched on-boundary images: {metrics['crossings']:.1f} an image on average; {none} of {len(rows)} images "
        "had none that counted (their reconstruction is the mean of the last K samples)."
    )


def _attack(settings: Mapping[str, Any]) -> str:
    attack = settings["attack"]
    eps = attack.get("eps_255")
    return f"`{attack['name']}`" + ("" if eps is None else f" at {eps:g}/255")
