"""Adaptive PGD and the unrolled attack: what they share, and what each is for."""

import pytest
import torch
import torch.nn.functional as F

from dipguard.attacks import Cost, build_attack
from dipguard.attacks.backward import BACKWARD, DEFAULT_FIT
from dipguard.attacks.best_found import BestFound
from dipguard.defenses import build_defense
from dipguard.fit.unrolled import unrolled_fit
from dipguard.networks.presets import hourglass

from .conftest import Median, NoDefense, Noise, Purifier, Shadowed, accuracy, adaptive, quick, scaled

NETWORK = hourglass((4, 8), skips=0, input_depth=1)
TINY = {"networks": (NETWORK,), "T": 9, "t0": 3, "every": 2, "lr": 0.05, "progress": False}
PAPER = {"network": "small", "T": 10, "t0": 2, "tau": 0.0, "decisions": 10, "lr": 0.05, "progress": False}
CLIMBERS = pytest.mark.parametrize("name", ["adaptive_pgd", "unrolled"])


def tiny(victim, name="mirror", **options):
    return build_defense(name, victim, **{**(TINY if name == "mirror" else PAPER), **options})


@pytest.mark.parametrize(
    ("name", "draws"), [("adaptive_pgd", "fixed"), ("adaptive_pgd", "fresh"), ("unrolled", "fixed")]
)
def test_it_repeats_exactly_and_no_batch_mate_matters(digits_cnn, digits, name, draws):
    part, indices = digits.select(0, 3), torch.tensor([9, 4, 2])
    images, victim = part.images.double(), digits_cnn.double()
    try:
        whole = quick(name, victim, Noise(), draws=draws)(images, part.labels, indices=indices)
        again = quick(name, victim, Noise(), draws=draws)(images, part.labels, indices=indices)
        parts = quick(name, victim, Noise(), draws=draws, batch_size=2)(images, part.labels, indices=indices)
    finally:
        victim.float()
    assert torch.equal(whole, again)
    assert torch.allclose(whole, parts, atol=1e-9)
    other = quick(name, digits_cnn, Noise(), draws=draws, seed=1)(part.images, part.labels, indices=indices)
    assert not torch.allclose(whole.float(), other)


def test_with_the_identity_it_is_bpda_with_every_iterate_evaluated(digits_cnn, digits):
    part = digits.select(0, 8)
    options = {"eps_255": 20, "steps": 4, "random_start": False, "draws": "fixed"}
    bpda = adaptive("bpda", digits_cnn, Median(), budgets=range(1, 5), **options)
    curve = bpda.snapshots(part.images, part.labels)
    attack = quick("adaptive_pgd", digits_cnn, Median(), **options)
    attacked = attack(part.images, part.labels)
    at = [part.images, *curve.values()]
    assert all(any(torch.equal(one, images[i]) for images in at) for i, one in enumerate(attacked))
    right = [accuracy(attack, images, part) for images in at]
    assert attack.last_history == pytest.approx(right[1:])
    assert attack.history == pytest.approx(best_of(attack, at, part))


def best_of(attack, iterates, part):
    withstood, history = torch.ones(len(part.labels), dtype=torch.bool), []
    for images in iterates:
        withstood &= ~attack.fooled(images, part.labels)
        history.append(float(withstood.float().mean()))
    return history[1:]


def test_the_backward_approximation_is_differentiated_at_the_given_image(digits_cnn, digits):
    part = digits.select(0, 3)
    x = part.images.clone().requires_grad_()
    at = Median().purify(part.images).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(digits_cnn(at), part.labels, reduction="sum"), at)
    (expected,) = torch.autograd.grad(BACKWARD["blur"](x, torch.arange(3), DEFAULT_FIT), x, gradient)
    options = {"steps": 1, "alpha_255": 8, "random_start": False, "backward": "blur"}
    attack = quick("adaptive_pgd", digits_cnn, Median(), **options)
    mine, _ = attack.gradient(part.images, part.labels, torch.arange(3), look=0)
    assert torch.allclose(mine, expected, rtol=1e-3, atol=1e-6 * float(expected.abs().max()))
    assert attack.settings["backward"] == "blur"


