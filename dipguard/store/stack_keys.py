"""The keys of one stack of images."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dipguard.fit import DecideOptions, FitOptions
from dipguard.store.folder import TraceStore
from dipguard.store.keys import decide_parts, digest_of, engine_of, fit_keys, fit_parts, network_name


class StackKeys:
    """What the entries of B images are called, and what their headers say.

    Args:
        images: x0, [B, 3, H, W] in [0, 1].
        indices: Their indices.
        fit: How they are fitted.
        T: Length of the fit, which settles what the engine ``auto`` is.
        device: Where they are fitted.
        logits: What the victim says of the first image, [1, C], where somebody has asked it already.

    Attributes:
        indices: Their indices.
        engine: The engine's name.
        fits: The key of each image's fit.
        logits: As given.

    Raises:
        ValueError: An engine that cannot run here, or images too small for the network.
    """

    def __init__(
        self,
        images: Tensor,
        *,
        indices: Sequence[int],
        fit: FitOptions,
        T: int,
        device: torch.device,
        logits: Tensor | None = None,
    ) -> None:
        self.indices = [int(i) for i in indices]
        self._size, self._fit, self._device = (images.shape[-2], images.shape[-1]), fit, device
        self.engine = self.engine_at(T)
        self._parts = fit_parts(fit, engine=self.engine, device=device)
        self._digests, self.fits = fit_keys(images, self.indices, self._parts, dtype=fit.dtype)
        self.logits = logits
        self._traces: dict[DecideOptions, list[str]] = {}

    def engine_at(self, T: int) -> str:
        """The engine of a fit of T steps."""
        return engine_of(self._fit, T=T, size=self._size, device=self._device)

    def traces(self, victim: nn.Module, decide: DecideOptions) -> list[str]:
        """The key of each image's trace, as this victim decides; it is the same one at each call."""
        if decide not in self._traces:
            decided = digest_of(decide_parts(victim, decide))
            self._traces[decide] = [digest_of([key, decided]) for key in self.fits]
        return self._traces[decide]

    def part(self, rows: slice) -> StackKeys:
        """The keys of these images alone."""
        some = copy.copy(self)
        some.indices, some.fits, some._digests = self.indices[rows], self.fits[rows], self._digests[rows]
        some._traces = {decide: keys[rows] for decide, keys in self._traces.items()}
        some.logits = self.logits if rows.indices(len(self.fits))[0] == 0 else None
        return some

    def about(self, b: int) -> dict[str, Any]:
        """What the header of an entry of image b says."""
        return {
            "network": network_name(self._fit),
            "parts": self._parts,
            "image": self._digests[b],
            "index": self.indices[b],
            "fit": self.fits[b],
        }


def holds_traces(store: TraceStore, keys: Sequence[str]) -> bool:
    """Whether there is a trace for each of these keys, as far as the files' names tell."""
    return all(store.cache.get(("traces", key)) is not None or store.file("traces", key).is_file() for key in keys)
