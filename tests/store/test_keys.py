"""Keys: everything that the numbers depend on, and nothing else."""

import importlib
import sys
from argparse import Namespace
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning.profilers import SimpleProfiler
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import InterpolationMode

from dipguard.fit import DecideOptions, FitOptions
from dipguard.networks import network_spec
from dipguard.store import numerics, victim_digest
from dipguard.store.keys import StackKeys
from tests.store.parts import random_victim, smooth_images

CPU = torch.device("cpu")


def fit_key(
    images: Tensor | None = None,
    *,
    index: int = 0,
    T: int = 200,
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> str:
    images = smooth_images(1) if images is None else images
    fit = FitOptions(**{"network": "small", "engine": "torch", **options})
    return StackKeys(images, indices=[index], fit=fit, T=T, device=CPU, trainer=trainer).fits[0]


OTHER = {
    "index": 1, "seed": 1, "network": "medium", "z": "gaussian", "z_scale": 0.2, "jitter": 0.2, "init": "xavier",
    "padding": "reflect", "lr": 0.02, "dtype": "float64", "engine": "native", "optimise_z": True, "dead_zone": 2.0,
    "matmul_precision": "tf32",
}  # fmt: skip


@pytest.mark.parametrize("option", OTHER)
def test_what_changes_a_fit_changes_its_key(option: str):
    assert fit_key(**{option: OTHER[option]}) != fit_key()


def test_every_option_of_a_fit_was_tried():
    assert {field.name for field in fields(FitOptions)} <= OTHER.keys()


def test_the_kind_of_device_counts():
    how = {"indices": [0], "fit": FitOptions(network="small", engine="torch"), "T": 9}
    made = [StackKeys(smooth_images(1), **how, device=torch.device(kind)).fits for kind in ("cpu", "cuda")]
    assert made[0] != made[1]


def test_the_native_engines_sources_count(monkeypatch: pytest.MonkeyPatch):
    native, other = fit_key(engine="native"), fit_key()
    monkeypatch.setattr("dipguard.store.keys.sources_digest", lambda *words: "another")
    assert fit_key(engine="native") != native
    assert fit_key() == other


def test_the_image_counts_by_what_it_holds():
    image = smooth_images(1)
    other = image.clone()
    other[0, 0, 0, 0] = torch.nextafter(other[0, 0, 0, 0], torch.tensor(2.0))
    assert fit_key(image.clone()) == fit_key(image)
    assert fit_key(other) != fit_key(image)
    assert fit_key(image.flip(-1)) != fit_key(image)


def test_what_a_fit_does_not_depend_on_is_not_in_its_key():
    # T (as long as the engine is the same), how a network is named, and how z_scale's default is written.
    spec = network_spec("small")
    assert fit_key(T=100) == fit_key(T=1500) == fit_key(network=spec) == fit_key(z_scale=spec.z_scale)


def test_arguments_of_the_trainer_count_but_not_which_object_they_are():
    first, second = (fit_key(trainer={"profiler": SimpleProfiler()}) for _ in range(2))
    assert first == second != fit_key()
    for number in (float, np.float32):
        assert fit_key(trainer={"gradient_clip_val": number(1)}) != fit_key(trainer={"gradient_clip_val": number(2)})


def test_auto_is_the_engine_that_it_becomes():
    assert fit_key(engine="auto", T=200) == fit_key(engine="native")
    assert fit_key(engine="auto", T=20) == fit_key(engine="torch")


@pytest.mark.parametrize(("precision", "engine"), [("bf16-mixed", "torch"), ("32", "native"), ("64-true", "native")])
def test_auto_is_torch_in_mixed_precision(precision: str, engine: str):
    of = {"indices": [0], "fit": FitOptions(network="small"), "T": 200, "device": CPU}
    assert StackKeys(smooth_images(1), **of, trainer={"precision": precision}).engine == engine


def test_an_image_s_key_does_not_depend_on_its_batch_mates():
    images, fit = smooth_images(3), FitOptions(network="small", engine="torch")
    together = StackKeys(images, indices=[4, 5, 6], fit=fit, T=200, device=CPU)
    assert together.fits == [fit_key(images[b : b + 1], index=4 + b) for b in range(3)]


def trace_key(*, victim: int = 1, **options: Any) -> str:
    keys = StackKeys(smooth_images(1), indices=[0], fit=FitOptions(network="small", engine="torch"), T=100, device=CPU)
    return keys.traces(random_victim(victim), DecideOptions(**{"T": 100, **options}))[0]


@pytest.mark.parametrize(
    "options",
    [
        {"T": 90, "decisions": 50},
        {"decisions": 50},
        {"decisions": None, "every": 5},
        {"N": 5},
        {"scores": "probabilities"},
        {"victim": 2},
    ],
    ids=str,
)
def test_what_changes_a_trace_changes_its_key(options: dict[str, Any]):
    assert trace_key(**{"decisions": 100, **options}) != trace_key(decisions=100)


def test_a_trace_is_known_by_its_steps_however_they_are_asked_for():
    assert trace_key(decisions=20) == trace_key(decisions=None, every=5)
    assert trace_key(decisions=20, K_max=3) == trace_key(decisions=20, K_max=30)


class Scaled(nn.Module):
    """A victim of which a state dict does not tell all."""

    mean: Tensor

    def __init__(self, *, mean: float = 0.5, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = self._inner_temperature = temperature
        self.register_buffer("mean", torch.full((3, 1, 1), mean), persistent=False)
        self.inner = random_victim()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x - self.mean) / self.temperature


class Other(Scaled):
    """The same parts, another class."""


def test_code_is_a_part_of_a_victims_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = (
        "from torch import nn\nclass Net(nn.Module):\n    def forward(self, x):\n        return x.mean((2, 3)) * {}\n"
    )
    digests = []
    for number, factor in enumerate((1, 2, 1)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "net_of_mine.py").write_text(code.format(factor))
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, "net_of_mine", raising=False)
        digests.append(victim_digest(importlib.import_module("net_of_mine").Net()))
    assert digests[0] == digests[2] != digests[1]


