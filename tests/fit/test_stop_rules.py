"""Stopping rules on fits: riders see every step and change nothing; a fit of their own ends when they are done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.demos.boring_classes import BoringModel
from torch import Tensor, nn

from dipguard.decision.stopping import FixedStep, PeakOfSmoothedPSNR, StopRule, WindowedVariance
from dipguard.engines.native_build import compiler
from dipguard.fit import DecideOptions, FitOptions, StitchOptions, fit_stack
from dipguard.fit.stop_rules import StopRules, fit_rules

CPU = torch.device("cpu")
T = 40
FIT = FitOptions(network="small", dtype="float64", seed=2, engine="torch")
WORKING = ["torch", pytest.param("native", marks=pytest.mark.skipif(compiler() is None, reason="no C++ compiler"))]


def rules() -> dict[str, StopRule]:
    return {
        "peak": PeakOfSmoothedPSNR(smoothing=0.2),
        "variance": WindowedVariance(window=4, patience=6),
        "early": FixedStep(3),
        "late": FixedStep(T - 1),
    }


class Watch(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(outputs["reconstructions"].clone())


def defend(images: Tensor, victim: nn.Module, *riders: pl.Callback, **decide: Any) -> Any:
    return fit_stack(
        images,
        victim=victim,
        indices=[4, 1, 7],
        fit=FIT,
        decide=DecideOptions(T=T, decisions=None, every=2, **decide),
        stitch=StitchOptions(tau=0.0, t0=0, K=1),
        device=CPU,
        callbacks=riders,
    )


@pytest.mark.parametrize("engine", WORKING)
def test_each_rule_chooses_among_the_steps_of_one_fit(images: Tensor, engine: str) -> None:
    watch, given = Watch(), images[:3]
    fit = FitOptions(network="small", dtype="float64", seed=2, engine=engine)
    found = fit_rules(given, rules=rules(), indices=[4, 1, 7], fit=fit, T=T, device=CPU, callbacks=[watch])
    assert list(found) == ["peak", "variance", "early", "late"]
    assert len(watch.seen) == T
    for name, rule in rules().items():
        for t, x in enumerate(watch.seen):
            rule.update(t, x, given.double())
        assert torch.equal(found[name].steps, rule.result().steps)
        assert torch.equal(found[name].images, rule.result().images)
        for b, t in enumerate(found[name].steps.tolist()):
            assert torch.equal(found[name].images[b], watch.seen[t][b])
    assert len(set(found["variance"].steps.tolist())) > 1


def test_riders_change_nothing_and_get_what_a_fit_of_their_own_gives(images: Tensor, victim: nn.Module) -> None:
    rider = StopRules(rules())
    with_rider, without = defend(images[:3], victim, rider), defend(images[:3], victim)
    for mine, theirs in zip(with_rider.reconstructions, without.reconstructions, strict=True):
        assert torch.equal(mine.image, theirs.image)
    for mine, theirs in zip(with_rider.traces, without.traces, strict=True):
        assert torch.equal(mine.scores, theirs.scores)
        assert torch.equal(mine.on_boundary, theirs.on_boundary)
    own = fit_rules(images[:3], rules=rules(), indices=[4, 1, 7], fit=FIT, T=T, device=CPU)
    assert rider.stopped.keys() == own.keys()
    for name, stopped in rider.stopped.items():
        assert torch.equal(stopped.steps, own[name].steps)
        assert torch.equal(stopped.images, own[name].images)
    assert rider.seconds > 0


def test_a_fit_that_retires_images_takes_no_riders(images: Tensor, victim: nn.Module) -> None:
    with pytest.raises(
        ValueError, match="`rules` must see every image to the fit's end, got a fit that retires images"
    ):
        defend(images[:3], victim, StopRules(rules()), patience=1)


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (lambda: {"fixed": FixedStep(7)}, 8),
        (lambda: {"one": FixedStep(2), "two": FixedStep(9)}, 10),
        (lambda: {"variance": WindowedVariance(window=2, patience=1)}, 150),
        (lambda: {"variance": WindowedVariance(window=2, patience=1), "peak": PeakOfSmoothedPSNR()}, 200),
    ],
)
def test_a_fit_of_their_own_ends_when_all_are_done(
    images: Tensor, make: Callable[[], dict[str, StopRule]], most: int
) -> None:
    watch = Watch()
    fit_rules(images[:2], rules=make(), indices=[0, 1], fit=FIT, T=200, device=CPU, callbacks=[watch])
    assert len(watch.seen) == most if most != 150 else len(watch.seen) <= most


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_it_works_in_any_gradient_mode_and_leaves_the_random_state(images: Tensor, around: Any) -> None:
    def found(given: Tensor) -> Tensor:
        return fit_rules(given, rules=rules(), indices=[0, 1], fit=FIT, T=T, device=CPU)["peak"].images

    expected = found(images[:2])
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    with around():
        assert torch.equal(found(images[:2].clone()), expected)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    (expected.clone().requires_grad_() * 2).sum().backward()  # an inference tensor would refuse


def test_no_rules_used_rules_and_other_modules_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match="`rules` must hold at least one rule"):
        StopRules({})
    used = rules()
    fit_rules(images[:1], rules=used, indices=[0], fit=FIT, T=T, device=CPU)
    with pytest.raises(ValueError, match=f"`t` must be {T}, the next step of this rule's one fit, got 0"):
        fit_rules(images[:1], rules=used, indices=[0], fit=FIT, T=T, device=CPU)
    with pytest.raises(RuntimeError, match=f"FixedStep chose none of the {T} steps"):
        fit_rules(images[:1], rules={"late": FixedStep(T)}, indices=[0], fit=FIT, T=T, device=CPU)
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, callbacks=[StopRules(rules())], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(TypeError, match="works on a StackedDIP, got BoringModel"):
        trainer.fit(BoringModel())
