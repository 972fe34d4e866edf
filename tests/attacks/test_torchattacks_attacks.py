import copy
import sys

import pytest
import torch
import torchattacks
from torch import nn

from dipguard.attacks import build_attack
from dipguard.data import load_data
from dipguard.victims import build_victim

from .conftest import right


@pytest.mark.parametrize(("name", "options"), [("fgsm", {}), ("pgd", {}), ("pgd", {"eps_255": 16}), ("cw", {})])
def test_it_fools_the_digits_victim(digits_cnn, digits, name, options):
    attacked = build_attack(name, digits_cnn, **options)(digits.images, digits.labels)
    assert right(digits_cnn, digits.images, digits.labels) >= 0.9
    assert right(digits_cnn, attacked, digits.labels) <= 0.15


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
@pytest.mark.parametrize("eps_255", [0.5, 1, 8])
def test_the_budget_is_in_levels_of_255_and_is_used(digits_cnn, digits, name, eps_255):
    attack = build_attack(name, digits_cnn, eps_255=eps_255)
    change = (attack(digits.images, digits.labels) - digits.images).abs().max()
    assert change == pytest.approx(eps_255 / 255, abs=1e-6)
    assert attack.settings["eps_255"] == eps_255


def test_pgd_has_torchattacks_defaults_and_result(digits_cnn, digits):
    part = digits.select(0, 8)
    ours = build_attack("pgd", digits_cnn, random_start=False)(part.images, part.labels)
    theirs = torchattacks.PGD(digits_cnn, random_start=False)(part.images, part.labels)
    assert torch.equal(ours, theirs)


def test_pgds_options_arrive(digits_cnn, digits):
    part = digits.select(0, 8)
    attack = build_attack("pgd", digits_cnn, eps_255=4, alpha_255=1, steps=1, random_start=False)
    assert (attack(part.images, part.labels) - part.images).abs().max() == pytest.approx(1 / 255, abs=1e-6)
    assert attack.settings.items() >= {"alpha_255": 1, "steps": 1, "random_start": False}.items()


def test_pgds_start_depends_on_the_seed_and_the_batchs_first_index(digits_cnn, digits):
    images, labels = digits.images[:8], digits.labels[:8]
    attack = build_attack("pgd", digits_cnn, batch_size=4)
    whole = attack(images, labels)
    assert torch.equal(attack(images[4:], labels[4:], indices=torch.arange(4, 8)), whole[4:])
    assert not torch.equal(attack(images[4:], labels[4:]), whole[4:])
    assert not torch.equal(build_attack("pgd", digits_cnn, batch_size=4, seed=1)(images, labels), whole)


def _partly_frozen(victim):
    """The usual fine-tuning state: train mode, BatchNorms in eval mode."""
    victim = copy.deepcopy(victim).train()
    for module in victim.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return victim


def test_frozen_batch_norms_stay_frozen_where_the_library_thaws_them(digits_cnn, digits):
    part = digits.select(0, 4)
    victim = _partly_frozen(digits_cnn)
    build_attack("fgsm", victim)(part.images, part.labels)
    assert not victim.network[1].training
    assert victim.training
    torchattacks.FGSM(victim)(part.images, part.labels)
    assert victim.network[1].training  # what dipguard keeps from happening


def test_gradients_of_the_victim_stay_where_the_library_adds_to_them(digits_cnn, digits):
    part = digits.select(0, 4)
    victim = copy.deepcopy(digits_cnn)
    build_attack("cw", victim, steps=2)(part.images, part.labels)
    assert all(p.grad is None for p in victim.parameters())
    torchattacks.CW(victim, steps=2)(part.images, part.labels)
    assert any(p.grad is not None for p in victim.parameters())


class _Shifted(nn.Module):
    """The same decisions and margins, other logits."""

    def __init__(self, victim, shift):
        super().__init__()
        self.victim, self.shift = victim, shift

    def forward(self, images):
        return self.victim(images) + self.shift


