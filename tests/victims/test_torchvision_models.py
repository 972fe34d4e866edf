import warnings

import pytest
import torch
from torchvision import models

from dipguard.victims import build_victim


@pytest.mark.slow
def test_real_squeezenet_weights_by_path(real_data, photographs):
    path = real_data / "weights" / "squeezenet1_0_deepcomp.pth"
    victim = build_victim("torchvision", arch="squeezenet1_0", weights=path)
    with torch.no_grad():
        right = int((victim(photographs.images).argmax(1) == photographs.labels).sum())
    assert 11 <= right <= 23  # 55.8 % on all 1,000 pictures of the set: two standard deviations for 30


@pytest.mark.parametrize("arch", ["squeezenet1_1", "mobilenet_v3_small", "googlenet"])
def test_a_state_dict_of_any_classifier_loads_without_complaint(tmp_path, arch):
    # GoogLeNet's inputs are normalised with ImageNet's figures, and once more by itself.
    extra = {"init_weights": False, "transform_input": True} if arch == "googlenet" else {}
    network = models.get_model(arch, weights=None, num_classes=7, **extra).eval()
    torch.save(network.state_dict(), tmp_path / "own.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path, identity = tmp_path / "own.pt", {"mean": (0, 0, 0), "std": (1, 1, 1)}
        victim = build_victim("torchvision", arch=arch, weights=path, num_classes=7, **identity)
    image = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.allclose(victim(image), network(image), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"arch": "resnet55"}, ValueError, "`victim.arch`.*'resnet55'; near it: .*resnet50"),
        ({"arch": "mobilenet_v3"}, ValueError, "`victim.arch`.*near it: .*mobilenet_v3_large"),
        ({"arch": "fcn_resnet50"}, ValueError, "`victim.arch`"),
        ({"arch": "resnet18", "weights": "IMAGENET22K"}, ValueError, "`victim.weights`.*DEFAULT.*IMAGENET22K"),
        ({"arch": "resnet18", "weights": "nowhere.pth"}, FileNotFoundError, "`victim.weights`.*nowhere.pth"),
        ({"arch": "resnet18", "num_classes": 10}, ValueError, "`victim.num_classes` must be 1000"),
        ({"arch": "resnet18", "num_classes": 1}, ValueError, "`victim.num_classes`"),
        ({"network": "resnet18"}, TypeError, "arch, num_classes, mean, std"),
    ],
)
def test_torchvision_refuses(options, error, message):
    with pytest.raises(error, match=message):
        build_victim("torchvision", **options)


@pytest.mark.parametrize("content", [b"altered", None])
def test_an_altered_file_in_torch_hubs_cache_is_fetched_again(tmp_path, monkeypatch, content):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    kept = tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    kept.parent.mkdir()
    if content is not None:
        kept.write_bytes(content)
    asked = []

    def get_model(arch, weights):
        asked.append(kept.exists())
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models.get_model", get_model)
    with pytest.raises(RuntimeError, match=r"`victim.weights`: squeezenet1_1's weights DEFAULT could not be fetched"):
        build_victim("torchvision", arch="squeezenet1_1")
    assert asked == [False]


@pytest.mark.parametrize("arch", ["squeezenet1_1", "efficientnet_b1"])
def test_normalisation_size_and_names_are_those_of_the_weights_own_transforms(tmp_path, arch):
    torch.save(models.get_model(arch, weights=None).state_dict(), tmp_path / "own.pt")
    victim = build_victim("torchvision", arch=arch, weights=tmp_path / "own.pt")
    weights = models.get_model_weights(arch).DEFAULT
    transforms = weights.transforms()
    assert victim.mean.flatten().tolist() == pytest.approx(transforms.mean)
    assert victim.std.flatten().tolist() == pytest.approx(transforms.std)
    assert victim.size == tuple(transforms.crop_size * 2)
    assert victim.interpolation == transforms.interpolation.value
    assert victim.classes == tuple(weights.meta["categories"])
