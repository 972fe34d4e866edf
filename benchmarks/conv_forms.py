"""Every form of the stacked convolution on every layer of a network, and the whole step in every way of running it.

    python benchmarks/conv_forms.py [--device cuda] [--stack 512] [--network medium] [--precision float32] [--json FILE]

Beside the machine's two ceilings, a matrix product and a copy. ``error`` is the largest difference from ``grouped``,
relative to the largest number, over the result and all gradients. On a CPU the default stack is small, and the run ends
within a minute; on a GPU allow for the compilation of the Triton kernels and, with ``--compile``, of the network.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a GPU machine may hold this folder without installing it

from benchmarks.fit_speed import matmul_rate
from benchmarks.profile_fit import copy_rate
from dipguard.engines.cuda_graph import CudaGraphStep
from dipguard.engines.precision import PRECISIONS, precision
from dipguard.networks import PRESETS, StackedSkipNet, build
from dipguard.networks.convolution import available_forms, stacked_conv2d
from dipguard.networks.form_choice import FormChoice, LayerShape, choose_forms, example, layer_shapes
from dipguard.networks.timing import median_seconds
from dipguard.networks.triton_conv import triton_conv2d
from dipguard.networks.triton_norm import triton_norm_leaky_relu
from dipguard.networks.unet import SLOPE

NAN = float("nan")


@dataclass(frozen=True)
class Row:
    """One way of doing one thing; rates in TFLOP/s for convolutions and steps, in GB/s for normalisations."""

    what: str
    form: str
    forward_ms: float
    backward_ms: float
    forward_rate: float
    backward_rate: float
    error: float
    note: str = ""

    def __str__(self) -> str:
        return (
            f"{self.what:<34} {self.form:<15} {self.forward_ms:>9.3f} {self.backward_ms:>9.3f} "
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


def convolutions(device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Forms, and variants of them that are no forms of their own."""
    forms: dict[str, Callable[..., Tensor]] = {f: partial(stacked_conv2d, form=f) for f in available_forms(device)}
    if "triton" in forms:
        forms["triton tf32x3"] = partial(triton_conv2d, input_precision="tf32x3")
    return forms


def compared(
    what: str, ways: Mapping[str, Callable[[], Tensor]], inputs: tuple[Tensor, ...], work: float, behind: float
) -> Iterator[Row]:
    """A row for each way of computing y from ``inputs``, of which the first is compared with.

    ``work`` and ``behind`` are what the forward and the backward pass do: FLOPs / 1e12, or bytes / 1e9.
    """
    wanted = [t for t in inputs if t.requires_grad]
    device = inputs[0].device
    first: list[Tensor] = []
    dy: Tensor | None = None
    for form, forward in ways.items():
        try:
            dy = torch.randn_like(forward()) if dy is None else dy

            def both(forward: Callable[[], Tensor] = forward, dy: Tensor = dy) -> list[Tensor]:
                y = forward()
                return [y.detach(), *torch.autograd.grad(y, wanted, dy)]

            results = both()
            first = first or results
            error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(results, first, strict=True))
            ahead = median_seconds(forward, device=device)
            back = max(median_seconds(both, device=device) - ahead, 1e-9)
        except Exception as problem:  # a form that this machine cannot run is a finding, not the end
            yield Row(what, form, NAN, NAN, NAN, NAN, NAN, f"{type(problem).__name__}: {problem}"[:150])
            continue
        yield Row(what, form, ahead * 1e3, back * 1e3, work / ahead, behind / back, error)


def layer_rows(shape: LayerShape, device: torch.device) -> Iterator[Row]:
    """All forms on one layer shape."""
    inputs = example(shape, device=device, dtype=torch.float32)
    options = {"stride": shape.stride, "padding": shape.padding}
    ways = {form: partial(function, *inputs, **options) for form, function in convolutions(device).items()}
    name = f"{shape.inputs}->{shape.outputs} {shape.kernel}x{shape.kernel}/{shape.stride} {shape.height}x{shape.width}"
    work = shape.flops / 1e12
    both = (inputs, work, work * (1 + shape.gradient))
    yield from compared(f"{name} {shape.padding}", ways, *both)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        yield from compared(f"{name} {shape.padding}", {"grouped, tuned": ways["grouped"]}, *both)
        torch.backends.cudnn.benchmark = False


