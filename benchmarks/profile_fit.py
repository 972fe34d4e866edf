"""Where the time of a stacked fit goes: a profile by operation, beside the machine's two ceilings.

    python benchmarks/profile_fit.py [--network medium] [--stack 32] [--device cpu]

The ceilings are the rate of a large float32 matrix product and the bandwidth of a large copy. Times are what an
operation itself took, an image-step; operations below one percent are summed up.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a GPU machine may hold this folder without installing it

from benchmarks.fit_speed import matmul_rate, synchronise
from dipguard.engines.native import NativeEngine
from dipguard.engines.native_plan import Instruction, Operation
from dipguard.fit import FitOptions, StackedDIP
from dipguard.fit.runner import isolated_trainer
from dipguard.networks import PRESETS, build


def copy_rate(device: torch.device, *, mebibytes: int = 256) -> float:
    """Bytes read and written a second by a copy of a block that no cache holds."""
    source = torch.ones(mebibytes * 2**18, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        synchronise(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * 4 / best


def print_native(module: StackedDIP, *, repeats: int = 50) -> None:
    """Each operation of the native engine's program by itself, on one image and one thread."""
    torch.set_num_threads(1)  # or the threads would work on it together
    given = module.given[:1].clone()
    engine = NativeEngine(build(module.net.spec, stack_size=1), given)
    z = module.z[:1]
    engine.step(z)
    rows = []
    for op in list(engine.plan.program):
        seconds = time_program(engine, [op] * repeats, z) / repeats
        source, target = engine.plan.frames[op.source], engine.plan.frames[op.target]
        flops = 2 * op.kernel**2 * source.channels * target.channels * target.height * target.width
        convolves = Operation(op.operation).name in ("CONVOLVE", "CONVOLVE_BACK", "WEIGHT_GRADIENT")
        rate = f"{flops / seconds / 1e9:.0f} GFLOP/s" if convolves else ""
        shape = f"{source.channels}-{target.channels}, k {op.kernel}, s {op.stride}, {target.height}x{target.width}"
        rows.append((seconds * 1e6, Operation(op.operation).name, shape, rate))
    total = sum(row[0] for row in rows)
    print(f"{total:.0f} us an image-step on one thread, operation by operation, without Adam and jitter")
    for spent, name, shape, rate in sorted(rows, reverse=True):
        if spent >= total / 100:
            print(f"{spent:>8.1f} us {spent / total:>6.1%}  {name:<16} {shape:<28} {rate}")


def time_program(engine: NativeEngine, program: list[Instruction], z: torch.Tensor) -> float:
    """Least seconds of five runs of a program; numbers mean nothing afterwards."""
    engine.set_program(program)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        engine.step(z)
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=sorted(PRESETS), default="medium")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--stack", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--engine", choices=("torch", "native"), default="torch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    print(f"matrix product {matmul_rate(device) / 1e9:.0f} GFLOP/s, copy {copy_rate(device) / 1e9:.1f} GB/s")
    options = FitOptions(network=args.network, jitter=1 / 30, padding="reflect")
    module = StackedDIP(torch.rand(args.stack, 3, args.side, args.side), options=options)
    module.to(device)
    if args.engine == "native":
        print_native(module)
        return
    optimiser = torch.optim.Adam(module.engine.parameters(), lr=0.01, fused=True)
    module.on_fit_start()

    def step() -> None:
        optimiser.zero_grad()
        module.training_step(None, 0)["loss"].backward()
        optimiser.step()

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with isolated_trainer(device):
        for _ in range(4):
            step()
        synchronise(device)
        start = time.perf_counter()
        for _ in range(args.steps):
            step()
        synchronise(device)
        wall = (time.perf_counter() - start) / args.steps / args.stack * 1e6
        with profile(activities=activities) as profiler:
            for _ in range(args.steps):
                step()
            synchronise(device)
    events = profiler.key_averages()
    if device.type == "cuda":  # the kernels: the operations that launched them have the same time again
        kernels = [e for e in events if e.device_type.name == "CUDA"]
        rows = [(e.self_device_time_total, e.count, e.key) for e in kernels]
    else:
        rows = [(e.self_cpu_time_total, e.count, e.key) for e in events]
    total = sum(row[0] for row in rows)
    print(f"{args.network}, stack {args.stack}: {wall:.0f} us an image-step without the profiler")
    print(f"{'us/image-step':>13} {'share':>6} {'calls/step':>10}  operation")
    for spent, count, name in sorted(rows, reverse=True):
        if spent >= total / 100:
            each = spent / args.steps / args.stack
            print(f"{each:>13.1f} {spent / total:>6.1%} {count / args.steps:>10.0f}  {name}")
    rest = sum(row[0] for row in rows if row[0] < total / 100)
    print(f"{rest / args.steps / args.stack:>13.1f} {rest / total:>6.1%} {'':>10}  all others")


if __name__ == "__main__":
    main()
