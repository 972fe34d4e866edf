"""A defence as a preprocessor of the Adversarial Robustness Toolbox (ART)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dipguard.attacks.backward import straight_through
from dipguard.attacks.target import Purifies
from dipguard.integrations.inputs import InputPurifier
from dipguard.registry import import_extra


def purify_preprocessor(defense: Purifies, *, draws: str = "content", device_type: str = "cpu") -> Any:
    """Return the defence as an ``art.defences.preprocessor.PreprocessorPyTorch``.

    Use it in ``PyTorchClassifier(..., clip_values=(0, 1), preprocessing_defences=[...])``. Predictions are made on
    purified images [N, 3, H, W] in [0, 1], with the gradient of `straight_through`. ART's ``fit`` trains on the images
    as they are. ``draws``, one of :data:`~dipguard.integrations.inputs.DRAWS`, is how a random defence draws;
    ``device_type`` is ``cpu``, or ``gpu`` for torch's current one. A DIP is fitted on the device of the defence's
    victim.
    """
    purifier = InputPurifier(defense, draws=draws)
    art = import_extra("art.defences.preprocessor.preprocessor", owner="purify_preprocessor", extra="art")
    base: Any = art.PreprocessorPyTorch

    class PurifyPreprocessor(base):  # type: ignore[misc]
        params = ("purifier",)

        def __init__(self, purifier: InputPurifier) -> None:
            super().__init__(device_type=device_type, is_fitted=True, apply_fit=False, apply_predict=True)
            self.purifier = purifier

        def forward(self, x: Tensor, y: Any | None = None) -> tuple[Tensor, Any | None]:
            images = x.float()  # some attacks of ART compute in float64, its classifiers do not
            return straight_through(images, self.purifier(images)), y

    return PurifyPreprocessor(purifier)