@pytest.mark.parametrize("shift", [-64.0, 64.0])
def test_cw_depends_on_margins_alone_where_the_library_needs_positive_logits(digits_cnn, digits, shift):
    part = digits.select(0, 16)
    # In float64 a shift costs no digits, so that only the objective can make a difference.
    victim, images = copy.deepcopy(digits_cnn).double(), part.images.double()
    expected = build_attack("cw", victim)(images, part.labels)
    shifted = build_attack("cw", _Shifted(victim, shift))(images, part.labels)
    assert torch.allclose(shifted, expected, atol=1e-6)
    assert right(victim, shifted, part.labels) <= 0.2


def test_the_librarys_own_cw_fails_on_negative_logits(digits_cnn, digits):
    part = digits.select(0, 16)
    victim = _Shifted(copy.deepcopy(digits_cnn), -64.0)
    theirs = torchattacks.CW(victim)(part.images, part.labels)
    ours = build_attack("cw", victim)(part.images, part.labels)
    assert right(victim, theirs, part.labels) > 0.5
    assert right(victim, ours, part.labels) <= 0.2


def test_a_victim_without_parameters_is_attacked_in_silence(digits, capsys):
    class Brightness(nn.Module):
        def forward(self, images):
            mean = images.mean(dim=(1, 2, 3))
            return torch.stack((mean, 0.3 - mean), dim=1)

    labels = (digits.images.mean(dim=(1, 2, 3)) < 0.15).long()
    attacked = build_attack("fgsm", Brightness(), eps_255=255)(digits.images, labels)
    assert right(Brightness(), attacked, labels) < 0.1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["fgsm", "pgd", "cw"])
def test_without_the_library_it_says_what_to_install(digits_cnn, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(ImportError, match=r"pip install 'dipguard\[attacks\]'"):
        build_attack(name, digits_cnn)
    build_attack("none", digits_cnn)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("pgd", {"eps_255": 0}, ValueError, "`eps_255` must be above 0"),
        ("pgd", {"eps_255": -8}, ValueError, "`eps_255`"),
        ("fgsm", {"eps_255": 256}, ValueError, "`eps_255`.*255"),
        ("fgsm", {"eps_255": float("nan")}, ValueError, "`eps_255`"),
        ("fgsm", {"eps_255": "8"}, TypeError, "`eps_255`"),
        ("pgd", {"alpha_255": 0}, ValueError, "`alpha_255`"),
        ("pgd", {"steps": 0}, ValueError, "`steps`"),
        ("cw", {"eps_255": 8}, TypeError, "'cw' takes no option 'eps_255'.*c, kappa, steps, lr"),
        ("none", {"eps_255": 8}, TypeError, "'none' takes no option 'eps_255'"),
        ("cw", {"c": 0}, ValueError, "`c` must be above 0"),
        ("cw", {"lr": -1}, ValueError, "`lr`"),
        ("cw", {"kappa": -1}, ValueError, "`kappa`"),
        ("cw", {"steps": 1.5}, TypeError, "`steps`"),
    ],
)
def test_bad_options_are_refused(digits_cnn, name, options, error, message):
    with pytest.raises(error, match=message):
        build_attack(name, digits_cnn, **options)


def test_pgd_8_on_real_images_leaves_none_right(real_data):
    victim = build_victim("cifar10_resnet20", weights=real_data / "weights" / "resnet20-12fca82f.th")
    data = load_data("arrays", path=real_data / "cifar10" / "tune.npz", limit=16)
    attacked = build_attack("pgd", victim, eps_255=8)(data.images, data.labels)
    assert right(victim, data.images, data.labels) >= 0.8
    assert right(victim, attacked, data.labels) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("fgsm", 0.25), ("pgd", 0.02), ("cw", 0.02)])
def test_attacks_on_the_deepest_real_victim(real_data, name, most):
    victim = build_victim("cifar10_resnet56", weights=real_data / "weights" / "resnet56-4bfd9763.th")
    data = load_data("arrays", path=real_data / "cifar10" / "tune.npz", limit=64)
    attacked = build_attack(name, victim)(data.images, data.labels)
    assert right(victim, attacked, data.labels) <= most
