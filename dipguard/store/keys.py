"""What a fit depends on, and what a victim's view of it depends on besides: the names of the store's files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache, lru_cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from dipguard.checks import check_int
from dipguard.classifier import device_of
from dipguard.decision import sampled_steps
from dipguard.engines import make_engine
from dipguard.engines.base import SHORT
from dipguard.engines.native_build import FLAGS, SOURCES
from dipguard.files import tensor_digest
from dipguard.fit import DecideOptions, FitOptions, StackedDIP
from dipguard.fit.module import DTYPES
from dipguard.fit.runner import apart
from dipguard.networks import NetworkSpec, resolve
from dipguard.version import __version__

NUMERICS = 1
"""Raised by whoever changes dipguard's fit, SSIM or decisions so that their numbers change."""

_engines: dict[Any, str] = {}


def digest_of(parts: Any) -> str:
    """A digest of JSON values, 32 hex digits; the order of keys plays no role."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@lru_cache(maxsize=64)
def fit_parts(fit: FitOptions, *, engine: str, device: torch.device) -> dict[str, Any]:
    """What x(t), v(t) and the loss depend on besides the image and its index, as JSON can hold it.

    Not T: x(t) is the same in every fit that gets as far as t. Not the victim, whom a fit never asks. Versions are
    those that change the numbers: torch (draws, kernels), torchmetrics (SSIM), the native engine's sources, and
    ``NUMERICS``. Rounding that is not named: another processor, another GPU; and, but for the native engine, the number
    of images in a stack.

    Args:
        fit: How it is fitted.
        engine: The engine's name, once ``auto`` is decided (:func:`engine_of`).
        device: Where it is fitted.

    Returns:
        The same dict each time; never to be changed.
    """
    versions: dict[str, Any] = {"numerics": NUMERICS, "torch": torch.__version__, "torchmetrics": _torchmetrics()}
    if engine == "native":
        versions["native"] = _native_sources()
    return {
        **fit.as_settings(),
        "network": asdict(resolve(fit.network)),
        "engine": engine,
        "device": device.type,
        "versions": versions,
    }


def fit_keys(
    images: Tensor, indices: Sequence[int], parts: Mapping[str, Any], *, dtype: str
) -> tuple[list[str], list[str]]:
    """Each image's own digest, and the key of its fit.

    Args:
        images: x0, [B, 3, H, W].
        indices: Their indices, which settle their draws.
        parts: :func:`fit_parts`.
        dtype: The fit's, in which the images are compared.
    """
    common = digest_of(parts)
    values = images.detach().to(device="cpu", dtype=DTYPES[dtype])
    digests = [tensor_digest([image]) for image in values]
    keys = [digest_of([common, digest, int(i)]) for digest, i in zip(digests, indices, strict=True)]
    return digests, keys


def decide_parts(victim: nn.Module, decide: DecideOptions) -> dict[str, Any]:
    """What a trace depends on besides its fit: the victim, the sampled steps, N and the scores of Eq. 5.

    ``K_max`` is not among them: a trace serves every smaller one.
    """
    steps = sampled_steps(decide.T, decisions=decide.decisions, every=decide.every)
    aside = ("T", "decisions", "every", "K_max", "keep_samples", "patience")
    own = {name: value for name, value in asdict(decide).items() if name not in aside}
    return {**own, "steps": list(steps), "victim": victim_digest(victim), "victim_on": device_of(victim).type}


def victim_digest(victim: nn.Module) -> str:
    """A digest of a victim: of every part its class, its plain attributes, its parameters and its buffers.

    Buffers count also where a state dict leaves them out, as those of a normalisation often are. Code is not looked at,
    nor are attributes of other kinds; :mod:`dipguard.store.serve` therefore asks the victim again before it trusts.
    """
    plain = (bool, int, float, str, tuple, type(None))
    parts, tensors = [], []
    for name, part in victim.named_modules():
        kind, values = type(part), vars(part)
        own = {k: repr(v) for k, v in values.items() if k != "training" and k[0] != "_" and isinstance(v, plain)}
        held = {k: v for k, v in (*part._parameters.items(), *part._buffers.items()) if v is not None}
        parts.append([name, f"{kind.__module__}.{kind.__qualname__}", own, list(held)])
        # NumPy has no bfloat16.
        tensors += [v.view(torch.int16) if v.dtype == torch.bfloat16 else v for v in held.values()]
    return digest_of([parts, tensor_digest(tensors)])


def engine_of(fit: FitOptions, *, T: int, size: tuple[int, int], device: torch.device) -> str:
    """The engine that a fit of T steps gets, ``auto`` decided; which may compile the native one.

    Raises:
        ValueError: An engine that cannot run here, or an image too small for the network.
    """
    if device.type != "cpu" or fit.engine != "auto":
        return fit.engine
    check_int(T, name="T", low=1)
    key = (resolve(fit.network), fit.padding, fit.dtype, fit.optimise_z, size, T < SHORT)
    if key not in _engines:
        with apart(device):
            module = StackedDIP(torch.full((1, 3, *size), 0.5), options=fit)
            _engines[key] = make_engine(fit.engine, module.net, module.given, steps=T, z_gradient=fit.optimise_z).name
    return _engines[key]


def versions() -> dict[str, str]:
    """What an entry says of the programs that made it."""
    return {
        "dipguard": __version__,
        "torch": torch.__version__,
        "torchmetrics": _torchmetrics(),
        "numerics": str(NUMERICS),
    }


def network_name(fit: FitOptions) -> str:
    """For people."""
    return "own" if isinstance(fit.network, NetworkSpec) else fit.network


@cache
def _torchmetrics() -> str:
    return version("torchmetrics")


@cache
def _native_sources() -> str:
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
