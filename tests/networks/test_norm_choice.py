"""Forms of normalisation and LeakyReLU, and their choice."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dipguard.networks import build
from dipguard.networks.layers import StackedNorm2d, stacked_norm
from dipguard.networks.norm_choice import NormChoice, NormShape, choose_norms, norm_shapes

CPU = torch.device("cpu")


def test_every_normalisation_has_its_shape_and_slope() -> None:
    net = build("small", stack_size=3)
    shapes = norm_shapes(net, size=(17, 18))
    norms = {name for name, module in net.named_modules() if isinstance(module, StackedNorm2d)}
    assert set(shapes) == norms
    assert {shape.stack for shape in shapes.values()} == {3}
    # A scale's own normalisation has no activation behind it, a block's has.
    assert {name.count(".norm") and shape.slope for name, shape in shapes.items()} == {0.2, 1.0}
    assert shapes["body.norm"] == NormShape(3, shapes["body.norm"].channels, 17, 18, 1.0, 1e-5)
    assert shapes["body.up.1.norm"].slope == 0.2


@pytest.mark.parametrize("slope", [0.2, 1.0])
def test_torch_s_form_is_its_two_operations(slope: float) -> None:
    x, weight, bias = torch.randn(1, 6, 5, 4), torch.rand(2, 3), torch.rand(2, 3)
    right = F.batch_norm(x, None, None, weight.flatten(), bias.flatten(), training=True, eps=1e-3)
    right = F.leaky_relu(right, slope)
    assert torch.equal(stacked_norm(x, weight, bias, slope=slope, eps=1e-3), right)


def test_a_cpu_takes_torch_s() -> None:
    net = build("small", stack_size=1)
    choice = choose_norms(net, CPU, size=(16, 16))
    assert set(choice.forms.values()) == {"torch"}
    NormChoice({"body.norm": "triton"}, 0.0, {}).apply(net)
    assert net.body.norm.form == "triton"
    with pytest.raises(RuntimeError, match="riton"):
        net(torch.rand(1, net.spec.input_depth, 16, 16))
    choice.apply(net)
    assert net(torch.rand(1, net.spec.input_depth, 16, 16)).shape == (1, 3, 16, 16)


def test_a_form_that_fails_is_left_out_where_there_is_a_choice() -> None:
    net = build("small", stack_size=1)
    choice = choose_norms(net, CPU, size=(16, 16), forms=("torch", "triton"))
    assert set(choice.forms.values()) == {"torch"}
    assert all(seconds["triton"] == float("inf") > seconds["torch"] for seconds in choice.measured.values())
    with pytest.raises(ValueError, match="`norms` must be one of torch, triton, got 'apex'"):
        choose_norms(net, CPU, size=(16, 16), forms=("apex",))
