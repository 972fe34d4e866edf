"""DIPGuard, the method of the paper, through its public methods."""

from __future__ import annotations

import csv
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.profilers import SimpleProfiler
from torch import Tensor, nn
from tqdm import tqdm

from dipguard import DIPGuard
from dipguard.decision import stitch
from dipguard.defenses import Defense
from dipguard.fit import FitProgress

QUICK: dict[str, Any] = {"network": "small", "T": 12, "decisions": 6, "tau": 0.0, "t0": 0, "K": 3, "progress": False}


def test_purify_defend_and_forward_agree(small_images: Tensor, small_victim: nn.Module) -> None:
    guard = DIPGuard(small_victim, **QUICK)
    assert isinstance(guard, Defense)
    result = guard.defend(small_images[:3])
    assert torch.equal(result.reconstructions, guard.purify(small_images[:3]))
    small_victim.eval()
    with torch.no_grad():
        torch.testing.assert_close(guard(small_images[:3]), small_victim(result.reconstructions))
        assert torch.equal(result.decisions_before, small_victim(small_images[:3]).argmax(1))
        assert torch.equal(result.decisions_after, small_victim(result.reconstructions).argmax(1))
    assert result.reconstructions.shape == (3, 3, 16, 16)
    assert 0 <= float(result.reconstructions.min()) <= float(result.reconstructions.max()) <= 1
    assert set(result.reasons) <= {"crossings", "no_crossing"}
    for trace, image, used in zip(result.traces, result.reconstructions, result.used, strict=True):
        rebuilt = stitch(trace, tau=0.0, t0=0, K=3, beta=0.5)
        assert torch.equal(rebuilt.image, image)
        assert len(rebuilt.used) == used
    assert min(result.seconds.values()) > 0


