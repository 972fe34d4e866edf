import pytest
import torch
import torch.nn.functional as F
import torchattacks

from dipguard.attacks import Cost, build_defense_aware_attack

from .conftest import Enlarge, Median, NoDefense, Noise, any_size


def bpda(victim, defense, **options):
    return build_defense_aware_attack("bpda", victim, defense, **options)


def test_with_no_defence_it_is_pgd(digits_cnn, digits):
    part = digits.select(0, 8)
    ours = bpda(digits_cnn, NoDefense(), steps=10, random_start=False)(part.images, part.labels)
    assert torch.equal(ours, torchattacks.PGD(digits_cnn, random_start=False)(part.images, part.labels))


def test_a_step_is_the_definition(digits_cnn, digits):
    """x + alpha sign(dL/dx at g(x)), projected: written down from Section 4.3.1."""
    part = digits.select(0, 8)
    x = part.images.clone()
    for _ in range(2):
        purified = Median().purify(x).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(digits_cnn(purified), part.labels), purified)
        x = (part.images + (x + 3 / 255 * gradient.sign() - part.images).clamp(-4 / 255, 4 / 255)).clamp(0, 1)
    attack = bpda(digits_cnn, Median(), eps_255=4, alpha_255=3, steps=2, random_start=False)
    assert torch.allclose(attack(part.images, part.labels), x, atol=1e-7)


@pytest.mark.parametrize(("defense", "eot_iter"), [(Median, 1), (Noise, 1), (Noise, 3)])
def test_one_run_gives_the_whole_curve(digits_cnn, digits, defense, eot_iter):
    part = digits.select(0, 4)
    whole = bpda(digits_cnn, defense(), eot_iter=eot_iter)
    curve = whole.curve(part.images, part.labels, iterations=(4, 1, 2))
    assert list(curve) == [1, 2, 4]
    assert (
        whole.spent
        == whole.estimate(4, iterations=4)
        == Cost(4 * 4 * eot_iter * 1, whole.spent.dip_steps, *(16 * eot_iter,) * 2)
    )
    for number, images in curve.items():
        alone = bpda(digits_cnn, defense(), eot_iter=eot_iter, steps=number)
        assert torch.equal(alone(part.images, part.labels), images)


def test_figure_4s_iterations_are_the_default_and_the_budget_is_kept(digits_cnn, digits):
    part = digits.select(0, 4)
    curve = bpda(digits_cnn, Median(), eps_255=2).curve(part.images, part.labels)
    assert list(curve) == list(range(1, 16))
    assert max(float((images - part.images).abs().max()) for images in curve.values()) <= 2 / 255 + 1e-6
    assert not torch.equal(curve[14], curve[15])


def test_eot_averages_over_draws(digits_cnn, digits):
    part = digits.select(0, 4)
    one, several = (bpda(digits_cnn, Noise(), steps=1, eot_iter=n, random_start=False) for n in (1, 8))
    assert not torch.equal(one(part.images, part.labels), several(part.images, part.labels))


def test_the_gradient_of_an_enlarged_image_comes_back_to_its_pixels(digits_cnn, digits):
    part, victim = digits.select(0, 4), any_size(digits_cnn)
    x = part.images.clone().requires_grad_()
    large = F.interpolate(x, size=(64, 64), mode="bilinear", align_corners=False)
    at = Enlarge().purify(part.images).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(victim(at), part.labels), at)
    (expected,) = torch.autograd.grad(large, x, gradient)
    attack = bpda(victim, Enlarge(), alpha_255=8, steps=1, random_start=False)
    attacked = attack(part.images, part.labels)
    assert torch.allclose(attacked, (part.images + 8 / 255 * expected.sign()).clamp(0, 1), atol=1e-7)


def test_batches_are_attacked_one_after_the_other(digits_cnn, digits):
    part = digits.select(0, 5)
    attack = bpda(digits_cnn, Median(), steps=2, batch_size=2)
    whole = attack.curve(part.images, part.labels, iterations=(1, 2))
    first = attack.curve(part.images[:2], part.labels[:2], iterations=(1, 2))
    assert all(torch.equal(whole[number][:2], first[number]) for number in (1, 2))


@pytest.mark.parametrize(
    ("iterations", "error", "message"),
    [((), ValueError, "at least one"), ((0, 1), ValueError, "`iterations`"), ((1.5,), TypeError, "`iterations`")],
)
def test_bad_iterations_are_refused(digits_cnn, digits, iterations, error, message):
    with pytest.raises(error, match=message):
        bpda(digits_cnn, Median()).curve(digits.images[:1], digits.labels[:1], iterations=iterations)
