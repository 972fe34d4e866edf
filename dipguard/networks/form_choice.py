"""Which form of the stacked convolution each layer uses: measured once at the start, on the device at hand.

On a CPU it is always ``grouped``. On a GPU every form that runs there is timed on each distinct layer shape, and its
result compared with that of ``grouped``: a form that fails, or disagrees, is left out. What was measured is kept for
the rest of the process.

The choice depends on the stack's size. Forms differ by rounding alone, but a DIP fit amplifies that: an image fitted
in a stack of another size may then differ visibly in float32, as it also may because torch's own kernels choose their
algorithm by size. Never does an image's data reach another's. Whoever needs one rounding everywhere sets one form.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from dipguard.checks import check_choice
from dipguard.networks.convolution import FORMS, available_forms, stacked_conv2d
from dipguard.networks.layers import StackedConv2d
from dipguard.networks.timing import median_seconds
from dipguard.networks.unet import StackedSkipNet

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
ROUGH = 3e-2
"""Largest relative difference from ``grouped`` in bfloat16 and TF32."""


@dataclass(frozen=True)
class LayerShape:
    """What the speed of a layer depends on.

    ``height`` and ``width`` are the input's. ``gradient`` says whether the input needs one: the first layers' is z,
    which is not fitted.
    """

    stack: int
    inputs: int
    outputs: int
    kernel: int
    stride: int
    padding: str
    height: int
    width: int
    gradient: bool

    @property
    def flops(self) -> int:
        """Operations of the forward pass, a multiplication and an addition counted as two."""
        rows, columns = -(-self.height // self.stride), -(-self.width // self.stride)
        return 2 * self.stack * self.outputs * self.inputs * self.kernel**2 * rows * columns


@dataclass(frozen=True)
class FormChoice:
    """The forms chosen.

    Attributes:
        forms: Layer name -> form.
        seconds: What choosing took, compilation included: part of the fit's start-up.
        measured: Layer shape -> form -> seconds of one forward and backward pass; infinite where it cannot be used.
    """

    forms: dict[str, str]
    seconds: float
    measured: dict[LayerShape, dict[str, float]]

    def apply(self, net: nn.Module) -> None:
        """Set the layers' forms."""
        for name, form in self.forms.items():
            layer = net.get_submodule(name)
            assert isinstance(layer, StackedConv2d)
            layer.form = form


_MEASURED: dict[tuple[object, ...], dict[str, float]] = {}


def choose_forms(
    net: StackedSkipNet,
    device: torch.device,
    *,
    size: tuple[int, int],
    z_gradient: bool = False,
    forms: Collection[str] | None = None,
) -> FormChoice:
    """The fastest form for each layer of a stack.

    Call it inside the precision (:mod:`dipguard.engines.precision`) that the fit will run in.

    Args:
        net: The stack; it is not changed (see :meth:`FormChoice.apply`).
        device: Where it will be fitted.
        size: Height and width of the images.
        z_gradient: z is fitted too.
        forms: The candidates; all that run on the device by default.

    Raises:
        ValueError: Unknown form.
        RuntimeError: No candidate works for some layer.
    """
    start = time.perf_counter()
    candidates = [check_choice(form, FORMS, name="forms") for form in forms or available_forms(device)]
    shapes = layer_shapes(net, size=size, z_gradient=z_gradient)
    if device.type != "cuda":
        return FormChoice(dict.fromkeys(shapes, "grouped"), time.perf_counter() - start, {})
    dtype = net.head.weight.dtype
    measured = {shape: measure(shape, device=device, dtype=dtype, forms=candidates) for shape in set(shapes.values())}
    chosen = {}
    for name, shape in shapes.items():
        form, seconds = min(measured[shape].items(), key=lambda pair: pair[1])
        if seconds == float("inf"):
            raise RuntimeError(f"none of {', '.join(candidates)} computes {shape} in {dtype} on {device}")
        chosen[name] = form
    return FormChoice(chosen, time.perf_counter() - start, measured)


