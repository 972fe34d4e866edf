from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dipguard.attacks import build_attack
from dipguard.cli.main import main
from dipguard.data import load_data
from dipguard.victims import build_victim


def save(image: Tensor, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(path)
    return path


def load(path: Path) -> Tensor:
    """uint8 [3, H, W]."""
    with Image.open(path) as picture:
        pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
        return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1).contiguous()


@pytest.fixture(scope="session")
def victim() -> nn.Module:
    return build_victim("digits_cnn", progress=False)


@pytest.fixture
def pictures(tmp_path, victim) -> Path:
    """Three attacked digits, one of them in a folder of its own."""
    digits = load_data("digits", limit=3)
    attacked = build_attack("pgd", victim, eps_255=24)(digits.images, digits.labels, indices=digits.indices)
    for image, name in zip(attacked, ("b.png", "a.png", "deep/c.png"), strict=True):
        save(image, tmp_path / "given" / name)
    return tmp_path / "given"


@pytest.fixture
def purify(capsys, victim, tmp_path):
    """Run ``dipguard purify`` on the digits victim, without figures; returns standard output and error."""

    def run(given: Path, *words: str, out: Path | None = None, defense: str = "jpeg", exits: int = 0) -> list[str]:
        target = tmp_path / "out" if out is None else out
        usual = {"--victim": "digits_cnn", "--figures": "0"}
        named = [word for option, value in usual.items() if option not in words for word in (option, value)]
        code = main(["purify", str(given), str(target), *named, "--defense", defense, "--no-progress", *words])
        printed, said = capsys.readouterr()
        assert code == exits, said
        return [printed, said]

    return run
