"""Image classifiers of Hugging Face's transformers, by hub id, folder or as objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dipguard.registry import import_extra
from dipguard.victims.base import Channels, Normalised, first_line, square

_PROBE_SIDE = 512
_COLOURS = ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255))
_INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # in the order of PIL's numbers


class Unwrapped(nn.Module):
    """A classifier of transformers as a plain module; ``order`` are the channels that it expects: (2, 1, 0) for BGR."""

    def __init__(self, model: nn.Module, *, order: Sequence[int] = (0, 1, 2)) -> None:
        super().__init__()
        self.model, self.order = model, list(order)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, C] of normalised images [B, 3, H, W]."""
        ordered = images if self.order == [0, 1, 2] else images[:, self.order]
        return self.model(**{str(self.model.main_input_name): ordered}, return_dict=True).logits


def build(
    *,
    weights: str | Path | None = None,
    revision: str | None = None,
    mean: Channels = None,
    std: Channels = None,
    size: int | None = None,
) -> Normalised:
    """Any image classifier of transformers (``AutoModelForImageClassification``); code from the hub is never run.

    Normalisation, channel order and size are measured on what its ``AutoImageProcessor`` makes of one-colour images.

    Args:
        weights: Hub id such as ``google/vit-base-patch16-224``, or a folder written by ``save_pretrained`` that
            contains ``preprocessor_config.json``.
        revision: Branch, tag or commit on the hub.
        mean: Per-channel mean, for a model without processor; give ``std`` and ``size`` (pixels of the side) too.
    """
    if not weights:
        wanted = "the hub id of an image classifier, or a local folder of one"
        raise ValueError(f"`victim.weights` must be {wanted}, got none")
    source = _source(weights)
    kind = _transformers().AutoModelForImageClassification
    problem = f"no image classifier could be loaded from {source}"
    network, found = _load(kind, source, revision, problem, output_loading_info=True)
    lacking = sorted({str(key) for name in ("missing_keys", "mismatched_keys") for key in found[name]})
    if lacking:
        raise ValueError(
            f"`victim.weights`: {source} lacks {', '.join(lacking[:3])} of its {type(network).__name__}, which would "
            "stay as random as they were drawn; it is no finished image classifier"
        )
    return of_model(network.float(), mean=mean, std=std, size=size, source=source, revision=revision)


def of_model(
    network: Any, *, mean: Channels, std: Channels, size: int | None, source: str = "", revision: str | None = None
) -> Normalised:
    """A model with the preprocessing of the processor that was saved with it, or the given one."""
    source = source or str(network.config.name_or_path)
    names = dict(network.config.id2label or {})
    classes = tuple(str(names[i]) for i in range(len(names))) if set(names) == set(range(len(names))) else ()
    side = square(size)
    problem = f"{source or 'the model'} has no image processor; give `mean`, `std` and `size` as options of the victim"
    try:
        if not source:
            raise ValueError(f"`victim`: {problem}")
        processor = _load(_transformers().AutoImageProcessor, source, revision, problem)
        pictures, (order, own_mean, own_std) = _measured(processor, source)
    except (ImportError, ValueError, RuntimeError):
        if mean is None or std is None or side is None:
            raise
        return Normalised(Unwrapped(network), mean=mean, std=std, classes=classes, size=side)
    return Normalised(
        Unwrapped(network, order=order),
        mean=own_mean if mean is None else mean,
        std=own_std if std is None else std,
        classes=classes,
        size=side or (pictures.shape[2], pictures.shape[3]),
        interpolation=_interpolation(processor),
    )


def _interpolation(processor: Any) -> str:
    """How a processor resizes: by the name that timm's have, or PIL's number."""
    named = (getattr(processor, "data_config", None) or {}).get("interpolation")
    number = getattr(processor, "resample", None)
    return str(named or _INTERPOLATIONS[2 if number is None else int(number)])


def _measured(processor: Any, source: str) -> tuple[Tensor, tuple[list[int], list[float], list[float]]]:
    """What a processor makes of one-colour pictures, and what it does to colours."""
    image = import_extra("PIL.Image", owner="an image processor", extra="vision")
    colours = [image.new("RGB", (_PROBE_SIDE, _PROBE_SIDE), colour) for colour in _COLOURS]
    pictures = processor(images=colours, return_tensors="pt")["pixel_values"]
    if not isinstance(pictures, Tensor) or pictures.ndim != 4 or pictures.shape[:2] != (4, 3):
        raise ValueError(f"`victim.weights`: the image processor of {source} makes no images [B, 3, H, W]")
    return pictures, _affine(pictures, source)


def _transformers() -> Any:
    return import_extra("transformers", owner="the victim 'huggingface'", extra="huggingface")


def _load(kind: Any, source: str, revision: str | None, problem: str, **options: Any) -> Any:
    where = {"local_files_only": Path(source).is_dir(), "revision": revision or "main", "trust_remote_code": False}
    try:
        return kind.from_pretrained(source, **where, **options)
    except Exception as error:  # OSError, ValueError, KeyError, and the errors of safetensors and the transport
        raise RuntimeError(f"`victim.weights`: {problem}: {first_line(error)}") from error


def _source(weights: str | Path) -> str:
    """An existing folder, or what may be a hub id: `name` or `owner/name`."""
    path = Path(weights).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists() or isinstance(weights, Path) or weights[0] in "./~\\" or len(path.parts) > 2:
        raise FileNotFoundError(f"`victim.weights` must be a hub id or a folder with a saved model, got {weights}")
    return weights


def _affine(output: Tensor, source: str) -> tuple[list[int], list[float], list[float]]:
    """Order, mean and std of a processor with the ``output`` (x[order[c]] - mean) / std for black, red, green, blue."""
    # The middle, since some processors pad images with a border.
    middle = output[:, :, output.shape[2] // 2, output.shape[3] // 2].double()
    slope = (middle[1:] - middle[0]).T  # slope[c, i]: output channel c over input channel i
    scale, order = slope.max(dim=1)
    alone = torch.zeros_like(slope).scatter_(1, order[:, None], scale[:, None])
    if sorted(order.tolist()) != [0, 1, 2] or not torch.allclose(slope, alone, rtol=0, atol=1e-3) or min(scale) <= 0:
        problem = "does more to colours than to reorder and normalise them"
        raise ValueError(f"`victim.weights`: the image processor of {source} {problem}")
    std, back = 1 / scale, order.argsort()
    return order.tolist(), (-middle[0] * std)[back].tolist(), std[back].tolist()
