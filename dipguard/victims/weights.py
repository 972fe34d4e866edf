"""Strict (every key, every shape) and safe (no pickled code) loading of weights."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from dipguard.cache import cache_folder
from dipguard.files import file_digest, write_text
from dipguard.victims.base import first_line

HASHED = re.compile(r"-(?!20\d\d[01]\d[0-3]\d\.)([0-9a-f]{8,})\.[^/]*$")
"""Finds the start of the file's SHA-256 in names like torch.hub's, ``name-0123abcd.pt``, but not a date."""
_ENTRIES = ("state_dict", "model_state_dict", "model", "net")


def load_state_dict_strict(
    module: nn.Module, path_or_url: str | Path, *, argument: str = "victim.weights"
) -> nn.Module:
    """Load a state dict into ``module`` and return the module; it is unchanged if anything is wrong.

    Reads ``.safetensors`` and, with ``weights_only=True``, files of ``torch.save``. The state dict may be an entry of a
    checkpoint (``state_dict``, ``model_state_dict``, ``model``, ``net``), and all its names may have a prefix
    (``model.``, ``module.``, ``_orig_mod.``). Half precision becomes float32. Downloads are kept in the cache folder by
    their address; their SHA-256 is checked each time. Messages call the option ``argument``. FileNotFoundError or
    RuntimeError without a file or a download, ValueError for one that is damaged, holds other objects than tensors, or
    the weights of another network.
    """
    source, expected = str(path_or_url), module.state_dict()
    path = _download(source, argument=argument) if source.startswith("https://") else Path(source).expanduser()
    weights = _unwrap(_read(path, argument=argument), expected, source=source, argument=argument)
    if problems := _problems(expected, weights):
        count = sum(parameter.numel() for parameter in module.parameters())
        network = f"{type(module).__name__} ({len(expected)} tensors, {count:,} parameters)"
        raise ValueError(f"`{argument}`: {source} does not hold the weights of this {network}: {'; '.join(problems)}")
    module.load_state_dict(weights)
    return module


def _download(url: str, *, argument: str) -> Path:
    name = Path(urlsplit(url).path).name
    path = cache_folder("weights", hashlib.sha256(url.encode()).hexdigest()[:16], name)
    record, prefix = path.with_name("SHA256"), "".join(HASHED.findall(name))
    with suppress(OSError):
        if record.read_text() == (digest := file_digest(path)) and digest.startswith(prefix):
            return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix or None)
        write_text(record, file_digest(path))
    except Exception as error:  # urllib, hash and disk errors share no base class
        advice = f"Download the file in another way and give its path as `{argument}`"
        raise RuntimeError(f"`{argument}`: the weights could not be fetched from {url}: {error}. {advice}") from error
    return path


def _read(path: Path, *, argument: str) -> Any:
    if not os.path.isfile(path):  # False also in a folder that may not be searched, where Path's raises an error
        raise FileNotFoundError(f"`{argument}` must name an existing weights file, got {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files surface as pickle, zip, runtime, end-of-file or key errors
        problem = f"is damaged or is no state dict of torch.save or safetensors: {first_line(error)}"
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):
            problem = (
                f"holds pickled objects besides tensors ({foreign[1]}), which could run code and are not loaded: save "
                "its state dict alone, by torch.save(checkpoint['state_dict'], ...)"
            )
        raise ValueError(f"`{argument}`: {path} {problem}") from error


def _unwrap(state: Any, expected: Mapping[str, Tensor], *, source: str, argument: str) -> dict[str, Tensor]:
    if isinstance(state, Mapping):
        state = next((state[name] for name in _ENTRIES if isinstance(state.get(name), Mapping)), state)
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        wanted = f"a state dict (names -> tensors), or a dict with one of the entries {', '.join(_ENTRIES)}"
        raise ValueError(f"`{argument}`: {source} must hold {wanted}")
    weights = {
        str(key): value.to(torch.promote_types(value.dtype, torch.float32)) if value.is_floating_point() else value
        for key, value in state.items()
    }
    # Lightning, DataParallel and torch.compile put the name of their attribute before every name.
    first = next(iter(weights))
    for prefix in ("", *(first[: dot.end()] for dot in re.finditer(r"\.", first))):
        shared = all(name.startswith(prefix) for name in weights)
        if shared and not expected.keys().isdisjoint(name.removeprefix(prefix) for name in weights):
            return {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _problems(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    # BatchNorm's step counters came with torch 0.4.1: older files lack them, and evaluation does not use them.
    absent = [key for key in expected if key not in weights and not key.endswith("num_batches_tracked")]
    extra = [key for key in weights if key not in expected]
    shapes = {key: (tuple(weights[key].shape), tuple(expected[key].shape)) for key in expected if key in weights}
    wrong = [f"{key} {own} instead of {other}" for key, (own, other) in shapes.items() if own != other]
    return [
        f"{what}: {', '.join(keys[:3])}" + (f", and {len(keys) - 3} more" if len(keys) > 3 else "")
        for what, keys in (("missing", absent), ("unexpected", extra), ("of another shape", wrong))
        if keys
    ]
