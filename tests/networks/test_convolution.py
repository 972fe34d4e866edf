"""The forms of the stacked convolution against torch's own convolution, one network at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dipguard.networks import build
from dipguard.networks.convolution import FORMS, available_forms, stacked_conv2d
from dipguard.networks.layers import StackedConv2d

CPU_FORMS = available_forms(torch.device("cpu"))

# kernel, stride, padding, height, width; the last but one is a 4x4 kernel on 2x2 pixels, where the border is repeated.
GEOMETRIES = [
    (1, 1, "zeros", 5, 6),
    (1, 2, "reflect", 5, 6),
    (2, 1, "zeros", 5, 6),
    (2, 2, "reflect", 6, 7),
    (3, 1, "zeros", 7, 6),
    (3, 1, "reflect", 5, 5),
    (3, 2, "reflect", 7, 8),
    (4, 1, "reflect", 2, 2),
    (4, 2, "zeros", 9, 6),
]


def draw(kernel: int, height: int, width: int, *, stack: int = 3, channels_last: bool) -> tuple[Tensor, ...]:
    x = torch.randn(1, stack * 4, height, width, dtype=torch.float64)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    weight = torch.randn(stack, 5, 4, kernel, kernel, dtype=torch.float64)
    bias = torch.randn(stack, 5, dtype=torch.float64)
    return tuple(t.requires_grad_() for t in (x.contiguous(memory_format=layout), weight, bias))


def one_by_one(x: Tensor, weight: Tensor, bias: Tensor, *, stride: int, padding: str) -> Tensor:
    before, after = (weight.shape[-1] - 1) // 2, weight.shape[-1] // 2
    mode = "constant" if padding == "zeros" else "reflect" if after < min(x.shape[-2:]) else "replicate"
    parts = []
    for b, own in enumerate(x.unflatten(1, (len(weight), -1)).unbind(1)):
        if before + after:
            own = F.pad(own, (before, after, before, after), mode=mode)
        parts.append(F.conv2d(own, weight[b], bias[b], stride=stride))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("form", CPU_FORMS)
@pytest.mark.parametrize(("kernel", "stride", "padding", "height", "width"), GEOMETRIES)
def test_every_form_is_the_networks_own_convolutions(
    kernel: int, stride: int, padding: str, height: int, width: int, form: str, channels_last: bool
) -> None:
    tensors = draw(kernel, height, width, channels_last=channels_last)
    y = stacked_conv2d(*tensors, stride=stride, padding=padding, form=form)
    right = one_by_one(*tensors, stride=stride, padding=padding)
    assert y.shape == right.shape == (1, 15, -(-height // stride), -(-width // stride))
    dy = torch.randn_like(right)
    ours, theirs = (torch.autograd.grad(out, tensors, dy) for out in (y, right))
    torch.testing.assert_close(y, right, rtol=0, atol=1e-10)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", CPU_FORMS)
def test_a_network_does_not_see_its_neighbours(form: str) -> None:
    x, weight, bias = draw(3, 6, 6, channels_last=False)
    y = stacked_conv2d(x, weight, bias, padding="reflect", form=form)
    seen = torch.autograd.grad(y[:, 5:10].sum(), (x, weight, bias))
    for gradient, own in zip(seen, (slice(4, 8), 1, 1), strict=True):
        mine = (0, own) if gradient.ndim == 4 else own
        assert float(gradient[mine].abs().min()) > 0
        rest = gradient.clone()
        rest[mine] = 0
        assert float(rest.abs().max()) == 0


@pytest.mark.parametrize("network", ["small", "medium", "large"])
@pytest.mark.parametrize("form", [form for form in CPU_FORMS if form != "grouped"])
def test_a_whole_network_gives_the_same_in_every_form(network: str, form: str) -> None:
    net = build(network, stack_size=2, dtype=torch.float64)
    z = torch.rand(2, 4, 32, 32, dtype=torch.float64)
    results = []
    for chosen in ("grouped", form):
        for layer in net.modules():
            if isinstance(layer, StackedConv2d):
                layer.form = chosen
        x = net(z)
        results.append((x, *torch.autograd.grad(x.square().sum(), list(net.parameters()))))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_a_layer_is_grouped_unless_told_otherwise() -> None:
    layer = StackedConv2d(2, 3, 4, kernel=3)
    assert layer.form == "grouped"
    layer.form = "winograd"
    with pytest.raises(ValueError, match="`form` must be one of grouped, matmul, vmap, triton, got 'winograd'"):
        layer(torch.rand(1, 6, 8, 8))


def test_triton_is_offered_on_cuda_alone() -> None:
    assert CPU_FORMS == ("grouped", "matmul", "vmap")
    assert set(available_forms(torch.device("cuda"))) <= set(FORMS)


def test_triton_refuses_a_cpu() -> None:
    with pytest.raises(RuntimeError, match="the form 'triton' needs"):
        stacked_conv2d(*draw(3, 6, 6, channels_last=False), form="triton")
