"""The callback in a Lightning project, with the defaults of the Trainer."""

import copy
import csv
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dipguard import DIPGuard
from dipguard.defenses import build_defense
from dipguard.defenses.transforms import Median
from dipguard.integrations.lightning import DefendedModule, PurifyCallback

from .conftest import TINY, trainer
from .projects import KINDS, MEAN, STD, DigitsData, DigitsModule

UNDEFENDED, DEFENDED = "test_accuracy_undefended", "test_accuracy_defended"


def accuracy(module: DigitsModule, images: Tensor, labels: Tensor) -> float:
    module.eval()
    with torch.no_grad():
        return float((module(images).argmax(1) == labels).float().mean())


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_every_kind(module: DigitsModule, kind: str) -> None:
    module.kind, data, median = kind, DigitsData(kind=kind, count=60, batch_size=32), build_defense("median", module)
    images, labels = KINDS[kind]
    said = {} if kind in ("tensor", "tuple", "list") else {"images": images, "labels": labels}
    (results,) = trainer(PurifyCallback(median, **said)).test(module, data, verbose=False)
    purified = median.purify(data.pictures.x)
    assert torch.equal(torch.cat(module.seen), purified)
    if kind == "tensor":
        assert results == {}
        return
    assert results[DEFENDED] == pytest.approx(results["their_accuracy"])
    assert results[DEFENDED] == pytest.approx(accuracy(module, purified, data.pictures.y))
    assert results[UNDEFENDED] == pytest.approx(accuracy(module, data.pictures.x, data.pictures.y))
    assert results[DEFENDED] != results[UNDEFENDED]


@pytest.mark.parametrize("loop", ["test", "validate", "predict"])
def test_every_loop(module: DigitsModule, loop: str) -> None:
    data, median = DigitsData(), build_defense("median", module)
    runner = trainer(PurifyCallback(median))
    getattr(runner, loop)(module, data, **({} if loop == "predict" else {"verbose": False}))
    assert torch.equal(torch.cat(module.seen), median.purify(data.pictures.x))
    assert (f"{loop}_accuracy_defended" in runner.callback_metrics) == (loop != "predict")


def test_two_callbacks_of_one_trainer_are_refused(module: DigitsModule) -> None:
    defenses = [build_defense(name, module) for name in ("median", "jpeg")]
    with pytest.raises(RuntimeError, match="test_step is purified already: a Trainer has one PurifyCallback"):
        trainer(*map(PurifyCallback, defenses)).test(module, DigitsData(), verbose=False)
    assert "test_step" not in vars(module)


def test_a_defended_module_needs_no_callback(module: DigitsModule) -> None:
    median = build_defense("median", module)
    with pytest.raises(RuntimeError, match="a DefendedModule needs no PurifyCallback"):
        trainer(PurifyCallback(median)).test(DefendedModule(module, median), DigitsData(), verbose=False)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [2, 5])
def test_a_guards_draws_do_not_depend_on_the_batch_size(module: DigitsModule, batch_size: int) -> None:
    data, guard = DigitsData(batch_size=batch_size), DIPGuard(module, **TINY)
    (results,) = trainer(PurifyCallback(guard)).test(module, data, verbose=False)
    expected = guard.purify(data.pictures.x)
    torch.testing.assert_close(torch.cat(module.seen), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, data.pictures.x, atol=0.05)
    assert results[DEFENDED] == pytest.approx(accuracy(module, expected, data.pictures.y))


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_the_trainers_precision_does_not_reach_the_fit(module: DigitsModule, precision: str) -> None:
    guard = DIPGuard(module, **{**TINY, "dtype": "float32"})
    data = DigitsData(count=2)
    reference = guard.purify(data.pictures.x)
    trainer(PurifyCallback(guard), precision=precision).test(module, data, verbose=False)
    (seen,) = module.seen
    assert module.autocast == [precision == "bf16-mixed"]
    if precision == "bf16-mixed":
        assert torch.equal(seen, reference)
    else:  # the victim, and thus the guard, is the module in another precision: only the type is sure
        assert seen.dtype == {"64-true": torch.float64, "bf16-true": torch.bfloat16}[precision]
        assert 0 <= float(seen.min()) <= float(seen.max()) <= 1
    assert torch.get_default_dtype() == torch.float32


