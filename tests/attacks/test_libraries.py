import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchattacks
from torch import nn

from dipguard.attacks import build_attack

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


def _partly_frozen(victim):
    """The usual fine-tuning state: train mode, BatchNorms in eval mode."""
    victim = copy.deepcopy(victim).train()
    for module in victim.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return victim


def test_frozen_batch_norms_stay_frozen_where_the_library_thaws_them(digits_cnn, digits):
    part = digits.select(0, 4)
    victim = _partly_frozen(digits_cnn)
    build_attack("fgsm", victim)(part.images, part.labels)
    assert not victim.network[1].training
    assert victim.training
    torchattacks.FGSM(victim)(part.images, part.labels)
    assert victim.network[1].training  # what dipguard keeps from happening


def test_gradients_of_the_victim_stay_where_the_library_adds_to_them(digits_cnn, digits):
    part = digits.select(0, 4)
    victim = copy.deepcopy(digits_cnn)
    build_attack("cw", victim, steps=2)(part.images, part.labels)
    assert all(p.grad is None for p in victim.parameters())
    torchattacks.CW(victim, steps=2)(part.images, part.labels)
    assert any(p.grad is not None for p in victim.parameters())


def test_a_victim_without_parameters_is_attacked_in_silence(digits, capsys):
    class Brightness(nn.Module):
        def forward(self, images):
            mean = images.mean(dim=(1, 2, 3))
            return torch.stack((mean, 0.3 - mean), dim=1)

    labels = (digits.images.mean(dim=(1, 2, 3)) < 0.15).long()
    attacked = build_attack("fgsm", Brightness(), eps_255=255)(digits.images, labels)
    assert right(Brightness(), attacked, labels) < 0.1
    assert capsys.readouterr().out == ""