class Stacks(pl.Callback):
    """How many images each stack has, and the loggers of its Trainer."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.loggers: list[Any] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.sizes.append(len(pl_module.given))
        self.loggers.extend(trainer.loggers)


def test_chunks_do_not_change_an_image(small_images: Tensor, small_victim: nn.Module) -> None:
    exact = {**QUICK, "dtype": "float64"}
    whole = DIPGuard(small_victim, stack_size=5, **exact).defend(small_images[:5].double())
    stacks = Stacks()
    parts = DIPGuard(small_victim, stack_size=2, **exact).defend(small_images[:5].double(), callbacks=[stacks])
    assert stacks.sizes == [2, 2, 1]
    torch.testing.assert_close(parts.reconstructions, whole.reconstructions, rtol=0, atol=1e-9)
    assert [trace.index for trace in parts.traces] == [0, 1, 2, 3, 4]


def test_the_stack_size_is_chosen_or_given(small_images: Tensor, small_victim: nn.Module) -> None:
    chosen = DIPGuard(small_victim, **QUICK)
    assert chosen.stack_size is None
    for guard, count, sizes in ((chosen, 3, [3]), (DIPGuard(small_victim, stack_size=3, **QUICK), 8, [3, 3, 2])):
        stacks = Stacks()
        guard.defend(small_images[:count], callbacks=[stacks])
        assert stacks.sizes == sizes
    assert "stack_size" not in chosen.settings


def test_the_logger_gets_the_means_of_each_stack(small_images: Tensor, small_victim: nn.Module, tmp_path: Path) -> None:
    logger, stacks = CSVLogger(tmp_path), Stacks()
    DIPGuard(small_victim, stack_size=2, **QUICK).defend(small_images[:4], logger=logger, callbacks=[stacks])
    assert stacks.loggers == [logger, logger]
    logger.save()
    with (Path(logger.log_dir) / "metrics.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["fit/mse"]]
    assert [int(row["step"]) for row in rows] == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23]
    assert all(row["fit/quality"] and row["fit/crossings"] for row in rows)


def test_arguments_of_the_trainer_reach_it(small_images: Tensor, small_victim: nn.Module) -> None:
    profiler = SimpleProfiler()
    guard = DIPGuard(small_victim, trainer={"profiler": profiler}, **QUICK)
    expected = DIPGuard(small_victim, **QUICK).purify(small_images[:2])
    assert torch.equal(guard.purify(small_images[:2]), expected)
    assert any("training_step" in action for action in profiler.recorded_durations)
    assert guard.settings["trainer"] == {"profiler": "SimpleProfiler"}
    with pytest.raises(ValueError, match="max_steps"):
        DIPGuard(small_victim, trainer={"max_steps": 3}, **QUICK).purify(small_images[:1])


def test_a_trace_is_stitched_again_with_other_parameters(small_images: Tensor, small_victim: nn.Module) -> None:
    result = DIPGuard(small_victim, **QUICK).defend(small_images[:3])
    other = DIPGuard(small_victim, **{**QUICK, "K": 2, "beta": 0.0})
    expected = other.defend(small_images[:3])
    for trace, image in zip(result.traces, expected.reconstructions, strict=True):
        assert torch.equal(other.rebuild(trace).image, image)


def test_a_store_gives_the_same_images_without_another_fit(
    small_images: Tensor, small_victim: nn.Module, tmp_path: Path
) -> None:
    plain = DIPGuard(small_victim, **QUICK).defend(small_images[:3])
    stored = DIPGuard(small_victim, store=tmp_path, store_T=(20,), **QUICK)
    stacks = Stacks()
    for _ in range(2):
        result = stored.defend(small_images[:3], callbacks=[stacks])
        torch.testing.assert_close(result.reconstructions, plain.reconstructions, rtol=0, atol=1e-6)
        assert (result.reasons, result.used) == (plain.reasons, plain.used)
    assert (
        DIPGuard(small_victim, **{**QUICK, "T": 20}, store=tmp_path).defend(small_images[:3], callbacks=[stacks]).traces
    )
    assert stacks.sizes == [3]


def test_the_bar_ends_full_when_a_store_has_the_fits(
    small_images: Tensor, small_victim: nn.Module, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    DIPGuard(small_victim, store=tmp_path, **QUICK).purify(small_images[:1])
    guard = DIPGuard(small_victim, **{**QUICK, "progress": True, "stack_size": 1}, store=tmp_path)
    capfd.readouterr()
    guard.purify(small_images[:3])
    assert "24.0/24.0" in capfd.readouterr().err
    guard.purify(small_images[:3])
    assert "fit: 0.00step" in capfd.readouterr().err  # tqdm's way to show that nothing is left of nothing


def test_another_bar_takes_the_place_of_its_own(
    small_images: Tensor, small_victim: nn.Module, capfd: pytest.CaptureFixture[str]
) -> None:
    with tqdm(total=24, disable=False) as bar:
        capfd.readouterr()
        DIPGuard(small_victim, **{**QUICK, "progress": True}).defend(small_images[:2], callbacks=[FitProgress(bar)])
        assert bar.n == 24
    assert "fit:" not in capfd.readouterr().err


def test_a_warm_up_beyond_the_fit_is_warned_of(small_victim: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    DIPGuard(small_victim, **QUICK)
    assert not caplog.records
    DIPGuard(small_victim, **{**QUICK, "t0": 12})
    assert "`t0`=12 is past the end of the fit (12 steps): no crossing can count" in caplog.text
    DIPGuard(small_victim, **{**QUICK, "t0": 6}, t0_unit="samples")
    assert "`t0`=6 is past the end of the fit (6 samples)" in caplog.text


def test_steps_per_image_is_T(small_victim: nn.Module) -> None:
    assert DIPGuard(small_victim, **QUICK).steps_per_image == 12


def test_an_images_index_settles_its_draws(small_images: Tensor, small_victim: nn.Module) -> None:
    guard = DIPGuard(small_victim, **QUICK)
    assert torch.equal(
        guard.purify(small_images[:2], indices=torch.tensor([7, 3])),
        guard.defend(small_images[:2], indices=[7, 3]).reconstructions,
    )
    seventh = guard.defend(small_images[:1], indices=[7]).reconstructions
    assert torch.equal(seventh, guard.defend(small_images[:1], indices=[7]).reconstructions)
    assert not torch.equal(seventh, guard.defend(small_images[:1], indices=[8]).reconstructions)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_works_under_any_gradient_mode_and_leaves_the_callers_state(
    small_images: Tensor, small_victim: nn.Module, around: Any
) -> None:
    expected = DIPGuard(small_victim, **QUICK).purify(small_images[:2])
    small_victim.train()
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with around():
        given = small_images[:2].clone()
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        purified = DIPGuard(small_victim, **QUICK).purify(given)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (grad, inference)
    assert torch.equal(purified, expected)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]
    assert small_victim.training
    assert all(p.requires_grad for p in small_victim.parameters())


class Classifier(pl.LightningModule):
    def __init__(self, net: nn.Module, guard: DIPGuard) -> None:
        super().__init__()
        self.net, self.guard, self.seen = net, guard, []

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.append(self.guard.purify(batch))


def test_works_inside_a_test_loop_with_inference_mode(small_images: Tensor, small_victim: nn.Module) -> None:
    guard = DIPGuard(small_victim, **QUICK)
    module = Classifier(small_victim, guard)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.test(module, torch.utils.data.DataLoader(small_images[:4], batch_size=2), verbose=False)
    assert torch.equal(module.seen[0], guard.purify(small_images[:2]))
    assert len(module.seen) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_images_come_back_in_their_dtype(small_images: Tensor, small_victim: nn.Module, dtype: torch.dtype) -> None:
    assert DIPGuard(small_victim, **QUICK).purify(small_images[:1].to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (lambda x: x * 255, ValueError, r"`images` must lie in \[0, 1\], got values from"),
        (lambda x: x - 0.5, ValueError, r"`images` must lie in \[0, 1\], got values from -"),
        (lambda x: x.clone().fill_(float("nan")), ValueError, "`images` must be finite, got NaN"),
        (lambda x: x.clone().index_fill_(3, torch.tensor([4]), float("inf")), ValueError, "`images` must be finite"),
        (lambda x: x[0], ValueError, r"`images` must have 4 dimensions \[B, 3, H, W\], got shape \(3, 16, 16\)"),
        (lambda x: x[:, :1], ValueError, "`images` must have 3 channels"),
        (lambda x: x.permute(0, 2, 3, 1), ValueError, "`images` must have 3 channels"),
        (lambda x: (x * 255).byte(), TypeError, r"`images` must be floats in \[0, 1\], got torch.uint8"),
        (lambda x: x[:0], ValueError, "`images` must hold at least one image"),
        (lambda x: x.numpy(), TypeError, r"`images` must be a torch.Tensor \[B, 3, H, W\], got ndarray"),
        (lambda x: x[..., :4, :4], ValueError, "`images` must be at least 5x5 pixels for a network of 2 scales"),
    ],
)
def test_bad_images_are_named(
    small_images: Tensor, small_victim: nn.Module, bad: Any, error: type, message: str
) -> None:
    flat = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))
    with pytest.raises(error, match=message):
        DIPGuard(flat, **QUICK).purify(bad(small_images[:2]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decisions": 1}, ValueError, "`decisions` must be at least 2, got 1"),
        ({"T": 0}, ValueError, "`T` must be at least 1, got 0"),
        ({"K": 0}, ValueError, "`K` must be at least 1, got 0"),
        ({"K": 2.5}, TypeError, "`K` must be an integer, got 2.5"),
        ({"K_max": 2}, ValueError, "`K_max` must be at least 3, got 2"),
        ({"beta": -0.5}, ValueError, "`beta` must be finite and at least 0, got -0.5"),
        ({"tau": 1.5}, ValueError, "`tau` must be from 0 to 1, got 1.5"),
        ({"tau": -0.1}, ValueError, "`tau` must be from 0 to 1, got -0.1"),
        ({"t0": -1}, ValueError, "`t0` must be at least 0, got -1"),
        ({"N": 0}, ValueError, "`N` must be at least 1, got 0"),
        ({"stack_size": 0}, ValueError, "`stack_size` must be at least 1, got 0"),
        ({"stack_size": "all"}, TypeError, "`stack_size` must be an integer, got 'all'"),
        ({"network": "huge"}, ValueError, "`network` must be one of"),
        ({"scores": "odds"}, ValueError, "`scores` must be one of logits, probabilities, got 'odds'"),
        ({"matmul_precision": "half"}, ValueError, "`matmul_precision` must be one of float32, tf32, bfloat16, got"),
        (
            {"matmul_precision": "tf32", "engine": "native"},
            ValueError,
            "`matmul_precision` 'tf32' needs `engine` 'torch'",
        ),
        ({"jiter": 0.1}, TypeError, r"the defence 'paper' takes no option 'jiter' \(did you mean 'jitter'\?\)"),
        ({"tauu": 0.1}, TypeError, r"the defence 'paper' takes no option 'tauu' \(did you mean 'tau'\?\)"),
        ({"lr": 0.0}, ValueError, "`lr` must be above 0"),
        ({"rule": ">"}, ValueError, "`rule` must be one of at_least, above"),
        ({"divide_by": "k"}, ValueError, "`divide_by` must be one of found, K"),
    ],
)
def test_bad_options_are_named(small_victim: nn.Module, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        DIPGuard(small_victim, **{**QUICK, **options})


@pytest.mark.parametrize(
    ("net", "error", "message"),
    [
        (
            nn.Conv2d(3, 4, 3),
            ValueError,
            r"`victim` must return logits \[B, C\] with C of at least 2, got shape \(1, 4, 14, 14\)",
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(768, 1)), ValueError, r"C of at least 2, got shape \(1, 1\)"),
        (nn.LSTM(32, 4), ValueError, "input"),
    ],
)
def test_a_victim_that_gives_no_logits_is_named(
    small_images: Tensor, net: nn.Module, error: type, message: str
) -> None:
    with pytest.raises((error, RuntimeError), match=message):
        DIPGuard(net, **QUICK).purify(small_images[:1])


class Twofold(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1), x


def test_a_victim_that_is_no_module_or_returns_no_tensor_is_named(small_images: Tensor) -> None:
    with pytest.raises(TypeError, match=r"`victim` must be a torch\.nn\.Module, got function"):
        DIPGuard(lambda x: x, **QUICK)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`victim` must return a floating-point tensor .* got tuple"):
        DIPGuard(Twofold(), **QUICK).purify(small_images[:1])


def test_probabilities_are_warned_of_and_logits_are_not(small_images: Tensor, small_victim: nn.Module) -> None:
    with pytest.warns(UserWarning, match="`victim` must return logits, but its outputs lie in"):
        DIPGuard(nn.Sequential(small_victim, nn.Softmax(dim=1)), **QUICK).purify(small_images[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        DIPGuard(small_victim, **QUICK).purify(small_images[:1])


def test_wrong_number_of_indices_is_named(small_images: Tensor, small_victim: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"`indices` must hold one index per image \(2\), got 1"):
        DIPGuard(small_victim, **QUICK).defend(small_images[:2], indices=[1])


def test_progress_tells_the_time_left(
    small_images: Tensor, small_victim: nn.Module, capfd: pytest.CaptureFixture[str]
) -> None:
    DIPGuard(small_victim, **{**QUICK, "progress": True, "stack_size": 1}).purify(small_images[:2])
    shown = capfd.readouterr().err
    assert "fit: 100%" in shown
    assert "24.0/24.0" in shown


def test_settings_can_be_written_as_json(small_victim: nn.Module) -> None:
    import json

    settings = DIPGuard(small_victim, **QUICK).settings
    assert json.loads(json.dumps(settings)) == settings
    assert settings["z_scale"] == pytest.approx(1 / 30)
    assert {"T", "tau", "t0", "K", "beta", "seed", "network", "decisions", "N", "K_max", "jitter"} <= settings.keys()


def test_cells_stored_when_keep_samples_was_an_option_are_found(small_victim: nn.Module) -> None:
    assert DIPGuard(small_victim).settings["keep_samples"] is False  # a part of their keys
    with pytest.raises(TypeError, match="takes no option 'keep_samples'"):
        DIPGuard(small_victim, keep_samples=False)


def test_more_decisions_than_steps_mean_every_step(small_images: Tensor, small_victim: nn.Module) -> None:
    result = DIPGuard(small_victim, **{**QUICK, "decisions": 200}).defend(small_images[:1])
    assert result.traces[0].steps.tolist() == list(range(12))
