"""A defended classifier and a defended LightningModule."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from dipguard import DIPGuard
from dipguard.defenses import build_defense
from dipguard.integrations.lightning import DefendedClassifier, DefendedModule

from .conftest import TINY, trainer
from .projects import MEAN, STD, DigitsData, DigitsModule, digits


def normalised(images: Tensor) -> Tensor:
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def logits(module: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return module(images)


def test_a_defended_classifier_reads_purified_images(module: DigitsModule) -> None:
    images = digits(0, 6, noise=0.3)[0]
    median = build_defense("median", module)
    defended = DefendedClassifier(module, median).eval()
    assert not module.training
    expected = logits(module, median.purify(images))
    assert torch.equal(logits(defended, images), expected)
    assert not torch.allclose(expected, logits(module, images), atol=0.1)
    scaled = DefendedClassifier(module, median, mean=MEAN, std=STD)
    torch.testing.assert_close(logits(scaled, normalised(images)), logits(module, normalised(median.purify(images))))
    assert [key.removeprefix("classifier.") for key in defended.state_dict()] == list(module.state_dict())
    guarded = DefendedClassifier(module, DIPGuard(module))
    assert set(map(id, guarded.parameters())) == set(map(id, module.parameters()))


def test_a_defence_from_elsewhere_is_isolated(module: DigitsModule) -> None:
    class Sloppy:
        def purify(self, images: Tensor, *, indices: Tensor | None = None) -> Tensor:
            assert not torch.is_autocast_enabled("cpu")
            return (images + 0.01 * torch.rand_like(images)).clamp(0, 1)

    defended, images, state = DefendedClassifier(module.eval(), Sloppy()), digits(0, 2)[0], torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits(defended, images)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_guards_draws_come_from_the_image_or_from_indices(module: DigitsModule) -> None:
    images = digits(0, 3, noise=0.3)[0]
    guard = DIPGuard(module.eval(), **TINY)
    defended = DefendedClassifier(module, guard)
    together = logits(defended, images)
    torch.testing.assert_close(logits(defended, images[1:2]), together[1:2], rtol=0, atol=1e-4)
    by_position = logits(module, guard.purify(images))
    assert not torch.allclose(together, by_position, atol=1e-3)
    placed = DefendedClassifier(module, guard, draws="position")
    torch.testing.assert_close(logits(placed, images), by_position, rtol=0, atol=1e-4)
    for indices in (torch.arange(3), [0, 1, 2]):
        with torch.inference_mode():
            handed = defended(images, indices=indices)
        torch.testing.assert_close(handed, by_position, rtol=0, atol=1e-4)


def test_fine_tuning_on_purified_images_reaches_the_classifier(module: DigitsModule) -> None:
    images, labels = digits(0, 4)
    defended = DefendedClassifier(module, build_defense("median", module))
    nn.functional.cross_entropy(defended(images), labels).backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("loop", ["test", "validate", "predict"])
def test_a_defended_module_in_every_loop(module: DigitsModule, loop: str) -> None:
    data, guard = DigitsData(count=3), DIPGuard(module, **TINY)
    own = dict(vars(module))
    defended = DefendedModule(module, guard)
    assert isinstance(defended, DigitsModule)
    outcome = getattr(trainer(), loop)(defended, data, **({} if loop == "predict" else {"verbose": False}))
    module.eval()
    expected = logits(DefendedClassifier(module, guard), data.pictures.x).argmax(1)
    if loop == "predict":
        assert torch.equal(torch.cat(outcome), expected)
    else:
        right = float((expected == data.pictures.y).float().mean())
        assert outcome == [{"their_accuracy": pytest.approx(right)}]
    assert vars(module).keys() == own.keys()
    module.train()
    assert {key for key, value in vars(module).items() if value is not own[key]} <= {"training", "_device", "_dtype"}


def test_the_forward_of_a_defended_module(module: DigitsModule) -> None:
    images, median = digits(0, 4, noise=0.3)[0], build_defense("median", module)
    module.eval()
    expected = logits(module, median.purify(images))
    defended = DefendedModule(module, median)
    assert torch.equal(logits(defended, images), expected)
    with pytest.raises(TypeError, match="`images` must name an argument of forward, got 'images': forward was given 1"):
        DefendedModule(module, median, images="images")(images)
    named = DefendedModule(module, median, images="images")
    with torch.no_grad():
        assert torch.equal(named(images=images), expected)
    scaled = DefendedModule(module, median, mean=MEAN, std=STD)
    torch.testing.assert_close(logits(scaled, normalised(images)), logits(module, normalised(median.purify(images))))


def test_a_compiled_module_is_defended_too(module: DigitsModule) -> None:
    images = digits(0, 4, noise=0.3)[0]
    module.eval().compile(backend="eager")
    median = build_defense("median", module)
    expected = logits(module, median.purify(images))
    assert torch.equal(logits(DefendedModule(module, median), images), expected)
    assert not torch.allclose(logits(module, images), expected, atol=0.1)


def test_the_module_knows_where_the_weights_are(module: DigitsModule) -> None:
    defended = DefendedModule(module, build_defense("median", module)).double()
    assert defended.dtype == module.dtype == torch.float64
    module.float()
    logits(defended, digits(0, 2)[0])
    assert module.dtype == torch.float32


def test_a_defended_module_is_saved_as_the_module(module: DigitsModule, tmp_path: Path) -> None:
    runner = trainer()
    defended = DefendedModule(module, DIPGuard(module, **TINY))
    runner.test(defended, DigitsData(count=1), verbose=False)
    runner.save_checkpoint(tmp_path / "defended.ckpt")
    saved = torch.load(tmp_path / "defended.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == list(defended.state_dict()) == list(module.state_dict())
    assert saved["hyper_parameters"] == {"rate": 0.01} == dict(defended.hparams)
    again = DigitsModule.load_from_checkpoint(tmp_path / "defended.ckpt", kind="tuple", weights_only=True)
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in again.state_dict().items())
    assert b"dipguard" not in (tmp_path / "defended.ckpt").read_bytes()


def test_fitting_a_defended_module_is_fitting_the_module(module: DigitsModule) -> None:
    data, twin = DigitsData(count=4), copy.deepcopy(module)
    pl.seed_everything(1, verbose=False)
    trainer(max_epochs=1).fit(DefendedModule(module, build_defense("median", module)), data)
    pl.seed_everything(1, verbose=False)
    trainer(max_epochs=1).fit(twin, data)
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in module.state_dict().items())


class Watch(pl.Callback):
    """Asks a defended module during the fit of the module itself."""

    def __init__(self, defense: Any, images: Tensor) -> None:
        self.defense, self.images = defense, images

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.eval()
        self.given = logits(pl_module, self.defense.purify(self.images))
        self.seen = logits(DefendedModule(pl_module, self.defense), self.images)


def test_a_defended_module_defends_during_a_fit_of_the_module(module: DigitsModule) -> None:
    watch = Watch(build_defense("median", module), digits(0, 4, noise=0.3)[0])
    trainer(watch, max_epochs=1).fit(module, DigitsData(count=4))
    assert torch.equal(watch.seen, watch.given)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_a_defended_module_travels(module: DigitsModule, how: Any) -> None:
    images = digits(0, 2, noise=0.3)[0]
    defended = DefendedModule(module.eval(), build_defense("median", module))
    other = how(defended)
    assert type(other) is type(defended)
    assert torch.equal(logits(other, images), logits(defended, images))
    assert not set(map(id, other.parameters())) & set(map(id, module.parameters()))


class Shortcut(DigitsModule):
    """Its step goes by the network, not by forward."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("their_accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())