def test_accuracy_is_counted_in_float32(module: DigitsModule) -> None:
    data = DigitsData(count=300, batch_size=1)
    (results,) = trainer(PurifyCallback(build_defense("median", module)), precision="bf16-true").test(
        module, data, verbose=False
    )
    module.bfloat16()
    assert results["test_accuracy_undefended"] == pytest.approx(
        accuracy(module, data.pictures.x.bfloat16(), data.pictures.y)
    )


def test_normalised_batches_are_brought_to_pixels_and_back(module: DigitsModule) -> None:
    data, median = DigitsData(normalised=True), build_defense("median", module)
    trainer(PurifyCallback(median, mean=MEAN, std=STD)).test(module, data, verbose=False)
    pixels = torch.cat(module.seen) * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    torch.testing.assert_close(pixels, median.purify(data.pictures.x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("make", [partial(build_defense, "median"), Median])
def test_a_defence_may_be_made_for_the_trainers_module(module: DigitsModule, make: Any, normalised: bool) -> None:
    data, how = DigitsData(normalised=normalised), {"mean": MEAN, "std": STD} if normalised else {}
    callback = PurifyCallback(make, **how)
    trainer(callback).test(module, data, verbose=False)
    module.eval()
    assert not any(tensor.is_inference() for tensor in callback.purifier.defense.buffers())
    victim, pixels = callback.purifier.defense.victim, data.pictures.x
    if normalised:
        wanted = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        torch.testing.assert_close(victim(pixels), module(wanted))
    else:
        assert victim is module
    seen, module.seen = torch.cat(module.seen), []
    trainer(PurifyCallback(build_defense("median", module), **how)).test(module, data, verbose=False)
    assert torch.equal(seen, torch.cat(module.seen))


@pytest.mark.slow
def test_module_and_random_states_are_left_as_they_were(module: DigitsModule) -> None:
    module.net[1].eval()  # a frozen BatchNorm
    modes = [part.training for part in module.modules()]
    values = {key: value.clone() for key, value in module.state_dict().items()}
    before = torch.get_rng_state()
    trainer().test(module, DigitsData(count=2), verbose=False)  # a loader draws, with or without the callback
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    own = set(vars(module))
    torch.set_rng_state(before)
    trainer(PurifyCallback(DIPGuard(module, **TINY))).test(module, DigitsData(count=2), verbose=False)
    assert [part.training for part in module.modules()] == modes
    now = module.state_dict()
    assert list(now) == list(values)
    assert all(torch.equal(now[key], value) for key, value in values.items() if not key.startswith("accuracy"))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert set(vars(module)) == own
    assert {p.device.type for p in module.parameters()} == {"cpu"}
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.slow
def test_checkpoints_and_hyper_parameters_hold_nothing_of_it(module: DigitsModule, tmp_path: Path) -> None:
    fitted = trainer(PurifyCallback(DIPGuard(module, **TINY)), max_epochs=1, default_root_dir=tmp_path)
    fitted.fit(module, DigitsData(count=4))
    assert torch.equal(torch.cat(module.seen[-2:]), DigitsData(count=4).pictures.x)  # fit's validation is as ever
    fitted.test(module, DigitsData(count=2), verbose=False)
    fitted.save_checkpoint(tmp_path / "with.ckpt")
    plain = trainer(max_epochs=1, default_root_dir=tmp_path)
    plain.fit(module, DigitsData(count=4))
    plain.test(module, DigitsData(count=2), verbose=False)
    plain.save_checkpoint(tmp_path / "without.ckpt")
    saved, usual = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("with", "without"))
    assert list(saved["state_dict"]) == list(usual["state_dict"]) == list(module.state_dict())
    assert saved["hyper_parameters"] == usual["hyper_parameters"] == {"rate": 0.01}
    assert saved.keys() == usual.keys()
    assert saved["callbacks"] == usual["callbacks"] == {}
    assert b"dipguard" not in (tmp_path / "with.ckpt").read_bytes()


def test_their_logger_gets_two_columns_more(module: DigitsModule, tmp_path: Path) -> None:
    columns = {}
    for name, callbacks in (("with", [PurifyCallback(DIPGuard(module, **TINY))]), ("without", [])):
        logger = CSVLogger(tmp_path, name=name, version="")
        trainer(*callbacks, logger=logger).test(module, DigitsData(count=2), verbose=False)
        with (tmp_path / name / "metrics.csv").open() as file:
            columns[name] = csv.DictReader(file).fieldnames
    assert set(columns["with"]) - set(columns["without"]) == {UNDEFENDED, DEFENDED}


def test_their_progress_bar_is_the_only_one(module: DigitsModule, capfd: pytest.CaptureFixture[str]) -> None:
    guard = DIPGuard(module, **TINY)
    trainer(PurifyCallback(guard), enable_progress_bar=True).test(module, DigitsData(count=2), verbose=False)
    shown = "".join(capfd.readouterr())
    assert "Testing" in shown
    assert "fit:" not in shown
    assert "TPU" not in shown.split("Testing")[1]  # an inner Trainer's start-up lines
    assert guard.progress


def test_several_loaders_are_counted_and_logged_apart(module: DigitsModule) -> None:
    data, guard = DigitsData(count=3), DIPGuard(module, **TINY)
    loaders = [data.test_dataloader(), DigitsData(count=2, noise=0.1).test_dataloader()]
    module.test_step = lambda batch, batch_idx, dataloader_idx: DigitsModule.test_step(module, batch, batch_idx)
    theirs = module.test_step
    results = trainer(PurifyCallback(guard)).test(module, loaders, verbose=False)
    assert [f"{DEFENDED}/dataloader_idx_{n}" in result for n, result in enumerate(results)] == [True, True]
    torch.testing.assert_close(torch.cat(module.seen[2:]), guard.purify(DigitsData(count=2, noise=0.1).pictures.x))
    assert module.test_step is theirs


def test_a_validation_after_a_fit_counts_its_own_images(module: DigitsModule) -> None:
    """In one process too, where a sampler is distributed over one."""
    sets = [DigitsData(count=count).pictures for count in (2, 5)]
    samplers = [DistributedSampler(pictures, num_replicas=1, rank=0, shuffle=False) for pictures in sets]
    few, many = (DataLoader(p, batch_size=2, sampler=s) for p, s in zip(sets, samplers, strict=True))
    guard = DIPGuard(copy.deepcopy(module), **TINY)
    runner = trainer(PurifyCallback(guard), max_epochs=1, limit_train_batches=1)
    runner.fit(module, few, few)
    module.seen.clear()
    runner.validate(module, many, verbose=False)
    assert runner.callback_metrics["validate_accuracy_defended"] == runner.callback_metrics["their_accuracy"]
    torch.testing.assert_close(torch.cat(module.seen), guard.purify(sets[1].x), rtol=0, atol=1e-5)


def test_indices_may_come_with_the_batch(module: DigitsModule) -> None:
    data, guard = DigitsData(count=4), DIPGuard(module, **TINY)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = DataLoader(TensorDataset(data.pictures.x[order], data.pictures.y[order], order), batch_size=3)
    trainer(PurifyCallback(guard, indices=2)).test(module, shuffled, verbose=False)
    torch.testing.assert_close(torch.cat(module.seen), guard.purify(data.pictures.x)[order], rtol=0, atol=1e-5)


def test_a_dataset_of_ready_batches_is_not_written_to(module: DigitsModule) -> None:
    data, median = DigitsData(count=4), build_defense("median", module)
    batches = [(data.pictures.x[:2], data.pictures.y[:2]), (data.pictures.x[2:], data.pictures.y[2:])]
    given = data.pictures.x.clone()
    runner = trainer(PurifyCallback(median))
    for _ in range(2):
        runner.test(module, DataLoader(batches, batch_size=None), verbose=False)
    assert torch.equal(data.pictures.x, given)
    assert torch.equal(torch.cat(module.seen[2:]), torch.cat(module.seen[:2]))


SCALED = {"mean": (0, 0, 0), "std": (9, 9, 9)}
NO_PLACE = r"`images` must say where .* the batch is a dict with the keys 'image', 'label', 'name'"


@pytest.mark.parametrize(
    ("options", "kind", "error", "message"),
    [
        ({}, "dict", TypeError, NO_PLACE),
        ({"images": "picture"}, "dict", ValueError, r"`images` must name a part of the batch, got \('picture',\)"),
        ({"images": "name"}, "dict", TypeError, r"`images` must name a tensor, got \('name',\): there is a str"),
        ({"images": 1}, "tuple", ValueError, r"`images` must have 4 dimensions \[B, 3, H, W\], got shape \(2,\)"),
        ({"images": 0, "labels": 5}, "tuple", ValueError, r"`labels` must name a part of the batch, got \(5,\)"),
        ({"images": 0, "labels": 0}, "tuple", TypeError, "`labels` must be an integer tensor"),
        (SCALED, "tuple", ValueError, r"`images` must lie in \[0, 1\].*: `mean` and `std` must be the pipeline's"),
    ],
)
def test_what_is_wrong_with_a_batch_is_named(module, options, kind, error, message) -> None:
    module.kind = kind
    runner = trainer(PurifyCallback(build_defense("median", module), **options))
    with pytest.raises(error, match=message):
        runner.test(module, DigitsData(kind=kind), verbose=False)
    assert "test_step" not in vars(module)


def test_images_that_are_normalised_without_a_word_are_refused(module: DigitsModule) -> None:
    runner = trainer(PurifyCallback(build_defense("median", module)))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got values from -.*`mean` and `std` are needed if"):
        runner.test(module, DigitsData(normalised=True), verbose=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"defense": torch.nn.Identity()}, TypeError, "`defense` must have purify"),
        ({"images": 1.5}, TypeError, "`images` must be a position, a key, or a tuple of them, got 1.5"),
        ({"labels": ("a", None)}, TypeError, "`labels` must be a position"),
        ({"mean": (0.5, 0.5, 0.5)}, ValueError, "`mean` and `std` must be given together"),
        ({"mean": (0.5, 0.5), "std": (1, 1, 1)}, ValueError, "`mean` must hold three numbers"),
        ({"mean": 0.5, "std": 1}, ValueError, "`mean` must hold three numbers"),
        ({"mean": (0, 0, 0), "std": (1, 0, 1)}, ValueError, "`std` must be above 0"),
    ],
)
def test_bad_arguments_are_named(module: DigitsModule, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        PurifyCallback(**{"defense": build_defense("median", module), **options})


@pytest.mark.slow
def test_two_processes(module: DigitsModule, tmp_path: Path) -> None:
    """Five images, so that one process gets one twice: it counts once, and each image is what one process makes."""
    data, guard = DigitsData(batch_size=2), DIPGuard(module, **TINY)
    expected = guard.purify(data.pictures.x)
    shared = DigitsModule(folder=tmp_path)
    shared.load_state_dict(module.state_dict())
    runner = trainer(PurifyCallback(DIPGuard(shared, **TINY)), devices=2, strategy="ddp_spawn")
    (results,) = runner.test(shared, data, verbose=False)
    assert results[DEFENDED] == pytest.approx(accuracy(module, expected, data.pictures.y))
    assert results[UNDEFENDED] == pytest.approx(accuracy(module, data.pictures.x, data.pictures.y))
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert [part["ranks"] for part in parts] == [(0, 0, 0), (1, 1, 1)]
    seen = torch.stack([torch.cat(part["seen"]) for part in parts], dim=1).flatten(0, 1)
    torch.testing.assert_close(seen, torch.cat([expected, expected[:1]]), rtol=0, atol=1e-5)
