"""Which kernel computes each layer of a stack on a GPU: the fastest one, measured once at the start.

Stacked convolutions can be computed by torch as one convolution of B groups (``grouped``) or as one batched matrix
product of all pixels' neighbourhoods (``matmul``, kernel ** 2 times the input's memory), or by our own kernels
(``triton``, :mod:`dipguard.engines.triton_ops`; ``triton tf32x3`` splits float32 products into three of TF32);
normalisations with LeakyReLU, and the middle of a scale (upsampling, concatenation, normalisation), by ``torch`` or
``triton``. On a GPU every candidate is timed on each distinct layer shape and compared with the
first of its list in float64; one that fails or is too far off is left out. On a CPU the first of each list is used.

The choice depends on the stack size (to a power of two). Kernels differ only by rounding, but a DIP fit amplifies that:
in float32 an image may be reconstructed visibly differently in a stack of another size, as with torch's own kernels.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dipguard.checks import check_choice
from dipguard.classifier import is_out_of_memory
from dipguard.engines.triton_ops import triton_conv2d, triton_join_norm, triton_norm_leaky_relu
from dipguard.networks import StackedSkipNet
from dipguard.networks.unet import (
    StackedConv2d,
    StackedJoin2d,
    StackedNorm2d,
    grouped_conv2d,
    join_norm,
    norm_leaky_relu,
    pad_border,
)

_log = logging.getLogger(__name__)

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
ROUGH = 3e-2
"""Largest relative error in bfloat16 and TF32."""
SPLIT = "triton tf32x3"
"""Float32 products as sums of TF32 ones: taken where its error is at most the largest of the float32 forms."""
CHECKED = 4
"""Networks, the stack's last ones, whose results are compared: float64 is slow on many GPUs."""
BUDGET = 4.0
"""Seconds after which a choice compiles no further kernel; a later process makes it again."""
SLOW = 0.01
"""A run that takes longer than these seconds is timed once."""
MATMUL_SHARE = 1 / 8
"""Of the GPU's memory, for the neighbourhoods of ``matmul``."""
AHEAD = 2_000_000
"""Clock cycles, about a millisecond, for which the GPU waits while the host queues the work to be timed."""


