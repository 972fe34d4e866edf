import pytest
import torch
from PIL import Image

from dipguard.cli import CommandError
from dipguard.cli.pictures import find_pictures, read_picture, read_png, write_png
from tests.cli.conftest import load


def _halves(size=(60, 40), mode="RGB"):
    """Left half black, right half white."""
    picture = Image.new("L", size, 0)
    picture.paste(255, (size[0] // 2, 0, *size))
    return picture.convert(mode)


def _read(path, size=(20, 20), resize="crop", interpolation="bilinear"):
    return read_picture(path, size=size, resize=resize, interpolation=interpolation)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".webp", ".ppm"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_kinds_of_pictures(tmp_path, suffix, mode):
    _halves(mode=mode).save(tmp_path / f"x{suffix}")
    pixels = _read(tmp_path / f"x{suffix}")
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 20, 20)
    assert int(pixels[:, :, :8].max()) < 30
    assert int(pixels[:, :, 12:].min()) > 225


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "1", "CMYK"])
def test_modes_of_pictures(tmp_path, mode):
    suffix = ".jpg" if mode == "CMYK" else ".png"
    _halves(mode=mode).save(tmp_path / f"x{suffix}")
    pixels = _read(tmp_path / f"x{suffix}")
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


def test_names_of_results(tmp_path):
    for name in ("cat.jpg", "cat.bmp", "dog.v2.jpeg", "deep/cat.png", ".hidden/x.png", "notes.txt"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = find_pictures(tmp_path / "in", tmp_path / "out")
    assert {source.name: source.output for source in found} == {
        "cat.bmp": "cat.bmp.png",
        "cat.jpg": "cat.jpg.png",
        "deep/cat.png": "deep/cat.png",
        "dog.v2.jpeg": "dog.v2.png",
    }


@pytest.mark.parametrize(
    ("names", "outputs"),
    [
        (("cat.jpg", "cat.png", "cat.jpg.png"), {"cat.jpg.png", "cat.png.png", "cat.jpg.png.png"}),
        (("Cat.jpg", "cat.bmp"), {"Cat.jpg.png", "cat.bmp.png"}),
        (("a.jpg", "figures/a.figure.jpg"), {"a.png", "figures/a.figure.jpg.png"}),
    ],
)
def test_no_two_pictures_have_one_result(tmp_path, names, outputs):
    for name in names:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = [source.output for source in find_pictures(tmp_path / "in", tmp_path / "out")]
    assert len(found) == len(names)
    assert set(found) == outputs


def test_a_result_in_the_place_of_a_given_picture_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").touch()
    with pytest.raises(CommandError, match="is one of the given pictures"):
        find_pictures(tmp_path / "a" / "x.png", tmp_path / "a")


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