@dataclass
class Settings:
    scale: float


def halved(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output / 2


def doubled(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def test_digest_of_a_victim():
    same = [Scaled(), Scaled().eval()]
    changed = [Scaled(mean=0.4), Scaled(temperature=2.0), Other(), Scaled().double(), Scaled().bfloat16()]
    with torch.no_grad():
        changed.append(Scaled())
        changed[-1].inner[0].bias[0] += 1e-3
        changed.append(Scaled())
        changed[-1].inner[1].running_mean += 1e-3
    own: dict[str, list[Any]] = {"_inner_temperature": [2.0], "order": [[2, 1, 0]], "sides": [(1, [2])]}
    own |= {"at": [torch.zeros(2), torch.ones(2), torch.ones(2).bfloat16()], "table": [np.zeros(2), np.ones(2)]}
    own |= {"function": [functional.relu, functional.gelu, nn.ReLU, max]}
    own |= {"options": [{"scale": 1}, {"scale": 2}, {"scale": torch.ones(1)}]}
    own |= {"mode": [InterpolationMode.BILINEAR, InterpolationMode.NEAREST], "k": [np.float32(1), np.float32(2)]}
    own |= {"dtype": [torch.float16, torch.bfloat16], "pool": [partial(max, 1), partial(max, 2), partial(min, 1)]}
    own |= {"kept": [{"a", "b"}, {"a", "c"}], "range": [range(3), range(4)]}
    own |= {kind.__name__: [kind(scale=1.0), kind(scale=2.0)] for kind in (Settings, SimpleNamespace, Namespace)}
    own |= {"cfg": [OmegaConf.create({"scale": scale}) for scale in (1.0, 2.0, "???")]}
    for name, value in [(name, value) for name, values in own.items() for value in values]:
        changed.append(Scaled())
        setattr(changed[-1], name, value)
    for hook in (halved, doubled):
        changed.append(Scaled())
        changed[-1].register_forward_hook(hook)
    cycle: dict[str, Any] = {}
    cycle["cycle"] = cycle
    for odd in (torch.eye(2).to_sparse(), torch.empty(2, device="meta"), cycle, [object()]):  # left out
        same.append(Scaled())
        same[-1].odd = odd
    digests = [victim_digest(victim) for victim in [*same, *changed]]
    assert len(set(digests[: len(same)])) == 1
    assert len(set(digests)) == 1 + len(changed)


@pytest.mark.parametrize("program", ["dipguard", "numerics", "torch", "torchmetrics"])
def test_another_version_has_other_keys(program: str, monkeypatch: pytest.MonkeyPatch):
    fit, trace = fit_key(), trace_key()
    numbers = dict(numerics())
    if program == "torchmetrics":
        monkeypatch.setattr("dipguard.store.keys.version", lambda name: "0.0.1")
    elif program == "torch":
        monkeypatch.setattr(torch, "__version__", "0.0.1")
    else:
        monkeypatch.setattr(f"dipguard.store.keys.{'NUMERICS' if program == 'numerics' else '__version__'}", "0.0.1")
    numerics.cache_clear()
    try:
        assert numerics() != numbers  # a part of each cell's key, too
        assert (fit_key() != fit, trace_key() != trace) == (True, True)
    finally:
        numerics.cache_clear()


def test_frozen_victims_are_told_apart_by_their_constants():
    def frozen(seed):
        torch.manual_seed(seed)
        return torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()))

    first, same, other = (victim_digest(frozen(seed)) for seed in (1, 1, 2))
    assert first == same
    assert first != other


@pytest.mark.parametrize(("T", "engine"), [(99, "torch"), (100, "auto")])
def test_the_engine_of_a_gpu_is_one_that_a_fit_can_be_asked_for(T: int, engine: str) -> None:
    keys = StackKeys(smooth_images(1), indices=[0], fit=FitOptions(network="small"), T=T, device=torch.device("cuda"))
    assert keys.engine == FitOptions(engine=keys.engine).engine == engine
