"""The stack against a plain network of torch.nn layers."""

import dataclasses

import pytest
import torch

from benchmarks.plain_loop import PlainSkipNet
from dipguard.networks import NetworkSpec, build, network_spec
from dipguard.networks.unet import StackedConv2d, bordered, doubled, same_padding
from dipguard.seeding import image_generator

PARAMETERS = {"small": 7_019, "medium": 82_236, "large": 433_587, "cifar10": 82_236, "imagenet": 556_215}
ODD = NetworkSpec(n_d=(5, 6), n_u=(4, 7), n_s=(0, 3), k_d=(3, 5), k_u=(4, 3), k_s=(1, 3), input_depth=2)
NEAREST = dataclasses.replace(ODD, upsample="nearest")


@pytest.mark.parametrize(("preset", "count"), PARAMETERS.items())
def test_parameter_counts_of_appendix_b(preset, count):
    net = build(preset, stack_size=2)
    assert net.parameters_per_image() == count
    spec = network_spec(preset)
    assert sum(p.numel() for p in PlainSkipNet(spec).parameters()) == count
    assert (spec.z_scale, spec.upsample) == (1 / 100 if preset == "imagenet" else 1 / 30, "bilinear")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@pytest.mark.parametrize(
    ("network", "side"),
    [
        ("small", 16),
        ("medium", 19),
        pytest.param("large", 32, marks=pytest.mark.slow),
        (ODD, 13),
        (NEAREST, 13),
    ],
)
def test_a_stack_is_its_networks_one_by_one(network, side, padding, channels_last):
    stack = build(network, stack_size=3, seed=1, indices=[4, 0, 9], padding=padding, dtype=torch.float64)
    stack.set_layout(channels_last=channels_last)
    z = torch.rand(3, stack.spec.input_depth, side, side + 1, dtype=torch.float64, requires_grad=True)
    together = stack(z)
    assert together.shape == (3, 3, side, side + 1)
    for b in range(3):
        plain = PlainSkipNet(stack.spec, padding=padding).double()
        plain.copy_from(stack, b)
        alone = plain(z[b : b + 1])
        torch.testing.assert_close(together[b : b + 1], alone, rtol=0, atol=1e-12)
        mine = torch.autograd.grad(together[b].square().sum(), z, retain_graph=True)[0]
        theirs = torch.autograd.grad(alone.square().sum(), z)[0]
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
        assert float(mine[[i for i in range(3) if i != b]].abs().max()) == 0


@pytest.mark.parametrize("init", ["default", "xavier"])
def test_weights_depend_on_seed_and_index_alone(init):
    wide = build("small", stack_size=3, seed=5, indices=[7, 8, 9], init=init)
    alone = build("small", stack_size=1, seed=5, indices=[8], init=init)
    for mine, theirs in zip(wide.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine[1], theirs[0])
    other = build("small", stack_size=1, seed=6, indices=[8], init=init)
    assert not torch.equal(other.head.weight, alone.head.weight)
    assert not torch.equal(wide.head.weight[0], wide.head.weight[1])


