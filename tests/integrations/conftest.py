from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from .projects import DigitsModule, digits

TINY: dict[str, Any] = {"network": "small", "T": 6, "decisions": 3, "t0": 0, "tau": 0.0, "K": 3}
TINY |= {"z_scale": 0.1, "dtype": "float64"}
"""A guard's options: a fit of a fraction of a second, in float64 so that the size of its stack does not show."""


@pytest.fixture(scope="session")
def weights() -> dict[str, Any]:
    """Of a module that reads nine digits of ten, as its owner has trained it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = DigitsModule()
        x, y = digits(100, 1200, noise=0.1)
        optimiser = torch.optim.Adam(module.parameters(), lr=0.01)
        for _ in range(2):
            for part in torch.randperm(len(x)).split(64):
                optimiser.zero_grad()
                F.cross_entropy(module(x[part]), y[part]).backward()
                optimiser.step()
        return {key: value.detach().clone() for key, value in module.state_dict().items()}


@pytest.fixture
def module(weights: dict[str, Any]) -> DigitsModule:
    made = DigitsModule()
    made.load_state_dict(weights)
    return made


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """Without output; gradients, inference mode and precision stay the Trainer's own defaults."""
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    return pl.Trainer(accelerator="cpu", callbacks=[*callbacks], **{**dict.fromkeys(quiet, False), **options})
