"""What 200 reconstruction settings cost over one set of fits, against one of them.

    python benchmarks/replay_grid.py [--images 16] [--T 1000] [--network medium] [--json FILE]

The images are scikit-learn's digits, the victim is the small CNN trained on them. Every setting (tau x t0 x K x beta)
is a defence of its own on the same store, like the jobs of a sweep. The first one finds the store empty: it fits, asks
the victim, and writes the entries. All others replay. Wall and CPU time are shown, since a busy machine stretches the
first.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder need not be installed

from dipguard import DIPGuard
from dipguard.data import load_data
from dipguard.store import LAYERS, Store
from dipguard.victims import build_victim

GRID = {"tau": (0.5, 0.6, 0.7, 0.8, 0.9), "t0": (25, 50), "K": (5, 10, 15, 20), "beta": (0.0, 0.25, 0.5, 0.75, 1.0)}


@dataclass
class Cost:
    """Seconds of wall and CPU time; those of the parts are wall time.

    Attributes:
        wall: On the clock.
        cpu: Of this process, all threads.
        look_up: Keys, and entries read or, the first time, written; the start of the fit, choice of the stack size.
        fit: The fit.
        decide: Victim and localisation the first time; stitch and victim each time.
    """

    wall: float = 0.0
    cpu: float = 0.0
    look_up: float = 0.0
    fit: float = 0.0
    decide: float = 0.0

    def add(self, work: Callable[[], dict[str, float]]) -> None:
        """Add what a piece of work takes, which returns the seconds of its parts."""
        wall, cpu = time.perf_counter(), time.process_time()
        parts = work()
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        self.look_up += parts["start"]
        self.fit += parts["fit"]
        self.decide += parts["decide"]


def settings() -> Iterator[dict[str, Any]]:
    """The grid."""
    for values in product(*GRID.values()):
        yield dict(zip(GRID, values, strict=True))


def measure(images: Tensor, victim: nn.Module, folder: Path, *, network: str, T: int) -> tuple[Cost, Cost, int]:
    """Costs of the first setting and of all others, and the number of others."""
    store = Store(folder)
    fixed: dict[str, Any] = {"network": network, "T": T, "progress": False}

    def defend(one: dict[str, Any]) -> Callable[[], dict[str, float]]:
        return lambda: DIPGuard(victim, **one, **fixed, store=store).defend(images).seconds

    first, *others = settings()
    one, rest = Cost(), Cost()
    one.add(defend(first))
    for setting in others:
        rest.add(defend(setting))
    assert store.counts["fitted"] == len(images), store.counts
    return one, rest, len(others)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="200 reconstruction settings over one set of fits, against one.")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--T", type=int, default=1000)
    parser.add_argument("--network", default="medium")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    asked = parser.parse_args()
    images = load_data("digits", limit=asked.images).images
    victim = build_victim("digits_cnn", progress=False)
    # Compiles the engine and loads what the first fit of a process loads, which is no part of either side.
    DIPGuard(victim, network=asked.network, T=100, decisions=2, engine="auto", progress=False).defend(images[:1])
    with tempfile.TemporaryDirectory(prefix="dipguard-replay-") as folder:
        one, rest, others = measure(images, victim, Path(folder), network=asked.network, T=asked.T)
        files = {layer: list(Path(folder, layer).glob("??/*.npz")) for layer in LAYERS}
        sizes = {layer: (len(paths), sum(path.stat().st_size for path in paths)) for layer, paths in files.items()}
    more = {name: getattr(rest, name) / getattr(one, name) for name in ("wall", "cpu")}
    print(
        f"{asked.images} images, T={asked.T}, {asked.network}, {torch.get_num_threads()} threads, {others + 1} settings"
    )
    for name, cost, count in (("one", one, 1), ("each other", rest, others)):
        parts = " ".join(f"{key} {1000 * value / count:.1f}" for key, value in asdict(cost).items())
        print(f"{name:10} ms: {parts}")
    print(f"200 settings take {100 * more['wall']:.1f} % more wall time than one ({100 * more['cpu']:.1f} % CPU)")
    print(
        "entries: " + ", ".join(f"{layer} {count} ({size / 2**20:.1f} MiB)" for layer, (count, size) in sizes.items())
    )
    if asked.json is not None:
        figures = {"one": asdict(one), "others": asdict(rest), "more": more, "settings": others + 1}
        asked.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