def norm_rows(shape: LayerShape, device: torch.device) -> Iterator[Row]:
    """Normalisation and LeakyReLU of a layer's result; the rates count every tensor once, as if it were read once."""
    side = -(-shape.height // shape.stride), -(-shape.width // shape.stride)
    x = torch.randn(1, shape.stack * shape.outputs, *side, device=device, requires_grad=True)
    weight, bias = (torch.rand(shape.stack, shape.outputs, device=device, requires_grad=True) for _ in range(2))

    def by_torch() -> Tensor:
        y = F.batch_norm(x, None, None, weight.flatten(), bias.flatten(), training=True, eps=1e-5)
        return F.leaky_relu_(y, SLOPE)

    ways: dict[str, Callable[[], Tensor]] = {"torch": by_torch}
    if "triton" in available_forms(device):
        ways["triton"] = partial(triton_norm_leaky_relu, x, weight, bias, slope=SLOPE)
    name = f"norm + LeakyReLU {shape.outputs} {side[0]}x{side[1]}"
    size = x.numel() * x.element_size() / 1e9
    yield from compared(name, ways, (x, weight, bias), 2 * size, 3 * size)


def step_rows(net: StackedSkipNet, side: int, args: argparse.Namespace, choice: FormChoice, clock: Clock) -> list[Row]:
    """Forward, backward and Adam of the whole stack: eager and as a CUDA graph, grouped and in the chosen forms."""
    device = net.head.weight.device
    flops = 3 * sum(shape.flops for shape in layer_shapes(net, size=(side, side)).values()) / 1e12
    given, z = (
        torch.rand(net.stack_size, 3, side, side, device=device),
        torch.rand(net.stack_size, net.spec.input_depth, side, side, device=device),
    )
    graphs = [False, True] if device.type == "cuda" else [False]
    forms = {"grouped": FormChoice(dict.fromkeys(choice.forms, "grouped"), 0.0, {}), "chosen forms": choice}
    ways = [
        (f"{'graph' if capture else 'eager'}, {name}", form, capture)
        for capture in graphs
        for name, form in forms.items()
    ]
    rows = []
    for name, form, capture in ways:
        if not clock.say(f"whole step, {name}"):
            break
        start = time.perf_counter()
        form.apply(net)
        step = CudaGraphStep(net, given, products=args.precision, capture=capture)
        rows.append(_step_row(name, net, partial(step.compute, z), flops, start))
    if args.compile and clock.say("whole step, torch.compile"):
        start = time.perf_counter()
        forms["grouped"].apply(net)
        compiled = torch.compile(net)

        def work() -> tuple[Tensor, Tensor, list[Tensor]]:
            with precision(args.precision, device):
                x = compiled(z)
                errors = (x - given).square().flatten(1).mean(dim=1)
                return x, errors, list(torch.autograd.grad(errors.sum(), list(net.parameters())))

        rows.append(_step_row("torch.compile", net, work, flops, start))
    return rows


def _step_row(
    name: str, net: StackedSkipNet, work: Callable[[], tuple[Tensor, Tensor, list[Tensor]]], flops: float, start: float
) -> Row:
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
    return Row("whole step (both passes, Adam)", name, seconds * 1e3, NAN, flops / seconds, NAN, 0, note)


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
    torch.manual_seed(0)
    net = build(args.network, stack_size=args.stack or (512 if cuda else 4)).to(device)
    net.set_layout(channels_last=not cuda)
    rows: list[Row] = []
    with precision(args.precision, device):
        rate, copy = matmul_rate(device, side=8192 if cuda else 1024) / 1e12, copy_rate(device) / 1e9
        name = torch.cuda.get_device_name(device) if cuda else "CPU"
        print(f"{name}, torch {torch.__version__}, {args.network}, stack {net.stack_size}, {args.precision}")
        print(f"ceilings: matrix product {rate:.3f} TFLOP/s, copy {copy:.0f} GB/s (read and written)")
        print(f"{'':<34} {'form':<15} {'fwd ms':>9} {'bwd ms':>9} {'fwd rate':>9} {'bwd rate':>9} {'error':>8}")
        shapes = dict.fromkeys(layer_shapes(net, size=(args.side, args.side)).values())
        normed = {(s.outputs, -(-s.height // s.stride), -(-s.width // s.stride)): s for s in shapes}
        parts = [(layer_rows, shape) for shape in sorted(shapes, key=lambda shape: -shape.flops)]
        for part, shape in parts + [(norm_rows, shape) for shape in normed.values()]:
            if clock.say(f"{part.__name__} {shape.inputs}->{shape.outputs} at {shape.height}x{shape.width}"):
                for row in part(shape, device):
                    rows.append(row)
                    print(row, flush=True)
        choice = choose_forms(net, device, size=(args.side, args.side))
    print(f"chosen in {choice.seconds:.1f} s: {choice.forms}")
    for row in step_rows(net, args.side, args, choice, clock):
        rows.append(row)
        print(f"{row}, {row.forward_rate / rate:.0%} of the matrix product", flush=True)
    if args.json is not None:
        report = {"matmul_tflops": rate, "copy_gbytes": copy, "forms": choice.forms, "rows": [asdict(r) for r in rows]}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
