"""CIFAR-10 victims: ResNets of He et al. with their public weights, the paper's ResNet-50, and CNN-A."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet50

from dipguard.attacks import build_attack
from dipguard.data import load_data
from dipguard.victims import build_victim
from dipguard.victims.cifar import WEIGHTS_URL, CifarResNet, cnn_a_network

# depth, the original file, parameters, and how many of CIFAR-10's first 400 test images it decides rightly
NETWORKS = [
    (20, "resnet20-12fca82f.th", 269_722, 365),
    (32, "resnet32-d509ac18.th", 464_154, 373),
    (44, "resnet44-014dd654.th", 658_586, 370),
    (56, "resnet56-4bfd9763.th", 853_018, 376),
]


@pytest.mark.parametrize(("depth", "file", "parameters", "right"), NETWORKS)
def test_the_original_weights_load_and_decide(real_data, depth, file, parameters, right):
    before = torch.get_rng_state()
    victim = build_victim(f"cifar10_resnet{depth}", weights=real_data / "weights" / file)
    assert torch.equal(torch.get_rng_state(), before)
    assert sum(p.numel() for p in victim.parameters()) == parameters
    assert not any(module.training for module in victim.modules())
    data = load_data("arrays", path=real_data / "cifar10" / "tune.npz", limit=20)
    with torch.no_grad():
        assert (victim(data.images).argmax(1) == data.labels).sum() >= 18


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "file", "parameters", "right"), NETWORKS)
def test_clean_accuracy_on_real_images(real_data, depth, file, parameters, right):
    victim = build_victim(f"cifar10_resnet{depth}", weights=real_data / "weights" / file)
    data = load_data("arrays", path=real_data / "cifar10" / "tune.npz")
    with torch.no_grad():
        decided = torch.cat([victim(part).argmax(1) for part in data.images.split(100)])
    # One image may fall to the other side with another processor's rounding.
    assert abs(int((decided == data.labels).sum()) - right) <= 1


@pytest.mark.parametrize(("depth", "file"), [NETWORKS[0][:2], NETWORKS[3][:2]])
def test_weights_of_another_depth_are_refused(real_data, depth, file):
    other = 20 if depth != 20 else 56
    with pytest.raises(ValueError, match=rf"`victim.weights`.*{file}.*CifarResNet"):
        build_victim(f"cifar10_resnet{other}", weights=real_data / "weights" / file)


def test_default_weights_are_the_originals():
    assert {url.rsplit("/", 1)[1] for url in WEIGHTS_URL.values()} == {row[1] for row in NETWORKS}


def test_shortcut_a_takes_every_second_pixel_and_pads_channels_on_both_sides():
    block = CifarResNet(3).layer2[0]
    x = torch.rand(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    shortcut = block.shortcut(x)
    assert shortcut.shape == (2, 32, 4, 4)
    assert torch.equal(shortcut[:, 8:24], x[:, :, 0::2, 0::2])
    assert not shortcut[:, :8].any()
    assert not shortcut[:, 24:].any()


def test_a_block_without_change_of_size_adds_its_input():
    block = CifarResNet(1).layer1[0].eval()
    x = torch.rand(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    inner = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    assert torch.equal(block(x), F.relu(inner + x))


def test_missing_weights_are_named():
    with pytest.raises(FileNotFoundError, match=r"`victim.weights`.*nowhere\.th"):
        build_victim("cifar10_resnet20", weights="nowhere.th")


def _resnet50():
    network = resnet50(weights=None, num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    return network.eval()


@pytest.mark.slow
def test_a_resnet50_of_that_design_loads_and_computes_the_same(tmp_path, images):
    network = _resnet50()
    torch.save(network.state_dict(), tmp_path / "resnet50.pt")
    victim = build_victim("cifar10_resnet50", weights=tmp_path / "resnet50.pt")
    assert sum(p.numel() for p in victim.parameters()) == 23_520_842
    mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)
    std = torch.tensor([0.2471, 0.2435, 0.2616]).view(1, 3, 1, 1)
    with torch.no_grad():
        assert torch.allclose(victim(images[:1]), network((images[:1] - mean) / std), atol=1e-5)


@pytest.mark.slow
def test_torchvisions_own_resnet50_is_refused(tmp_path):
    torch.save(resnet50(weights=None, num_classes=10).state_dict(), tmp_path / "resnet50.pt")
    with pytest.raises(ValueError, match=r"conv1\.weight \(64, 3, 7, 7\) instead of \(64, 3, 3, 3\)"):
        build_victim("cifar10_resnet50", weights=tmp_path / "resnet50.pt")


@pytest.mark.parametrize("weights", [None, ""])
def test_resnet50_without_weights_says_where_they_are(weights):
    with pytest.raises(ValueError, match=r"`victim.weights`.*huyvnphan/PyTorch_CIFAR10"):
        build_victim("cifar10_resnet50", weights=weights)


def test_a_cnn_a_loads_and_computes_the_same(tmp_path, images):
    bare = cnn_a_network().eval()
    torch.save(bare.state_dict(), tmp_path / "cnn.pth")
    victim = build_victim("cifar_cnn_a", weights=tmp_path / "cnn.pth")
    assert sum(p.numel() for p in victim.parameters()) == 214_918
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))
    with torch.no_grad():
        assert torch.allclose(victim(images), bare((images - mean) / std), atol=1e-6)


@pytest.mark.slow
def test_adversarially_trained_weights_resist_an_attack(real_data):
    victim = build_victim("cifar_cnn_a", weights=real_data / "weights" / "cifar_cnn_a_adv4.pth")
    data = load_data("arrays", path=real_data / "cifar10" / "tune.npz")
    attack = build_attack("pgd", victim, eps_255=8, steps=20, alpha_255=2, batch_size=200)
    with torch.no_grad():
        clean, attacked = (
            int((victim(x).argmax(1) == data.labels).sum()) for x in (data.images, attack(data.images, data.labels))
        )
    # Of 400; measured elsewhere on 500: 58.6 % and 23.8 %.
    assert abs(clean - 232) <= 1
    assert abs(attacked - 92) <= 3


@pytest.mark.parametrize("weights", [None, ""])
def test_cnn_a_without_weights_says_what_is_missing(weights):
    with pytest.raises(ValueError, match=r"`victim.weights`.*cifar_cnn_a_adv4\.pth"):
        build_victim("cifar_cnn_a", weights=weights)


def test_another_networks_weights_are_refused(tmp_path):
    state = cnn_a_network().state_dict()
    state["7.bias"] = torch.zeros(100)
    torch.save(state, tmp_path / "wide.pth")
    with pytest.raises(ValueError, match=r"7\.bias \(100,\) instead of \(10,\)"):
        build_victim("cifar_cnn_a", weights=tmp_path / "wide.pth")
