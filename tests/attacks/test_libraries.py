import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dipguard.attacks import build_attack
from dipguard.attacks.libraries import _limit_where_underflown

from .conftest import STATIC, right

ROOT = Path(__file__).resolve().parents[2]
NEEDS = {name: "foolbox" if name == "ddn" else "torchattacks" for name in STATIC if name not in ("none", "noise")}


@pytest.mark.parametrize(("name", "library"), NEEDS.items())
def test_without_the_library_it_says_what_to_install(digits_cnn, monkeypatch, name, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"this attack needs {library}.*pip install 'dipguard\[attacks\]'"):
        build_attack(name, digits_cnn)
    build_attack("none", digits_cnn)


@pytest.mark.parametrize(("name", "library"), NEEDS.items())
def test_library_and_version_are_in_the_settings(digits_cnn, name, library):
    settings = build_attack(name, digits_cnn).settings
    assert settings["library"] == library
    assert settings["library_version"][0].isdigit()


@pytest.mark.slow
def test_foolbox_loads_where_there_is_no_git_program():
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
os.environ["PATH"] = "/nowhere"
from dipguard.attacks.libraries import foolbox
print(foolbox().__version__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_victim_without_parameters_is_attacked_in_silence(digits, capsys):
    class Brightness(nn.Module):
        def forward(self, images):
            mean = images.mean(dim=(1, 2, 3))
            return torch.stack((mean, 0.3 - mean), dim=1)

    labels = (digits.images.mean(dim=(1, 2, 3)) < 0.15).long()
    attacked = build_attack("fgsm", Brightness(), eps_255=255)(digits.images, labels)
    assert right(Brightness(), attacked, labels) < 0.1
    assert capsys.readouterr().out == ""


def test_a_victim_in_half_precision_is_fooled_as_often_in_large_batches():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        victim = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
        images = torch.rand(256, 3, 8, 8)
    labels = victim(images).argmax(1)
    options = {"eps_255": 8, "steps": 20}
    wanted = right(victim, build_attack("bim", victim, batch_size=64, **options)(images, labels), labels)
    victim.half()
    for size in (64, 256):
        attacked = build_attack("bim", victim, batch_size=size, **options)(images, labels)
        assert right(victim, attacked.half(), labels) == pytest.approx(wanted, abs=0.05)


def test_an_underflown_gradient_keeps_its_direction():
    gradient = torch.tensor([[2.0, -1.0, 0.5], [2e-5, -1e-5, 5e-6], [0.0, 0.0, 0.0], [0.0, 2e-5, 0.0]])
    top = torch.tensor([[0, 1], [1, 0], [2, 1], [0, 1]])
    got = _limit_where_underflown(gradient, top, 1e-2)
    wanted = torch.tensor([[2.0, -1.0, 0.5], [1e-2, -5e-3, 2.5e-3], [0.0, 1e-2, -1e-2], [-1e-2, 1e-2, 0.0]])
    torch.testing.assert_close(got, wanted)
