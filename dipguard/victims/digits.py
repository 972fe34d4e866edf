"""The built-in victim: a small CNN for scikit-learn's digits, trained on first use (seconds on a CPU) and cached."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import nn

from dipguard.cache import cache_folder
from dipguard.checks import check_int
from dipguard.data.digits import CLASSES, digits_split
from dipguard.files import write_bytes
from dipguard.victims.base import Normalised
from dipguard.victims.weights import load_state_dict_strict

_MEAN, _STD = (0.31,) * 3, (0.32,) * 3  # of the training digits
_EPOCHS, _BATCH, _RATE = 12, 64, 3e-3
_NOISE = 0.04  # in training, since the CNN would otherwise see only smooth, enlarged images and fail on rough ones
_FILE = "digits_cnn-1.safetensors"  # raise the number when the training changes


def build(*, weights: str | Path | None = None, seed: int = 0, progress: bool = True) -> Normalised:
    """A CNN for the digits [B, 3, 32, 32] in [0, 1]: three strided convolutions with BatchNorm, one linear layer.

    It has 34,058 parameters and reads about 98.7 % of the evaluation digits correctly. On first use it is trained with
    ``seed`` and saved in the cache folder; ``weights`` is the path of a state dict to load instead.
    """
    check_int(seed, name="seed", low=0)
    network = _network()
    victim = Normalised(network, mean=_MEAN, std=_STD, classes=CLASSES, size=(32, 32))
    if weights is not None:
        load_state_dict_strict(network, weights)
        return victim
    path = cache_folder("victims", _FILE if seed == 0 else _FILE.replace("-", f"-seed{seed}-"))
    if os.path.exists(path):  # False also in a folder that may not be searched, where Path's raises an error
        try:
            load_state_dict_strict(network, path)
            return victim
        except (OSError, ValueError) as error:
            warnings.warn(f"the cached digits victim is damaged and is trained again: {error}", stacklevel=2)
    # More threads make convolutions this small slower, ten times so on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _train(victim, seed=seed, progress=progress)
    finally:
        torch.set_num_threads(threads)
    try:
        write_bytes(path, save({name: tensor.contiguous() for name, tensor in network.state_dict().items()}))
    except OSError as error:
        text = f"the digits victim could not be kept in {path.parent} and will be trained again next time: {error}"
        warnings.warn(f"{text}; set DIPGUARD_CACHE to a folder that can be written", stacklevel=2)
    return victim


def _network() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
        convolution = nn.utils.skip_init(nn.Conv2d, inputs, outputs, 3, stride=2, padding=1)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.utils.skip_init(nn.Linear, 64 * 4 * 4, 10)).float()


def _train(victim: Normalised, *, seed: int, progress: bool) -> None:
    from tqdm.auto import tqdm

    images, labels = digits_split(evaluation=False)
    draws = torch.Generator().manual_seed(seed)
    for module in victim.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_uniform_(module.weight, generator=draws)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    steps = len(images) // _BATCH
    optimiser = torch.optim.Adam(victim.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=_EPOCHS * steps)
    with torch.enable_grad(), tqdm(total=_EPOCHS * steps, desc="training digits_cnn", disable=not progress) as bar:
        victim.train()
        for _ in range(_EPOCHS):
            order = torch.randperm(len(images), generator=draws)
            for batch in order[: steps * _BATCH].split(_BATCH):
                noise = torch.randn(images[batch].shape, generator=draws, dtype=torch.float32)
                noisy = (images[batch] + _NOISE * noise).clamp(0, 1)
                optimiser.zero_grad()
                F.cross_entropy(victim(noisy), labels[batch]).backward()
                optimiser.step()
                schedule.step()
                bar.update()
    optimiser.zero_grad()
    victim.eval()
