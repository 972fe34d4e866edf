import pytest
import torch
import torchattacks
from torch import nn

from dipguard.attacks import build_attack

from .conftest import right


class _FewClasses(nn.Module):
    """The first ``count`` classes of a victim."""

    def __init__(self, victim, count):
        super().__init__()
        self.victim, self.count = victim, count

    def forward(self, images):
        return self.victim(images)[:, : self.count]


@pytest.mark.parametrize(
    ("name", "options", "most"),
    [
        ("autoattack", {}, 0.15),
        ("autoattack", {"version": "rand", "steps": 5}, 0.15),
        ("square", {"n_queries": 400, "eps_255": 60}, 0.8),  # few queries, on a victim that rounding trains anew
    ],
)
def test_it_fools_the_digits_victim(digits_cnn, digits, name, options, most):
    part = digits.select(0, 8)
    attacked = build_attack(name, digits_cnn, **options)(part.images, part.labels)
    assert right(digits_cnn, attacked, part.labels) <= most


def test_the_weakest_budget_goes_through_all_four_parts(digits_cnn, digits):
    part = digits.select(0, 2)
    attack = build_attack("autoattack", digits_cnn, eps_255=0.25, steps=1, targets=1)
    made = attack.make(attack.view(digits_cnn))
    assert [type(each).__name__ for each in made._autoattack.attacks] == ["APGD", "APGDT", "FAB", "Square"]
    made._autoattack.attacks[-1].n_queries = 5  # all else is as `attack_batch` runs it
    with torch.no_grad():
        attacked = made(part.images, part.labels)
    assert (attacked - part.images).abs().max() <= 0.25 / 255 + 1e-6
    assert right(digits_cnn, attacked, part.labels) == right(digits_cnn, part.images, part.labels)


@pytest.mark.parametrize(("count", "version"), [(4, "standard"), (3, "rand")])
def test_the_number_of_classes_is_the_victims(digits_cnn, digits, count, version):
    few = _FewClasses(digits_cnn, count)
    part = digits.select(0, 40)
    images, labels = (values[part.labels < count][:4] for values in (part.images, part.labels))
    attacked = build_attack("autoattack", few, version=version, eps_255=16)(images, labels)
    assert right(few, attacked, labels) == 0
    with pytest.raises(ValueError, match=rf"`victim` must have at least {count} classes for '{version}', got 2"):
        build_attack("autoattack", _FewClasses(digits_cnn, 2), version=version)(images[:1], labels[:1] * 0)


def test_the_library_takes_ten_classes_for_granted(digits_cnn, digits):
    part = digits.select(0, 40)
    images, labels = (values[part.labels < 5][:4] for values in (part.images, part.labels))
    with pytest.raises(IndexError):
        torchattacks.AutoAttack(_FewClasses(digits_cnn, 5), eps=0.5 / 255, seed=0)(images, labels)
    attack = build_attack("autoattack", _FewClasses(digits_cnn, 5), eps_255=0.5)
    targeted = attack.make(attack.view(attack.victim), num_classes=5)._autoattack.attacks[1:3]
    assert [part.n_target_classes for part in targeted] == [4, 4]


def test_steps_and_targets_arrive(digits_cnn):
    attack = build_attack("autoattack", digits_cnn, steps=100, targets=3)
    parts = attack.make(attack.view(digits_cnn), num_classes=1000)._autoattack.attacks
    assert [part.steps for part in parts[:3]] == [100] * 3
    assert [part.n_target_classes for part in parts[1:3]] == [3, 3]


@pytest.mark.parametrize("name", ["square", "autoattack"])
def test_seeds_and_indices_settle_the_draws(digits_cnn, digits, name):
    part = digits.select(0, 4)
    options = {"eps_255": 60, "n_queries": 100} if name == "square" else {"version": "rand", "steps": 1}
    attack = build_attack(name, digits_cnn, **options)
    first = attack(part.images, part.labels)
    torch.manual_seed(7)
    assert torch.equal(attack(part.images, part.labels), first)
    assert not torch.equal(attack(part.images, part.labels, indices=torch.arange(4, 8)), first)
    assert not torch.equal(build_attack(name, digits_cnn, seed=1, **options)(part.images, part.labels), first)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("square", {"n_queries": 0}, ValueError, "`n_queries`"),
        ("square", {"n_restarts": 0}, ValueError, "`n_restarts`"),
        ("square", {"p_init": 0}, ValueError, "`p_init` must be above 0"),
        ("square", {"loss": "hinge"}, ValueError, "`loss` must be one of margin, ce"),
        ("autoattack", {"version": "plus"}, ValueError, "`version` must be one of standard, rand"),
        ("autoattack", {"steps": 0}, ValueError, "`steps`"),
        ("autoattack", {"targets": 0}, ValueError, "`targets`"),
    ],
)
def test_bad_options_are_refused(digits_cnn, name, options, error, message):
    with pytest.raises(error, match=message):
        build_attack(name, digits_cnn, **options)
