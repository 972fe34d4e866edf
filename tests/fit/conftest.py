"""A few natural images and a victim with smooth decisions, so that fits cross boundaries; Trainers and callbacks."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional as F

from dipguard.decision.stopping import Stopped, StopRule
from dipguard.engines.native_build import compiler
from dipguard.fit import StopRuleCallback, run_fit

NATIVE = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
WORKING = ["torch", pytest.param("native", marks=NATIVE)]
"""Engines that a CPU may have."""


def trainer(T: int | None, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """Of T steps (None: `max_steps` is not given), on the CPU, without logs, files and bars."""
    steps = {} if T is None else {"max_steps": T}
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return pl.Trainer(accelerator="cpu", callbacks=[*callbacks], **{**steps, **dict.fromkeys(quiet, False), **options})


def fit_rule(images: Tensor, *, rule: StopRule, T: int, callbacks: Sequence[pl.Callback] = (), **run: Any) -> Stopped:
    """Fit networks for a fresh stopping rule alone, and no longer than it needs; what it chose."""
    run_fit(images, T=rule.steps_needed(T), callbacks=[StopRuleCallback(rule), *callbacks], **run)
    return rule.result()


class Watch(pl.Callback):
    """Keeps every x(t)."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(outputs["reconstructions"].clone())


class At(pl.Callback):
    """Does something, perhaps to the Trainer, after one step."""

    def __init__(self, step: int, act: Callable[[pl.Trainer], object]) -> None:
        self.step, self.act = step, act

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if outputs["step"] == self.step:
            self.act(trainer)


def stop(trainer: pl.Trainer) -> None:
    trainer.should_stop = True


@pytest.fixture(scope="session")
def images() -> Tensor:
    """Eight 32x32 crops of scikit-learn's two photographs, reduced eightfold, [8, 3, 32, 32] in [0, 1]."""
    photographs = [torch.from_numpy(p.copy()).permute(2, 0, 1).float() / 255 for p in load_sample_images().images]
    small = [F.avg_pool2d(p, 8)[:, :32, 16 * k : 16 * k + 32] for p in photographs for k in range(3)]
    small += [F.avg_pool2d(p, 12)[:, 2:34, 4:36] for p in photographs]
    return torch.stack(small)


@pytest.fixture(scope="session")
def victim() -> nn.Module:
    """A random classifier of ten classes with BatchNorm and dropout, in train mode as a careless user leaves it."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        first, second = nn.Conv2d(3, 16, 5, stride=2), nn.Conv2d(16, 32, 3, stride=2)
        head = nn.Dropout(0.5), nn.Flatten(), nn.Linear(32 * 36, 10)
        net = nn.Sequential(first, nn.BatchNorm2d(16), nn.ReLU(), second, nn.ReLU(), *head)
    with torch.no_grad():
        net[-1].weight *= 8
    return net


@pytest.fixture(scope="session")
def undecided(images: Tensor) -> nn.Module:
    """A linear classifier that reads nothing from these images themselves, so that small changes of them decide."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 3072, generator=draw)
    basis, _ = torch.linalg.qr(torch.cat([images.flatten(1), torch.ones(1, 3072)]).T)
    linear = nn.Linear(3072, 10, bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight - (weight @ basis) @ basis.T)
    return nn.Sequential(nn.Flatten(), linear)
