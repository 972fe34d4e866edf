"""Every kernel for each layer of a network, and the whole step in every way of running it.

    python benchmarks/conv_forms.py [--device cuda] [--stack 512] [--network medium] [--precision float32] [--json FILE]

The machine's two ceilings, a matrix product and a copy, are shown for comparison. ``error`` is the largest difference
from the first kernel, relative to the largest number, over the result and all gradients. On a CPU the default stack is
small, and the run ends within a minute; on a GPU allow time to compile the Triton kernels and, with ``--compile``, the
network.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a GPU machine may hold this folder without installing it

from benchmarks.fit_speed import matmul_rate
from benchmarks.profile_fit import copy_rate
from dipguard.engines.cuda_graph import CudaGraphEngine
from dipguard.engines.kernel_choice import (
    CONVOLUTIONS,
    JOINS,
    LayerShape,
    available,
    layer_shapes,
    median_seconds,
)
from dipguard.networks import PRESETS, StackedSkipNet, build
from dipguard.precision import PRECISIONS, precision

NAN = float("nan")


@dataclass(frozen=True)
class Row:
    """One way of doing one thing; rates in TFLOP/s for convolutions and steps, in GB/s for normalisations."""

    what: str
    kernel: str
    forward_ms: float
    backward_ms: float
    forward_rate: float
    backward_rate: float
    error: float
    note: str = ""

    def __str__(self) -> str:
        return (
            f"{self.what:<34} {self.kernel:<15} {self.forward_ms:>9.3f} {self.backward_ms:>9.3f} "
            f"{self.forward_rate:>9.3f} {self.backward_rate:>9.3f} {self.error:>8.0e}  {self.note}"
        )


class Clock:
    """Seconds gone and left, on standard error."""

    def __init__(self, budget: float) -> None:
        self.start, self.budget = time.perf_counter(), budget

    def left(self) -> float:
        """Seconds left."""
        return self.budget - (time.perf_counter() - self.start)

    def say(self, what: str) -> bool:
        """Announce a part; False, and so skip it, when the time is up."""
        left = self.left()
        print(f"[{self.budget - left:.0f} s gone, {left:.0f} s left] {what}", file=sys.stderr, flush=True)
        return left > 0


def compared(
    what: str, ways: Mapping[str, Callable[[], Tensor]], inputs: tuple[Tensor, ...], work: float, behind: float
) -> Iterator[Row]:
    """A row for each way of computing y from ``inputs``, compared with the first one.

    ``work`` and ``behind`` are the work of the forward and the backward pass: FLOPs / 1e12, or bytes / 1e9.
    """
    wanted = [t for t in inputs if t.requires_grad]
    device = inputs[0].device
    first: list[Tensor] = []
    dy: Tensor | None = None
    for name, forward in ways.items():
        try:
            dy = torch.randn_like(forward()) if dy is None else dy

            def both(forward: Callable[[], Tensor] = forward, dy: Tensor = dy) -> list[Tensor]:
                y = forward()
                return [y.detach(), *torch.autograd.grad(y, wanted, dy)]

            results = both()
            first = first or results
            errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(results, first, strict=True)]
            error = float(torch.stack(errors).max())  # Python's max would overlook a NaN
            ahead = median_seconds(forward, device=device)
            back = max(median_seconds(both, device=device) - ahead, 1e-9)
        except Exception as problem:  # a kernel that this machine cannot run is a finding, not the end
            yield Row(what, name, NAN, NAN, NAN, NAN, NAN, f"{type(problem).__name__}: {problem}"[:150])
            continue
        yield Row(what, name, ahead * 1e3, back * 1e3, work / ahead, behind / back, error)


def layer_rows(shape: LayerShape, device: torch.device) -> Iterator[Row]:
    """All kernels on one layer shape; rates of normalisations and joins count every tensor once."""
    inputs = shape.example(device=device, dtype=torch.float32)
    options, (height, width) = dict(shape.options), shape.x[-2:]
    ways = {name: partial(shape.kernel(name), *inputs) for name in available(shape.table, device)}
    if shape.table is CONVOLUTIONS:
        work = flops(shape) / 1e12
        _, outputs, inner, kernel, _ = shape.weight
        kind = f"{kernel}x{kernel}/{options['stride']} {height}x{width} {options['padding']}"
        yield from compared(f"{inner}->{outputs} {kind}", ways, inputs, work, work * (1 + shape.gradient))
    elif shape.table is JOINS:
        read = sum(t.numel() * t.element_size() for t in inputs if t.ndim == 4) / 1e9
        made = math.prod((shape.stack, shape.weight[1], *options["size"])) * inputs[0].element_size() / 1e9
        name = f"join, {options['upsample']}, {shape.weight[1]} {options['size'][0]}x{options['size'][1]}"
        yield from compared(name, ways, inputs, read + made, 2 * read + made)
    else:
        size = inputs[0].numel() * inputs[0].element_size() / 1e9
        name = f"norm, slope {options['slope']}, {shape.weight[1]} {height}x{width}"
        yield from compared(name, ways, inputs, 2 * size, 3 * size)


def flops(shape: LayerShape) -> int:
    """Operations of a convolution's forward pass; a multiplication and an addition count as two."""
    stride = dict(shape.options)["stride"]
    return 2 * math.prod(shape.weight) * math.prod(-(-side // stride) for side in shape.x[-2:])


def step_rows(args: argparse.Namespace, device: torch.device, clock: Clock) -> Iterator[Row]:
    """Forward, backward and Adam of the whole stack: eager and as a CUDA graph, grouped and with chosen kernels."""
    kernels: dict[str, dict[str, Any]] = {
        "grouped": {"convolutions": ("grouped",), "normalisations": ("torch",)},
        "chosen kernels": {},
    }
    for capture, (name, options) in product([False, True] if device.type == "cuda" else [False], kernels.items()):
        name = f"{'graph' if capture else 'eager'}, {name}"
        if not clock.say(f"whole step, {name}"):
            return
        start = time.perf_counter()
        net, given, z = problem(args, device)
        engine = CudaGraphEngine(net, given, matmul_precision=args.precision, capture=capture, **options)
        if not capture and not options:
            print(f"chosen in {time.perf_counter() - start:.1f} s: {engine.choice}")
        yield _step_row(name, net, partial(engine.compute, z), start)
    if args.compile and clock.say("whole step, torch.compile"):
        start = time.perf_counter()
        net, given, z = problem(args, device)
        compiled = torch.compile(net)

        def work() -> tuple[Tensor, Tensor, list[Tensor]]:
            with precision(args.precision, device):
                x = compiled(z)
                errors = (x - given).square().flatten(1).mean(dim=1)
                return x, errors, list(torch.autograd.grad(errors.sum(), list(net.parameters())))

        yield _step_row("torch.compile", net, work, start)


def problem(args: argparse.Namespace, device: torch.device) -> tuple[StackedSkipNet, Tensor, Tensor]:
    """A stack on the device, its images and z."""
    net = build(args.network, stack_size=args.stack).to(device)
    net.set_layout(channels_last=device.type == "cpu")
    side = (args.side, args.side)
    given = torch.rand(args.stack, 3, *side, device=device)
    return net, given, torch.rand(args.stack, net.spec.input_depth, *side, device=device)


def _step_row(
    name: str, net: StackedSkipNet, work: Callable[[], tuple[Tensor, Tensor, list[Tensor]]], start: float
) -> Row:
    x = work()[0]
    shapes = layer_shapes(net, size=(x.shape[-2], x.shape[-1])).values()
    work_done = 3 * sum(flops(shape) for shape in shapes if shape.table is CONVOLUTIONS) / 1e12
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01, fused=True)

    def step() -> None:
        for parameter, gradient in zip(net.parameters(), work()[2], strict=True):
            parameter.grad = gradient
        optimiser.step()

    step()
    begun = time.perf_counter() - start
    seconds = median_seconds(step, device=net.head.weight.device)
    each = seconds / net.stack_size
    note = f"{each * 1e6:.2f} us an image-step; 1,000 images of 1,000 steps {each * 1e6:.0f} s; start-up {begun:.1f} s"
    return Row("whole step (both passes, Adam)", name, seconds * 1e3, NAN, work_done / seconds, NAN, 0, note)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stack", type=int, help="512 on a GPU, 4 on a CPU")
    parser.add_argument("--network", choices=sorted(PRESETS), default="medium")
    parser.add_argument("--side", type=int, default=32, help="image side in pixels")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--compile", action="store_true", help="time torch.compile too; it takes a minute to compile")
    parser.add_argument("--budget", type=float, help="seconds after which no part is begun (300 on a GPU, 50 on a CPU)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    clock = Clock(args.budget or (300 if cuda else 50))
    args.stack = args.stack or (512 if cuda else 4)
    torch.manual_seed(0)
    net, _, _ = problem(args, device)
    rows: list[Row] = []
    with precision(args.precision, device):
        rate, copy = matmul_rate(device, side=8192 if cuda else 1024) / 1e12, copy_rate(device) / 1e9
        name = torch.cuda.get_device_name(device) if cuda else "CPU"
        print(f"{name}, torch {torch.__version__}, {args.network}, stack {net.stack_size}, {args.precision}")
        print(f"ceilings: matrix product {rate:.3f} TFLOP/s, copy {copy:.0f} GB/s (read and written)")
        print(f"{'':<34} {'kernel':<15} {'fwd ms':>9} {'bwd ms':>9} {'fwd rate':>9} {'bwd rate':>9} {'error':>8}")
        for shape in dict.fromkeys(layer_shapes(net, size=(args.side, args.side)).values()):
            if clock.say(str(shape)):
                for row in layer_rows(shape, device):
                    rows.append(row)
                    print(row, flush=True)
    for row in step_rows(args, device, clock):
        rows.append(row)
        print(f"{row}, {row.forward_rate / rate:.0%} of the matrix product", flush=True)
    if args.json is not None:
        report = {"matmul_tflops": rate, "copy_gbytes": copy, "rows": [asdict(r) for r in rows]}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
