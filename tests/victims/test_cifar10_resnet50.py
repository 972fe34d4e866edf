import pytest
import torch
from torch import nn
from torchvision.models import resnet50

from dipguard.victims import build_victim


def _state():
    network = resnet50(weights=None, num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    return network.eval()


def test_a_state_dict_of_that_design_loads_and_computes_the_same(tmp_path, images):
    network = _state()
    torch.save(network.state_dict(), tmp_path / "resnet50.pt")
    victim = build_victim("cifar10_resnet50", weights=tmp_path / "resnet50.pt")
    assert sum(p.numel() for p in victim.parameters()) == 23_520_842
    mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)
    std = torch.tensor([0.2471, 0.2435, 0.2616]).view(1, 3, 1, 1)
    with torch.no_grad():
        assert torch.allclose(victim(images[:1]), network((images[:1] - mean) / std), atol=1e-5)


def test_torchvisions_own_resnet50_is_refused(tmp_path):
    torch.save(resnet50(weights=None, num_classes=10).state_dict(), tmp_path / "resnet50.pt")
    with pytest.raises(ValueError, match=r"conv1\.weight \(64, 3, 7, 7\) instead of \(64, 3, 3, 3\)"):
        build_victim("cifar10_resnet50", weights=tmp_path / "resnet50.pt")


@pytest.mark.parametrize("weights", [None, ""])
def test_without_weights_it_says_where_they_are(weights):
    with pytest.raises(ValueError, match=r"`victim.weights`.*huyvnphan/PyTorch_CIFAR10"):
        build_victim("cifar10_resnet50", weights=weights)
