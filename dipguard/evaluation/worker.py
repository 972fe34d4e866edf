"""A process that purifies a share of a run's chunks, and ends with its parent."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from itertools import product
from multiprocessing import connection, parent_process
from pathlib import Path

from dipguard.config import RunConfig


def work(rank: int, count: int, config: RunConfig, folder: Path, places: Sequence[tuple[str, str]]) -> None:
    """Purify every ``count``-th chunk of the cells at ``places``, from ``rank`` on, for each draw that judges it.

    What fails is left to the parent, which meets it too. With the torch engine, another number of threads may change a
    fit's numbers by rounding.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch  # only now: that takes seconds

    from dipguard.evaluation.matrix import parts_of
    from dipguard.evaluation.plan import prepare

    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    if config.trainer.get("accelerator") != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    matrix = prepare(config, folder)  # made anew, since not every defence can be pickled
    turn = itertools.count()  # through all cells: small ones have fewer chunks than there are processes
    for cell in (matrix.cell(*place) for place in places):
        snapshots = range(len(matrix.attack_entry(cell).header["snapshots"]))
        for snapshot, draw, part in product(snapshots, range(cell.judge), parts_of(len(cell.clean), matrix.chunk_size)):
            if next(turn) % count != rank:
                continue
            with suppress(Exception):
                matrix.draw(cell, snapshot, part, draw) if draw else matrix.chunk(cell, snapshot, part)


def _end_with_parent() -> None:
    """End this process when its parent ends, even if that is killed."""
    parent = parent_process()
    connection.wait([] if parent is None else [parent.sentinel])
    os._exit(1)
