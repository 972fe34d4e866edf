"""What defences with a trained network share: weights that may be missing, and where the network runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dipguard.classifier import device_of, eval_mode
from dipguard.defenses.base import Defense
from dipguard.files import tensor_digest
from dipguard.precision import full_precision
from dipguard.victims.weights import load_state_dict_strict


class NetworkDefense(Defense):
    """A defence with a trained network, which runs in float32, without autocast and without TF32.

    A subclass sets the class of the network, and ``weights_source``, a sentence that says where weights can be found.
    ``weights`` is the path or https address of a state dict (errors are those of
    :func:`~dipguard.victims.load_state_dict_strict`); without, a defence can be built, but is `unavailable`.
    """

    network_class: ClassVar[type[nn.Module]]
    weights_source: ClassVar[str]

    def __init__(self, victim: nn.Module, *, weights: str | Path | None = None, seed: int | None = 0) -> None:
        super().__init__(victim, seed=seed)
        self.network: nn.Module | None = None
        self._digest: str | None = None
        if weights is not None:
            # Initial weights, soon overwritten, are drawn from the global generator.
            with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
                network = load_state_dict_strict(self.network_class().float(), weights, argument="weights")
            self.network = network.eval().requires_grad_(False)
            self._digest = tensor_digest(self.network.state_dict().values())
        self.versions["torch"] = torch.__version__

    @property
    def unavailable(self) -> str | None:
        """Where weights can be found if none were supplied."""
        if self.network is not None:
            return None
        return f"weights not supplied. Give `weights`, the path or https address of a state dict; {self.weights_source}"

    @property
    def settings(self) -> dict[str, Any]:
        """The options, and the weights' digest (None without weights)."""
        return {**super().settings, "weights": self._digest}

    def run(self, *inputs: Tensor) -> Tensor:
        """Return the network's float32 output on the victim's device; the first input is images [n, 3, H, W]."""
        assert self.network is not None, "purify() checks that weights are there"
        device = device_of(self.victim, inputs[0].device)
        with full_precision(device), eval_mode(self.network.to(device, torch.float32)) as network:
            return network(*(tensor.to(device, torch.float32) for tensor in inputs))
