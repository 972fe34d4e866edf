"""Stopping rules on fits: they see every step and change nothing; a fit for a rule alone ends when it is done."""

from dataclasses import replace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.callbacks.early_stopping import EarlyStoppingReason
from pytorch_lightning.demos.boring_classes import BoringModel
from torch import Tensor, nn

from dipguard.decision.stopping import FixedStep, PeakOfSmoothedPSNR, StopRule
from dipguard.fit import DecideOptions, FitOptions, StitchOptions, StopRuleCallback, fit_stack
from tests.fit.conftest import NATIVE, Watch, fit_rule, trainer

CPU = torch.device("cpu")
T = 40
FIT = FitOptions(network="small", dtype="float64", seed=2, engine="torch")


def rules() -> dict[str, StopRule]:
    return {"peak": PeakOfSmoothedPSNR(smoothing=0.2), "fixed": FixedStep(30)}


def test_early_stopping_begins_anew_with_each_fit(images: Tensor) -> None:
    stop = EarlyStopping("fit/mse", patience=1)
    stop.stopping_reason = EarlyStoppingReason.PATIENCE_EXHAUSTED  # of an earlier fit
    for image in range(2):  # it would end the second fit, which is not as good after 50 steps as the first after 200
        rule, given = FixedStep(199), images[image, None]
        found = fit_rule(given, rule=rule, indices=[image], fit=FIT, T=200, device=CPU, callbacks=[stop])
        assert stop.best_score == pytest.approx(float((found.images - given).square().mean()))
        assert stop.stopping_reason == EarlyStoppingReason.NOT_STOPPED


@pytest.mark.parametrize("engine", ["torch", pytest.param("native", marks=[NATIVE, pytest.mark.slow])])
def test_each_rule_chooses_among_the_steps_of_its_fit(images: Tensor, engine: str) -> None:
    given, chosen = images[:3], {}
    fit = replace(FIT, engine=engine)
    for name, rule in rules().items():
        watch = Watch()
        found = fit_rule(given, rule=rules()[name], indices=[4, 1, 7], fit=fit, T=T, device=CPU, callbacks=[watch])
        assert len(watch.seen) == rule.steps_needed(T)
        for t, x in enumerate(watch.seen):
            rule.update(t, x, given.double())
        assert torch.equal(found.steps, rule.result().steps)
        assert torch.equal(found.images, rule.result().images)
        for b, t in enumerate(found.steps.tolist()):
            assert torch.equal(found.images[b], watch.seen[t][b])
        chosen[name] = found.steps.tolist()
    assert len(set(chosen["peak"])) > 1


@pytest.mark.slow
def test_a_rule_changes_no_other_result(images: Tensor, victim: nn.Module) -> None:
    def defend(*callbacks: pl.Callback) -> Any:
        decide, stitch = DecideOptions(T=T, decisions=None, every=2), StitchOptions(tau=0.0, t0=0, K=1, beta=0.5)
        how = {"indices": [4, 1, 7], "fit": FIT, "decide": decide, "stitch": stitch, "device": CPU}
        return fit_stack(images[:3], victim=victim, callbacks=callbacks, **how)

    used = rules().values()
    watched, without = defend(*map(StopRuleCallback, used)), defend()
    for mine, theirs in zip(watched.reconstructions, without.reconstructions, strict=True):
        assert torch.equal(mine.image, theirs.image)
    for mine, theirs in zip(watched.traces, without.traces, strict=True):
        assert torch.equal(mine.scores, theirs.scores)
        assert torch.equal(mine.on_boundary, theirs.on_boundary)
    assert all(len(rule.result().steps) == 3 for rule in used)


@pytest.mark.parametrize(("rule", "length", "steps"), [(FixedStep(7), 200, 8), (PeakOfSmoothedPSNR(), 20, 20)])
def test_a_fit_for_a_rule_is_no_longer_than_it_needs(images: Tensor, rule: StopRule, length: int, steps: int) -> None:
    watch = Watch()
    fit_rule(images[:2], rule=rule, indices=[0, 1], fit=FIT, T=length, device=CPU, callbacks=[watch])
    assert len(watch.seen) == steps


def test_used_rules_late_steps_and_other_modules_are_refused(images: Tensor) -> None:
    used, run = rules()["peak"], {"indices": [0], "fit": FIT, "T": 6, "device": CPU}
    fit_rule(images[:1], rule=used, **run)
    with pytest.raises(ValueError, match="`t` must be 6, the next step of this rule's one fit, got 0"):
        fit_rule(images[:1], rule=used, **run)
    with pytest.raises(RuntimeError, match="FixedStep chose none of the 6 steps"):
        fit_rule(images[:1], rule=FixedStep(6), **run)
    with pytest.raises(TypeError, match="works on a StackedDIP, got BoringModel"):
        trainer(1, StopRuleCallback(rules()["peak"])).fit(BoringModel())