def matmul_conv2d(x: Tensor, weight: Tensor, bias: Tensor, *, stride: int = 1, padding: str = "zeros") -> Tensor:
    """B convolutions with the arguments and result of :func:`dipguard.networks.unet.grouped_conv2d`."""
    stack, outputs, inputs, kernel, _ = weight.shape
    x = pad_border(x, kernel=kernel, padding=padding)
    rows, columns = ((side - kernel) // stride + 1 for side in x.shape[-2:])
    images = x.reshape(stack, inputs, *x.shape[-2:])
    # The neighbourhoods of a 1x1 kernel are the pixels themselves.
    plain = kernel == 1 and stride == 1
    neighbourhoods = images.flatten(2) if plain else F.unfold(images, kernel, stride=stride)
    y = torch.baddbmm(bias[:, :, None], weight.flatten(2), neighbourhoods)
    return y.view(1, stack * outputs, rows, columns)


Function: TypeAlias = Callable[..., Tensor]
CONVOLUTIONS: dict[str, Function] = {
    "grouped": grouped_conv2d,
    "matmul": matmul_conv2d,
    "triton": triton_conv2d,
    SPLIT: partial(triton_conv2d, products="tf32x3"),
}
NORMALISATIONS: dict[str, Function] = {"torch": norm_leaky_relu, "triton": triton_norm_leaky_relu}
JOINS: dict[str, Function] = {"torch": join_norm, "triton": triton_join_norm}
TABLES = {StackedConv2d: CONVOLUTIONS, StackedNorm2d: NORMALISATIONS, StackedJoin2d: JOINS}


def available(
    table: Mapping[str, Function], device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[str, ...]:
    """The names of a table that can run on a device, and are of use in a dtype and the current precision."""
    with_triton = device.type == "cuda" and find_spec("triton") is not None
    names = (name for name in table if with_triton or not name.startswith("triton"))
    return tuple(name for name in names if name != SPLIT or (_exact(device) and dtype == torch.float32))


class Choice(dict[str, str]):
    """The name of the kernel of each layer; ``complete`` if every candidate was tried."""

    def __init__(self, kernels: Mapping[str, str], *, complete: bool = True) -> None:
        super().__init__(kernels)
        self.complete = complete


@dataclass(frozen=True)
class LayerShape:
    """What the speed of a convolution, a normalisation, or the join of a scale depends on."""

    x: tuple[int, ...]  # [1, B * inputs, H, W]
    weight: tuple[int, ...]  # [B, outputs, inputs, kernel, kernel] or, of a normalisation or a join, [B, channels]
    options: tuple[tuple[str, Any], ...]  # stride and padding; slope and eps; or upsample, eps and size
    gradient: bool = True  # whether x needs one

    @property
    def stack(self) -> int:
        """B."""
        return self.weight[0]

    @property
    def kind(self) -> str:
        """``convolution``, ``normalisation`` or ``join``."""
        if len(self.weight) == 5:
            return "convolution"
        return "join" if "size" in dict(self.options) else "normalisation"

    @property
    def table(self) -> dict[str, Function]:
        """All candidates, as functions of :meth:`example` and the options."""
        return {"convolution": CONVOLUTIONS, "normalisation": NORMALISATIONS, "join": JOINS}[self.kind]

    def kernel(self, name: str) -> Function:
        """One candidate, as a function of :meth:`example`."""
        return partial(self.table[name], **dict(self.options))

    def example(self, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Random x (but for convolutions in autocast's dtype where that is on), weight, bias and a join's skip."""
        cast = self.table is not CONVOLUTIONS and torch.is_autocast_enabled(device.type)
        activation = torch.get_autocast_dtype(device.type) if cast else dtype
        drawn = [(self.x, activation, self.gradient), (self.weight, dtype, True), (self.weight[:2], dtype, True)]
        skips = self.weight[1] * self.stack - self.x[1]
        if self.table is JOINS and skips:
            drawn.append(((1, skips, *dict(self.options)["size"]), activation, True))
        draw = torch.Generator(device).manual_seed(0)
        return tuple(
            torch.randn(size, generator=draw, device=device, dtype=kind).requires_grad_(gradient)
            for size, kind, gradient in drawn
        )


def choose_kernels(
    net: StackedSkipNet,
    device: torch.device,
    *,
    size: tuple[int, int],
    z_gradient: bool = False,
    convolutions: Collection[str] | None = None,
    normalisations: Collection[str] | None = None,
) -> Choice:
    """The fastest kernel for each layer of a stack, by the layer's name (:func:`use_kernels`).

    Call it inside the :func:`~dipguard.precision.precision` of the fit. ``size`` is the height and width of the images.
    The candidates are by default all that can run on a GPU, and torch's ``grouped`` and ``torch`` on a CPU; joins have
    those of normalisations. ValueError for an unknown name, RuntimeError if no candidate works for some layer.

    Most of the time goes into compiling; after 4 seconds only torch's own candidates are measured. So joins and
    normalisations, which gain most and compile fast, come first, and of each kind the largest layer.
    """
    dtype, deadline = net.head.weight.dtype, time.perf_counter() + BUDGET

    def offer(table: Mapping[str, Function], asked: Collection[str] | None, argument: str) -> list[str]:
        default = available(table, device, dtype) if device.type == "cuda" else tuple(table)[:1]
        return [check_choice(name, table, name=argument) for name in asked or default]

    offers = offer(CONVOLUTIONS, convolutions, "convolutions"), offer(NORMALISATIONS, normalisations, "normalisations")
    shapes = layer_shapes(net, size=size, z_gradient=z_gradient)
    kinds, fastest, complete = (JOINS, NORMALISATIONS, CONVOLUTIONS), dict[LayerShape, str](), True
    for shape in sorted(set(shapes.values()), key=lambda one: (kinds.index(one.table), -math.prod(one.x), str(one))):
        offered = offers[shape.table is not CONVOLUTIONS]
        fastest[shape] = offered[0]
        if len(offered) > 1:
            seconds = measure(shape, device=device, dtype=dtype, names=offered, deadline=deadline)
            fastest[shape] = min(seconds, key=seconds.__getitem__)
            complete = complete and len(seconds) == len(set(offered))
            if seconds[fastest[shape]] == math.inf:
                raise RuntimeError(f"none of {', '.join(offered)} computes {shape} in {dtype} on {device}")
    return Choice({layer: fastest[shape] for layer, shape in shapes.items()}, complete=complete)


def use_kernels(net: nn.Module, chosen: Mapping[str, str]) -> None:
    """Let these layers be computed by these kernels."""
    for layer_name, name in chosen.items():
        layer: Any = net.get_submodule(layer_name)
        layer.compute = TABLES[type(layer)][name]


def use_first_kernels(net: nn.Module) -> None:
    """Let all layers be computed by torch's own operations, which run on every device."""
    for layer in net.modules():
        if type(layer) in TABLES:
            layer.compute = next(iter(TABLES[type(layer)].values()))  # type: ignore[assignment]


def layer_shapes(net: StackedSkipNet, *, size: tuple[int, int], z_gradient: bool = False) -> dict[str, LayerShape]:
    """Shapes of all convolutions, normalisations and joins by layer name, in running order; computes nothing."""
    with torch.device("meta"):
        twin = StackedSkipNet(net.spec, stack_size=net.stack_size, padding=net.padding)
        z = torch.empty(net.stack_size, net.spec.input_depth, *size, dtype=torch.float32, requires_grad=z_gradient)
    shapes: dict[str, LayerShape] = {}

    def note(layer: Any, arguments: tuple[Any, ...], *, name: str) -> None:
        x, *rest = arguments
        how = [(option, getattr(layer, option)) for option in kinds[type(layer)]]
        how += [("size", rest[1])] if rest else []
        shapes[name] = LayerShape(tuple(x.shape), tuple(layer.weight.shape), tuple(how), x.requires_grad)

    kinds = {StackedConv2d: ("stride", "padding"), StackedNorm2d: ("slope", "eps"), StackedJoin2d: ("upsample", "eps")}
    for name, module in twin.named_modules():
        if type(module) in kinds:
            module.register_forward_pre_hook(partial(note, name=name))
    with torch.enable_grad():
        twin(z)
    return shapes


def measure(
    shape: LayerShape, *, device: torch.device, dtype: torch.dtype, names: Collection[str], deadline: float = math.inf
) -> dict[str, float]:
    """Seconds of a forward and backward pass of each candidate; infinite if it fails or its error is too large.

    After the deadline, by ``time.perf_counter``, Triton's are not tried where another works, and have no seconds.
    """
    times = dict.fromkeys(names, math.inf)
    with torch.inference_mode(False), torch.enable_grad():
        tensors = shape.example(device=device, dtype=dtype)
        first = next(iter(shape.table))
        like = shape.kernel(first)(*tensors).detach()
        draw = torch.Generator(device).manual_seed(1)
        dy = torch.randn(like.shape, generator=draw, device=device, dtype=like.dtype)
        few = [_last(t, shape.stack) for t in (*tensors, dy)]
        truth = _both(shape.kernel(first), [t.double() for t in few])

        def error(results: Iterable[Tensor]) -> float:
            # Python's max would overlook a NaN.
            return float(torch.stack([(a - b).norm() / b.norm() for a, b in zip(results, truth, strict=True)]).max())

        tolerance = TOLERANCES.get(dtype, ROUGH) if _exact(device) else ROUGH
        own = error(_both(shape.kernel(first), few))
        for name in names:
            best = min(times.values())
            if time.perf_counter() > deadline and best < math.inf and name.startswith("triton"):
                times.pop(name, None)
                continue
            if name == "matmul" and _unfolded(shape, dtype) > MATMUL_SHARE * _memory(device):
                continue
            try:
                both = partial(_both, shape.kernel(name), [*tensors, dy])
                off = error(_last(t, shape.stack) for t in both())
                if off <= (min(tolerance, own) if name == SPLIT else tolerance):
                    times[name] = median_seconds(both, device=device, best=best)
                    own = max(own, off)
                else:
                    _log.info("%s is not used for %s: its error is %.1e", name, shape, off)
            except Exception as problem:  # a compiler's own error types
                if is_out_of_memory(problem) and name != "matmul":  # which alone takes far more than the fit
                    raise
                _log.info("%s cannot be used for %s: %s", name, shape, problem)
    return times


def _unfolded(shape: LayerShape, dtype: torch.dtype) -> float:
    """Bytes of a convolution's neighbourhoods."""
    return math.prod(shape.x) * (shape.weight[-1] / dict(shape.options)["stride"]) ** 2 * dtype.itemsize


def _memory(device: torch.device) -> float:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf


def _both(kernel: Function, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The result, and the gradients of the tensors that require one; the last one is the result's own gradient."""
    *inputs, dy = tensors
    y = kernel(*inputs)
    return y.detach(), *torch.autograd.grad(y, [t for t in inputs if t.requires_grad], dy)


def _last(t: Tensor, stack: int) -> Tensor:
    """The part of the last networks, of an activation [1, B * channels, H, W] or of parameters [B, ...]."""
    return t[:, -(t.shape[1] // stack) * CHECKED :] if t.ndim == 4 else t[-CHECKED:]


def _exact(device: torch.device) -> bool:
    cast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    convolution = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined, unused-ignore]
    return not {"tf32", torch.bfloat16} & {torch.backends.cuda.matmul.fp32_precision, convolution, cast}


def median_seconds(
    work: Callable[[], object], *, device: torch.device, runs: int = 5, best: float | None = None
) -> float:
    """The median of ``runs`` runs after a warm-up; on a GPU without the gaps between kernels, which a graph closes.

    Given ``best``, the seconds of another way, what takes over 10 ms or over 1.5 times as long is run only once.
    """
    work()
    times: list[float] = []
    while len(times) < runs:
        times.append(_on_gpu(work, device) if device.type == "cuda" else _on_cpu(work))
        if best is not None and times[-1] > min(SLOW, 1.5 * best):
            break
    return statistics.median(times)


def _on_cpu(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _on_gpu(work: Callable[[], object], device: torch.device) -> float:
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD)
        start.record()
        work()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1e3