def layer_shapes(net: StackedSkipNet, *, size: tuple[int, int], z_gradient: bool = False) -> dict[str, LayerShape]:
    """Shapes of all stacked convolutions, by layer name, in the order in which they run; nothing is computed."""
    with torch.device("meta"):
        alone = StackedSkipNet(net.spec, stack_size=1, padding=net.padding)
        z = torch.empty(1, net.spec.input_depth, *size, requires_grad=z_gradient)
    shapes: dict[str, LayerShape] = {}

    def note(layer: nn.Module, arguments: tuple[Tensor, ...], *, name: str) -> None:
        assert isinstance(layer, StackedConv2d)
        (x,) = arguments
        _, outputs, inputs, kernel, _ = layer.weight.shape
        height, width = x.shape[-2:]
        shapes[name] = LayerShape(
            1, inputs, outputs, kernel, layer.stride, layer.padding, height, width, x.requires_grad
        )

    for name, module in alone.named_modules():
        if isinstance(module, StackedConv2d):
            module.register_forward_pre_hook(partial(note, name=name))
    with torch.enable_grad():
        alone(z)
    return {name: replace(shape, stack=net.stack_size) for name, shape in shapes.items()}


def measure(shape: LayerShape, *, device: torch.device, dtype: torch.dtype, forms: Collection[str]) -> dict[str, float]:
    """Seconds of one forward and backward pass of each form; infinite for one that fails or disagrees with grouped."""
    key = (*setting(device), shape, dtype)
    known = _MEASURED.setdefault(key, {})
    missing = [form for form in forms if form not in known]
    if missing:
        with torch.inference_mode(False), torch.enable_grad():
            tensors = example(shape, device=device, dtype=dtype)
            right = passes(shape, tensors, form="grouped")()
            for form in missing:
                known[form] = timed(passes(shape, tensors, form=form), right, device=device)
    return {form: known[form] for form in forms}


def example(shape: LayerShape, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random x, weight and bias of a shape; the caller's random state is left alone."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = (
        (1, shape.stack * shape.inputs, shape.height, shape.width),
        (shape.stack, shape.outputs, shape.inputs, shape.kernel, shape.kernel),
        (shape.stack, shape.outputs),
    )
    x, weight, bias = (torch.randn(size, generator=generator, device=device, dtype=dtype) for size in sizes)
    return x.requires_grad_(shape.gradient), weight.requires_grad_(), bias.requires_grad_()


def passes(shape: LayerShape, tensors: tuple[Tensor, Tensor, Tensor], *, form: str) -> Callable[[], tuple[Tensor, ...]]:
    """One forward and backward pass of a form: gives y and the gradients."""
    wanted = [t for t in tensors if t.requires_grad]

    def work() -> tuple[Tensor, ...]:
        y = stacked_conv2d(*tensors, stride=shape.stride, padding=shape.padding, form=form)
        return y, *torch.autograd.grad(y, wanted, y.detach())

    return work


def timed(work: Callable[[], tuple[Tensor, ...]], right: tuple[Tensor, ...], *, device: torch.device) -> float:
    """Seconds of ``work``; infinite if it fails, or if its results are not the right ones."""
    try:
        ours = work()
        if all(_close(a, b) for a, b in zip(ours, right, strict=True)):
            return median_seconds(work, device=device)
    except Exception:  # a compiler's own error types, or memory: the form is then none for this machine
        pass
    return float("inf")


def _close(ours: Tensor, right: Tensor) -> bool:
    exact = not any(word in ("tf32", torch.bfloat16) for word in _precision(right.device))
    tolerance = TOLERANCES.get(right.dtype, ROUGH) if exact else ROUGH
    return bool((ours.double() - right.double()).norm() <= tolerance * right.double().norm())


def _precision(device: torch.device) -> tuple[object, ...]:
    cast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    convolution = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined, unused-ignore]
    return torch.backends.cuda.matmul.fp32_precision, convolution, cast


def setting(device: torch.device) -> tuple[object, ...]:
    """What measured times depend on besides the work: the device, torch, and the precision."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name, torch.__version__, *_precision(device)