def test_the_unrolled_gradient_is_that_of_the_short_fits(digits_cnn, digits):
    networks = (NETWORK, hourglass((3,), skips=0, input_depth=1))
    part, guard = digits.select(0, 2), tiny(digits_cnn, networks=networks)
    x = part.images.clone().requires_grad_()
    views = torch.stack([unrolled_fit(x, T=3, fit=fit, indices=[5, 2], floor=1e-3) for fit in guard.dip_fits])
    true = digits_cnn(views.flatten(0, 1)).softmax(-1).view(2, 2, -1)[:, [0, 1], part.labels]
    (expected,) = torch.autograd.grad(-true.mean(0).log().sum(), x)
    attack = quick("unrolled", digits_cnn, guard, T=3)
    mine, answers = attack.gradient(part.images, part.labels, torch.tensor([5, 2]), look=0)
    assert answers is None
    assert torch.allclose(mine, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert attack.spent == Cost(0, 2 * 2 * 3, 4, 4)


@pytest.mark.parametrize(("evaluate_every", "evaluations"), [(1, 4), (2, 3), (9, 2)])
def test_the_unrolled_attack_is_evaluated_now_and_then(digits_cnn, digits, evaluate_every, evaluations):
    part, defense = digits.select(0, 2), Noise()
    attack = quick("unrolled", digits_cnn, defense, steps=3, evaluate_every=evaluate_every)
    attack(part.images, part.labels)
    assert len(defense.indices) == 2 * evaluations
    assert attack.spent == attack.estimate(2)
    assert len(attack.history) == 3


@pytest.mark.parametrize(
    ("name", "intermediate", "views"),
    [
        pytest.param("mirror", "stitched", 0, marks=pytest.mark.slow),
        pytest.param("mirror", "last", 1, marks=pytest.mark.slow),
        pytest.param("mirror", "mean", 1, marks=pytest.mark.slow),
        ("mirror", "class_scores", 8),
        pytest.param("paper", "last", 1, marks=pytest.mark.slow),
        ("paper", "on_boundary", 1),
    ],
)
def test_intermediates_are_attacked_at_the_price_of_one_purification(digits_cnn, digits, name, intermediate, views):
    part, guard = digits.select(0, 2), tiny(digits_cnn, name)
    attack = quick("adaptive_pgd", digits_cnn, guard, intermediate=intermediate, steps=1)
    attacked = attack(part.images, part.labels)
    steps = guard.steps_per_image
    assert attack.spent == attack.estimate(2) == Cost(4, 4 * steps, 4 + 2 * views, 2 * max(views, 1))
    assert attack.history[-1] == pytest.approx(accuracy(attack, attacked, part))
    made = guard.intermediates(part.images)[intermediate]
    at, given = made.views.clone().requires_grad_(), part.images.clone().requires_grad_()
    if made.scores is None:
        logits = digits_cnn(at.flatten(0, 1)).unflatten(0, (len(at), 2))
    else:
        logits = made.scores(at, given)[None]
    true = logits.softmax(-1)[:, [0, 1], part.labels]
    loss = -true.mean(0).log().sum()
    by_view, *by_given = torch.autograd.grad(loss, [at, given] if made.scores else [at])
    mine, _ = attack.gradient(part.images, part.labels, torch.arange(2), look=0)
    expected = by_view.sum(0) + sum(by_given)
    assert torch.allclose(mine, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert expected.flatten(1).any(dim=1).all()


@CLIMBERS
def test_eot_looks_as_often_as_it_says(digits_cnn, digits, name):
    part, defense = digits.select(0, 2), Noise()
    attack = quick(name, digits_cnn, defense, eot_iter=3, steps=1, draws="fresh")
    attack(part.images, part.labels)
    assert len(set(defense.indices)) == len(defense.indices) == 2 * 3 * 2
    assert attack.spent == attack.estimate(2)


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_scores_of_a_victim_that_is_too_sure_have_a_gradient(digits_cnn, digits, loss):
    part, guard = digits.select(0, 4), tiny(scaled(digits_cnn))
    attack = quick("adaptive_pgd", scaled(digits_cnn), guard, loss=loss, intermediate="class_scores", steps=1)
    gradient, _ = attack.gradient(part.images, part.labels, torch.arange(4), look=0)
    assert gradient.isfinite().all()
    assert gradient.flatten(1).any(dim=1).all()


@CLIMBERS
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_a_victim_that_is_too_sure_has_a_gradient(digits_cnn, digits, name, loss):
    part = digits.select(0, 4 if name == "adaptive_pgd" else 2)
    attack = quick(name, scaled(digits_cnn), NoDefense(), loss=loss, eps_255=16, alpha_255=8)
    attack(part.images, part.labels)
    assert attack.flat == 0
    if name == "adaptive_pgd":
        assert attack.history[-1] == 0


def test_a_flat_victim_is_counted(digits_cnn, digits):
    part = digits.select(0, 4)
    black = Purifier(lambda images: torch.where(images.mean(dim=(1, 2, 3), keepdim=True) > 0, 0.0, images))
    attack = quick("adaptive_pgd", Shadowed(digits_cnn, 0.5), black)
    attack(part.images, part.labels)
    assert attack.flat == 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adaptive_pgd", {"alpha_255": 8, "backward": "blur"}),
        ("adaptive_pgd", {"alpha_255": 8, "backward": "blur", "draws": "fresh", "eot_iter": 2}),
        ("adaptive_pgd", {"alpha_255": 8, "backward": "blur", "loss": "margin"}),
        ("defended_autoattack", {}),
    ],
)
def test_it_breaks_jpeg_where_noise_does_not(digits_cnn, digits, name, options):
    part, jpeg = digits.select(0, 16), build_defense("jpeg", digits_cnn)
    attack = adaptive(name, digits_cnn, jpeg, eps_255=30, steps=8, **options)
    noisy = build_attack("noise", digits_cnn, eps_255=30)(part.images, part.labels)
    assert accuracy(attack, attack(part.images, part.labels), part) <= accuracy(attack, noisy, part) - 0.25


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adaptive_pgd", {"backward": "blur", "intermediate": "class_scores"}),
        ("adaptive_pgd", {"backward": "short_dip"}),
        ("unrolled", {"T": 20, "evaluate_every": 1}),
    ],
)
def test_it_breaks_a_deep_image_prior_where_noise_does_not(digits_cnn, digits, name, options):
    # A dead zone as wide as this noise leaves nothing of a digit to fit, and then no attack is needed.
    part, guard = digits.select(0, 8), tiny(digits_cnn, T=40, t0=20, every=5, dead_zone=0.0, mirror=False)
    attack = quick(name, digits_cnn, guard, eps_255=60, alpha_255=20, steps=6, **options)
    noisy = build_attack("noise", digits_cnn, eps_255=60)(part.images, part.labels)
    assert accuracy(attack, attack(part.images, part.labels), part) <= accuracy(attack, noisy, part) - 0.25


