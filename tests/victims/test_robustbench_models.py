"""Models of RobustBench as victims, and a defended one in its benchmark."""

from __future__ import annotations

import hashlib
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dipguard.defenses import build_defense
from dipguard.integrations.attackable import BPDAClassifier
from dipguard.victims import build_victim
from dipguard.victims.robustbench_models import library

if find_spec("robustbench") is None:
    pytest.skip("the victim robustbench needs the extra robustbench", allow_module_level=True)
pytestmark = pytest.mark.slow  # the library takes seconds to import
ARCH = "Addepalli2022Efficient_RN18"


@pytest.fixture(scope="module")
def network() -> Any:
    """A small one of their networks, with random weights."""
    library()
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_dicts[BenchmarkDataset.cifar_10][ThreatModel.Linf][ARCH]["model"]().eval()


@pytest.fixture(scope="module")
def weights(network: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("zoo") / "mine.pt"
    torch.save({"state_dict": {f"module.{name}": value for name, value in network.state_dict().items()}}, path)
    return path


def test_a_checkpoint_is_read_as_theirs(network, weights):
    victim = build_victim("robustbench", arch=ARCH, weights=weights)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(victim(images), network(images))
    assert (victim.size, victim.classes[3], victim.training) == ((32, 32), "cat", False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"arch": "Wang2023Beter_WRN-28-10"}, ValueError, "near it: Wang2023Better_WRN-28-10"),
        ({"dataset": "svhn"}, ValueError, "`victim.dataset` must be one of cifar10, cifar100, imagenet, got 'svhn'"),
        ({"threat_model": "L1"}, ValueError, "`victim.threat_model` must be one of Linf, L2, corruptions, got 'L1'"),
        ({"weights": "nowhere.pt"}, FileNotFoundError, "`victim.weights` must name an existing weights file"),
        ({"arch": "Chen2020Adversarial", "weights": "other"}, ValueError, "`victim.weights` must be None for Chen2020"),
        ({"arch": "Standard_R50", "dataset": "imagenet", "weights": "other"}, ValueError, "must be None for Standard"),
        (
            {"arch": "Debenedetti2022Light_XCiT-S12", "dataset": "imagenet", "weights": "other"},
            ValueError,
            "must be None for Debenedetti2022Light_XCiT-S12, which RobustBench does not read from one file",
        ),
        ({"arch": "Standard", "weights": "other"}, ValueError, "`victim.weights`: Standard cannot be read from"),
    ],
)
def test_bad_options_are_refused(options, error, message, weights):
    given = options | ({"weights": weights} if options.get("weights") == "other" else {})
    with pytest.raises(error, match=message):
        build_victim("robustbench", **given)


def test_torchattacks_old_copy_is_told_from_the_library(monkeypatch):
    monkeypatch.delattr(library(), "benchmark")  # what the copy lacks
    with pytest.raises(ImportError, match=r"old copy of it: pip install --force-reinstall --no-deps robustbench"):
        build_victim("robustbench")


def test_a_defended_model_goes_through_their_benchmark(weights, tmp_path, monkeypatch):
    import pyautoattack
    import robustbench
    from torchvision.datasets import CIFAR10

    class AutoAttack:
        """The package's AutoAttack with the arguments of the repository's, which the benchmark needs; one attack."""

        def __init__(self, model: Any, *, log_path: Any, version: str, **options: Any) -> None:
            self.attack = pyautoattack.AutoAttack(model, version="custom", attacks=["apgd-ce"], **options)

        def run_standard_evaluation(self, x: torch.Tensor, y: torch.Tensor, *, bs: int, state_path: Any) -> Any:
            return self.attack.run_standard_evaluation(x, y, batch_size=bs, state_path=state_path)[0]

    monkeypatch.setattr("robustbench.eval.AutoAttack", AutoAttack)
    victim = build_victim("robustbench", arch=ARCH, weights=weights)
    defended = BPDAClassifier(victim, build_defense("median", victim)).eval()
    pixels = np.random.default_rng(0).integers(256, size=(2, 3, 32, 32), dtype=np.uint8)
    labels = defended(torch.from_numpy(pixels).float() / 255).argmax(1).tolist()

    # The files of CIFAR-10, as torchvision reads them.
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    files = {"test_batch": {"data": pixels.reshape(2, -1), "labels": labels}, "batches.meta": {"label_names": []}}
    sums = {}
    for name, content in files.items():
        (folder / name).write_bytes(written := pickle.dumps(content))
        sums[name] = hashlib.md5(written).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})

    given = {"dataset": "cifar10", "threat_model": "Linf", "n_examples": 2, "data_dir": str(tmp_path)}
    assert robustbench.benchmark(defended, eps=1.0, **given) == (1.0, 0.0)
