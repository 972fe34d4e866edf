import pytest
import torch
import torchattacks

from dipguard.attacks import build_attack

from .conftest import Scaled, right

FAMILY = pytest.mark.parametrize("name", ["fgsm", "pgd", "bim", "mifgsm", "eotpgd"])
ITERATIVE = pytest.mark.parametrize("name", ["pgd", "bim", "mifgsm", "eotpgd"])
THEIRS = {"fgsm": "FGSM", "pgd": "PGD", "bim": "BIM", "mifgsm": "MIFGSM", "eotpgd": "EOTPGD"}


@FAMILY
@pytest.mark.parametrize("options", [{}, {"eps_255": 16}])
def test_it_fools_the_digits_victim(digits_cnn, digits, name, options):
    attacked = build_attack(name, digits_cnn, **options)(digits.images, digits.labels)
    assert right(digits_cnn, digits.images, digits.labels) >= 0.9
    assert right(digits_cnn, attacked, digits.labels) <= 0.15


@FAMILY
def test_defaults_and_results_are_the_librarys(digits_cnn, digits, name):
    part = digits.select(0, 8)
    fixed = {"random_start": False} if name in ("pgd", "eotpgd") else {}
    ours = build_attack(name, digits_cnn, **fixed)(part.images, part.labels)
    theirs = getattr(torchattacks, THEIRS[name])(digits_cnn, **fixed)(part.images, part.labels)
    assert torch.equal(ours, theirs)


@ITERATIVE
def test_options_arrive(digits_cnn, digits, name):
    part = digits.select(0, 8)
    fixed = {"random_start": False} if name in ("pgd", "eotpgd") else {}
    attack = build_attack(name, digits_cnn, eps_255=4, alpha_255=1, steps=1, **fixed)
    assert (attack(part.images, part.labels) - part.images).abs().max() == pytest.approx(1 / 255, abs=1e-6)
    assert attack.settings.items() >= {"alpha_255": 1, "steps": 1, **fixed}.items()


@pytest.mark.parametrize("name", ["pgd", "eotpgd"])
def test_the_start_depends_on_the_seed_and_the_batchs_first_index(digits_cnn, digits, name):
    images, labels = digits.images[:8], digits.labels[:8]
    attack = build_attack(name, digits_cnn, batch_size=4)
    whole = attack(images, labels)
    assert torch.equal(attack(images[4:], labels[4:], indices=torch.arange(4, 8)), whole[4:])
    assert not torch.equal(attack(images[4:], labels[4:]), whole[4:])
    assert not torch.equal(build_attack(name, digits_cnn, batch_size=4, seed=1)(images, labels), whole)


@FAMILY
def test_a_victim_that_is_too_sure_is_fooled_where_the_library_stands_still(digits_cnn, digits, name):
    part = digits.select(0, 8)
    sure = Scaled(digits_cnn)
    theirs = getattr(torchattacks, THEIRS[name])(sure)(part.images, part.labels)
    ours = build_attack(name, sure)(part.images, part.labels)
    assert right(sure, theirs, part.labels) >= 0.75
    assert right(sure, ours, part.labels) == 0


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("pgd", {"eps_255": 0}, ValueError, "`eps_255` must be above 0"),
        ("bim", {"eps_255": -8}, ValueError, "`eps_255`"),
        ("fgsm", {"eps_255": 256}, ValueError, "`eps_255`.*255"),
        ("mifgsm", {"eps_255": float("nan")}, ValueError, "`eps_255`"),
        ("fgsm", {"eps_255": "8"}, TypeError, "`eps_255`"),
        ("none", {"eps_255": 8}, TypeError, "'none' takes no option 'eps_255'"),
        ("pgd", {"alpha_255": 0}, ValueError, "`alpha_255`"),
        ("eotpgd", {"alpha_255": 300}, ValueError, "`alpha_255`"),
        ("bim", {"steps": 0}, ValueError, "`steps`"),
        ("bim", {"random_start": True}, TypeError, "takes no option 'random_start'"),
        ("eotpgd", {"eot_iter": 0}, ValueError, "`eot_iter`"),
        ("mifgsm", {"decay": -0.5}, ValueError, "`decay`"),
    ],
)
def test_bad_options_are_refused(digits_cnn, name, options, error, message):
    with pytest.raises(error, match=message):
        build_attack(name, digits_cnn, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("fgsm", 0.25), ("pgd", 0.02), ("bim", 0.02), ("mifgsm", 0.02)])
def test_attacks_on_the_deepest_real_victim(deepest, name, most):
    victim, data = deepest
    attacked = build_attack(name, victim)(data.images, data.labels)
    assert right(victim, attacked, data.labels) <= most
