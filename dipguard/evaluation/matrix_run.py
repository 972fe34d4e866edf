"""Runs a matrix cell by cell, chunk by chunk; what is stored already is not run again."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dipguard.evaluation.matrix import Matrix
from dipguard.evaluation.metrics import decide, similarity
from dipguard.evaluation.results import write_results
from dipguard.evaluation.riders import Group, groups_of, purify_group
from dipguard.evaluation.shared import counted, shared_attack
from dipguard.evaluation.statistics import psnr

_log = logging.getLogger(__name__)

STEPS_A_UNIT = 25
"""Steps of a fit that weigh as much as one image of a feed-forward row, for the time left."""


def run_matrix(matrix: Matrix, *, share: tuple[int, int] = (0, 1)) -> None:
    """Attack, purify and judge what the folder does not hold yet.

    Args:
        matrix: See :func:`~dipguard.evaluation.matrix.prepare_matrix`.
        share: (rank, processes): this process purifies every processes-th chunk alone, and judges nothing; (0, 1) does
            everything.
    """
    rank, processes = share
    groups = groups_of(matrix.rows)
    show = matrix.config.trainer.progress and rank == 0
    with _progress(matrix, groups, show=show) as bar, counted(matrix):
        for column in matrix.config.columns:
            attacked = attacked_images(matrix, column)
            bar.update(len(matrix.clean))
            for group in groups:
                todo = [row for row in group.rows if not is_done(matrix, column, row)]
                if not todo:
                    bar.update(_weight(matrix, group) * len(matrix.clean))
                    continue
                bar.set_postfix_str(f"{column} x {', '.join(todo)}")
                for number, start in enumerate(range(0, len(matrix.clean), matrix.config.chunk)):
                    if number % processes == rank:
                        purify_chunk(matrix, column, group, todo, attacked["images"], start)
                    bar.update(_weight(matrix, group) * len(matrix.clean.images[start : start + matrix.config.chunk]))
                if processes == 1:
                    for row in todo:
                        finish_cell(matrix, column, row)
                    write_results(matrix)
    if processes == 1:
        write_results(matrix)


def attacked_images(matrix: Matrix, column: str) -> dict[str, Any]:
    """A column's attacked images [N, 3, H, W] with what the attack achieved; stored, or made and stored now."""
    key, path = matrix.column_key(column), matrix.folder.attacked_path(column)
    saved = matrix.folder.load(path, key=key)
    if saved is None and matrix.store is not None:
        saved = shared_attack(matrix, column, lambda: _attack(matrix, column))
    elif saved is None:
        saved = _attack(matrix, column)
        matrix.folder.save(path, saved, key=key)
    return {name: torch.from_numpy(np.asarray(value)) for name, value in saved.items()}


def _attack(matrix: Matrix, column: str) -> dict[str, Any]:
    attack, clean = matrix.attack(column), matrix.clean
    _log.info("attack %s: %d images", column, len(clean))
    start = time.perf_counter()
    images, labels = clean.images.to(matrix.device), clean.labels.to(matrix.device)
    attacked = attack(images, labels, indices=clean.indices)
    seconds = time.perf_counter() - start
    report = attack.report(images, attacked, labels, indices=clean.indices)
    return {
        "images": attacked.cpu().numpy(),
        "decisions": decide(matrix.victim, attacked).numpy(),
        "fooled": report.fooled.numpy(),
        "linf": report.linf.numpy(),
        "l2": report.l2.numpy(),
        "seconds": np.float64(seconds),
    }


def is_done(matrix: Matrix, column: str, row: str) -> bool:
    """Whether a cell is finished, or can never be."""
    if matrix.rows[row].unavailable is not None:
        return True
    return matrix.folder.load(matrix.folder.cell_path(column, row), key=matrix.cell_key(column, row)) is not None


def purify_chunk(matrix: Matrix, column: str, group: Group, rows: list[str], attacked: Tensor, start: int) -> None:
    """Purify the images from number ``start`` on by the rows of a group, where no part of them is stored."""
    keys = {row: matrix.cell_key(column, row) for row in rows}
    paths = {row: matrix.folder.part_path(column, row, start) for row in rows}
    todo = [row for row in rows if matrix.folder.load(paths[row], key=keys[row]) is None]
    if not todo:
        return
    part = slice(start, start + matrix.config.chunk)
    images, indices = attacked[part].to(matrix.device), matrix.clean.indices[part]
    for row, (purified, seconds) in purify_group(matrix.rows, group, todo, images, indices).items():
        arrays = {"images": purified.cpu().numpy(), "seconds": np.float64(seconds)}
        matrix.folder.save(paths[row], arrays, key=keys[row])


def finish_cell(matrix: Matrix, column: str, row: str) -> None:
    """Put a cell's chunks together and judge its reconstructions."""
    key, clean, folder = matrix.cell_key(column, row), matrix.clean, matrix.folder
    starts = range(0, len(clean), matrix.config.chunk)
    parts = [folder.load(folder.part_path(column, row, start), key=key) for start in starts]
    if any(part is None for part in parts):
        raise RuntimeError(f"cell {column} x {row} cannot be finished: a chunk is missing in {folder.path}")
    images = torch.cat([torch.from_numpy(part["images"]) for part in parts if part is not None])
    same = images.shape == clean.images.shape
    comparable = images if same else torch.nn.functional.interpolate(images, clean.images.shape[-2:], mode="area")
    arrays = {
        "images": images.numpy(),
        "indices": clean.indices.numpy(),
        "decisions": decide(matrix.victim, images.to(matrix.device)).numpy(),
        "ssim": similarity(comparable, clean.images).numpy(),
        "psnr": psnr(comparable, clean.images).numpy(),
        "seconds": np.float64(sum(float(part["seconds"]) for part in parts if part is not None)),
    }
    folder.save(folder.cell_path(column, row), arrays, key=key)
    folder.drop_parts(column, row)


def _weight(matrix: Matrix, group: Group) -> int:
    return 1 + matrix.rows[group.leader].steps_per_image // STEPS_A_UNIT


@contextmanager
def _progress(matrix: Matrix, groups: list[Group], *, show: bool) -> Iterator[Any]:
    images = len(matrix.clean)
    total = len(matrix.config.columns) * images * (1 + sum(_weight(matrix, group) for group in groups))
    with tqdm(total=total, desc="evaluate", unit="unit", disable=not show, dynamic_ncols=True) as bar:
        yield bar
