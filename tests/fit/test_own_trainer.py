"""The module and its callbacks in anybody's own Trainer: what Lightning offers works, what cannot work is refused."""

import copy
import csv
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.profilers import SimpleProfiler
from torch import Tensor, nn

from dipguard.decision import quality
from dipguard.fit import (
    BoundaryDetector,
    DecideOptions,
    DecisionLogger,
    FitOptions,
    StackedDIP,
    StackResult,
    Stitcher,
    StitchOptions,
    fit_stack,
    make_trainer,
    run_fit,
)
from tests.docs_blocks import run_python
from tests.fit.conftest import NATIVE, At, Watch, stop, trainer

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = FitOptions(network="small", engine="torch")
STITCH = {"tau": 0.1, "t0": 2, "K": 5, "beta": 0.5}


def ours(victim: nn.Module, **decide: Any) -> tuple[DecisionLogger, BoundaryDetector, Stitcher]:
    return DecisionLogger(victim, **decide), BoundaryDetector(victim), Stitcher(**STITCH)


def equal(mine: Stitcher, theirs: Stitcher | StackResult) -> bool:
    pairs = zip(mine.traces, theirs.traces, strict=True)
    images = zip(mine.reconstructions, theirs.reconstructions, strict=True)
    return all(a.equals(b) for a, b in pairs) and all(torch.equal(a.image, b.image) for a, b in images)


@pytest.fixture(scope="module")
def fifty_two(images: Tensor, undecided: nn.Module) -> StackResult:
    return fit_stack(
        images[:2], victim=undecided, indices=[0, 1], fit=SMALL, decide=DecideOptions(T=52),
        stitch=StitchOptions(**STITCH), device=CPU,
    )  # fmt: skip


@pytest.mark.parametrize(("steps_per_epoch", "epochs"), [(None, 2), pytest.param(7, 8, marks=pytest.mark.slow)])
def test_epochs_change_no_number(images, undecided, fifty_two, steps_per_epoch, epochs) -> None:
    callbacks = ours(undecided)
    own = trainer(52, *callbacks)
    own.fit(StackedDIP(images[:2], options=SMALL, steps_per_epoch=steps_per_epoch))
    assert own.current_epoch == epochs
    assert equal(callbacks[-1], fifty_two)
    for trace in callbacks[-1].traces:
        assert trace.steps.tolist() == list(range(52))
        assert len(trace.crossing_at) > 0


def test_early_stopping_really_stops(images: Tensor, undecided: nn.Module) -> None:
    callbacks = ours(undecided)
    own = trainer(1000, *callbacks, EarlyStopping("fit/mse", min_delta=0.01, patience=1))
    module = StackedDIP(images[:1], options=SMALL, steps_per_epoch=20)
    own.fit(module)
    assert 40 <= module.step < 500
    assert module.step % 20 == 0
    (trace,) = callbacks[-1].traces
    assert trace.settings["T"] == 1000
    assert trace.settings["ended_after"] == module.step
    assert int(trace.steps[-1]) == module.step - 1
    assert set(own.callback_metrics) == {"fit/mse", "fit/quality", "fit/crossings", "fit/decision_changed"}


def test_a_metric_that_needs_the_victim_can_be_monitored_in_a_small_stack(images: Tensor, undecided: nn.Module) -> None:
    stop = EarlyStopping("fit/crossings", mode="max", stopping_threshold=2.5, patience=100)
    callbacks = ours(undecided, decisions=None, every=2)
    module = StackedDIP(images[:1], options=SMALL, steps_per_epoch=10)
    trainer(200, *callbacks, stop).fit(module)
    assert module.step < 200
    (trace,) = callbacks[-1].traces
    changes = trace.decisions[1:] != trace.decisions[:-1]
    before = trace.steps[1:] < module.step - 10
    assert int(changes.sum()) >= 3 > int(changes[before].sum()), "it stops at the end of the very epoch"


def test_metrics_are_those_of_the_last_sample(images: Tensor, undecided: nn.Module) -> None:
    callbacks = ours(undecided, decisions=6)
    own = trainer(30, *callbacks)
    own.fit(StackedDIP(images[:2], options=SMALL))
    traces = callbacks[-1].traces
    wanted = {
        "fit/mse": torch.stack([t.loss[-1] for t in traces]).mean(),
        "fit/quality": torch.stack([t.quality[-1] for t in traces]).mean(),
        "fit/crossings": sum(int((t.decisions[1:] != t.decisions[:-1]).sum()) for t in traces) / 2,
        "fit/decision_changed": sum(int(t.decisions[-1]) != t.given_decision for t in traces) / 2,
    }
    found, expected = ({name: float(v) for name, v in of.items()} for of in (own.callback_metrics, wanted))
    assert found == pytest.approx(expected, abs=1e-6)