def test_a_step_past_forward_is_not_taken_for_defended() -> None:
    module = Shortcut()
    with pytest.raises(RuntimeError, match=r"test_step did not call self\(images\).*PurifyCallback"):
        trainer().test(DefendedModule(module, build_defense("median", module)), DigitsData(count=2), verbose=False)


def test_what_cannot_be_defended_is_named(module: DigitsModule) -> None:
    median = build_defense("median", module)
    with pytest.raises(TypeError, match=r"`module` must be a torch\.nn\.Module, got int"):
        DefendedModule(3, median)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`module` must have its class's own forward"):
        DefendedModule(DefendedModule(module, median), median)
    module.forward = module.forward  # as Lightning leaves it after a fit in DDP
    images = digits(0, 2)[0]
    assert torch.equal(logits(DefendedModule(module.eval(), median), images), logits(module, median.purify(images)))
    module.forward = module.net.forward
    with pytest.raises(ValueError, match="`module` must have its class's own forward"):
        DefendedModule(module, median)
    del module.forward
    with pytest.raises(TypeError, match="`images` must be a position or a keyword of forward, got None"):
        DefendedModule(module, median, images=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`defense` must have purify"):
        DefendedModule(module, module)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`classifier` must be a torch\.nn\.Module"):
        DefendedClassifier(lambda x: x, median)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`draws` must be one of content, position, got 'fixed'"):
        DefendedClassifier(module, median, draws="fixed")
    with pytest.raises(ValueError, match=r"`images` must lie in \[0, 1\], got values from"):
        DefendedClassifier(module, median)(torch.full((1, 3, 16, 16), 2.0))


def test_images_that_went_through_a_normalisation_are_clamped(module: DigitsModule) -> None:
    images = digits(0, 2)[0]
    defended = DefendedClassifier(module, build_defense("median", module)).eval()
    assert torch.equal(logits(defended, images - 3e-8), logits(defended, (images - 3e-8).clamp(0, 1)))
