"""Images that leave a stack when they are finished, with and without others in their places.

    python benchmarks/retire.py [--images FILE.npz --weights FILE.th] [--count 16] [--slots 4] [--T 300] [--K 3]
                                [--patience 10]

Without a file: handwritten digits and a small classifier of them, trained on the spot. Three runs: every image to the
end; stacks that shrink; one stack that is refilled. ``full`` is the mean number of images a step over the places, up to
the step at which the last image began. ``moved`` is the mean absolute difference of the stitched images from those of
the first run, in units of 1/255: what patience costs. Seconds are the processor's, on one thread.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.callbacks_share import pgd
from dipguard.data.arrays import load_arrays
from dipguard.fit import DecideOptions, FitOptions, StitchOptions, fit_stack


class Steps(pl.Callback):
    """Images at each step."""

    def __init__(self) -> None:
        self.images: list[int] = []
        self.begun = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note how many are fitted, and whether somebody has just begun."""
        self.images.append(len(pl_module.indices))
        if any(cohort.first_step == batch_idx for cohort in pl_module.cohorts):
            self.begun = len(self.images)


def attacked(args: argparse.Namespace) -> tuple[Tensor, nn.Module]:
    """Images under PGD, and their victim."""
    if args.images is not None:
        from dipguard.victims.cifar_resnet import build

        data, victim = load_arrays(path=args.images, limit=args.count), build(depth=56, weights=args.weights)
    else:
        from dipguard.data.digits import load_digits
        from dipguard.victims.digits import build as build_digits

        data, victim = load_digits(limit=args.count), build_digits(progress=False)
    return pgd(victim.eval(), data.images, data.labels), victim


def run(
    images: Tensor, victim: nn.Module, args: argparse.Namespace, *, patience: int | None, slots: int, part: int
) -> tuple[Tensor, Steps, float]:
    """All images, ``part`` at a call; stitched images, what was fitted, and seconds."""
    steps, made = Steps(), []
    start = time.process_time()
    for first in range(0, len(images), part):
        rows = range(first, min(first + part, len(images)))
        done = fit_stack(
            images[rows.start : rows.stop],
            victim=victim,
            indices=rows,
            fit=FitOptions(),
            decide=DecideOptions(T=args.T, decisions=args.T // 5, patience=patience),
            stitch=StitchOptions(tau=0.5, K=args.K),
            device=torch.device("cpu"),
            callbacks=[steps],
            slots=slots,
        )
        made += [reconstruction.image for reconstruction in done.reconstructions]
    return torch.stack(made), steps, time.process_time() - start


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--K", type=int, default=3, help="crossings that an image must have")
    parser.add_argument("--T", type=int, default=300)
    parser.add_argument("--patience", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    images, victim = attacked(args)
    first: Tensor | None = None
    for name, patience, part in (
        ("to the end", None, args.slots),
        ("shrinking stacks", args.patience, args.slots),
        ("refilled", args.patience, len(images)),
    ):
        made, steps, seconds = run(images, victim, args, patience=patience, slots=args.slots, part=part)
        first = made if first is None else first
        until = steps.images[: steps.begun] if part > args.slots else steps.images
        print(
            f"{name:<17} {sum(steps.images):>6} image-steps in {len(steps.images):>5} steps, "
            f"full {sum(until) / len(until) / args.slots:.0%}, {seconds:.1f} s, "
            f"moved {float((made - first).abs().mean()) * 255:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
