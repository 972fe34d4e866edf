import pytest
import torch
import torch.nn.functional as F

from dipguard.data import load_data
from dipguard.victims import build_victim
from dipguard.victims.cifar_resnet import WEIGHTS_URL, CifarResNet

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


@pytest.mark.parametrize(("depth", "file"), [row[:2] for row in NETWORKS])
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
