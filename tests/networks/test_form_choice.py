"""Which form each layer gets."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dipguard.networks import build
from dipguard.networks.convolution import available_forms
from dipguard.networks.form_choice import FormChoice, LayerShape, choose_forms, layer_shapes, measure
from dipguard.networks.layers import StackedConv2d

CPU = torch.device("cpu")
SHAPE = LayerShape(
    stack=2, inputs=3, outputs=4, kernel=3, stride=1, padding="reflect", height=8, width=8, gradient=True
)


@pytest.mark.parametrize(("network", "side"), [("small", 17), ("medium", 32), ("large", 32), ("imagenet", 64)])
def test_layer_shapes_account_for_every_flop(network: str, side: int) -> None:
    net = build(network, stack_size=2)
    shapes = layer_shapes(net, size=(side, side + 1))
    convolutions = {name for name, layer in net.named_modules() if isinstance(layer, StackedConv2d)}
    assert set(shapes) == convolutions
    with FlopCounterMode(display=False) as counter:
        net(torch.rand(2, 4, side, side + 1))
    assert sum(shape.flops for shape in shapes.values()) == counter.get_total_flops()
    # Only the layers that read z, which is fixed, need no gradient of their input.
    assert {name for name, shape in shapes.items() if not shape.gradient} == {"body.down.0.conv", "body.skip.conv"}


def test_a_cpu_keeps_grouped_without_measuring() -> None:
    net = build("small", stack_size=2)
    choice = choose_forms(net, CPU, size=(32, 32))
    assert set(choice.forms.values()) == {"grouped"}
    assert choice.measured == {}
    assert 0 < choice.seconds < 5


@pytest.mark.parametrize("gradient", [False, True])
def test_measuring_times_each_form_once_a_process(gradient: bool) -> None:
    shape = LayerShape(**{**vars(SHAPE), "gradient": gradient})
    forms = available_forms(CPU)
    first = measure(shape, device=CPU, dtype=torch.float64, forms=forms)
    assert set(first) == set(forms)
    assert all(0 < seconds < 1 for seconds in first.values())
    assert measure(shape, device=CPU, dtype=torch.float64, forms=forms) == first
    other = measure(shape, device=CPU, dtype=torch.float32, forms=forms)
    assert other != first


def test_a_form_that_cannot_run_is_never_the_fastest() -> None:
    times = measure(SHAPE, device=CPU, dtype=torch.float32, forms=["grouped", "triton"])
    assert math.isinf(times["triton"])
    assert math.isfinite(times["grouped"])


def test_measuring_works_under_inference_mode_and_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    with torch.inference_mode():
        times = measure(SHAPE, device=CPU, dtype=torch.bfloat16, forms=["grouped", "matmul"])
    assert all(math.isfinite(seconds) for seconds in times.values())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_choice_is_applied_to_the_layers_it_names() -> None:
    net = build("small", stack_size=1)
    FormChoice({"head": "matmul", "body.up.0.conv": "vmap"}, 0.0, {}).apply(net)
    forms = {name: layer.form for name, layer in net.named_modules() if isinstance(layer, StackedConv2d)}
    assert {name: form for name, form in forms.items() if form != "grouped"} == {
        "head": "matmul",
        "body.up.0.conv": "vmap",
    }


def test_unknown_forms_are_named() -> None:
    with pytest.raises(ValueError, match="`forms` must be one of grouped, matmul, vmap, triton, got 'fft'"):
        choose_forms(build("small", stack_size=1), CPU, size=(32, 32), forms=["fft"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_fastest_form_is_chosen() -> None:
    device = torch.device("cuda")
    net = build("small", stack_size=4).to(device)
    choice = choose_forms(net, device, size=(32, 32))
    shapes = layer_shapes(net, size=(32, 32))
    assert set(choice.measured) == set(shapes.values())
    for name, form in choice.forms.items():
        times = choice.measured[shapes[name]]
        assert times[form] == min(times.values())