@pytest.mark.parametrize("init", ["default", "xavier"])
def test_initial_weights_are_torchs_draws_layer_by_layer(init):
    stack = build("small", stack_size=2, seed=5, indices=[7, 8], init=init)
    for b, index in enumerate([7, 8]):
        generator = image_generator(seed=5, index=index, purpose="weights")
        for layer in stack.convolutions():
            outputs, inputs, kernel, _ = layer.weight[b].shape
            theirs = torch.nn.Conv2d(inputs, outputs, kernel)
            if init == "xavier":
                torch.nn.init.xavier_uniform_(theirs.weight, generator=generator)
                torch.nn.init.uniform_(theirs.bias, 0, 0, generator=generator)
            else:  # what Conv2d's own reset_parameters does, which takes no generator
                torch.nn.init.kaiming_uniform_(theirs.weight, a=5**0.5, generator=generator)
                bound = 1 / (inputs * kernel**2) ** 0.5
                torch.nn.init.uniform_(theirs.bias, -bound, bound, generator=generator)
            torch.testing.assert_close(layer.weight[b], theirs.weight, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(layer.bias[b], theirs.bias, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kernel", range(1, 8))
@pytest.mark.parametrize(("stride", "side"), [(1, 7), (2, 7), (2, 8)])
def test_every_kernel_keeps_or_halves_the_size(kernel, stride, side):
    assert sum(same_padding(kernel)) == kernel - 1
    layer = StackedConv2d(2, 3, 4, kernel=kernel, stride=stride)
    out = layer(torch.zeros(1, 6, side, side))
    assert out.shape == (1, 8, -(-side // stride), -(-side // stride))


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (1, 2), (0, 1)])
def test_the_deterministic_border_is_torchs(before, after, mode):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    made = bordered(bordered(x, before, after, mode=mode, dim=-1), before, after, mode=mode, dim=-2)
    wanted = torch.nn.functional.pad(x, (before, after, before, after), mode=mode)
    assert torch.equal(made, wanted)
    dy = torch.randn_like(wanted)
    torch.testing.assert_close(torch.autograd.grad(made, x, dy), torch.autograd.grad(wanted, x, dy))


@pytest.mark.parametrize(("height", "width"), [(4, 5), (1, 3), (2, 1)])
def test_the_deterministic_upsampling_is_torchs(height, width):
    x = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    made = doubled(doubled(x, dim=-1), dim=-2)
    wanted = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(made, wanted)
    dy = torch.randn_like(wanted)
    torch.testing.assert_close(torch.autograd.grad(made, x, dy), torch.autograd.grad(wanted, x, dy))


@pytest.mark.parametrize(("preset", "smallest"), [("small", 5), ("medium", 9), ("large", 17), ("imagenet", 33)])
def test_too_many_scales_for_an_image_are_refused(preset, smallest):
    # Two pixels at the deepest scale of `large` are too few for a reflection of two: there the border is repeated.
    net = build(preset, stack_size=1)
    net.spec.check_size(smallest, smallest)
    assert net(torch.rand(1, 4, smallest, smallest)).shape == (1, 3, smallest, smallest)
    with pytest.raises(ValueError, match=rf"`images` must be at least {smallest}x{smallest} .* got {smallest - 1}x40"):
        net.spec.check_size(smallest - 1, 40)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "huge"}, "`network` must be one of cifar10, imagenet, small, medium, large, got 'huge'"),
        ({"stack_size": 0}, "`stack_size` must be at least 1, got 0"),
        ({"init": "he"}, "`init` must be one of default, xavier, got 'he'"),
        ({"padding": "circular"}, "`padding` must be one of zeros, reflect, got 'circular'"),
        ({"indices": [1, 2, 3]}, "`indices` must hold stack_size=2 numbers, got 3"),
    ],
)
def test_bad_options_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**{"network": "small", "stack_size": 2, **arguments})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_u": (4,)}, "one entry a scale"),
        ({"n_d": 32}, "`n_d` must be a list of integers, one a scale, got 32"),
        ({"n_d": (0, 4)}, "`n_d` must be at least 1, got 0"),
        ({"n_u": (16.5, 4)}, "`n_u` must be an integer, got 16.5"),
        ({"k_s": (0, 1)}, "`k_s` must be at least 1, got 0"),
        ({"n_s": (-1, 0)}, "`n_s` must be at least 0, got -1"),
        ({"input_depth": 0}, "`input_depth` must be at least 1, got 0"),
        ({"z_scale": 0.0}, "`z_scale` must be above 0"),
        ({"z_scale": -1.0}, "`z_scale` must be finite and at least 0, got -1.0"),
        ({"upsample": "bicubic"}, "`upsample` must be one of bilinear, nearest, got 'bicubic'"),
    ],
)
def test_bad_specs_are_named(change, message):
    good = {"n_d": (4, 4), "n_u": (4, 4), "n_s": (2, 2), "k_d": (3, 3), "k_u": (3, 3), "k_s": (1, 1)}
    with pytest.raises((TypeError, ValueError), match=message):
        NetworkSpec(**{**good, **change})


def test_lists_and_tuples_make_one_spec() -> None:
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(ODD).items()}
    assert NetworkSpec(**lists) == ODD
    assert hash(NetworkSpec(**lists)) == hash(ODD)  # a store looks specs up
