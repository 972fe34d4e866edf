"""Which form of normalisation and LeakyReLU each layer uses: measured once at the start, as for the convolutions.

``torch``
    Torch's two operations.
``triton``
    One kernel for both (:mod:`dipguard.networks.triton_norm`), on NVIDIA GPUs.

On a CPU it is always ``torch``. On a GPU every form that runs there is timed on each distinct shape, and one that
fails, or disagrees with torch's, is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dipguard.checks import check_choice
from dipguard.networks.convolution import available_forms
from dipguard.networks.form_choice import setting, timed
from dipguard.networks.layers import NORM_FORMS, StackedNorm2d, stacked_norm
from dipguard.networks.unet import StackedSkipNet


@dataclass(frozen=True)
class NormShape:
    """What the speed of a normalisation depends on."""

    stack: int
    channels: int
    height: int
    width: int
    slope: float
    eps: float


@dataclass(frozen=True)
class NormChoice:
    """The forms chosen.

    Attributes:
        forms: Layer name -> form.
        seconds: What choosing took, compilation included.
        measured: Shape -> form -> seconds of one forward and backward pass; infinite where it cannot be used.
    """

    forms: dict[str, str]
    seconds: float
    measured: dict[NormShape, dict[str, float]]

    def apply(self, net: nn.Module) -> None:
        """Set the layers' forms."""
        for name, form in self.forms.items():
            layer = net.get_submodule(name)
            assert isinstance(layer, StackedNorm2d)
            layer.form = form


_MEASURED: dict[tuple[object, ...], dict[str, float]] = {}


def choose_norms(
    net: StackedSkipNet, device: torch.device, *, size: tuple[int, int], forms: Collection[str] | None = None
) -> NormChoice:
    """The fastest form for each normalisation of a stack.

    Call it inside the precision (:mod:`dipguard.engines.precision`) that the fit will run in.

    Args:
        net: The stack; it is not changed (see :meth:`NormChoice.apply`).
        device: Where it will be fitted.
        size: Height and width of the images.
        forms: The candidates; all that run on the device by default. A single one is taken unmeasured.

    Raises:
        ValueError: Unknown form.
        RuntimeError: No candidate works for some layer.
    """
    start = time.perf_counter()
    candidates = [check_choice(form, NORM_FORMS, name="norms") for form in forms or _available(device)]
    shapes = norm_shapes(net, size=size)
    if len(candidates) == 1:
        return NormChoice(dict.fromkeys(shapes, candidates[0]), time.perf_counter() - start, {})
    cast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if cast else net.head.weight.dtype
    measured = {shape: _measure(shape, device=device, dtype=dtype, forms=candidates) for shape in set(shapes.values())}
    for shape, seconds in measured.items():
        if min(seconds.values()) == float("inf"):
            raise RuntimeError(f"none of {', '.join(candidates)} computes {shape} in {dtype} on {device}")
    chosen = {name: min(measured[shape], key=measured[shape].__getitem__) for name, shape in shapes.items()}
    return NormChoice(chosen, time.perf_counter() - start, measured)


def norm_shapes(net: StackedSkipNet, *, size: tuple[int, int]) -> dict[str, NormShape]:
    """Shapes of all normalisations, by layer name, in the order in which they run; nothing is computed."""
    with torch.device("meta"):
        alone = StackedSkipNet(net.spec, stack_size=1, padding=net.padding)
        z = torch.empty(1, net.spec.input_depth, *size)
    shapes: dict[str, NormShape] = {}

    def note(layer: nn.Module, arguments: tuple[Tensor, ...], *, name: str) -> None:
        assert isinstance(layer, StackedNorm2d)
        height, width = arguments[0].shape[-2:]
        shapes[name] = NormShape(net.stack_size, layer.weight.shape[1], height, width, layer.slope, layer.eps)

    for name, module in alone.named_modules():
        if isinstance(module, StackedNorm2d):
            module.register_forward_pre_hook(partial(note, name=name))
    alone(z)
    return shapes


def _available(device: torch.device) -> tuple[str, ...]:
    return NORM_FORMS if "triton" in available_forms(device) else NORM_FORMS[:1]


def _measure(shape: NormShape, *, device: torch.device, dtype: torch.dtype, forms: Collection[str]) -> dict[str, float]:
    """Seconds of one forward and backward pass of each form; infinite for one that fails or disagrees with torch's."""
    known = _MEASURED.setdefault((*setting(device), shape, dtype), {})
    missing = [form for form in forms if form not in known]
    if missing:
        with torch.inference_mode(False), torch.enable_grad():
            work = _passes(shape, device=device, dtype=dtype)
            right = work("torch")()
            for form in missing:
                known[form] = timed(work(form), right, device=device)
    return {form: known[form] for form in forms}


def _passes(
    shape: NormShape, *, device: torch.device, dtype: torch.dtype
) -> Callable[[str], Callable[[], tuple[Tensor, ...]]]:
    """One forward and backward pass of a form on random numbers: gives y and the gradients."""
    draw = torch.Generator(device).manual_seed(0)
    sizes = (1, shape.stack * shape.channels, shape.height, shape.width)
    x, dy = (torch.randn(sizes, generator=draw, device=device, dtype=dtype) for _ in range(2))
    own = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (
        torch.rand(shape.stack, shape.channels, generator=draw, device=device, dtype=own).requires_grad_()
        for _ in range(2)
    )
    inputs = (x.requires_grad_(), weight, bias)

    def work(form: str) -> tuple[Tensor, ...]:
        y = stacked_norm(*inputs, slope=shape.slope, eps=shape.eps, form=form)
        return y, *torch.autograd.grad(y, inputs, dy)

    return lambda form: partial(work, form)
