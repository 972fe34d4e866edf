"""ART's own classifier and attacks with a defence as preprocessor."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dipguard import DIPGuard
from dipguard.defenses import build_defense
from dipguard.integrations.art import purify_preprocessor

from .conftest import TINY
from .projects import DigitsModule, digits

pytest.importorskip("art", reason="needs the extra art")


def estimator(module: nn.Module, *preprocessors: Any) -> Any:
    from art.estimators.classification import PyTorchClassifier

    about = {"loss": nn.CrossEntropyLoss(), "input_shape": (3, 16, 16), "nb_classes": 10, "clip_values": (0.0, 1.0)}
    return PyTorchClassifier(module, preprocessing_defences=list(preprocessors), device_type="cpu", **about)


def pgd(classifier: Any, images: Tensor, labels: Tensor, *, steps: int = 5) -> np.ndarray:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch

    attack = ProjectedGradientDescentPyTorch(classifier, eps=0.25, eps_step=0.08, max_iter=steps, verbose=False)
    return attack.generate(images.numpy(), labels.numpy())


def accuracy(classifier: Any, images: np.ndarray, labels: Tensor) -> float:
    return float((classifier.predict(images).argmax(1) == labels.numpy()).mean())


def test_it_is_one_of_arts_preprocessors_and_purifies(module: DigitsModule) -> None:
    from art.defences.preprocessor.preprocessor import PreprocessorPyTorch

    median, (images, labels) = build_defense("median", module), digits(0, 6, noise=0.2)
    preprocessor = purify_preprocessor(median)
    assert isinstance(preprocessor, PreprocessorPyTorch)
    assert (preprocessor.apply_fit, preprocessor.apply_predict) == (False, True)
    purified, same = preprocessor(images.numpy(), labels.numpy())
    assert np.array_equal(purified, median.purify(images).numpy())
    assert np.array_equal(same, labels.numpy())
    classifier = estimator(module, preprocessor)
    with torch.no_grad():
        expected = module.eval()(median.purify(images)).numpy()
    np.testing.assert_allclose(classifier.predict(images.numpy()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("defense", ["median", "jpeg"])
def test_arts_attack_through_a_cheap_defence_works(module: DigitsModule, defense: str) -> None:
    images, labels = digits(0, 24)
    classifier = estimator(module, purify_preprocessor(build_defense(defense, module)))
    assert accuracy(classifier, images.numpy(), labels) > 0.7
    attacked = pgd(classifier, images, labels)
    assert np.abs(attacked - images.numpy()).max() == pytest.approx(0.25, abs=1e-5)
    assert accuracy(classifier, attacked, labels) < 0.3


def test_arts_attack_through_a_deep_image_prior(module: DigitsModule) -> None:
    images, labels = digits(0, 2)
    defended = estimator(module, purify_preprocessor(DIPGuard(module, progress=False, **TINY)))
    attacked = pgd(defended, images, labels, steps=1)
    assert 0 < np.abs(attacked - images.numpy()).max() <= 0.25 + 1e-5


def test_arts_gradients_are_those_by_the_purified_image(module: DigitsModule) -> None:
    median, (images, labels) = build_defense("median", module), digits(0, 4, noise=0.1)
    purified = median.purify(images).requires_grad_()
    F.cross_entropy(module.eval()(purified), labels, reduction="sum").backward()
    classifier = estimator(module, purify_preprocessor(median))
    gradient = classifier.loss_gradient(images.numpy(), np.eye(10)[labels.numpy()])
    scale = np.abs(gradient).max() / float(purified.grad.abs().max())  # ART takes the mean or the sum
    np.testing.assert_allclose(gradient, purified.grad.numpy() * scale, rtol=1e-4, atol=1e-6)
    assert scale in (pytest.approx(1), pytest.approx(1 / 4))
    one_class = classifier.class_gradient(images.numpy(), label=3)
    purified.grad = None
    module(purified)[:, 3].sum().backward()
    np.testing.assert_allclose(one_class[:, 0], purified.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_the_gradient_through_a_resizing_defence_is_the_adjoint_of_a_resize(module: DigitsModule) -> None:
    class Enlarge:
        def purify(self, images: Tensor, *, indices: Tensor | None = None) -> Tensor:
            return F.interpolate(images, scale_factor=2, mode="nearest")

    images = digits(0, 2)[0]
    x = images.clone().requires_grad_()
    bilinear = F.interpolate(x, size=(32, 32), mode="bilinear", align_corners=False)
    gradient = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (expected,) = torch.autograd.grad(bilinear, x, gradient)
    given = images.clone().requires_grad_()
    purify_preprocessor(Enlarge()).forward(given)[0].backward(gradient)
    torch.testing.assert_close(given.grad, expected)


def test_art_attacks_that_only_ask_for_decisions(module: DigitsModule) -> None:
    from art.attacks.evasion import HopSkipJump

    images = digits(0, 2)[0].numpy()
    classifier = estimator(module, purify_preprocessor(build_defense("median", module)))
    attack = HopSkipJump(classifier, max_iter=1, max_eval=20, init_eval=10, init_size=20, verbose=False)
    before = classifier.predict(images).argmax(1)
    assert not (classifier.predict(attack.generate(images)).argmax(1) == before).any()


def test_bad_arguments_are_named(module: DigitsModule) -> None:
    with pytest.raises(TypeError, match="`defense` must have purify"):
        purify_preprocessor(module)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`draws` must be one of"):
        purify_preprocessor(build_defense("median", module), draws="random")
