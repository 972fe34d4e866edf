"""BPDA, AutoAttack's version for random victims, and Square, on a defended victim."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import torchattacks

from dipguard.attacks import Cost, Snapshot, build_attack
from dipguard.attacks.defended_torchattacks import apart_by
from dipguard.attacks.libraries import VictimView

from .conftest import Changed, Enlarge, Median, NoDefense, Noise, accuracy, adaptive, any_size, quick


def bpda(victim, defense, **options):
    return adaptive("bpda", victim, defense, **options)


def test_with_no_defence_it_is_pgd(digits_cnn, digits):
    part, exact = digits.select(0, 8), copy.deepcopy(digits_cnn).double()  # in float32 rounding turns small gradients
    ours = bpda(exact, NoDefense(), steps=10, random_start=False)(part.images, part.labels)
    theirs = torchattacks.PGD(VictimView(exact), random_start=False)(part.images, part.labels)
    assert torch.equal(ours, theirs)


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


@pytest.mark.parametrize("defense", [Median, Noise])
def test_one_run_gives_the_images_at_every_budget(digits_cnn, digits, defense):
    part = digits.select(0, 4)
    whole = bpda(digits_cnn, defense(), steps=4, budgets=(4, 1, 2))
    made = whole.snapshots(part.images, part.labels)
    assert list(made) == [Snapshot(8, 1), Snapshot(8, 2), Snapshot(8, 4)]
    assert whole.spent == whole.estimate(4) == Cost(16, whole.spent.dip_steps, 16, 16)
    for (_, number), images in made.items():
        alone = bpda(digits_cnn, defense(), steps=number)
        assert torch.equal(alone(part.images, part.labels), images)
    assert torch.equal(whole(part.images, part.labels), made[8, 4])


def test_figure_4s_iterations_are_the_default_and_eps_is_kept(digits_cnn, digits):
    part = digits.select(0, 4)
    made = bpda(digits_cnn, Median(), eps_255=2, budgets=range(1, 16)).snapshots(part.images, part.labels)
    assert [budget for _, budget in made] == list(range(1, 16))
    assert max(float((images - part.images).abs().max()) for images in made.values()) <= 2 / 255 + 1e-6
    assert not torch.equal(made[2, 14], made[2, 15])


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
    attack = bpda(digits_cnn, Median(), steps=2, budgets=(1, 2), batch_size=2)
    whole = attack.snapshots(part.images, part.labels)
    first = attack.snapshots(part.images[:2], part.labels[:2])
    assert all(torch.equal(whole[limit][:2], first[limit]) for limit in [(8, 1), (8, 2)])


@pytest.mark.slow
def test_bpda_fools_what_a_plain_attack_does_not(real_victim):
    """The reason for adaptive attacks: a real victim behind a median filter, eps 8, and each attack's own best."""
    victim, data = real_victim
    attack = bpda(victim, Median(), budgets=(1, 5, 15))
    plain = build_attack("pgd", victim)(data.images, data.labels)
    assert accuracy(attack, plain, data) >= 2 / len(data)
    made = attack.snapshots(data.images, data.labels).values()
    counts = [len(data) * accuracy(attack, images, data) for images in made]
    assert counts[-1] == 0
    assert all(later <= earlier + 1 for earlier, later in pairwise(counts))


def test_apgd_and_square_are_the_librarys(digits_cnn, digits):
    part = digits.select(0, 8)
    theirs = torchattacks.APGD(digits_cnn, eps=8 / 255, steps=3)(part.images, part.labels)
    ours = quick("defended_autoattack", digits_cnn, NoDefense(), steps=3)(part.images, part.labels)
    left = [digits_cnn(images).argmax(1) == part.labels for images in (theirs, ours)]
    assert int(left[1].sum()) <= int(left[0].sum())
    attack = quick("defended_square", digits_cnn, NoDefense(), n_queries=60, eps_255=60)
    theirs = torchattacks.Square(digits_cnn, eps=60 / 255, n_queries=59)(part.images, part.labels)
    right = float((digits_cnn(theirs).argmax(1) == part.labels).float().mean())
    assert accuracy(attack, attack(part.images, part.labels), part) == pytest.approx(right, abs=0.25)
    assert attack.history[0] > attack.history[-1]


def test_the_second_loss_is_for_what_the_first_left(digits_cnn, digits):
    part = digits.select(0, 8)
    attack = quick("defended_autoattack", digits_cnn, Median(), steps=2, eps_255=8)
    attack(part.images, part.labels)
    left = round(attack.history[1] * 8)
    assert attack.spent.purifications == 3 * (8 + left)
    assert attack.spent.gradients == attack.spent.purifications
    assert attack.spent.purifications <= attack.estimate(8).purifications


def test_square_asks_no_more_than_it_may_and_differentiates_nothing(digits_cnn, digits):
    part = digits.select(0, 6)
    attack = quick("defended_square", digits_cnn, Median(), eps_255=1, n_queries=15)
    attack(part.images, part.labels)
    right = accuracy(attack, part.images, part)
    assert attack.spent.purifications <= attack.estimate(6).purifications == 6 * 15
    assert attack.spent.purifications >= right * 6 * 15
    assert attack.spent.gradients == 0


def test_eot_takes_draws_together(digits_cnn, digits):
    part, defense = digits.select(0, 2), Noise()
    attack = quick("defended_autoattack", digits_cnn, defense, steps=2, eot_iter=4, eps_255=1, draws="fresh")
    attack(part.images, part.labels)
    assert len(set(defense.indices)) == len(defense.indices) == attack.spent.purifications
    assert attack.spent.purifications % 4 == 0
    assert len(attack.history) == attack.spent.purifications // 4 // 2 - 1 or attack.history[-1] < 1


@pytest.mark.parametrize("eps_255", [8, 200])
def test_images_that_are_alike_keep_their_draws(digits_cnn, digits, eps_255):
    """Three copies of one image: only their indices tell them apart, and the search does not give those away."""
    images, labels = digits.images[:1].repeat(3, 1, 1, 1), digits.labels[:1].repeat(3)
    indices = torch.tensor([4, 9, 2])
    attack = quick("defended_square", digits_cnn, Noise(), draws="fixed", eps_255=eps_255, n_queries=15)
    attacked = attack(images, labels, indices=indices)
    wrong = attack.fooled(attacked, labels, indices=indices)
    assert attack.history[-1] == pytest.approx(1 - float(wrong.float().mean()))


def test_the_images_of_a_group_are_apart(digits):
    images = torch.cat([digits.images[:4], digits.images[:2] * 0.99])
    groups = apart_by(0.1, images)
    assert sorted(torch.cat(groups).tolist()) == list(range(6))
    assert len(groups) == 2
    for group in groups:
        distances = torch.pdist(images[group].flatten(1), p=torch.inf)
        assert distances.min() > 0.1


def test_too_few_classes_are_refused(digits_cnn, digits):
    two = Changed(digits_cnn, lambda logits: logits[:, :2])
    with pytest.raises(ValueError, match="`victim` must have at least 3 classes for 'defended_autoattack', got 2"):
        quick("defended_autoattack", two)(digits.images[:1], torch.tensor([0]))
