"""Models of RobustBench (Croce et al. 2021), the zoo of robust classifiers."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dipguard.cache import cache_folder
from dipguard.checks import check_choice
from dipguard.registry import import_extra
from dipguard.victims.base import Normalised, first_line, unknown_arch
from dipguard.victims.cifar import CIFAR10_CLASSES

DATA = ("cifar10", "cifar100", "imagenet")
THREATS = ("Linf", "L2", "corruptions")


def build(
    *, arch: str = "Standard", dataset: str = "cifar10", threat_model: str = "Linf", weights: str | Path | None = None
) -> Normalised:
    """A model of RobustBench, for images in [0, 1]; its normalisation is inside.

    Args:
        arch: Its name in the zoo, such as ``Wang2023Better_WRN-28-10``.
        dataset: ``cifar10``, ``cifar100`` (32x32) or ``imagenet`` (224x224).
        threat_model: What it was trained against: ``Linf``, ``L2`` or ``corruptions``.
        weights: Path of its checkpoint; None downloads it, once. ValueError for a model that RobustBench does not read
            from one file: an ensemble, or one that comes from torchvision or timm. RuntimeError if a download fails.
    """
    robustbench = library()
    enums = robustbench.model_zoo.enums
    check_choice(dataset, DATA, name="victim.dataset")
    check_choice(threat_model, THREATS, name="victim.threat_model")
    zoo = robustbench.model_zoo.model_dicts[enums.BenchmarkDataset(dataset)].get(enums.ThreatModel(threat_model), {})
    if arch not in zoo:
        raise unknown_arch(arch, list(zoo), library=f"RobustBench's {dataset} {threat_model}")
    one_file = _one_file(zoo[arch], arch, dataset, threat_model)
    if weights is not None and not one_file:
        raise ValueError(
            f"`victim.weights` must be None for {arch}, which RobustBench does not read from one file, got {weights}"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = cache_folder("robustbench")
        if weights is not None:  # a folder as the library lays it out: it knows how each checkpoint is read
            path, folder = Path(weights).expanduser(), Path(temporary)
            if not path.is_file():
                raise FileNotFoundError(f"`victim.weights` must name an existing weights file, got {path}")
            (folder / dataset / threat_model).mkdir(parents=True)
            link = folder / dataset / threat_model / f"{arch}.pt"
            try:
                link.symlink_to(path.absolute())
            except OSError:  # Windows lets few users do that
                shutil.copyfile(path, link)
        try:
            network = robustbench.utils.load_model(arch, model_dir=folder, dataset=dataset, threat_model=threat_model)
        except Exception as error:  # a download, a damaged file and other weights share no base class
            if weights is None:
                text = f"`victim.weights`: {arch} could not be fetched or read: {first_line(error)}"
                advice = ". Download the checkpoint in another way and give its path" if one_file else ""
                raise RuntimeError(text + advice) from error
            raise ValueError(f"`victim.weights`: {arch} cannot be read from {weights}: {first_line(error)}") from error
    side, classes = (224 if dataset == "imagenet" else 32), (CIFAR10_CLASSES if dataset == "cifar10" else ())
    return Normalised(network, mean=(0, 0, 0), std=(1, 1, 1), classes=classes, size=(side, side))


def _one_file(entry: Mapping[str, Any], arch: str, dataset: str, threat_model: str) -> bool:
    """Whether RobustBench reads a model of its zoo from a checkpoint of one file; it ignores the file of any other."""
    from timm import is_model

    in_timm = is_model(f"{arch.replace('-', '_')}_{dataset}_{threat_model}".lower())
    in_torchvision = dataset == "imagenet" and "Standard" in arch
    return not (in_timm or in_torchvision or isinstance(entry["gdrive_id"], list))


def library() -> Any:
    """Import RobustBench. Its release imports AutoAttack as ``autoattack``, but brings it as ``pyautoattack``.

    The wheel of torchattacks 3.5.1 holds an old RobustBench under the same name: the one installed last stands.
    """
    if find_spec("autoattack") is None and find_spec("pyautoattack") is not None:
        sys.modules.setdefault("autoattack", import_extra("pyautoattack", owner="RobustBench", extra="robustbench"))
    robustbench = import_extra("robustbench", owner="the victim 'robustbench'", extra="robustbench")
    if not hasattr(robustbench, "benchmark"):
        raise ImportError(
            "torchattacks has overwritten RobustBench with an old copy of it: "
            "pip install --force-reinstall --no-deps robustbench, then start Python again"
        )
    return robustbench
