from functools import partial

import pytest
import torch

from dipguard.fit import FitOptions, unrolled_fit
from dipguard.fit.replay import fit_samples
from dipguard.networks.presets import hourglass

OWN = {"padding": "zeros", "jitter": 0.0, "optimise_z": True, "seed": 2}
SMALL = hourglass((3, 4), skips=0, input_depth=1)
FITS = pytest.mark.parametrize(
    "fit",
    [
        FitOptions(network=SMALL, dtype="float64", **OWN),
        FitOptions(network="small", dtype="float64", seed=1, lr=0.02),
        FitOptions(network="small", dtype="float64", z="gaussian", z_scale=0.5, init="xavier", jitter=0.1),
        FitOptions(network=SMALL, dtype="float64", jitter=0.05, optimise_z=True),
        FitOptions(network=SMALL, dtype="float64", dead_zone=2.0),
    ],
    ids=["dipguard", "paper", "other readings", "jittered z", "dead zone"],
)


def ordinary(images, *, T, fit, indices):
    made, _ = fit_samples(images, steps=[T - 1], T=T, indices=indices, fit=fit, device=torch.device("cpu"))
    return torch.stack([samples.images for samples in made], dim=1)


@FITS
def test_its_values_are_the_ordinary_fits(images, fit):
    given, indices = images[:3].double(), [7, 0, 2**35]
    for T in (1, 2, 6):
        mine = unrolled_fit(given.clone().requires_grad_(), T=T, fit=fit, indices=indices)
        assert torch.allclose(mine, ordinary(given, T=T, fit=fit, indices=indices)[0], atol=1e-9)


@FITS
def test_its_gradient_is_the_ordinary_fits_finite_difference(images, fit):
    given, T = images[:2].double().clamp(0.01, 0.99), 4
    generator = torch.Generator().manual_seed(3)
    weights, direction = (torch.randn(given.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x = given.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((unrolled_fit(x, T=T, fit=fit) * weights).sum(), x)
    h = 1e-9
    above, below = (ordinary(given + s * h * direction, T=T, fit=fit, indices=[0, 1])[0] for s in (1, -1))
    expected = float(((above - below) * weights).sum() / (2 * h))
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-3)
    assert abs(expected) > 0.1


def test_no_image_depends_on_its_batch_mates(images):
    fit, indices = FitOptions(network=SMALL, dtype="float64", **OWN), [5, 1, 8]
    x = images[:3].double().requires_grad_()
    together = unrolled_fit(x, T=6, fit=fit, indices=indices)
    (gradient,) = torch.autograd.grad(together.square().sum(), x)
    for i in range(3):
        one = images[i : i + 1].double().requires_grad_()
        alone = unrolled_fit(one, T=6, fit=fit, indices=indices[i : i + 1])
        assert torch.allclose(together[i], alone[0], atol=1e-9)
        assert torch.allclose(gradient[i], torch.autograd.grad(alone.square().sum(), one)[0][0], rtol=1e-5, atol=1e-7)
    first = unrolled_fit(x, T=4, fit=fit, indices=indices)[0]
    assert not torch.autograd.grad(first.sum(), x)[0][1:].any()


def test_a_floor_changes_the_gradient_alone(images):
    fit = FitOptions(network=SMALL, **OWN)
    x = images[:1].clone().requires_grad_()
    exact, floored, high = (unrolled_fit(x, T=8, fit=fit, floor=floor) for floor in (0.0, 1e-3, 1e9))
    assert torch.equal(exact, floored)
    assert torch.equal(exact, high)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (exact, floored)]
    assert gradients[0].isfinite().all()
    assert not torch.equal(*gradients)
    assert float(gradients[1].norm()) > 0
    assert not torch.autograd.grad(high.square().sum(), x)[0].any()  # then nothing moves with the image


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_flat_image_gives_finite_gradients(value):
    x = torch.full((1, 3, 32, 32), value, requires_grad=True)
    made = unrolled_fit(x, T=6, fit=FitOptions(network=SMALL, init="xavier", **OWN))
    assert torch.autograd.grad(made.square().sum(), x)[0].isfinite().all()


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, partial(torch.autocast, "cpu", dtype=torch.bfloat16)]
)
def test_modes_and_the_random_state(images, mode):
    fit = FitOptions(network="small")
    expected = unrolled_fit(images[:1].clone().requires_grad_(), T=4, fit=fit)
    assert expected.requires_grad
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with mode():
        made = unrolled_fit(images[:1].clone(), T=4, fit=fit)
    assert torch.equal(torch.get_rng_state(), state)
    assert (made.dtype, made.requires_grad) == (torch.float32, False)
    assert torch.equal(made, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.full((1, 3, 32, 32), 2.0)}, ValueError, "`images`"),
        ({"images": torch.rand(1, 3, 4, 4)}, ValueError, "at least 5x5 pixels"),
        ({"T": 0}, ValueError, "`T` must be at least 1"),
        ({"T": 2.5}, TypeError, "`T`"),
        ({"floor": -1.0}, ValueError, "`floor`"),
        ({"indices": [0, 1]}, ValueError, "`indices` must hold one index per image \\(1\\), got 2"),
    ],
)
def test_bad_input_is_refused(images, change, error, message):
    given = {"images": images[:1], "T": 3, "fit": FitOptions(network="small"), **change}
    with pytest.raises(error, match=message):
        unrolled_fit(given.pop("images"), **given)