@pytest.mark.parametrize(("coarse", "grid"), [(4, 8), (5, 7), (32, 1)])
def test_a_coarse_perturbation_is_a_coarse_grid_enlarged(digits_cnn, digits, coarse, grid):
    part = digits.select(0, 3)
    images = part.images * 0.5 + 0.25  # far from 0 and 1: nothing is clipped
    attack = quick("adaptive_pgd", digits_cnn, Median(), coarse=coarse, eps_255=20, alpha_255=6)
    change = attack(images, part.labels) - images
    assert 0 < float(change.abs().max()) <= 20 / 255 + 1e-6
    # Least squares on the enlarged basis vectors leaves nothing.
    basis = F.interpolate(torch.eye(grid**2).view(-1, 1, grid, grid), size=(32, 32), mode="bilinear").flatten(1)
    values = change.flatten(2).double().flatten(0, 1).T
    found = torch.linalg.lstsq(basis.double().T, values).solution
    assert torch.allclose(basis.double().T @ found, values, atol=1e-5)
    assert float(found.abs().max()) <= 20 / 255 + 1e-5
    assert attack.settings["coarse"] == coarse


def test_a_coarse_step_is_the_sign_of_the_gradient_by_the_grid(digits_cnn, digits):
    part = digits.select(0, 2)
    images = part.images * 0.5 + 0.25
    grid = torch.zeros(2, 3, 8, 8, requires_grad=True)
    enlarged = images + F.interpolate(grid, size=(32, 32), mode="bilinear", align_corners=False)
    true = digits_cnn(enlarged).softmax(-1)[[0, 1], part.labels]
    (by_grid,) = torch.autograd.grad(-true.log().sum(), grid)
    expected = images + F.interpolate(8 / 255 * by_grid.sign(), size=(32, 32), mode="bilinear", align_corners=False)
    options = {"steps": 1, "alpha_255": 8, "eps_255": 16, "random_start": False, "coarse": 4}
    attack = quick("adaptive_pgd", digits_cnn, NoDefense(), **options)
    found = BestFound(images, part.labels, keep=4)
    attack.search(found, torch.arange(2))
    assert min(float((one - expected).abs().max()) for one in found.top) < 1e-6


def test_coarse_perturbations_break_what_smooths(digits_cnn, digits):
    part = digits.select(0, 16)
    attack = quick("adaptive_pgd", digits_cnn, Median(), coarse=2, eps_255=60, alpha_255=20, steps=5)
    assert accuracy(attack, attack(part.images, part.labels), part) <= 0.25
