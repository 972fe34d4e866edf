"""Algorithm 1, lines 1-8: the stacked fit against the plain loop, one image at a time."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.plain_loop import PlainSkipNet, plain_fit
from dipguard.decision.quality import image_noise
from dipguard.engines.kernel_choice import use_kernels
from dipguard.fit import FitOptions, StackedDIP
from dipguard.networks import PRESETS
from dipguard.networks.presets import hourglass
from dipguard.networks.unet import grouped_conv2d
from dipguard.seeding import image_generator
from tests.fit.conftest import NATIVE, WORKING, Watch, trainer

UNSKIPPED = hourglass((4, 8, 16), skips=0, input_depth=1)
NEAREST = replace(PRESETS["small"], upsample="nearest")


def fit(images: Tensor, indices: list[int], steps: int, **options: Any) -> tuple[Tensor, StackedDIP]:
    """x(0) ... x(steps - 1) of every image, [steps, B, 3, H, W]."""
    watch = Watch()
    module = StackedDIP(images, indices=indices, options=FitOptions(**{"dtype": "float64", **options}))
    trainer(steps, watch).fit(module)
    return torch.stack(watch.seen), module


def plainly(images: Tensor, indices: list[int], steps: int, **options: Any) -> Tensor:
    """The same by the plain loop, one image after the other."""
    how, traces = FitOptions(dtype="float64", **options), []
    fresh = StackedDIP(images, indices=indices, options=how)
    for b, index in enumerate(indices):
        net = PlainSkipNet(fresh.net.spec, padding=how.padding).double()
        net.copy_from(fresh.net, b)
        z = fresh.z.detach()[b : b + 1]
        stream = image_generator(seed=how.seed, index=index, purpose="jitter")
        noise = [torch.empty(z.shape).normal_(generator=stream).double() * how.jitter for _ in range(steps)]
        tolerance = 0.0 if fresh.tolerance is None else float(fresh.tolerance[b])
        more = {"noise": noise, "optimise_z": how.optimise_z, "tolerance": tolerance}
        traces.append(torch.stack(plain_fit(net, images[b : b + 1].double(), z, steps=steps, **more)))
    return torch.cat(traces, dim=1)


def test_options_reach_the_networks_and_their_input(images: Tensor) -> None:
    def made(**options: Any) -> StackedDIP:
        return StackedDIP(images[:1], options=FitOptions(network="small", **options))

    assert 0.03 < float(made().z.max()) <= 1 / 30
    assert 0.4 < float(made(z_scale=0.5).z.max()) <= 0.5
    assert float(made(z="gaussian").z.min()) < 0
    assert made().net.head.bias.any()
    assert not made(init="xavier").net.head.bias.any()


@pytest.mark.parametrize("engine", WORKING)
@pytest.mark.parametrize(
    ("network", "padding", "jitter", "steps"),
    [
        ("small", "reflect", 1 / 30, 12),
        ("medium", "zeros", 0.0, 8),
        pytest.param("medium", "reflect", 0.0, 20, marks=pytest.mark.slow),
        pytest.param("medium", "reflect", 1 / 30, 20, marks=pytest.mark.slow),
        pytest.param("large", "zeros", 0.0, 6, marks=pytest.mark.slow),
        pytest.param("large", "reflect", 1 / 30, 6, marks=pytest.mark.slow),
    ],
)
def test_a_stack_equals_the_plain_loop(images, network, padding, jitter, steps, engine) -> None:
    options = {"network": network, "padding": padding, "jitter": jitter, "seed": 3, "engine": engine}
    seen, _ = fit(images[:2], [5, 2], steps, **options)
    plain = plainly(images[:2], [5, 2], steps, **options)
    # A stack rounds its sums in another order than torch.nn's layers do, and Adam amplifies that; with reflected
    # borders, where more gradients are zero but for rounding, by more.
    torch.testing.assert_close(seen[0], plain[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(seen, plain, rtol=0, atol=1e-10 if padding == "zeros" else 1e-6)
    assert float((seen[-1] - seen[0]).abs().mean()) > 0.01


@pytest.mark.parametrize("engine", WORKING)
def test_a_stack_with_dead_zones_equals_the_plain_loop(images: Tensor, engine: str) -> None:
    options: dict[str, Any] = {"network": "small", "padding": "zeros", "dead_zone": 3.0, "engine": engine}
    seen, module = fit(images[:2], [5, 2], 12, **options)
    without, _ = fit(images[:2], [5, 2], 12, **{**options, "dead_zone": 0.0})
    torch.testing.assert_close(module.tolerance, 3 * image_noise(images[:2]))
    assert float((seen[-1] - without[-1]).abs().mean()) > 1e-4
    torch.testing.assert_close(seen, plainly(images[:2], [5, 2], 12, **options), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("network", "padding", "jitter", "engine"),
    [
        pytest.param("medium", "zeros", 0.0, "torch", marks=pytest.mark.slow),
        pytest.param("medium", "zeros", 0.0, "native", marks=[NATIVE, pytest.mark.slow]),
        pytest.param("medium", "reflect", 1 / 30, "torch", marks=pytest.mark.slow),
        pytest.param("medium", "reflect", 1 / 30, "native", marks=[NATIVE, pytest.mark.slow]),
        (UNSKIPPED, "zeros", 1 / 30, "torch"),
        pytest.param(UNSKIPPED, "zeros", 1 / 30, "native", marks=NATIVE),
        (NEAREST, "reflect", 0.0, "auto"),  # torch is the only engine for it
    ],
    ids=str,
)
def test_a_stack_that_fits_z_too_equals_the_plain_loop(images, network, padding, jitter, engine) -> None:
    options = {"network": network, "padding": padding, "engine": engine, "optimise_z": True, "jitter": jitter}
    seen, module = fit(images[:2], [5, 2], 15, **options)
    fixed, its_module = fit(images[:2], [5, 2], 15, **{**options, "optimise_z": False})
    # z moves by about a learning rate a step, and x(t) with it from x(1) on.
    assert 0.01 < float((module.z - its_module.z).detach().abs().max()) < 0.2
    assert torch.equal(seen[0], fixed[0])
    assert float((seen[-1] - fixed[-1]).abs().mean()) > 1e-4
    plain = plainly(images[:2], [5, 2], 15, **options)
    torch.testing.assert_close(seen, plain, rtol=0, atol=1e-9 if padding == "zeros" else 1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"engine": "torch", "network": "small", "optimise_z": True},
        pytest.param({"engine": "native", "jitter": 1 / 30, "optimise_z": True}, marks=NATIVE),
        pytest.param({"engine": "torch"}, marks=pytest.mark.slow),
        pytest.param({"z": "gaussian", "init": "xavier", "padding": "reflect"}, marks=pytest.mark.slow),
        pytest.param({"network": "large"}, marks=pytest.mark.slow),
        pytest.param({"engine": "native"}, marks=[NATIVE, pytest.mark.slow]),
    ],
)
def test_an_image_does_not_depend_on_its_neighbours(images: Tensor, options: dict) -> None:
    together, _ = fit(images[:3], [0, 1, 2], 8, **options)
    alone, _ = fit(images[2:3], [2], 8, **options)
    others, _ = fit(images[[6, 2]], [40, 2], 8, **options)
    torch.testing.assert_close(together[:, 2], alone[:, 0], rtol=0, atol=1e-10)
    torch.testing.assert_close(others[:, 1], alone[:, 0], rtol=0, atol=1e-10)


def test_seed_and_index_change_the_fit_and_repeat_it(images: Tensor) -> None:
    first, _ = fit(images[:1], [0], 2)
    assert torch.equal(first, fit(images[:1], [0], 2)[0])
    assert not torch.allclose(first, fit(images[:1], [1], 2)[0])
    assert not torch.allclose(first, fit(images[:1], [0], 2, seed=1)[0])


def test_a_module_can_be_fitted_twice_with_the_same_jitter(images: Tensor) -> None:
    module = StackedDIP(images[:1], options=FitOptions())
    for _ in range(2):
        module.on_fit_start()
        first = module.training_step(0, 0)["reconstructions"]
        module.on_fit_start()
        assert torch.equal(first, module.training_step(0, 0)["reconstructions"])


def test_float32_follows_float64_at_first(images: Tensor) -> None:
    # With noise on z: without it, the first steps are steeper.
    noisy = {"jitter": 1 / 30, "padding": "reflect"}
    double, _ = fit(images[:2], [0, 1], 3, **noisy)
    single = fit(images[:2], [0, 1], 3, dtype="float32", **noisy)[0].double()
    torch.testing.assert_close(single[0], double[0], rtol=0, atol=1e-5)
    # Adam's first steps turn rounding into sign changes: later images agree on average only.
    assert float((single[2] - double[2]).abs().mean()) < 1e-3


def test_an_image_too_small_for_the_network_is_refused() -> None:
    with pytest.raises(ValueError, match="`images` must be at least 9x9 pixels for a network of 3 scales"):
        StackedDIP(torch.rand(1, 3, 8, 32))


def test_indices_must_match_the_images(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"`indices` must hold one index per image \(2\), got 3"):
        StackedDIP(images[:2], indices=[1, 2, 3])
    assert StackedDIP(images[:2], indices=torch.tensor([5, 2])).indices == (5, 2)
    for bad in ([0, -1], [0, 1.0], [True, False], torch.tensor([[0, 1]])):
        with pytest.raises((TypeError, ValueError), match="`indices` must be"):
            StackedDIP(images[:2], indices=bad)


def test_after_a_fit_the_networks_run_on_every_device(images: Tensor) -> None:
    module = StackedDIP(images[:1], options=FitOptions(network="small", engine="torch"))
    use_kernels(module.net, {"head": "matmul"})
    trainer(2, Watch()).fit(module)
    assert module.net.head.compute is grouped_conv2d
