"""Does defended accuracy suffer under TF32 or bfloat16? The check on real images that decides whether to use them.

    python benchmarks/precision_accuracy.py --images FILE.npz --weights FILE.th [--victim cifar10_resnet56]
                                            [--device cuda] [--count 400] [--T 1000] [--precisions tf32 bfloat16]
                                            [--json FILE]

The images (uint8 and labels, see dipguard.data.arrays) are defended clean and under PGD (8/255, 20 steps), in float32
with two seeds and in each precision with the first seed. A precision passes if the lower end of the 95 % interval of
its accuracy minus float32's, paired image by image, is above -``--margin``, clean and attacked. The second seed shows
how much of a difference is chance: the random draws of a fit change the result about as much.

Without a GPU it runs on the CPU, where TF32 is float32 and bfloat16 is slow; a few images then only show that it works.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dipguard import DIPGuard
from dipguard.attacks import build_attack
from dipguard.data.arrays import load_arrays
from dipguard.evaluation.metrics import psnr, wilson
from dipguard.precision import PRECISIONS
from dipguard.victims import build_victim

Z_95 = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Row:
    """One way of fitting one set of images; ``low`` and ``high`` bound the difference from float32's accuracy."""

    images: str
    precision: str
    seed: int
    accuracy: float
    interval: tuple[float, float]
    difference: float
    low: float
    high: float
    same_decision: float
    psnr_to_float32: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.images:<9} {self.precision:<9} seed {self.seed}  accuracy {self.accuracy:6.1%} "
            f"({self.interval[0]:.1%} to {self.interval[1]:.1%}), difference {self.difference:+6.1%} "
            f"({self.low:+.1%} to {self.high:+.1%}), same decision {self.same_decision:.1%}, "
            f"PSNR {self.psnr_to_float32:.1f} dB, {self.seconds:.0f} s"
        )


def paired(ours: Tensor, theirs: Tensor) -> tuple[float, float, float]:
    """Mean of the difference of two sets of hits [N] on the same images, and its 95 % interval.

    Half an image is added on each side (Agresti and Min 2005), so that the interval is sound where few images differ.
    """
    better, worse, count = int((ours & ~theirs).sum()), int((theirs & ~ours).sum()), len(ours)
    up, down, all_ = better + 0.5, worse + 0.5, count + 2
    centre = (up - down) / all_
    spread = Z_95 * math.sqrt(max(0.0, (up + down) / all_ - centre**2) / all_)
    return (better - worse) / count, centre - spread, centre + spread


def rows(name: str, images: Tensor, labels: Tensor, victim: nn.Module, args: argparse.Namespace) -> list[Row]:
    """One set of images, fitted in every way; the others are compared with the first row."""
    made: list[Row] = []
    right = hits = decided = None
    for precision, seed in [("float32", 0), ("float32", 1), *((p, 0) for p in args.precisions)]:
        guard = DIPGuard(
            victim,
            T=args.T,
            decisions=min(200, args.T),
            seed=seed,
            matmul_precision=precision,
            engine=args.engine if precision != "float32" or args.engine != "torch" else "auto",
            progress=False,
        )
        done = guard.defend(images)
        ours = done.decisions_after == labels
        if right is None or hits is None or decided is None:
            right, hits, decided = done.reconstructions, ours, done.decisions_after
        difference, low, high = paired(ours, hits)
        correct, count = int(ours.sum()), len(ours)
        near = psnr(done.reconstructions.cpu(), right.cpu())
        near = near[torch.isfinite(near)]
        row = Row(
            name,
            precision,
            seed,
            correct / count,
            wilson(correct, count),
            difference,
            low,
            high,
            float((done.decisions_after == decided).double().mean()),
            float(near.mean()) if len(near) else math.inf,
            sum(done.seconds.values()),
        )
        print(row, flush=True)
        made.append(row)
    return made


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--victim", default="cifar10_resnet56")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--engine", choices=("torch", "cuda_graph"), default="torch")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--T", type=int, default=1000)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS[1:], default=list(PRECISIONS[1:]))
    parser.add_argument("--margin", type=float, default=0.02, help="loss of accuracy that is still accepted")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    data = load_arrays(path=args.images, limit=args.count)
    victim = build_victim(args.victim, weights=args.weights).to(args.device)
    images, labels = data.images.to(args.device), data.labels.to(args.device)
    sets = {"clean": images, "attacked": build_attack("pgd", victim, eps_255=8, alpha_255=2, steps=20)(images, labels)}
    found = [row for name, given in sets.items() for row in rows(name, given, data.labels, victim, args)]
    for precision in args.precisions:
        worst = min(row.low for row in found if row.precision == precision)
        verdict = "passes" if worst > -args.margin else "does not pass (or too few images to tell)"
        print(f"{precision} {verdict}: {worst:+.1%} at worst, {-args.margin:+.1%} accepted")
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in found], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
