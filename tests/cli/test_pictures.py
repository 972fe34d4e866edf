from itertools import product

import pytest
import torch
from PIL import Image

from dipguard.cli.pictures import find_pictures, read_picture, read_png, write_png
from tests.cli.conftest import load


def _halves(size=(60, 40), mode="RGB"):
    """Left half black, right half white."""
    picture = Image.new("L", size, 0)
    picture.paste(255, (size[0] // 2, 0, *size))
    return picture.convert(mode)


def _read(path, size=(20, 20), resize="crop", interpolation="bilinear"):
    return read_picture(path, size=size, resize=resize, interpolation=interpolation)


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [
        *product([".png", ".jpg", ".bmp", ".tif", ".webp", ".ppm"], ["RGB", "L"]),
        *product([".png"], ["RGBA", "P", "LA", "1"]),
        (".jpg", "CMYK"),
    ],
)
def test_kinds_of_pictures(tmp_path, suffix, mode):
    _halves(mode=mode).save(tmp_path / f"x{suffix}")
    pixels = _read(tmp_path / f"x{suffix}")
    assert (pixels.shape, pixels.dtype) == ((3, 20, 20), torch.uint8)
    assert int(pixels[:, :, :8].max()) < 30
    assert int(pixels[:, :, 12:].min()) > 225


def test_the_right_size_is_not_touched(tmp_path):
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
    assert torch.equal(_read(tmp_path / "x.png", size=(20, 30)), image)


def test_crop_keeps_the_shape_and_stretch_keeps_all(tmp_path):
    wide = Image.new("RGB", (90, 30), "blue")
    wide.paste("red", (30, 0, 60, 30))  # a red square in the middle
    wide.save(tmp_path / "x.png")
    cropped, stretched = (_read(tmp_path / "x.png", resize=how).float() / 255 for how in ("crop", "stretch"))
    assert cropped[0, :, 1:-1].min() > 0.9
    assert stretched[2, :, :6].min() > 0.9
    assert stretched[0, :, 8:12].min() > 0.9


def test_phones_write_the_upright_direction_beside_the_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    _halves(size=(40, 40)).save(tmp_path / "x.jpg", exif=exif)
    pixels = _read(tmp_path / "x.jpg")
    assert int(pixels[:, :8].max()) < 30
    assert int(pixels[:, 12:].min()) > 225


def test_interpolation_is_the_one_that_was_asked_for(tmp_path):
    _halves().save(tmp_path / "x.png")
    for name in ("nearest", "bilinear", "bicubic", "lanczos"):
        by_hand = _halves().resize((21, 20), Image.Resampling[name.upper()]).convert("RGB")
        by_hand.save(tmp_path / "hand.png")
        pixels = _read(tmp_path / "x.png", size=(20, 21), resize="stretch", interpolation=name)
        assert torch.equal(pixels, load(tmp_path / "hand.png"))


@pytest.mark.parametrize(
    "outputs",
    [
        {"cat.jpg": "cat.jpg.png", "cat.bmp": "cat.bmp.png", "deep/cat.png": "deep/cat.png"},
        {"dog.v2.jpeg": "dog.v2.png", ".hidden/x.png": None, "notes.txt": None},
        {"cat.jpg": "cat.jpg.png", "cat.png": "cat.png.png", "cat.jpg.png": "cat.jpg.png.png"},
        {"Cat.jpg": "Cat.jpg.png", "cat.bmp": "cat.bmp.png"},
        {"a.jpg": "a.png", "figures/a.figure.jpg": "figures/a.figure.jpg.png"},
    ],
)
def test_each_picture_has_a_result_of_its_own(tmp_path, outputs):
    for name in outputs:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = {source.name: source.output for source in find_pictures(tmp_path / "in", tmp_path / "out")}
    assert found == {name: output for name, output in outputs.items() if output}


def test_a_png_is_read_as_it_was_written(tmp_path):
    pixels = torch.randint(0, 256, (3, 9, 7), dtype=torch.uint8)
    path = tmp_path / "deep" / "x.png"
    write_png(path, pixels)
    assert torch.equal(load(path), pixels)
    assert torch.equal(read_png(path), pixels)


@pytest.mark.parametrize("content", [None, b"", b"no picture"])
def test_a_png_that_cannot_be_read_is_a_value_error(tmp_path, content):
    if content is not None:
        (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.png cannot be read"):
        read_png(tmp_path / "x.png")
