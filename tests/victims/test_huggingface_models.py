import contextlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dipguard.victims import build_victim
from dipguard.victims.huggingface_models import _interpolation

transformers = pytest.importorskip("transformers", reason="the victim huggingface needs the extra huggingface")

NAMES = {0: "cat", 1: "dog", 2: "eel"}


def _model(kind="vit", head="ViTForImageClassification"):
    names = {"id2label": NAMES, "label2id": {name: number for number, name in NAMES.items()}}
    torch.manual_seed(1)
    if kind == "resnet":
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], **names)
        return transformers.ResNetForImageClassification(config).eval()
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    config.update(names)
    return getattr(transformers, head)(config).eval()


SIDE = {"height": 32, "width": 32}
PROCESSORS = {
    "usual": ("ViTImageProcessor", {"size": SIDE, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}),
    "no normalisation": ("ViTImageProcessor", {"size": SIDE, "do_normalize": False}),
    "another scale": ("ViTImageProcessor", {"size": SIDE, "rescale_factor": 1 / 127.5}),
    "around zero": ("EfficientNetImageProcessor", {"size": SIDE, "crop_size": SIDE, "rescale_offset": True}),
    "BGR": ("MobileViTImageProcessor", {"size": {"shortest_edge": 36}, "crop_size": SIDE}),
    "cropped": ("ConvNextImageProcessor", {"size": {"shortest_edge": 32}, "crop_pct": 0.875}),
}


@pytest.fixture(params=["vit", "resnet"])
def folder(request, tmp_path):
    _model(request.param).save_pretrained(tmp_path / request.param)
    transformers.ViTImageProcessor(size=SIDE, resample=3).save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, "bilinear"),
        ({"resample": None}, "bilinear"),
        ({"resample": 0}, "nearest"),
        ({"resample": Image.Resampling.BICUBIC}, "bicubic"),
        ({"data_config": {"interpolation": "bicubic", "mean": (0, 0, 0)}}, "bicubic"),  # timm's
    ],
)
def test_it_resizes_as_its_processor_does(own, expected):
    assert _interpolation(SimpleNamespace(**own)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROCESSORS)
def test_it_reads_pictures_as_its_own_processor_prepares_them(tmp_path, kind):
    name, options = PROCESSORS[kind]
    model, processor = _model(), getattr(transformers, name)(**options)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    victim = build_victim("huggingface", weights=tmp_path)
    assert victim.size == (32, 32)
    # Without its resizing and cropping: the picture has the size already.
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    still = {"do_resize": False, "return_tensors": "pt"} | ({"do_center_crop": False} if "crop" in str(options) else {})
    prepared = processor(images=Image.fromarray(pixels), **still)["pixel_values"]
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        assert torch.allclose(victim(image), model(prepared).logits, atol=1e-4)


def test_names_and_interpolation_are_its_own(folder):
    victim = build_victim("huggingface", weights=str(folder))
    assert victim.classes == ("cat", "dog", "eel")
    assert victim.interpolation == "bicubic"
    assert not victim.training
    with torch.no_grad():
        assert victim(torch.rand(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize("folder", ["resnet"], indirect=True)
def test_a_model_that_returns_tuples_is_read(folder):
    images = torch.rand(1, 3, 32, 32)
    expected = build_victim("huggingface", weights=str(folder))(images)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "return_dict": False}))
    assert torch.equal(build_victim("huggingface", weights=str(folder))(images), expected)


def test_gradients_reach_the_images(folder):
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    build_victim("huggingface", weights=folder)(images).sum().backward()
    assert float(images.grad.abs().sum()) > 0


def test_without_a_processor_the_options_say_it(folder):
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(RuntimeError, match=r"no image processor.*`mean`, `std` and `size`"):
        build_victim("huggingface", weights=folder)
    victim = build_victim("huggingface", weights=folder, mean=(0, 0, 0), std=(1, 1, 1), size=32)
    assert victim.size == (32, 32)


@pytest.mark.parametrize("folder", ["vit"], indirect=True)
def test_options_do_not_hide_the_processors_order(folder):
    name, settings = PROCESSORS["BGR"]
    getattr(transformers, name)(**settings).save_pretrained(folder)
    options = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    for more in ({}, {"size": 32}):
        victim = build_victim("huggingface", weights=folder, **options, **more)
        assert victim.network.order == [2, 1, 0]
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "VivitImageProcessor"}')  # for films
    assert build_victim("huggingface", weights=folder, **options, size=32).network.order == [0, 1, 2]
    with pytest.raises(TypeError, match="`size` must be an integer"):
        build_victim("huggingface", weights=folder, size=(32, 32))


def test_a_backbone_without_its_head_is_refused(tmp_path):
    _model(head="ViTModel").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks classifier\.bias, classifier\.weight.*ViTForImageClassification"):
        build_victim("huggingface", weights=tmp_path)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (None, ValueError, "`victim.weights` must be the hub id"),
        ("./nowhere", FileNotFoundError, r"`victim.weights`.*nowhere"),
        ("one/two/three", FileNotFoundError, "`victim.weights`.*one/two/three"),
    ],
)
def test_huggingface_refuses(weights, error, message):
    with pytest.raises(error, match=message):
        build_victim("huggingface", weights=weights)


def test_a_hub_id_that_is_not_to_be_had_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = r"`victim.weights`: no image classifier could be loaded from nobody/nothing"
    with pytest.raises(RuntimeError, match=message):
        build_victim("huggingface", weights="nobody/nothing")


@pytest.mark.parametrize("damage", ["model.safetensors", "config.json"])
def test_a_damaged_folder_is_refused(folder, damage):
    (folder / damage).write_bytes(b"damaged")
    with pytest.raises(RuntimeError, match=r"`victim.weights`: no image classifier could be loaded from"):
        build_victim("huggingface", weights=folder)


def test_code_in_the_folder_is_not_run(folder, tmp_path):
    (folder / "pytorch_model.bin").write_bytes(b"cnow\n.")
    shutil.move(folder / "model.safetensors", tmp_path / "away")
    with pytest.raises(RuntimeError, match=r"`victim.weights`"):
        build_victim("huggingface", weights=folder)


@pytest.mark.parametrize(
    ("file", "changed"),
    [("config.json", {"model_type": "own"}), ("config.json", {}), ("preprocessor_config.json", {})],
    ids=["a kind that the library does not know", "model", "processor"],
)
def test_code_that_a_config_names_is_neither_asked_for_nor_run(folder, monkeypatch, tmp_path, file, changed):
    asked, ran = [], tmp_path / "ran"
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "yes")
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = json.loads((folder / file).read_text())
    names = ("AutoConfig", "AutoModelForImageClassification", "AutoImageProcessor")
    (folder / file).write_text(json.dumps(config | changed | {"auto_map": {name: "own.Own" for name in names}}))
    with contextlib.suppress(RuntimeError):
        assert build_victim("huggingface", weights=folder)(torch.rand(1, 3, 32, 32)).shape == (1, 3)
    assert not ran.exists()
    assert not asked
