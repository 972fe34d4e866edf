"""Strict (every key, every shape) and safe (no pickled code) loading of weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dipguard.victims.base import first_line

_HASHED = re.compile(r"-[0-9a-f]{8,}\.[^/]*$")  # name-<start of the file's sha256>.ext, which torch.hub verifies


def load_state_dict_strict(
    module: nn.Module, path_or_url: str | Path, *, argument: str = "victim.weights"
) -> nn.Module:
    """Load a state dict into ``module`` and return the module; it is unchanged if anything is wrong.

    Reads files of ``torch.save`` (with ``weights_only=True``) and ``.safetensors`` files. The state dict may be the
    entry ``state_dict`` of a checkpoint; the prefix ``module.`` is dropped; half precision becomes float32.

    Args:
        module: Network that the weights are for.
        path_or_url: File or https address. A download is kept in torch.hub's cache; if its name ends in
            ``-<sha256 prefix>.ext``, it is verified.
        argument: Name of the option in error messages.

    Raises:
        FileNotFoundError: No file at the path.
        RuntimeError: The download failed.
        ValueError: The file is damaged, or does not hold the weights of this network.
    """
    source = str(path_or_url)
    read = _download if source.startswith("https://") else _read
    weights = _unwrap(read(source, argument=argument), source=source, argument=argument)
    problems = _problems(module.state_dict(), weights)
    if problems:
        count = sum(parameter.numel() for parameter in module.parameters())
        raise ValueError(
            f"`{argument}`: {source} does not hold the weights of this {type(module).__name__} "
            f"({len(module.state_dict())} tensors, {count:,} parameters): {'; '.join(problems)}"
        )
    module.load_state_dict(weights)
    return module


def _download(url: str, *, argument: str) -> Any:
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=bool(_HASHED.search(url)), weights_only=True
        )
    except Exception as error:  # urllib, hash, unpickling and disk errors share no base class
        raise RuntimeError(
            f"`{argument}`: the weights could not be fetched from {url}: {error}. "
            f"Download the file in another way and give its path as `{argument}`"
        ) from error


def _read(source: str, *, argument: str) -> Any:
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"`{argument}` must name an existing weights file, got {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files surface as pickle, zip, runtime, end-of-file or key errors
        raise ValueError(
            f"`{argument}`: {path} is damaged or is no state dict of torch.save or safetensors: {first_line(error)}"
        ) from error


def _unwrap(state: Any, *, source: str, argument: str) -> dict[str, Tensor]:
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"`{argument}`: {source} must hold a state dict (names -> tensors), or a dict with the entry 'state_dict'"
        )
    prefix = "module." if all(str(key).startswith("module.") for key in state) else ""
    floats = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    return {str(key).removeprefix(prefix): value for key, value in floats.items()}


def _problems(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """What keeps ``weights`` from being those of a network with the state dict ``expected``."""
    # BatchNorm's step counters came with torch 0.4.1: older files lack them, and evaluation does not use them.
    absent = [key for key in expected if key not in weights and not key.endswith("num_batches_tracked")]
    extra = [key for key in weights if key not in expected]
    wrong = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    return [
        f"{what}: {', '.join(keys[:3])}" + (f", and {len(keys) - 3} more" if len(keys) > 3 else "")
        for what, keys in (("missing", absent), ("unexpected", extra), ("of another shape", wrong))
        if keys
    ]
