"""Launches the Triton kernels of the stacked convolution: grids, strides and tile sizes, without autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PROGRAMS = 512
"""Programs that fill a large GPU about four times over."""
GRADIENT_BLOCK = 64


def forward(padded: Tensor, weight: Tensor, bias: Tensor, *, stride: int, precision: str) -> Tensor:
    """The convolution of an input that is padded already, [1, B * inputs, H, W], any strides; weight contiguous."""
    rows, columns = ((side - weight.shape[-1]) // stride + 1 for side in padded.shape[-2:])
    y = padded.new_empty(1, bias.numel(), rows, columns)
    _correlate(padded, weight, bias, y, stride=stride, precision=precision)
    return y


def input_gradient(
    dy: Tensor, weight: Tensor, *, size: tuple[int, int], first: int, stride: int, precision: str
) -> Tensor:
    """Gradient with respect to the padded input, or to its part of ``size`` from row and column ``first`` on.

    Args:
        dy: [1, B * outputs, H', W'], contiguous.
        weight: [B, outputs, inputs, kernel, kernel], contiguous.
        size: Height and width of the result.
        first: Row and column of the padded input with which the result begins.
        stride: The convolution's.
        precision: One of ``PRECISIONS``.
    """
    from dipguard.networks._triton_conv_kernels import strided_gradient_kernel

    B, outputs, inputs, kernel, _ = weight.shape
    height, width = size
    dx = dy.new_empty(1, B * inputs, height, width)
    if stride == 1:
        # The transposed convolution is one more convolution, of dy with a border of zeros.
        front = kernel - 1 - first
        below, right = height + first - dy.shape[-2], width + first - dy.shape[-1]
        if kernel > 1:
            dy = F.pad(dy, (front, right, front, below))
        _correlate(dy, weight, None, dx, stride=1, precision=precision)
        return dx
    pixels = -(-height // stride) * -(-width // stride)
    launch(
        strided_gradient_kernel,
        lambda tile: (-(-pixels // tile["BLOCK_P"]), -(-inputs // tile["BLOCK_C"]) * stride**2, B),
        (dy, weight, dx, inputs, outputs, *dy.shape[-2:], height, width),
        {"FIRST": first, "KERNEL": kernel, "STRIDE": stride, **_sums(dy, precision)},
    )
    return dx


def _correlate(padded: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, *, stride: int, precision: str) -> None:
    # Without a bias: transposed, from the weight's outputs to its inputs.
    from dipguard.networks._triton_conv_kernels import forward_kernel

    transposed = bias is None
    B, outputs, inputs, kernel, _ = weight.shape
    inputs, outputs = (outputs, inputs) if transposed else (inputs, outputs)
    pixels, width = y.shape[-2] * y.shape[-1], y.shape[-1]
    block = _block(outputs)
    launch(
        forward_kernel,
        lambda tile: (-(-pixels // tile["BLOCK_P"]), -(-outputs // block), B),
        (
            padded,
            weight,
            weight if bias is None else bias,
            y,
            inputs,
            outputs,
            pixels,
            width,
            *_strides(padded, inputs),
        ),
        {"KERNEL": kernel, "STRIDE": stride, "TRANSPOSED": transposed, "BLOCK_O": block, **_sums(padded, precision)},
    )


def weight_gradient(
    padded: Tensor, dy: Tensor, weight: Tensor, *, stride: int, precision: str
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to weight and bias, in the weight's dtype; dy contiguous."""
    from dipguard.networks._triton_conv_kernels import weight_gradient_kernel

    B, outputs, inputs, kernel, _ = weight.shape
    depth, pixels = inputs * kernel**2, dy.shape[-2] * dy.shape[-1]
    block = _block(outputs)
    programs = B * -(-depth // GRADIENT_BLOCK) * -(-outputs // block)
    splits = max(1, min(-(-PROGRAMS // programs), pixels // (4 * GRADIENT_BLOCK)))
    share = -(-pixels // (splits * GRADIENT_BLOCK)) * GRADIENT_BLOCK
    dw, db = weight.new_empty(splits, *weight.shape), weight.new_empty(splits, B, outputs)
    arguments = (padded, dy, dw, db, inputs, outputs, pixels, dy.shape[-1], share, *_strides(padded, inputs))
    launch(
        weight_gradient_kernel,
        lambda tile: (-(-depth // tile["BLOCK_K"]), -(-outputs // block) * splits, B),
        arguments,
        {"KERNEL": kernel, "STRIDE": stride, "SPLITS": splits, "BLOCK_O": block, **_sums(padded, precision)},
    )
    return (dw[0], db[0]) if splits == 1 else (dw.sum(0), db.sum(0))


def fold(padded: Tensor, *, before: int, after: int, reflect: bool) -> Tensor:
    """Gradient of a reflected (or repeated) border: [1, C, H + before + after, W + ...] -> [1, C, H, W]."""
    from dipguard.networks._triton_fold_kernel import fold_kernel

    C, height, width = padded.shape[1], padded.shape[2] - before - after, padded.shape[3] - before - after
    dx = padded.new_empty(1, C, height, width)
    block = 1024
    launch(
        fold_kernel,
        lambda tile: (-(-dx.numel() // block),),
        (padded, dx, dx.numel(), height, width),
        {"BEFORE": before, "AFTER": after, "REFLECT": reflect, "BLOCK": block, "SUM": sum_dtype(padded)},
    )
    return dx


def _block(channels: int) -> int:
    # As little as possible of the last tile idle, but a narrow tile loads more for each product.
    return min((64, 32, 16), key=lambda block: -(-channels // block) * (block + 4))


def _strides(padded: Tensor, inputs: int) -> tuple[int, int, int, int]:
    # From network to network, channel to channel, row to row, pixel to pixel. The first stride of [1, C, H, W] says
    # nothing.
    channel, row, column = padded.stride()[1:]
    return inputs * channel, channel, row, column


def _sums(x: Tensor, precision: str) -> dict[str, Any]:
    return {"SUM": sum_dtype(x), "PRECISION": precision}


def sum_dtype(x: Tensor) -> Any:
    """The dtype in which a kernel adds up."""
    import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

    return tl.float64 if x.dtype == torch.float64 else tl.float32


def launch(kernel: Any, grid: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Run a kernel on the device of its first argument, a tensor."""
    device = arguments[0].device
    if device.type != "cuda":
        kernel[grid](*arguments, **options)
        return
    with torch.cuda.device(device):
        # Multiply-adds in one instruction: later versions of Triton leave that off by default.
        kernel[grid](*arguments, **options, enable_fp_fusion=True)


def check_device(device: torch.device) -> None:
    """Refuse a device on which Triton cannot run.

    Raises:
        RuntimeError: Triton is not installed, or the device is none of CUDA's and Triton does not interpret.
    """
    try:
        import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise RuntimeError("the form 'triton' needs the package triton, which is not installed here") from error
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise RuntimeError(f"the form 'triton' needs a CUDA device, got {device.type!r}")