def test_callbacks_serve_a_second_fit(images: Tensor, undecided: nn.Module) -> None:
    again, other = ours(undecided, decisions=10), ours(undecided, decisions=10)
    trainer(10, *again).fit(StackedDIP(images[:1], options=SMALL))
    for callbacks in (again, other):
        trainer(20, *callbacks).fit(StackedDIP(images[1:3], indices=[5, 6], options=SMALL))
    assert equal(again[-1], other[-1])
    assert [trace.index for trace in again[-1].traces] == [5, 6]


def test_a_checkpoint_holds_the_weights_and_is_chosen_by_a_metric(images, victim, tmp_path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="fit/quality", mode="max", save_top_k=-1)
    fit = FitOptions(network="small", engine="auto")  # of 100 steps: native where there is a compiler
    fitted = StackedDIP(images[:1], options=fit, steps_per_epoch=45)
    trainer(100, *ours(victim), checkpoint, enable_checkpointing=True).fit(fitted)
    names = ["epoch=0-step=45.ckpt", "epoch=1-step=90.ckpt", "epoch=2-step=100.ckpt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    module = StackedDIP(images[:1], options=fit)
    module.load_state_dict(torch.load(tmp_path / names[-1], weights_only=True)["state_dict"])
    with torch.no_grad():
        torch.testing.assert_close(module(module.z), fitted(fitted.z), rtol=0, atol=1e-5)
    assert Path(checkpoint.best_model_path).parent == tmp_path


def test_a_logger_and_a_profiler(images: Tensor, victim: nn.Module, tmp_path: Path) -> None:
    logger, profiler = CSVLogger(tmp_path, name="", version=""), SimpleProfiler(tmp_path, "profile")
    callbacks = ours(victim, decisions=6, first_step=1000)
    own = trainer(30, *callbacks, logger=logger, profiler=profiler, log_every_n_steps=1)
    own.fit(StackedDIP(images[:2], options=SMALL, steps_per_epoch=8))
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert {"fit/mse", "fit/quality", "fit/decision_changed", "fit/crossings"} <= rows[0].keys()
    assert [int(row["step"]) for row in rows] == [1004, 1009, 1014, 1019, 1024, 1029]
    for i, row in enumerate(rows):
        loss = torch.stack([trace.loss[i] for trace in callbacks[-1].traces]).mean()
        assert float(row["fit/mse"]) == pytest.approx(float(loss))
    text = next(tmp_path.glob("*profile*")).read_text()
    assert "DecisionLogger.on_train_batch_end" in text.replace("[Callback]", "")


@pytest.mark.parametrize("precision", ["bf16-mixed", pytest.param("64-true", marks=pytest.mark.slow)])
def test_precision_is_the_trainers(images: Tensor, undecided: nn.Module, precision: str) -> None:
    callbacks, exact = ours(undecided, decisions=10), ours(undecided, decisions=10)
    fit = FitOptions(network="small", jitter=0.1)
    trainer(12, *exact).fit(StackedDIP(images[:2], options=fit))
    module = StackedDIP(images[:2], options=fit)
    trainer(12, *callbacks, precision=precision).fit(module)
    wide = precision == "64-true"
    for trace, wanted in zip(callbacks[-1].traces, exact[-1].traces, strict=True):
        assert trace.last.dtype == (torch.float64 if wide else torch.float32)
        assert trace.settings["dtype"] == ("float64" if wide else "float32")
        # The same draws and the same fit, but for rounding.
        torch.testing.assert_close(trace.loss[0].float(), wanted.loss[0], rtol=1e-5 if wide else 0.02, atol=0)
        assert not torch.equal(trace.loss.float(), wanted.loss)
        assert 0.5 < float(trace.loss[-1] / wanted.loss[-1]) < 2
    if wide:
        double = ours(undecided, decisions=10)
        trainer(12, *double).fit(StackedDIP(images[:2], options=replace(fit, dtype="float64")))
        torch.testing.assert_close(callbacks[-1].traces[0].loss, double[-1].traces[0].loss, rtol=1e-4, atol=0)


def test_gradients_are_clipped_in_mixed_precision(images: Tensor, undecided: nn.Module) -> None:
    clipped = {"gradient_clip_val": 1e-12, "gradient_clip_algorithm": "value", "precision": "bf16-mixed"}
    fitted = []
    for more in ({}, clipped):
        module = StackedDIP(images[:1], options=SMALL)
        trainer(3, *ours(undecided, decisions=2), **more).fit(module)
        fitted.append(module.net.head.bias.detach().float())
    start = StackedDIP(images[:1], options=SMALL).net.head.bias
    moved = [float((bias - start).abs().max()) for bias in fitted]
    assert moved[1] < 0.01 * moved[0], "Adam's epsilon is large beside such gradients"


def test_an_epochs_metrics_are_not_rounded_by_mixed_precision(images: Tensor) -> None:
    watch, module = Watch(), StackedDIP(images[:2], options=FitOptions(network="small"))
    run = trainer(12, watch, precision="bf16-mixed")
    run.fit(module)
    expected = float(quality(watch.seen[-1], module.given).mean())
    assert float(run.callback_metrics["fit/quality"]) == pytest.approx(expected, abs=1e-5)


class Smooth(StackedDIP):
    """With a total-variation regulariser."""

    weight = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = super().training_step(batch, batch_idx)
        x = out["reconstructions"]
        out["loss"] = out["loss"] + self.weight * (x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean())
        return out


def test_a_regulariser_changes_the_result(images: Tensor, undecided: nn.Module) -> None:
    class Weightless(Smooth):
        weight = 0.0

    found = {}
    for kind in (StackedDIP, Weightless, Smooth):
        callbacks = ours(undecided, decisions=10)
        module = kind(images[:1], options=FitOptions(network="small", engine="auto" if kind is Smooth else "torch"))
        trainer(30, *callbacks).fit(module)
        assert module.engine.name == "torch"
        (trace,) = callbacks[-1].traces
        assert not trace.last.requires_grad
        found[kind] = trace
    rough = {kind: float(trace.last[-1].diff(dim=-1).abs().mean()) for kind, trace in found.items()}
    assert rough[Smooth] < 0.5 * rough[Weightless]
    torch.testing.assert_close(found[Weightless].loss[:3], found[StackedDIP].loss[:3], rtol=1e-5, atol=0)
    assert not torch.allclose(found[Smooth].loss, found[Weightless].loss, rtol=0.01)


def test_engines_without_gradients_are_refused_for_a_loss_of_ones_own(images: Tensor) -> None:
    native = FitOptions(network="small", engine="native")
    with pytest.raises(ValueError, match="`engine` 'native' has no gradients through the reconstructions"):
        trainer(4).fit(Smooth(images[:1], options=native))
    with pytest.raises(ValueError, match="`precision` 'bf16-mixed' of the Trainer needs `engine` 'auto' or 'torch'"):
        trainer(4, precision="bf16-mixed").fit(StackedDIP(images[:1], options=native))


@pytest.mark.parametrize("precision", ["16-mixed", "64-true"])
def test_a_trainers_precision_and_ours_together_are_refused(images: Tensor, precision: str) -> None:
    module = StackedDIP(images[:1], options=FitOptions(network="small", engine="torch", matmul_precision="bfloat16"))
    # Lightning itself turns 16-mixed into bf16-mixed on a CPU.
    needed = f"`precision` '(bf)?{precision}' of the Trainer needs `matmul_precision` 'float32', got 'bfloat16'"
    with pytest.raises(ValueError, match=needed):
        trainer(4, precision=precision).fit(module)


def test_an_output_of_another_kind_is_named(images: Tensor, victim: nn.Module) -> None:
    class Bare(StackedDIP):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(self.z).sum()

    with pytest.raises(TypeError, match=r"must return the dict of StackedDIP\.training_step, .* got \['loss'\]"):
        trainer(4, DecisionLogger(victim)).fit(Bare(images[:1], options=SMALL))


@pytest.mark.parametrize(
    ("T", "options", "message"),
    [
        (None, {"max_epochs": 3}, r"the Trainer must be the number T .* got max_steps=-1 \(max_epochs=3\)"),
        (None, {}, "`max_steps` of the Trainer must be the number T"),
        (40, {"accumulate_grad_batches": 2}, "`accumulate_grad_batches` of the Trainer must be 1, got 2"),
        (40, {"limit_train_batches": 0}, "`limit_train_batches` of the Trainer must leave a step, got 0"),
        (40, {"limit_train_batches": 5, "max_epochs": 7}, "`max_epochs` of the Trainer must allow for all 40 steps"),
        (40, {"precision": "bf16-true"}, "`precision` of the Trainer must be one of 32-true.*got 'bf16-true'"),
    ],
)
def test_a_trainer_that_cannot_fit_is_told_why(images, victim, T, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(T, *ours(victim), **options).fit(StackedDIP(images[:1], options=SMALL))


def test_accumulation_by_a_callback_is_refused_too(images: Tensor, victim: nn.Module) -> None:
    later = GradientAccumulationScheduler({0: 1, 1: 4})
    with pytest.raises(ValueError, match="`accumulate_grad_batches` of the Trainer must be 1, got 4"):
        trainer(40, *ours(victim), later).fit(StackedDIP(images[:1], options=SMALL))


def test_a_strategy_of_several_processes_is_refused_even_with_one(images: Tensor, victim: nn.Module) -> None:
    try:
        with pytest.raises(ValueError, match=r"`strategy` of the Trainer must be that of a single .* got DDPStrategy"):
            trainer(40, *ours(victim), strategy="ddp", devices=1).fit(StackedDIP(images[:1], options=SMALL))
    finally:
        torch.distributed.destroy_process_group()


def test_max_epochs_beside_max_steps(images: Tensor, victim: nn.Module) -> None:
    module = StackedDIP(images[:1], options=SMALL)
    trainer(60, max_epochs=1).fit(module)
    assert module.step == 60
    for few in ({"limit_train_batches": 5}, {"limit_train_batches": 0.5, "max_epochs": 2}, {"overfit_batches": 2}):
        module = StackedDIP(images[:1], options=SMALL)
        trainer(20, **few).fit(module)
        assert module.step == 20
    with pytest.raises(ValueError, match="`max_epochs` of the Trainer must allow for all 120 steps, got 2 epochs of"):
        trainer(120, max_epochs=2).fit(StackedDIP(images[:1], options=SMALL, steps_per_epoch=50))
    with pytest.raises(ValueError, match="`steps_per_epoch` must be at least 1, got 0"):
        StackedDIP(images[:1], steps_per_epoch=0)


def test_a_fit_that_begins_in_the_middle_is_refused(images: Tensor, victim: nn.Module, tmp_path: Path) -> None:
    own, module = trainer(20), StackedDIP(images[:1], options=SMALL)
    own.fit(module)
    with pytest.raises(RuntimeError, match="must be fitted once, got one whose networks are fitted already"):
        trainer(40).fit(module)
    own.save_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(RuntimeError, match="must start at step 0, got a Trainer at step 20"):
        own.fit(StackedDIP(images[:1], options=SMALL))
    with pytest.raises(RuntimeError, match=r"got a Trainer at step 20.*without `ckpt_path`"):
        trainer(40, *ours(victim)).fit(
            StackedDIP(images[:1], options=SMALL), ckpt_path=tmp_path / "half.ckpt", weights_only=True
        )


def test_a_fit_that_ends_before_the_first_sample_is_an_error(images: Tensor, victim: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="ended after 3 of 40 steps, before the first sample at step 9"):
        trainer(40, *ours(victim, decisions=4), At(2, stop)).fit(StackedDIP(images[:1], options=SMALL))
    with pytest.raises(ValueError, match="`every` must be from 1 to 2, got 10"):
        trainer(5, *ours(victim, every=10)).fit(StackedDIP(images[:1], options=SMALL))
    callbacks = ours(victim)
    trainer(1, *callbacks).fit(StackedDIP(images[:1], options=SMALL))
    assert callbacks[-1].traces[0].steps.tolist() == [0]


def test_other_data_than_its_own_images_is_refused(images: Tensor) -> None:
    module = StackedDIP(images[:1], options=SMALL)
    with pytest.raises(ValueError, match="must be given no data: a StackedDIP fits the images that it was made with"):
        trainer(3).fit(module, [images[1:2]])
    trainer(3).fit(StackedDIP(images[:1], options=SMALL))


def test_what_was_fitted_is_in_the_loggers_settings(images: Tensor, tmp_path: Path) -> None:
    module = StackedDIP(images[:1], options=SMALL, steps_per_epoch=2)
    trainer(3, logger=CSVLogger(tmp_path, name="", version="")).fit(module)
    saved = yaml.safe_load((tmp_path / "hparams.yaml").read_text())
    assert saved == {"fit/steps_per_epoch": 2, **{f"fit/{name}": value for name, value in SMALL.as_settings().items()}}


def test_what_was_asked_for_is_said(images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[str] = []
    handler = logging.StreamHandler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger("pytorch_lightning").addHandler(handler)
    stop = EarlyStopping("fit/mse", patience=1, min_delta=1.0, check_on_train_epoch_end=True, verbose=True)
    try:
        with caplog.at_level(logging.INFO, logger="dipguard"):
            run_fit(
                images[:1], T=300, indices=[0], fit=SMALL, device=CPU, callbacks=[stop], trainer={"profiler": "simple"}
            )
    finally:
        logging.getLogger("pytorch_lightning").removeHandler(handler)
    assert any("Profiler Report" in text for text in heard)
    assert any("Metric fit/mse improved" in text for text in heard)
    assert not any("GPU available" in text for text in heard)
    assert "a fit of 1 image(s) ended after 100 of 300 steps" in caplog.text


def test_further_arguments_of_our_own_trainer(images: Tensor, tmp_path: Path) -> None:
    made = make_trainer(7, device=CPU, trainer={"precision": "64-true", "profiler": "simple"})
    assert (made.max_steps, made.precision, type(made.profiler)) == (7, "64-true", SimpleProfiler)
    assert make_trainer(7, device=CPU, callbacks=[ModelCheckpoint(tmp_path)]).checkpoint_callbacks
    owned = {"max_steps": 3, "devices": 2, "accelerator": "gpu", "logger": True, "strategy": "ddp", "barebones": True}
    for name, value in {**owned, "limit_train_batches": 5, "val_check_interval": 2}.items():
        with pytest.raises(ValueError, match=f"`trainer` must leave `{name}` to the fit, got {name}={value!r}"):
            make_trainer(7, device=CPU, trainer={name: value})
    with pytest.raises(TypeError, match="bogus"):
        make_trainer(7, device=CPU, trainer={"bogus": 1})
    for algorithm in ({}, {"gradient_clip_algorithm": "norm"}):
        with pytest.raises(ValueError, match="must clip gradients by value, since a norm is that of all images"):
            make_trainer(7, device=CPU, trainer={"gradient_clip_val": 0.1, **algorithm})
    assert make_trainer(7, device=CPU, trainer={"gradient_clip_val": 0}).gradient_clip_val == 0


@pytest.mark.slow
def test_the_documents_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_python(ROOT / "docs" / "own_trainer.md", instead={}) == 4


@NATIVE
def test_optimisers_that_would_fit_nothing_or_lose_count_are_refused(images: Tensor) -> None:
    class Own(StackedDIP):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    class Again(StackedDIP):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.engine.parameters(), max_iter=3)

    native = FitOptions(network="small", engine="native")
    with pytest.raises(RuntimeError, match=r"must optimise `self.engine.parameters\(\)`.* engine 'native'"):
        trainer(3).fit(Own(images[:1], options=native))
    trainer(3).fit(Own(images[:1], options=SMALL))
    with pytest.raises(RuntimeError, match="the optimiser must call its closure once a step"):
        trainer(3).fit(Again(images[:1], options=native))


@pytest.mark.parametrize("engine", ["torch", pytest.param("native", marks=NATIVE)])
def test_a_fitted_module_can_be_copied(images: Tensor, engine: str) -> None:
    module = StackedDIP(images[:1], options=FitOptions(network="small", engine=engine, jitter=0.1))
    trainer(3).fit(module)
    assert torch.equal(copy.deepcopy(module)(module.z), module(module.z))


def test_a_callback_may_monitor_several_metrics(images: Tensor, undecided: nn.Module) -> None:
    class Watching(pl.Callback):
        def __init__(self) -> None:
            self.monitor = ["fit/mse", "fit/crossings"]

    mine = ours(undecided)
    trainer(6, *mine, Watching()).fit(StackedDIP(images[:1], options=SMALL))
    assert len(mine[2].reconstructions) == 1
