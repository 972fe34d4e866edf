"""Cells and their targets."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from dipguard.config import node_of
from dipguard.evaluation.cell import victim_name
from dipguard.evaluation.plan import prepare
from dipguard.reporting.paper_figures import VICTIMS
from dipguard.victims import build_victim
from tests.tiny_matrix import TINY, typed_matrix


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("torchvision", {}, VICTIMS["ImageNet"][0]),
        ("torchvision", {"arch": "mobilenet_v2", "weights": "own.pt"}, "torchvision:mobilenet_v2"),
        ("timm", {"arch": "mobilenetv2_100"}, "timm:mobilenetv2_100"),
        ("robustbench", {}, "robustbench:Standard"),
        ("huggingface", {"weights": "google/vit-base-patch16-224"}, "huggingface:google/vit-base-patch16-224"),
        ("huggingface", {"weights": "/imagenet/my-vit"}, "huggingface:my-vit"),
        ("huggingface", {}, "huggingface"),
        ("cifar10_resnet50", {"weights": "own.pth"}, VICTIMS["CIFAR-10"][0]),
    ],
)
def test_a_victim_of_a_library_is_named_with_its_network(name: str, given: dict[str, Any], expected: str) -> None:
    assert victim_name({"name": name, **node_of("victim", name), **given}) == expected


def digits_victim(arch: str) -> nn.Module:
    return build_victim("digits_cnn")


def test_the_runs_seed_is_that_of_attacks_and_defences(tmp_path: Path) -> None:
    matrix = prepare(typed_matrix(*TINY, "seed=5"), tmp_path)
    for cell in matrix.cells:
        assert cell.attack is not None
        assert (cell.attack.seed, cell.target.defense.seed, cell.target.bare.seed) == (5, 5, 5)


class Darkening:
    """What no digest looks into."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, images: Tensor) -> Tensor:
        return images - self.by


class Dark(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.change, self.victim = Darkening(by), build_victim("digits_cnn")

    def forward(self, images: Tensor) -> Tensor:
        return self.victim(self.change(images))


def test_settings_of_a_users_class_are_in_the_keys(tmp_path: Path) -> None:
    own = ("~victim", f"+victim._target_={__name__}.Dark")
    keys = [{c.key for c in prepare(typed_matrix(*TINY, *own, f"+victim.by={x}"), tmp_path).cells} for x in (0, 0, 0.1)]
    assert keys[0] == keys[1]
    assert not keys[0] & keys[2]


def test_targets_have_the_victims_full_name(tmp_path: Path) -> None:
    own = ("~victim", f"+victim._target_={__name__}.digits_victim", "+victim.arch=small")
    matrix = prepare(typed_matrix(*TINY, *own), tmp_path)
    assert {target.victim_name for target in matrix.targets.values()} == {"digits_victim:small"}
