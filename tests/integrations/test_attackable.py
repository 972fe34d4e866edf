"""foolbox and torchattacks against a defended classifier."""

import pytest
import torch
import torch.nn.functional as F
import torchattacks
from torch import Tensor, nn

from dipguard import DIPGuard
from dipguard.attacks.libraries import foolbox
from dipguard.defenses import build_defense
from dipguard.integrations.attackable import BPDAClassifier

from .conftest import TINY
from .projects import DigitsModule, digits

EPS = 0.25
DEFENSES = ("median", "jpeg")


def test_draws_are_passed_on(module: DigitsModule) -> None:
    assert BPDAClassifier(module, build_defense("median", module), draws="position").purifier.draws == "position"


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def foolbox_pgd(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    library = foolbox()
    attack = library.attacks.LinfPGD(steps=5, rel_stepsize=0.3)
    _, attacked, _ = attack(library.PyTorchModel(model, bounds=(0, 1), device="cpu"), images, labels, epsilons=EPS)
    return attacked


def torchattacks_pgd(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return torchattacks.PGD(model, eps=EPS, alpha=0.3 * EPS, steps=5)(images, labels)


@pytest.mark.parametrize("defense", DEFENSES)
@pytest.mark.parametrize("attack", [foolbox_pgd, torchattacks_pgd])
def test_an_attack_through_a_cheap_defence_works(module: DigitsModule, attack, defense: str) -> None:
    images, labels = digits(0, 24)
    defended = BPDAClassifier(module, build_defense(defense, module))
    assert accuracy(defended, images, labels) > 0.7
    attacked = attack(defended, images, labels)
    assert float((attacked - images).abs().max()) == pytest.approx(EPS, abs=1e-5)
    assert accuracy(defended, attacked, labels) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("attack", [foolbox_pgd, torchattacks_pgd])
def test_an_attack_through_a_guard(module: DigitsModule, attack) -> None:
    images, labels = digits(0, 2)
    defended = BPDAClassifier(module, DIPGuard(module, **TINY))
    attacked = attack(defended, images, labels)
    assert 0 < float((attacked - images).abs().max()) <= EPS + 1e-5


@pytest.mark.slow
def test_black_box_attacks_of_foolbox_ask_the_defended_model(module: DigitsModule) -> None:
    library, images = foolbox(), digits(0, 4)[0]
    defended = BPDAClassifier(module, build_defense("median", module))
    right = defended(images).argmax(1)
    model = library.PyTorchModel(defended, bounds=(0, 1), device="cpu")
    attack = library.attacks.HopSkipJumpAttack(steps=2, initial_gradient_eval_steps=10, max_gradient_eval_steps=10)
    _, attacked, _ = attack(model, images, right, epsilons=None)
    assert not bool((defended(attacked).argmax(1) == right).any())


def test_the_gradient_is_that_by_the_purified_image(module: DigitsModule) -> None:
    images, labels = digits(0, 4, noise=0.1)
    median = build_defense("median", module)
    given = images.clone().requires_grad_()
    F.cross_entropy(BPDAClassifier(module, median)(given), labels).backward()
    purified = median.purify(images).requires_grad_()
    F.cross_entropy(module.eval()(purified), labels).backward()
    torch.testing.assert_close(given.grad, purified.grad)
    assert float(given.grad.abs().max()) > 0


def test_a_classifier_that_is_very_sure_keeps_a_gradient(module: DigitsModule) -> None:
    images = digits(0, 4)[0].requires_grad_()
    sure = nn.Sequential(module, nn.Flatten())
    with torch.no_grad():
        module.net[-1].weight *= 1e4
        module.net[-1].bias *= 1e4
    logits = BPDAClassifier(sure, build_defense("median", sure))(images)
    F.cross_entropy(logits, logits.argmax(1)).backward()
    assert bool((images.grad != 0).flatten(1).any(1).all())


@pytest.mark.parametrize("attack", [foolbox_pgd, torchattacks_pgd])
def test_the_classifier_is_left_as_it_was(module: DigitsModule, attack) -> None:
    module.net[1].eval()
    modes = [part.training for part in module.modules()]
    values = {key: value.clone() for key, value in module.state_dict().items()}
    attack(BPDAClassifier(module, build_defense("median", module)), *digits(0, 4))
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in values.items())
