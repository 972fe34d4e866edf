"""Forms of the stacked convolution: one result, computed in several ways, of which each device prefers another.

``grouped``
    One convolution of B groups. Torch's own kernels; on a GPU cuDNN's grouped backward pass is known to be slow.
``matmul``
    Every pixel's neighbourhood is written out (``unfold``), then one batched matrix product. Needs kernel**2 times the
    input's memory, which is kept for the backward pass.
``vmap``
    ``torch.vmap`` over an ordinary convolution; today torch turns that into a grouped one of another memory layout.
``triton``
    Kernels of our own (:mod:`dipguard.networks.triton_conv`), on NVIDIA GPUs.

All give the same numbers but for rounding: the tests hold forward pass and gradients to 1e-10 of each other in float64.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from dipguard.checks import check_choice

FORMS = ("grouped", "matmul", "vmap", "triton")


def same_padding(kernel: int) -> tuple[int, int]:
    """Pixels before and after a side that keep its size: kernel - 1 in all, the odd one after.

    The usual (kernel - 1) // 2 on both sides shrinks the image for the even kernels of the small and large networks.
    """
    return (kernel - 1) // 2, kernel // 2


def padding_mode(padding: str, *, kernel: int, side: int) -> str:
    """The mode of torch's ``pad`` for a side of so many pixels.

    A reflection needs more pixels than it adds. Where a deep scale has fewer (the 2x2 pixels and 4x4 kernels of the
    large network on 32x32 images), its border is repeated instead.
    """
    if padding == "zeros":
        return "constant"
    return "reflect" if kernel // 2 < side else "replicate"


def available_forms(device: torch.device) -> tuple[str, ...]:
    """The forms that can run on a device, ``grouped`` first."""
    with_triton = device.type == "cuda" and find_spec("triton") is not None
    return FORMS if with_triton else FORMS[:-1]


def stacked_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor, *, stride: int = 1, padding: str = "zeros", form: str = "grouped"
) -> Tensor:
    """B convolutions, the b-th applied to the b-th network's channels alone.

    Keeps the size at stride 1, halves it (rounding up) at stride 2, for even kernels too.

    Args:
        x: [1, B * inputs, H, W], any strides.
        weight: [B, outputs, inputs, kernel, kernel].
        bias: [B, outputs].
        stride: 1 or 2.
        padding: ``zeros`` or ``reflect``.
        form: One of ``FORMS``.

    Returns:
        [1, B * outputs, ceil(H / stride), ceil(W / stride)].

    Raises:
        ValueError: Unknown form.
        RuntimeError: The form cannot run on x's device.
    """
    if form == "grouped":
        return _grouped(x, weight, bias, stride=stride, padding=padding)
    check_choice(form, FORMS, name="form")
    if form == "triton":
        from dipguard.networks.triton_conv import triton_conv2d

        return triton_conv2d(x, weight, bias, stride=stride, padding=padding)
    x = _pad(x, kernel=weight.shape[-1], padding=padding)
    return (_matmul if form == "matmul" else _vmap)(x, weight, bias, stride=stride)


def _pad(x: Tensor, *, kernel: int, padding: str) -> Tensor:
    before, after = same_padding(kernel)
    if not before + after:
        return x
    mode = padding_mode(padding, kernel=kernel, side=min(x.shape[-2:]))
    return F.pad(x, (before, after, before, after), mode=mode)


def _grouped(x: Tensor, weight: Tensor, bias: Tensor, *, stride: int, padding: str) -> Tensor:
    before, after = same_padding(weight.shape[-1])
    inside = before if before == after and padding == "zeros" else 0  # the convolution pads by itself
    if not inside:
        x = _pad(x, kernel=weight.shape[-1], padding=padding)
    return F.conv2d(x, weight.flatten(0, 1), bias.flatten(), stride=stride, padding=inside, groups=len(weight))


def _matmul(x: Tensor, weight: Tensor, bias: Tensor, *, stride: int) -> Tensor:
    stack, outputs, inputs, kernel, _ = weight.shape
    rows, columns = ((side - kernel) // stride + 1 for side in x.shape[-2:])
    images = x.reshape(stack, inputs, *x.shape[-2:])
    # A 1x1 kernel's neighbourhoods are the pixels themselves.
    plain = kernel == 1 and stride == 1
    neighbourhoods = images.flatten(2) if plain else F.unfold(images, kernel, stride=stride)
    y = torch.baddbmm(bias[:, :, None], weight.flatten(2), neighbourhoods)
    return y.view(1, stack * outputs, rows, columns)


def _vmap(x: Tensor, weight: Tensor, bias: Tensor, *, stride: int) -> Tensor:
    stack, outputs, inputs = weight.shape[:3]
    images = x.reshape(stack, inputs, *x.shape[-2:])
    y: Tensor = torch.vmap(partial(F.conv2d, stride=stride))(images, weight, bias)
    return y.reshape(1, stack * outputs, *y.shape[-2:])
