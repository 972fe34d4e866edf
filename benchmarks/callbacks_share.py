"""What a fit's callbacks cost beside the fit itself: the victim on samples and on crossings, SSIM, and the rest.

    python benchmarks/callbacks_share.py --images FILE.npz --weights FILE.th [--victim cifar10_resnet56] [--count 16]
                                        [--T 1000] [--defense paper]

The images (uint8, see dipguard.data.arrays) are attacked with PGD (8/255, 20 steps) first, since an attacked image
crosses boundaries more often than a clean one. Seconds are processor time on one thread, so that other programs do not
count. The floor is the arithmetic of the victim and the fit at the rate of a matrix product: only fewer readings of the
victim get below it. ``--defense mirror`` shows its windows, what the victim reads in them, and the stitching.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.fit_speed import matmul_rate, plain_step
from dipguard import DIPGuard
from dipguard.classifier import frozen
from dipguard.data.arrays import load_arrays
from dipguard.defenses.base import Defense
from dipguard.defenses.mirror import MirrorGuard
from dipguard.fit import BoundaryDetector, Decider, DecisionLogger, Stitcher, WindowLogger, callbacks
from dipguard.victims import build_victim

PARTS: Mapping[str, Mapping[str, tuple[Any, tuple[str, ...]]]] = {
    "paper": {
        "DecisionLogger": (DecisionLogger, ("on_train_batch_end", "on_train_end")),
        "BoundaryDetector": (BoundaryDetector, ("on_train_batch_end", "on_train_end")),
        "Stitcher": (Stitcher, ("on_train_end",)),
    },
    "mirror": {
        "WindowLogger": (WindowLogger, ("on_train_batch_end", "on_train_end")),
        "stitching": (MirrorGuard, ("_rebuild",)),
    },
}
"""Defence -> what its callbacks' time is divided into -> a class and its methods."""


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
def timed(spent: dict[str, float], owner: Any, name: str, what: str) -> Iterator[None]:
    """Add the seconds spent in a function of a class or module to ``spent``."""
    plain: Callable[..., Any] = getattr(owner, name)

    def clocked(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return plain(*args, **kwargs)
        finally:
            spent[what] = spent.get(what, 0.0) + time.process_time() - start

    setattr(owner, name, clocked)
    try:
        yield
    finally:
        setattr(owner, name, plain)


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


def profile(title: str, defense: Defense, images: Tensor) -> float:
    """Print where the time of one run went; returns the readings of the victim per image."""
    inside: dict[str, float] = {}
    parts: dict[str, float] = {}
    readings: list[int] = []
    start = time.process_time()
    with ExitStack() as stack:
        stack.enter_context(timed(inside, callbacks, "quality", "of these, SSIM"))
        stack.enter_context(counted(readings))
        stack.enter_context(timed(inside, Decider, "__call__", "of these, the victim"))
        for what, (owner, names) in PARTS[defense.name].items():
            for name in names:
                stack.enter_context(timed(parts, owner, name, what))
        done = defense.defend(images)
    total = time.process_time() - start
    share = sum(parts.values())
    each = sum(readings) / len(images)
    print(f"{title}, {len(images)} images: {total:.1f} s, callbacks and stitching {share:.1f} s = {share / total:.0%}")
    print(f"  {each:.0f} readings per image in {len(readings)} calls")
    if defense.name == "paper":
        kept = sum(len(trace.crossing_at) for trace in done.traces) / len(images)
        found = sum(int((t.decisions[1:] != t.decisions[:-1]).sum()) for t in done.traces) / len(images)
        print(f"  crossings per image: {found:.1f} found, {kept:.1f} kept")
    for what, seconds in [*parts.items(), *inside.items(), ("fit and start", total - share)]:
        print(f"  {what:<22} {seconds:7.2f} s {seconds / total:6.1%}", flush=True)
    return each


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--victim", default="cifar10_resnet56")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--T", type=int, default=1000)
    parser.add_argument("--defense", choices=sorted(PARTS), default="paper")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = load_arrays(path=args.images, limit=args.count)
    victim = build_victim(args.victim, weights=args.weights)
    attacked = pgd(victim, data.images, data.labels)
    common: dict[str, Any] = {"T": args.T, "stack_size": len(attacked), "progress": False}
    if args.defense == "mirror":
        profile("mirror", MirrorGuard(victim, **common), attacked)
        return
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        victim(attacked[:1])
    cpu = torch.device("cpu")
    rate, fit, reading = matmul_rate(cpu), plain_step("medium", attacked.shape[-1], cpu)[1], counter.get_total_flops()
    print(f"matrix product {rate / 1e9:.0f} GFLOP/s; fit {fit / 1e6:.0f} MFLOP a step, victim {reading / 1e6:.0f}")
    each = profile("paper", DIPGuard(victim, **common), attacked)
    floor = [len(attacked) * count * cost / rate for count, cost in ((args.T, fit), (each, reading))]
    print(f"arithmetic at the matrix product's rate: fit {floor[0]:.1f} s, victim {floor[1]:.1f} s", flush=True)


if __name__ == "__main__":
    main()
