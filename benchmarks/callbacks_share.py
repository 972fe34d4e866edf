"""What a fit's callbacks cost beside the fit itself: the victim on samples and on crossings, SSIM, and the rest.

    python benchmarks/callbacks_share.py --images FILE.npz --depth 56 --weights FILE.th [--count 16] [--T 1000] [--last]
                                        [--defense dipguard]

The images (uint8, see dipguard.data.arrays) are attacked with PGD (8/255, 20 steps) first, since an attacked image
crosses boundaries more often than a clean one. Seconds are the processor's, on one thread: others' work does not
count. The floor is the victim's and the fit's arithmetic at the rate of a matrix product: below it nothing gets without
reading fewer images. ``--defense dipguard`` looks at MirrorGuard instead: its windows and what the victim reads in
them, and the stitching.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.fit_speed import matmul_rate, plain_step
from dipguard.classifier import frozen
from dipguard.data.arrays import load_arrays
from dipguard.defenses.mirror_guard import MirrorGuard
from dipguard.fit import (
    BoundaryDetector,
    DecideOptions,
    DecisionLogger,
    FitOptions,
    Stitcher,
    StitchOptions,
    decision_logger,
    fit_stack,
)
from dipguard.fit.decider import Decider
from dipguard.fit.evidence_logger import EvidenceLogger
from dipguard.victims.cifar_resnet import build


def pgd(victim: nn.Module, images: Tensor, labels: Tensor, *, eps: float = 8 / 255, steps: int = 20) -> Tensor:
    """Projected gradient ascent on the cross-entropy, step eps / 4, from the images themselves."""
    x = images.clone()
    with frozen(victim):
        for _ in range(steps):
            x.requires_grad_(True)
            (gradient,) = torch.autograd.grad(F.cross_entropy(victim(x), labels), x)
            moved = x.detach() + eps / 4 * gradient.sign()
            x = torch.maximum(torch.minimum(moved, images + eps), images - eps).clamp(0, 1)
    return x.detach()


@contextmanager
def timed(spent: dict[str, float], module: Any, name: str, what: str) -> Iterator[None]:
    """Seconds spent in a function of a module, added to ``spent``."""
    plain: Callable[..., Any] = getattr(module, name)

    def clocked(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return plain(*args, **kwargs)
        finally:
            spent[what] = spent.get(what, 0.0) + time.process_time() - start

    setattr(module, name, clocked)
    try:
        yield
    finally:
        setattr(module, name, plain)


@contextmanager
def counted(readings: list[int]) -> Iterator[None]:
    """How many images the victim reads, call by call."""
    plain = Decider.__call__

    def counting(self: Decider, images: Tensor) -> Tensor:
        readings.append(len(images))
        return plain(self, images)

    Decider.__call__ = counting  # type: ignore[method-assign]
    try:
        yield
    finally:
        Decider.__call__ = plain  # type: ignore[method-assign]


def profile(
    images: Tensor, victim: nn.Module, *, T: int, rate: float, flops: tuple[float, float], **options: Any
) -> None:
    """One fit, and where its time went."""
    spent: dict[str, float] = {}
    parts: dict[str, float] = {}
    readings: list[int] = []
    start = time.process_time()
    with (
        timed(spent, decision_logger, "quality", "SSIM"),
        timed(parts, DecisionLogger, "on_train_batch_end", "DecisionLogger"),
        timed(parts, DecisionLogger, "on_train_end", "DecisionLogger"),
        timed(spent, BoundaryDetector, "look", "BoundaryDetector"),
        timed(parts, Stitcher, "on_train_end", "Stitcher"),
        counted(readings),
    ):
        done = fit_stack(
            images,
            victim=victim,
            indices=range(len(images)),
            fit=FitOptions(),
            decide=DecideOptions(T=T, **options),
            stitch=StitchOptions(),
            device=torch.device("cpu"),
        )
    wall = time.process_time() - start
    decide = sum(parts.values())
    logger = parts.pop("DecisionLogger")
    spent |= {"victim on samples": logger - sum(spent.values()), **parts}
    each = sum(readings) / len(images)
    kept = sum(len(trace.crossing_at) for trace in done.traces) / len(images)
    found = sum(int((t.decisions[1:] != t.decisions[:-1]).sum()) for t in done.traces) / len(images)
    print(f"{options or 'defaults'}: {wall:.1f} s, callbacks {decide:.1f} s = {decide / wall:.0%}")
    print(f"  crossings an image: {found:.1f} found, {kept:.1f} kept; {each:.0f} readings an image")
    for what, seconds in [*spent.items(), ("fit and start", wall - decide)]:
        print(f"  {what:<22} {seconds:7.2f} s {seconds / wall:6.1%}")
    floor = [len(images) * n * cost / rate for n, cost in ((T, flops[0]), (each, flops[1]))]
    print(f"  arithmetic at the matrix product's rate: fit {floor[0]:.1f} s, victim {floor[1]:.1f} s", flush=True)


def profile_guard(images: Tensor, victim: nn.Module, *, T: int) -> None:
    """One run of MirrorGuard, and where its time went."""
    spent: dict[str, float] = {}
    parts: dict[str, float] = {}
    readings: list[int] = []
    guard = MirrorGuard(victim, T=T, stack_size=len(images), progress=False)
    start = time.process_time()
    with (
        timed(spent, Decider, "__call__", "of these, the victim"),
        timed(parts, EvidenceLogger, "on_train_batch_end", "EvidenceLogger"),
        timed(parts, EvidenceLogger, "on_train_end", "EvidenceLogger"),
        timed(parts, MirrorGuard, "stitch", "stitching"),
        counted(readings),
    ):
        guard.purify(images)
    wall = time.process_time() - start
    decide = sum(parts.values())
    print(f"dipguard, {len(images)} images: {wall:.1f} s, callbacks and stitching {decide:.1f} s = {decide / wall:.0%}")
    print(f"  {sum(readings) / len(images):.0f} readings an image in {len(readings)} calls")
    for what, seconds in [*parts.items(), *spent.items(), ("fits and start", wall - decide)]:
        print(f"  {what:<22} {seconds:7.2f} s {seconds / wall:6.1%}", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--T", type=int, default=1000)
    parser.add_argument("--last", action="store_true", help="the last way alone")
    parser.add_argument("--defense", choices=("paper", "dipguard"), default="paper")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = load_arrays(path=args.images, limit=args.count)
    victim = build(depth=args.depth, weights=args.weights).eval()
    attacked = pgd(victim, data.images, data.labels)
    if args.defense == "dipguard":
        return profile_guard(attacked, victim, T=args.T)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        victim(attacked[:1])
    cpu = torch.device("cpu")
    rate = matmul_rate(cpu)
    flops = plain_step("medium", attacked.shape[-1], cpu)[1], counter.get_total_flops()
    print(
        f"matrix product {rate / 1e9:.0f} GFLOP/s; fit {flops[0] / 1e6:.0f} MFLOP a step, victim {flops[1] / 1e6:.0f}"
    )
    ways: list[dict[str, str]] = [{}, {"victim_speed": "folded"}, {"victim_speed": "folded", "search": "bisection"}]
    ways.append({"victim_speed": "bfloat16", "search": "bisection"})
    for options in ways[-1:] if args.last else ways:
        profile(attacked, victim, T=args.T, rate=rate, flops=flops, **options)


if __name__ == "__main__":
    main()
