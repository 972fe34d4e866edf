"""From the settings to what the parts are called with, and to what a run is known by."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from dipguard.attacks import Attack
from dipguard.config import TrainConfig
from dipguard.config_checks import MIRROR, MIRROR_ONLY
from dipguard.config_choices import DefenseName
from dipguard.config_matrix import MatrixConfig
from dipguard.data import ImageSet
from dipguard.defenses import DIPGuard
from dipguard.defenses.mirror_guard import MirrorGuard
from dipguard.defenses.mirror_stacks import MirrorStacks
from dipguard.files import tensor_digest
from dipguard.version import __version__
from dipguard.victims import check_victim

ASIDE = ("logger", "trainer", "report", "store")
"""What no result depends on."""


def choose_device(accelerator: str) -> torch.device:
    """``auto`` is the GPU where there is one.

    Raises:
        ValueError: ``gpu`` on a machine without one.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError("`trainer.accelerator` must be auto or cpu on a machine without a GPU, got 'gpu'")
    use_gpu = accelerator == "gpu" or (accelerator == "auto" and torch.cuda.is_available())
    return torch.device("cuda", torch.cuda.current_device()) if use_gpu else torch.device("cpu")


def number_of_classes(victim: nn.Module, clean: ImageSet, name: str) -> int:
    """How many classes the victim called ``name`` tells apart.

    Raises:
        ValueError: It cannot read images of this size.
    """
    try:
        return check_victim(victim, clean.images[:2]).shape[1]
    except RuntimeError as error:
        size = "x".join(map(str, clean.images.shape[-2:]))
        raise ValueError(f"`victim` {name} cannot read images of {size} pixels: {error}") from error


def data_options(config: TrainConfig | MatrixConfig) -> dict[str, Any]:
    """What the data set's loader is called with: the keys that are set; it refuses those that it does not know."""
    values = asdict(config.data)
    for name in ("name", "options", "mirrors"):
        del values[name]
    # The path is always passed, so that a loader that needs one says so.
    kept = {name: value for name, value in values.items() if value is not None or name == "path"}
    return kept | dict(config.data.options)


def attack_options(config: TrainConfig) -> dict[str, Any]:
    """What :func:`dipguard.attacks.build_attack` is called with besides the name and the victim."""
    attack = config.attack
    return {"eps_255": attack.eps_255, "seed": config.seed, "batch_size": attack.batch_size, **attack.options}


def build_guard(config: TrainConfig, victim: nn.Module, device: torch.device) -> DIPGuard | MirrorStacks:
    """The defence that the settings name.

    Raises:
        TypeError, ValueError: A value is out of range.
    """
    if config.defense.name == DefenseName.paper:
        return DIPGuard(victim, **guard_options(config, device))
    values = config.to_dict()
    fit = {name: value for name, value in values["fit"].items() if name not in ("stack_size", "patience")}
    return MirrorStacks(
        MirrorGuard(
            victim,
            **{name: values["defense"][name] for name in MIRROR},
            fit=fit,
            seed=config.seed,
            stack_size=config.fit.stack_size,
            progress=config.trainer.progress,
        )
    )


def guard_options(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """What :class:`dipguard.DIPGuard` is built with."""
    values = config.to_dict()
    for name in ("name", *MIRROR_ONLY):
        del values["defense"][name]
    return {
        **values["defense"],
        **values["fit"],
        "network": values["network"]["name"],
        "seed": config.seed,
        "accelerator": "gpu" if device.type == "cuda" else "cpu",
        "progress": config.trainer.progress,
        "store": config.store,
    }


def fingerprint(config: TrainConfig, clean: ImageSet, victim: nn.Module) -> dict[str, Any]:
    """What a run's results depend on. Files count by what they hold, not by where they lie."""
    values = config.to_dict()
    for group in ASIDE:
        del values[group]
    del values["fit"]["stack_size"]
    for group, key in (("data", "path"), ("data", "labels_csv"), ("victim", "weights")):
        del values[group][key]
    values["data"]["content"] = tensor_digest([clean.images, clean.labels, clean.indices])
    values["victim"]["content"] = tensor_digest(victim.state_dict().values())
    return values


def description(
    config: TrainConfig, attack: Attack, guard: DIPGuard | MirrorStacks, device: torch.device
) -> dict[str, Any]:
    """All that a run was made with, for its metrics.json."""
    values = config.to_dict()
    values["attack"]["settings"] = dict(attack.settings)
    values["guard"] = guard.settings
    values["versions"] = {
        "dipguard": __version__,
        "torch": torch.__version__,
        "pytorch_lightning": version("pytorch-lightning"),
        "python": platform.python_version(),
    }
    values["device"] = _device_name(device)
    return values


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)"
