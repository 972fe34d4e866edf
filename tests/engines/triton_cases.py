"""Runs the Triton kernels beside torch's own operations, and prints the differences as JSON.

A program of its own, since Triton decides at its import whether it interprets kernels on the CPU or compiles them:

    TRITON_INTERPRET=1 python tests/engines/triton_cases.py cpu
    python tests/engines/triton_cases.py cuda
"""

import itertools
import json
import math
import sys
import types
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
# The package without its front door, which loads torchmetrics, torchvision and more: most of this program's time.
sys.modules["dipguard"] = types.ModuleType("dipguard")
sys.modules["dipguard"].__path__ = [str(ROOT / "dipguard")]

from dipguard.engines import triton_ops  # noqa: E402
from dipguard.engines.kernel_choice import choose_kernels, use_kernels  # noqa: E402
from dipguard.engines.triton_ops import triton_conv2d, triton_join_norm, triton_norm_leaky_relu  # noqa: E402
from dipguard.networks import NetworkSpec, build  # noqa: E402
from dipguard.networks.unet import grouped_conv2d, join_norm  # noqa: E402

DTYPES = {"float32": torch.float32, "float64": torch.float64}

# kernel, stride, padding, height, width, inputs, outputs
CONVOLUTIONS = {
    "1x1": (1, 1, "zeros", 5, 7, 3, 4),
    "1x1, stride 2": (1, 2, "zeros", 5, 6, 3, 4),
    "2x2": (2, 1, "zeros", 5, 6, 3, 4),
    "2x2, stride 2, reflected": (2, 2, "reflect", 6, 7, 3, 4),
    "3x3": (3, 1, "zeros", 5, 6, 17, 3),
    "3x3, reflected, 35 to 32": (3, 1, "reflect", 4, 5, 35, 32),
    "3x3, reflected, 3 to 20": (3, 1, "reflect", 3, 4, 3, 20),
    "3x3, stride 2, reflected": (3, 2, "reflect", 7, 8, 4, 18),
    "4x4, reflected": (4, 1, "reflect", 7, 6, 3, 4),
    "4x4, repeated": (4, 1, "reflect", 2, 2, 3, 4),
    "4x4, stride 2": (4, 2, "zeros", 9, 6, 3, 4),
    "more pixels than a split": (2, 1, "zeros", 24, 25, 2, 3),
}
# height, width, slope, largest block
NORMS = {
    "one block": (5, 6, 0.2, 4096),
    "several blocks": (5, 6, 0.2, 16),
    "no activation": (5, 6, 1.0, 4096),
    "two pixels": (1, 2, 0.2, 4096),
}
# upsampling, height, width, skip channels, channels from below, largest block
JOINS = {
    "bilinear, even": ("bilinear", 6, 8, 2, 3, 4096),
    "bilinear, odd": ("bilinear", 7, 5, 2, 3, 4096),
    "bilinear, no skip": ("bilinear", 6, 7, 0, 3, 4096),
    "bilinear, one pixel below": ("bilinear", 2, 2, 1, 2, 4096),
    "bilinear, one row": ("bilinear", 1, 4, 1, 2, 4096),
    "bilinear, several blocks": ("bilinear", 11, 10, 1, 2, 16),
    "nearest, odd": ("nearest", 5, 7, 3, 2, 4096),
    "nearest, no skip, several blocks": ("nearest", 8, 9, 0, 2, 16),
}


def compare(ours: Tensor, right: Tensor, tensors: tuple[Tensor, ...]) -> list[float]:
    """Largest differences of the result and of the gradients, relative to the largest number."""
    dy = torch.randn_like(right)
    pairs = [(ours, right), *zip(*(torch.autograd.grad(y, tensors, dy) for y in (ours, right)), strict=True)]
    return [float(((a - b).abs().max() / b.abs().max().clamp(min=1)).detach()) for a, b in pairs]


def in_the_midst_of_nan(x: Tensor) -> Tensor:
    """The same numbers, with other strides, and with NaN in memory wherever none of them lies."""
    _, channels, height, width = x.shape
    room = torch.full((3, channels + 2, height + 2, width + 3), math.nan, dtype=x.dtype, device=x.device)
    inside = room[1:2, 1:-1, 1:-1, 1:-2]
    return inside.copy_(x)


def convolution(
    name: str, dtype: torch.dtype, layout: str, device: torch.device, products: str | None = None
) -> list[float]:
    kernel, stride, padding, height, width, inputs, outputs = CONVOLUTIONS[name]
    B = 2
    x = torch.randn(1, B * inputs, height, width, dtype=dtype, device=device)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "in NaN":
        x = in_the_midst_of_nan(x)
    weight = torch.randn(B, outputs, inputs, kernel, kernel, dtype=dtype, device=device)
    bias = torch.randn(B, outputs, dtype=dtype, device=device)
    tensors = tuple(t.requires_grad_() for t in (x, weight, bias))
    options = {"stride": stride, "padding": padding}
    y, right = triton_conv2d(*tensors, **options, products=products), grouped_conv2d(*tensors, **options)
    assert y.shape == right.shape
    return compare(y, right, tensors)


