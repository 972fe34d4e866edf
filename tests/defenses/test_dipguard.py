"""DIPGuard as people call it."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from dipguard import DIPGuard
from dipguard.decision import stitch
from dipguard.defenses import Defense

QUICK: dict[str, Any] = {"network": "small", "T": 12, "decisions": 6, "tau": 0.0, "t0": 0, "K": 3, "progress": False}


def test_purify_defend_and_forward_agree(images: Tensor, victim: nn.Module) -> None:
    guard = DIPGuard(victim, **QUICK)
    assert isinstance(guard, Defense)
    result = guard.defend(images[:3])
    assert torch.equal(result.reconstructions, guard.purify(images[:3]))
    victim.eval()
    with torch.no_grad():
        torch.testing.assert_close(guard(images[:3]), victim(result.reconstructions))
        assert torch.equal(result.decisions_before, victim(images[:3]).argmax(1))
        assert torch.equal(result.decisions_after, victim(result.reconstructions).argmax(1))
    assert result.reconstructions.shape == (3, 3, 32, 32)
    assert 0 <= float(result.reconstructions.min()) <= float(result.reconstructions.max()) <= 1
    assert set(result.reasons) <= {"crossings", "no_crossing"}
    for trace, image, used in zip(result.traces, result.reconstructions, result.crossings, strict=True):
        rebuilt = stitch(trace, tau=0.0, t0=0, K=3, beta=0.5)
        assert torch.equal(rebuilt.image, image)
        assert len(rebuilt.used) == used
    assert min(result.seconds.values()) > 0


def test_chunks_do_not_change_an_image(images: Tensor, victim: nn.Module) -> None:
    exact = {**QUICK, "dtype": "float64"}
    whole = DIPGuard(victim, stack_size=5, **exact).defend(images[:5].double())
    parts = list(DIPGuard(victim, stack_size=2, **exact).defend_stacks(images[:5].double()))
    assert [len(part.traces) for part in parts] == [2, 2, 1]
    joined = torch.cat([part.reconstructions for part in parts])
    torch.testing.assert_close(joined, whole.reconstructions, rtol=0, atol=1e-9)
    assert [t.index for part in parts for t in part.traces] == [0, 1, 2, 3, 4]


def test_the_stack_size_is_chosen_or_given(images: Tensor, victim: nn.Module) -> None:
    chosen = DIPGuard(victim, **QUICK)
    assert chosen.stack_size is None
    assert chosen.choose_stack_size(images) == 32  # a short job
    assert DIPGuard(victim, stack_size=3, **QUICK).choose_stack_size(images) == 3
    assert [len(part.traces) for part in chosen.defend_stacks(images[:3])] == [3]
    assert [len(part.traces) for part in chosen.defend_stacks(images[:3], stack_size=2)] == [2, 1]
    assert "stack_size" not in chosen.settings


def test_a_patient_defence_is_the_same_in_all_stacks(images: Tensor, victim: nn.Module) -> None:
    options = {**QUICK, "T": 40, "decisions": 20, "dtype": "float64", "K": 1, "padding": "zeros"}
    ended = DIPGuard(victim, patience=2, stack_size=2, **options).defend(images[:4])
    assert min(len(trace.steps) for trace in ended.traces) < 20
    alone = DIPGuard(victim, patience=2, stack_size=1, **options).defend(images[:4])
    assert [trace.steps.tolist() for trace in ended.traces] == [trace.steps.tolist() for trace in alone.traces]
    torch.testing.assert_close(ended.reconstructions, alone.reconstructions, rtol=0, atol=1e-7)
    patient = DIPGuard(victim, patience=2, **options)
    assert patient.settings["patience"] == 2
    # One stack of two is refilled with the other images: their results come together.
    assert [len(part.traces) for part in patient.defend_stacks(images[:4], stack_size=2)] == [4]


def test_faster_readings_give_the_same_image(images: Tensor, victim: nn.Module) -> None:
    plain, fast = (
        DIPGuard(victim, **{**QUICK, **options}).defend(images[:2])
        for options in ({}, {"victim_speed": "folded", "search": "bisection"})
    )
    assert torch.equal(fast.decisions_after, plain.decisions_after)
    assert fast.crossings == plain.crossings
    # Alpha is off by a point of its grid at most where scores are not monotone, and a crossing is one image of K.
    assert float((fast.reconstructions - plain.reconstructions).abs().mean()) < 0.01


def test_steps_per_image_is_T(victim: nn.Module) -> None:
    assert DIPGuard(victim, **QUICK).steps_per_image == 12


def test_an_images_index_settles_its_draws(images: Tensor, victim: nn.Module) -> None:
    guard = DIPGuard(victim, **QUICK)
    assert torch.equal(
        guard.purify(images[:2], indices=torch.tensor([7, 3])), guard.defend(images[:2], indices=[7, 3]).reconstructions
    )
    seventh = guard.defend(images[:1], indices=[7]).reconstructions
    assert torch.equal(seventh, guard.defend(images[:1], indices=[7]).reconstructions)
    assert not torch.equal(seventh, guard.defend(images[:1], indices=[8]).reconstructions)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_works_under_any_gradient_mode_and_leaves_the_callers_state(
    images: Tensor, victim: nn.Module, around: Any
) -> None:
    expected = DIPGuard(victim, **QUICK).purify(images[:2])
    victim.train()
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with around():
        given = images[:2].clone()
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        purified = DIPGuard(victim, **QUICK).purify(given)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (grad, inference)
    assert torch.equal(purified, expected)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]
    assert victim.training
    assert all(p.requires_grad for p in victim.parameters())


class Classifier(pl.LightningModule):
    def __init__(self, net: nn.Module, guard: DIPGuard) -> None:
        super().__init__()
        self.net, self.guard, self.seen = net, guard, []

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.append(self.guard.purify(batch))


def test_works_inside_a_test_loop_with_inference_mode(images: Tensor, victim: nn.Module) -> None:
    guard = DIPGuard(victim, **QUICK)
    module = Classifier(victim, guard)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.test(module, torch.utils.data.DataLoader(images[:4], batch_size=2), verbose=False)
    assert torch.equal(module.seen[0], guard.purify(images[:2]))
    assert len(module.seen) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_images_come_back_in_their_dtype(images: Tensor, victim: nn.Module, dtype: torch.dtype) -> None:
    assert DIPGuard(victim, **QUICK).purify(images[:1].to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (lambda x: x * 255, ValueError, r"`images` must lie in \[0, 1\], got values from"),
        (lambda x: x - 0.5, ValueError, r"`images` must lie in \[0, 1\], got values from -"),
        (lambda x: x.clone().fill_(float("nan")), ValueError, "`images` must be finite, got NaN"),
        (lambda x: x.clone().index_fill_(3, torch.tensor([4]), float("inf")), ValueError, "`images` must be finite"),
        (lambda x: x[0], ValueError, r"`images` must have 4 dimensions \[B, 3, H, W\], got shape \(3, 32, 32\)"),
        (lambda x: x[:, :1], ValueError, "`images` must have 3 channels"),
        (lambda x: x.permute(0, 2, 3, 1), ValueError, "`images` must have 3 channels"),
        (lambda x: (x * 255).byte(), TypeError, r"`images` must be floats in \[0, 1\], got torch.uint8"),
        (lambda x: x[:0], ValueError, "`images` must hold at least one image"),
        (lambda x: x.numpy(), TypeError, r"`images` must be a torch.Tensor \[B, 3, H, W\], got ndarray"),
        (lambda x: x[..., :4, :4], ValueError, "`images` must be at least 5x5 pixels for a network of 2 scales"),
    ],
)
def test_bad_images_are_named(images: Tensor, victim: nn.Module, bad: Any, error: type, message: str) -> None:
    flat = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))
    with pytest.raises(error, match=message):
        DIPGuard(flat, **QUICK).purify(bad(images[:2]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"T": 5}, ValueError, "`T` must be at least `decisions`, got T=5 and decisions=6"),
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
        ({"patience": 0}, ValueError, "`patience` must be at least 1, got 0"),
        ({"network": "huge"}, ValueError, "`network` must be one of"),
        ({"accelerator": "tpu"}, ValueError, "`accelerator` must be one of auto, cpu, gpu, got 'tpu'"),
        ({"scores": "odds"}, ValueError, "`scores` must be one of logits, probabilities, got 'odds'"),
        ({"search": "newton"}, ValueError, "`search` must be one of grid, bisection, got 'newton'"),
        ({"victim_speed": "fast"}, ValueError, "`victim_speed` must be one of as_is, folded, bfloat16, got 'fast'"),
        ({"precision": "half"}, ValueError, "`precision` must be one of float32, tf32, bfloat16, got 'half'"),
        ({"precision": "tf32", "engine": "native"}, ValueError, "`precision` 'tf32' needs `engine` 'torch' or"),
        ({"rule": ">"}, ValueError, "`rule` must be one of at_least, above"),
        ({"divide_by": "k"}, ValueError, "`divide_by` must be one of found, K"),
    ],
)
def test_bad_options_are_named(victim: nn.Module, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        DIPGuard(victim, **{**QUICK, **options})


@pytest.mark.parametrize(
    ("net", "error", "message"),
    [
        (
            nn.Conv2d(3, 4, 3),
            ValueError,
            r"`victim` must return logits \[B, C\] with C of at least 2, got shape \(1, 4, 30, 30\)",
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 1)), ValueError, r"C of at least 2, got shape \(1, 1\)"),
        (nn.LSTM(32, 4), ValueError, "input"),
    ],
)
def test_a_victim_that_gives_no_logits_is_named(images: Tensor, net: nn.Module, error: type, message: str) -> None:
    with pytest.raises((error, RuntimeError), match=message):
        DIPGuard(net, **QUICK).purify(images[:1])


class Twofold(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1), x


def test_a_victim_that_is_no_module_or_returns_no_tensor_is_named(images: Tensor) -> None:
    with pytest.raises(TypeError, match=r"`victim` must be a torch\.nn\.Module, got function"):
        DIPGuard(lambda x: x, **QUICK)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`victim` must return a floating-point tensor .* got tuple"):
        DIPGuard(Twofold(), **QUICK).purify(images[:1])


def test_probabilities_are_warned_of_and_logits_are_not(images: Tensor, victim: nn.Module) -> None:
    with pytest.warns(UserWarning, match="`victim` must return logits, but its outputs lie in"):
        DIPGuard(nn.Sequential(victim, nn.Softmax(dim=1)), **QUICK).purify(images[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        DIPGuard(victim, **QUICK).purify(images[:1])


def test_gpu_without_one_is_named(images: Tensor, victim: nn.Module) -> None:
    guard = DIPGuard(victim, accelerator="gpu", **QUICK)
    if torch.cuda.is_available():
        assert guard.purify(images[:1]).device.type == "cpu"
    else:
        with pytest.raises(ValueError, match="`accelerator` must be 'cpu' or 'auto' on a machine without a GPU"):
            guard.purify(images[:1])


def test_wrong_number_of_indices_is_named(images: Tensor, victim: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"`indices` must hold one index an image \(2\), got 1"):
        DIPGuard(victim, **QUICK).defend(images[:2], indices=[1])


def test_progress_tells_the_time_left(images: Tensor, victim: nn.Module, capfd: pytest.CaptureFixture[str]) -> None:
    DIPGuard(victim, **{**QUICK, "progress": True, "stack_size": 1}).purify(images[:2])
    shown = capfd.readouterr().err
    assert "fit: 100%" in shown
    assert "24.0/24.0" in shown


def test_settings_can_be_written_as_json(victim: nn.Module) -> None:
    import json

    settings = DIPGuard(victim, **QUICK).settings
    assert json.loads(json.dumps(settings)) == settings
    assert settings["z_scale"] == pytest.approx(1 / 30)
    assert {"T", "tau", "t0", "K", "beta", "seed", "network", "decisions", "N", "K_max", "jitter"} <= settings.keys()
