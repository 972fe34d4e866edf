"""How fast the fit is: the plain loop over single images against stacks, side by side in one run.

    python benchmarks/fit_speed.py [--network medium] [--stacks 1 8 32 128] [--engines torch native] [--rounds 3]
                                   [--device cpu] [--json FILE]

Every form does the same work: forward, backward and Adam of one network an image, with jitter on z. The forms take
turns, so that a machine whose speed drifts slows all of them; the figure of a form is its median round. FLOPs are those
of the convolutions, forward and backward, as torch counts them on the plain loop.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a GPU machine may hold this folder without installing it

from benchmarks.plain_loop import PlainSkipNet
from dipguard.engines.native_build import compiler, library
from dipguard.fit import FitOptions, StackedDIP
from dipguard.fit.runner import isolated_trainer, make_trainer
from dipguard.networks import PRESETS, network_spec
from dipguard.precision import precision

JITTER = 1 / 30


@dataclass(frozen=True)
class Row:
    """One form's figures; times are medians over the rounds."""

    form: str
    stack: int
    device: str
    ms_per_image_step: float
    ratio_to_plain_loop: float
    share_of_matmul: float
    peak_mib: float


class Clock(pl.Callback):
    """Seconds per step of a fit, its first ``warmup`` steps left out."""

    def __init__(self, device: torch.device, *, warmup: int) -> None:
        self.device = device
        self.warmup = warmup
        self.start = 0.0
        self.seconds = 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock after the warm-up, stop it at the last step."""
        done = pl_module.step
        if done == self.warmup:
            synchronise(self.device)
            self.start = time.perf_counter()
        elif done == trainer.max_steps:
            synchronise(self.device)
            self.seconds = (time.perf_counter() - self.start) / (done - self.warmup)


def synchronise(device: torch.device) -> None:
    """Wait for a GPU; a CPU has nothing outstanding."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def plain_step(network: str, side: int, device: torch.device) -> tuple[Callable[[], None], int]:
    """One step of the plain loop, and its FLOPs."""
    spec = network_spec(network)
    net = PlainSkipNet(spec).to(device)
    z = torch.rand(1, spec.input_depth, side, side, device=device) * spec.z_scale
    image = torch.rand(1, 3, side, side, device=device)
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)

    def step() -> None:
        optimiser.zero_grad()
        F.mse_loss(net(z + JITTER * torch.randn_like(z)), image).backward()
        optimiser.step()

    with FlopCounterMode(display=False) as counter:
        step()
    return step, int(counter.get_total_flops())


def time_plain(step: Callable[[], None], device: torch.device, *, steps: int) -> float:
    """Seconds per image-step of the plain loop."""
    with precision("float32", device):
        step()
        synchronise(device)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronise(device)
        return (time.perf_counter() - start) / steps


def time_stack(network: str, side: int, device: torch.device, *, engine: str, stack: int, steps: int) -> float:
    """Seconds per image-step of the Lightning loop over a stack, without its start-up."""
    clock = Clock(device, warmup=2)
    options = FitOptions(network=network, jitter=JITTER, padding="reflect", engine=engine)
    module = StackedDIP(torch.rand(stack, 3, side, side), options=options)
    with isolated_trainer(device):
        trainer = make_trainer(steps + 2, device=device, callbacks=[clock], logger=None)
        trainer.fit(module)
    vars(trainer).clear()  # its reference cycles would keep the fit's memory
    return clock.seconds / stack


def matmul_rate(device: torch.device, *, side: int = 2048) -> float:
    """FLOP/s of a float32 matrix product at torch's default precision."""
    a, b = torch.rand(side, side, device=device), torch.rand(side, side, device=device)
    a @ b
    best = float("inf")
    for _ in range(3):
        synchronise(device)
        start = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def peak_mib(device: torch.device, work: Callable[[], float]) -> tuple[float, float]:
    """Run ``work``; return what it returns, and the most memory held meanwhile, MiB (elsewhere than on Linux: ever)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        result = work()
        return result, torch.cuda.max_memory_allocated(device) / 2**20
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")
    except OSError:
        result = work()
        return result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    result = work()
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return result, int(line.split()[1]) / 2**10


def measure(args: argparse.Namespace) -> tuple[list[Row], dict[str, float]]:
    """All forms in turn, ``args.rounds`` times."""
    device = torch.device(args.device)
    step, flops = plain_step(args.network, args.side, device)
    forms: list[tuple[str, int, Callable[[], float]]] = [
        ("plain loop", 1, partial(time_plain, step, device, steps=args.steps))
    ]
    for engine, stack in product(args.engines, args.stacks):
        # Larger stacks take fewer steps: their figure is steadier, and the whole run ends within minutes.
        steps = max(4, args.steps // max(1, stack // 8))
        timed = partial(time_stack, args.network, args.side, device, engine=engine, stack=stack, steps=steps)
        forms.append((f"stack, {engine}", stack, timed))
    seconds: dict[int, list[float]] = {number: [] for number in range(len(forms))}
    memory = dict.fromkeys(seconds, 0.0)
    rates = []
    for _ in range(args.rounds):
        rates.append(matmul_rate(device))
        for number, (_, _, work) in enumerate(forms):
            value, peak = peak_mib(device, work)
            seconds[number].append(value)
            memory[number] = max(memory[number], peak)
    rate = max(rates)
    medians = {number: statistics.median(values) for number, values in seconds.items()}
    rows = [
        Row(
            form,
            stack,
            device.type,
            round(medians[n] * 1e3, 4),
            round(medians[n] / medians[0], 4),
            round(flops / medians[n] / rate, 4),
            round(memory[n], 1),
        )
        for n, (form, stack, _) in enumerate(forms)
    ]
    return rows, {"matmul_gflops": rate / 1e9, "mflop_per_image_step": flops / 1e6}


def start_up(args: argparse.Namespace) -> str:
    """Settle ``args.engines``; says what the native engine's compilation costs, from nothing."""
    if args.engines is None:
        args.engines = ["torch"]
        if args.device == "cpu" and compiler() is not None:
            args.engines.append("native")
    if "native" not in args.engines:
        return "not measured"
    before = os.environ.get("DIPGUARD_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DIPGUARD_CACHE"] = folder
        start = time.perf_counter()
        library("float32")
        seconds = time.perf_counter() - start
    if before is None:
        del os.environ["DIPGUARD_CACHE"]
    else:
        os.environ["DIPGUARD_CACHE"] = before
    return f"compiled in {seconds:.1f} s, once a machine"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=sorted(PRESETS), default="medium")
    parser.add_argument("--side", type=int, default=32, help="image side in pixels")
    parser.add_argument("--stacks", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--steps", type=int, default=24, help="timed steps of the plain loop")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--engines", nargs="+", help="by default all that run on the device")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    start = time.perf_counter()
    compiled = start_up(args)
    rows, machine = measure(args)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rate, work = machine["matmul_gflops"], machine["mflop_per_image_step"]
    print(f"matrix product {rate:.0f} GFLOP/s, {work:.0f} MFLOP an image-step")
    print(f"{'form':<16} {'stack':>5} {'ms/image-step':>14} {'ratio to plain':>15} {'of matmul':>10} {'peak MiB':>9}")
    for row in rows:
        print(
            f"{row.form:<16} {row.stack:>5} {row.ms_per_image_step:>14.3f} {row.ratio_to_plain_loop:>15.3f} "
            f"{row.share_of_matmul:>10.1%} {row.peak_mib:>9.0f}"
        )
    print(f"native engine: {compiled}")
    print(f"{time.perf_counter() - start:.0f} s")
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
