import foolbox
import pytest
import torch

from dipguard.attacks import build_attack

from .conftest import Scaled, right


def test_defaults_and_results_are_the_librarys(digits_cnn, digits):
    part = digits.select(0, 4)
    attack = build_attack("ddn", digits_cnn)
    assert attack.settings.items() >= {"init_epsilon": 1.0, "steps": 100, "gamma": 0.05}.items()
    model = foolbox.PyTorchModel(digits_cnn, bounds=(0, 1), device="cpu")
    theirs = foolbox.attacks.DDNAttack()(model, part.images, part.labels, epsilons=None)[1]
    ours = attack(part.images, part.labels)
    assert torch.equal(ours, theirs.clamp(0, 1))
    assert right(digits_cnn, ours, part.labels) == 0


def test_images_that_it_cannot_fool_come_back_clean_and_are_counted(digits_cnn, digits):
    part = digits.select(0, 8)
    attack = build_attack("ddn", digits_cnn, steps=2, init_epsilon=0.01)  # too short a way
    attacked = attack(part.images, part.labels)
    report = attack.report(part.images, attacked, part.labels)
    assert report.not_fooled >= 4
    assert torch.equal(attacked[~report.fooled], part.images[~report.fooled])


def test_its_change_is_smaller_than_pgds(digits_cnn, digits):
    part = digits.select(0, 8)
    norms = {}
    for name in ("pgd", "ddn"):
        attack = build_attack(name, digits_cnn)
        norms[name] = attack.report(part.images, attack(part.images, part.labels), part.labels).l2
    assert (norms["ddn"] < norms["pgd"]).all()


def test_a_victim_that_is_too_sure_is_fooled_by_a_change_of_the_same_size(digits_cnn, digits):
    part = digits.select(0, 4)
    changes = {}
    for victim in (digits_cnn, Scaled(digits_cnn)):
        attack = build_attack("ddn", victim, steps=40)
        report = attack.report(part.images, attack(part.images, part.labels), part.labels)
        assert report.not_fooled == 0
        changes[type(victim)] = float(report.l2.mean())
    assert changes[Scaled] == pytest.approx(changes[type(digits_cnn)], rel=0.2)


def test_batch_mates_do_not_matter(digits_cnn, digits):
    part = digits.select(0, 4)
    victim, images = digits_cnn.double(), part.images.double()
    try:
        attack = build_attack("ddn", victim, steps=30)
        assert torch.allclose(attack(images, part.labels)[2:3], attack(images[2:3], part.labels[2:3]), atol=1e-9)
    finally:
        digits_cnn.float()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps_255": 8}, TypeError, "'ddn' takes no option 'eps_255'.*init_epsilon, steps, gamma"),
        ({"init_epsilon": 0}, ValueError, "`init_epsilon` must be above 0"),
        ({"gamma": 0}, ValueError, "`gamma` must be above 0 and below 1"),
        ({"gamma": 1}, ValueError, "`gamma` must be above 0 and below 1"),
        ({"gamma": "0.05"}, TypeError, "`gamma`"),
        ({"steps": 0}, ValueError, "`steps`"),
    ],
)
def test_bad_options_are_refused(digits_cnn, options, error, message):
    with pytest.raises(error, match=message):
        build_attack("ddn", digits_cnn, **options)


@pytest.mark.slow
def test_on_the_deepest_real_victim(deepest):
    victim, data = deepest[0], deepest[1].select(0, 16)
    assert right(victim, build_attack("ddn", victim)(data.images, data.labels), data.labels) == 0