def norm(name: str, dtype: torch.dtype, device: torch.device) -> list[float]:
    height, width, slope, triton_ops.LARGEST_BLOCK = NORMS[name]
    x = (3 * torch.randn(1, 6, height, width, dtype=dtype, device=device) + 1).requires_grad_()
    weight, bias = (torch.randn(2, 3, dtype=dtype, device=device).requires_grad_() for _ in range(2))
    y = triton_norm_leaky_relu(x, weight, bias, slope=slope, eps=1e-5)
    right = F.batch_norm(x, None, None, weight.flatten(), bias.flatten(), training=True, eps=1e-5)
    return compare(y, F.leaky_relu(right, slope), (x, weight, bias))


def join(name: str, dtype: torch.dtype, device: torch.device) -> list[float]:
    upsample, height, width, skips, channels, triton_ops.LARGEST_BLOCK = JOINS[name]
    B, rows, columns = 2, -(-height // 2), -(-width // 2)
    low = 3 * torch.randn(1, B * channels, rows, columns, dtype=dtype, device=device) + 1
    skip = torch.randn(1, B * skips, height, width, dtype=dtype, device=device)
    parameters = (torch.randn(B, skips + channels, dtype=dtype, device=device) for _ in range(2))
    tensors = tuple(t.requires_grad_() for t in (low, *parameters, *([skip] if skips else [])))
    options = {"size": (height, width), "upsample": upsample, "eps": 1e-3}
    right = join_norm(*tensors, **options)
    y = triton_join_norm(*(in_the_midst_of_nan(t) if t.ndim == 4 else t for t in tensors), **options)
    assert y.shape == right.shape
    return compare(y, right, tensors)


def neighbours(device: torch.device) -> list[float]:
    """Whether an image's part of a join depends on the other network's numbers: no difference may come of them."""
    low, skip = torch.randn(1, 4, 3, 3, device=device), torch.randn(1, 2, 5, 6, device=device)
    weight, bias = torch.randn(2, 3, device=device), torch.randn(2, 3, device=device)
    tensors = tuple(t.requires_grad_() for t in (low, weight, bias, skip))
    alone = [t[:, : t.shape[1] // 2] if t.ndim == 4 else t[:1] for t in tensors]
    y, mine = (triton_join_norm(*t, size=(5, 6), upsample="bilinear", eps=1e-5) for t in (tensors, alone))
    dy = torch.randn_like(y)
    both, only = (torch.autograd.grad(a, tensors, b) for a, b in ((y, dy), (mine, dy[:, :3])))
    halves = [
        (a[:, : a.shape[1] // 2], b[:, : b.shape[1] // 2]) if a.ndim == 4 else (a[:1], b[:1])
        for a, b in zip((y, *both), (torch.cat([mine, mine], 1), *only), strict=True)
    ]
    # NaN, which no tolerance lets pass, unless every bit is the same.
    return [0.0 if torch.equal(a, b) else math.nan for a, b in halves]


def network(spec: str | NetworkSpec, stack: int, side: int, device: torch.device) -> list[float]:
    """A whole network, all of whose convolutions, normalisations and joins are Triton's."""
    net = build(spec, stack_size=stack, dtype=torch.float64).to(device)
    z = torch.rand(stack, 4, side, side + 1, dtype=torch.float64, device=device)
    right = net(z)
    size = (side, side + 1)
    all_triton = choose_kernels(net, device, size=size, convolutions=["triton"], normalisations=["triton"])
    assert set(all_triton.values()) == {"triton"}
    use_kernels(net, all_triton)
    return compare(net(z), right, tuple(net.parameters()))


def main(device: torch.device) -> dict[str, list[float]]:
    """Case -> differences of the result and of each gradient."""
    torch.manual_seed(0)
    if device.type == "cuda":
        # One tile for each kernel, as in the interpreter: compiling all of them would take minutes.
        from dipguard.engines import _triton_kernels

        for kernel in vars(_triton_kernels).values():
            if hasattr(kernel, "configs"):
                kernel.configs = kernel.configs[:1]
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    found = {}
    for case in CONVOLUTIONS:
        found[f"float64, {case}"] = convolution(case, torch.float64, "usual", device)
    for case in ("1x1", "3x3, reflected, 35 to 32", "4x4, stride 2"):
        found[f"float32, {case}"] = convolution(case, torch.float32, "usual", device)
        found[f"float32, {case}, tf32x3"] = convolution(case, torch.float32, "usual", device, "tf32x3")
    for layout, case in itertools.product(("channels last", "in NaN"), ("1x1", "3x3, stride 2, reflected")):
        found[f"float64, {case}, {layout}"] = convolution(case, torch.float64, layout, device)
    for case, (kind, dtype) in itertools.product(NORMS, DTYPES.items()):
        found[f"{kind}, norm, {case}"] = norm(case, dtype, device)
    for case in JOINS:
        found[f"float64, join, {case}"] = join(case, torch.float64, device)
    for case in ("bilinear, odd", "bilinear, several blocks", "nearest, odd"):
        found[f"float32, join, {case}"] = join(case, torch.float32, device)
    triton_ops.LARGEST_BLOCK = 4096
    found["float32, join, without its neighbours"] = neighbours(device)
    tiny = NetworkSpec((4, 3), (2, 4), (1, 0), (3, 2), (3, 2), (2, 1), upsample="nearest")
    for case, spec, stack, side in (("small", "small", 2, 5), ("medium", "medium", 1, 9), ("tiny", tiny, 3, 6)):
        found[f"float64, network, {case}"] = network(spec, stack, side, device)
    return found


if __name__ == "__main__":
    print(json.dumps(main(torch.device(sys.argv[1]))))
