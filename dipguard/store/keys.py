"""Keys: digests of everything that an entry depends on, and of nothing else."""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from enum import Enum
from functools import cache, partial
from importlib.metadata import version
from types import BuiltinFunctionType, FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from dipguard.classifier import device_of
from dipguard.engines.base import SHORT
from dipguard.engines.native_build import FLAGS, sources_digest
from dipguard.files import as_json, tensor_digest
from dipguard.fit import DecideOptions, FitOptions
from dipguard.fit.runner import trainer_precision
from dipguard.fit.stacks import engine_on_cpu
from dipguard.registry import class_sources
from dipguard.version import __version__

PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, Enum, np.generic, torch.dtype)
"""Types of which ``repr`` tells all."""
HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_engine_on_cpu = cache(engine_on_cpu)
NUMERICS = 9
"""To be raised with every change that changes the numbers of a fit, of an attack, of SSIM or of a decision."""


def digest_of(parts: Any) -> str:
    """A digest of JSON values, 32 hex digits; the order of a mapping's keys plays no role."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@cache
def numerics() -> dict[str, str]:
    """The programs that numbers depend on, a part of every key. The same dict each time; it must not be changed."""
    ours = f"{__version__}, {NUMERICS}"
    return {"dipguard": ours, "torch": torch.__version__, "torchmetrics": version("torchmetrics")}


def victim_digest(victim: nn.Module) -> str:
    """A digest of a classifier: class, code, plain attributes, parameters and all buffers of each of its modules.

    Plain are numbers, texts, None, enums, dtypes, tensors and arrays, functions and classes by their names, and lists,
    tuples, sets, dicts, dataclasses, namespaces, partial functions and OmegaConf's containers of them. Forward hooks
    are included by their names. What the classes' functions call is not part of the digest, nor are attributes of other
    types, such as the weights of quantised modules. Before a stored trace is used, the victim is therefore asked once
    more. A victim that keeps its activations as an attribute has another digest after each call.
    """
    aside = vars(pl.LightningModule())  # what Lightning notes there differs from call to call
    parts: list[Any] = []
    tensors: list[Tensor] = []
    for name, part in victim.named_modules():
        kind, values = type(part), vars(part)
        own = {k: text for k, v in values.items() if k not in aside and (text := _described(v)) is not None}
        if hooks := [hook for kind in HOOKS for hook in getattr(part, kind, {}).values()]:
            own["hooks"] = str([getattr(hook, "__qualname__", type(hook).__qualname__) for hook in hooks])
        held = {k: v for k, v in (*part._parameters.items(), *part._buffers.items()) if v is not None}
        if isinstance(part, torch.jit.ScriptModule) and not hasattr(part, "training"):  # frozen: weights are constants
            graph: Any = part.inlined_graph
            nodes = graph.findAllNodes("prim::Constant")
            constants = [n.t("value") for n in nodes if n.hasAttribute("value") and n.kindOf("value") == "t"]
            held |= {f"constant {i}": tensor.to_dense() for i, tensor in enumerate(constants)}
        parts.append([name, f"{kind.__module__}.{kind.__qualname__}", own, list(held)])
        tensors += map(_readable, held.values())
    kinds: set[Any] = {type(part) for part in victim.modules()}
    # Torch's version is in each key.
    code = sorted({text for kind in kinds for text in class_sources(kind, but=("torch", "builtins"))})
    return digest_of([parts, code, tensor_digest(tensors)])


def _described(value: Any, *, depth: int = 8) -> str | None:
    """A plain value as text, with the digests of its tensors; None for any other value, which lists and dicts omit."""
    if isinstance(value, PLAIN) or type(value).__module__.startswith("omegaconf."):
        return repr(value)
    if isinstance(value, (FunctionType, BuiltinFunctionType, type)) and not hasattr(value, "purified_by"):
        # Not the step that PurifyCallback puts into a module for a while.
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, np.ndarray) and value.dtype != object:
        return f"array {value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, Tensor):
        try:
            return f"tensor {tensor_digest([_readable(value)])}"
        except (RuntimeError, TypeError):  # sparse, quantised, without values, of a type that NumPy lacks
            return None
    content = _content(value)
    if content is None or depth == 0:
        return None
    parts = [f"{key}: {text}" for key, part in content if (text := _described(part, depth=depth - 1)) is not None]
    return f"{type(value).__name__} {parts}" if parts or not content else None


def _content(value: Any) -> list[tuple[Any, Any]] | None:
    """The parts of a container with their places or names, in a fixed order; None for what is no container."""
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    if isinstance(value, (set, frozenset)):
        return list(enumerate(sorted(value, key=repr)))
    if isinstance(value, partial):
        return [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name, None)) for field in fields(value)]
    if isinstance(value, (SimpleNamespace, Namespace)):
        value = vars(value)
    return sorted((k, part) for k, part in value.items() if isinstance(k, str)) if isinstance(value, dict) else None


def _readable(tensor: Tensor) -> Tensor:
    """The same bits in a type that NumPy has."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


class StackKeys:
    """The keys of the fits and traces of B images.

    ``engine`` is the engine's name, ``fits`` the key of each image's fit. A fit depends on the image x0, its index and
    the options, but neither on T, since x(t) is the same in every fit of at least t steps, nor on the victim, which the
    fit never asks. The keys do not distinguish what only changes rounding: another processor or GPU and, except for the
    native engine, the number of images in a stack. ValueError for an engine that cannot run here, or images too small
    for the network.
    """

    def __init__(
        self,
        images: Tensor,
        *,
        indices: Sequence[int],
        fit: FitOptions,
        T: int,
        device: torch.device,
        trainer: Mapping[str, Any] | None = None,
    ) -> None:
        self._size, self._fit, self._device = (images.shape[-2], images.shape[-1]), fit, device
        self._precision = trainer_precision(trainer)
        self.engine = self.engine_at(T)
        common = digest_of([
            {**fit.as_settings(), "network": asdict(fit.spec), "engine": self.engine},
            [device.type, numerics(), sources_digest(*FLAGS) if self.engine == "native" else ""],
            as_json(trainer or {}),
        ])  # fmt: skip
        values = images.detach().to(device="cpu", dtype=getattr(torch, fit.dtype))
        each = zip(values, indices, strict=True)
        self.fits = [digest_of([common, tensor_digest([image]), int(index)]) for image, index in each]

    def engine_at(self, T: int) -> str:
        """The engine of a fit of T steps; may compile the native one. On a GPU long fits keep ``auto``."""
        if self._fit.engine != "auto":
            return self._fit.engine
        if self._device.type != "cpu":
            return "auto" if T >= SHORT else "torch"
        return _engine_on_cpu(replace(self._fit, seed=0), self._size, min(T, SHORT), self._precision)

    def traces(self, victim: nn.Module, decide: DecideOptions) -> list[str]:
        """The key of each image's trace, of all that it depends on but ``K_max``: a trace serves every smaller one."""
        aside = ("T", "decisions", "every", "K_max")
        own = {name: value for name, value in asdict(decide).items() if name not in aside}
        decided = digest_of([own, list(decide.steps), victim_digest(victim), device_of(victim).type])
        return [digest_of([key, decided]) for key in self.fits]
