"""What the defences with a trained network share: weights that may be missing, and where the network runs."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dipguard.classifier import device_of
from dipguard.defenses.base import Purifier
from dipguard.files import tensor_digest
from dipguard.victims.weights import load_state_dict_strict


class NetworkDefense(Purifier):
    """A defence with a trained network. Without its weights it can be built, and says so, but purifies nothing.

    A subclass sets ``weights_source`` and implements `make_network`.

    Args:
        victim: as in `Purifier`; the network runs on its device, in float32 and without autocast.
        weights: path or https address of the network's state dict; None if they are not supplied.
        seed: as in `Purifier`.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: weights that do not fit or are damaged, no file, no download.
    """

    weights_source: ClassVar[str]

    def __init__(self, victim: nn.Module, *, weights: str | Path | None, seed: int) -> None:
        super().__init__(victim, seed=seed)
        self.network = None if weights is None else self._load(weights)
        self._digest = None if self.network is None else tensor_digest(self.network.state_dict().values())

    @abstractmethod
    def make_network(self) -> nn.Module:
        """Return the untrained network."""

    @property
    def unavailable(self) -> str | None:
        """Says where weights come from if none were supplied."""
        if self.network is not None:
            return None
        return (
            "weights not supplied. Give `weights`, the path or https address of a state dict; "
            f"{self.where_weights_come_from()}"
        )

    def where_weights_come_from(self) -> str:
        """A sentence for people without weights."""
        return self.weights_source

    @property
    def settings(self) -> dict[str, Any]:
        """As in `Purifier`, with the weights' digest (None where there are none) and torch's version."""
        return {**super().settings, "weights": self._digest, "versions": {"torch": torch.__version__}}

    def load_network(self, weights: str | Path) -> nn.Module:
        """Return the network with these weights, every name and shape checked."""
        return load_state_dict_strict(self.make_network().float(), weights, argument="weights")

    def run(self, *inputs: Tensor) -> Tensor:
        """The network's output for its inputs, of which images [n, 3, H, W] are the first; float32, where it ran."""
        assert self.network is not None, "purify() checks that weights are there"
        device = device_of(self.victim, inputs[0].device)
        with torch.autocast(device.type, enabled=False):
            output: Tensor = self.network.to(device)(*(tensor.to(device, torch.float32) for tensor in inputs))
        return output

    def _load(self, weights: str | Path) -> nn.Module:
        # Initial weights, soon overwritten, are drawn from the global generator.
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
            return self.load_network(weights).eval().requires_grad_(False)
