import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dipguard.data import load_data

RNG = np.random.default_rng(1)


def _picture(path, size=(6, 5), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).convert(mode)
    picture.save(path)
    return np.array(picture.convert("RGB"))


def _table(folder, text, name="labels.csv"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    for name in ("b", "a", "c"):
        _picture(tmp_path / "pictures" / f"{name}.png")
    return tmp_path / "pictures"


def test_subfolders_are_classes_in_alphabetical_order(tmp_path):
    dog, cat = _picture(tmp_path / "dog" / "1.png"), _picture(tmp_path / "cat" / "2.bmp")
    deeper = _picture(tmp_path / "cat" / "more" / "3.PNG")
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    _picture(tmp_path / ".hidden" / "4.png")
    loaded = load_data("image_folder", path=tmp_path)
    assert loaded.classes == ("cat", "dog")
    assert loaded.labels.tolist() == [0, 0, 1]
    found = (loaded.images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found, np.stack([cat, deeper, dog]))


def test_linked_folders_are_entered_once(tmp_path):
    _picture(tmp_path / "data" / "cat" / "1.png")
    _picture(tmp_path / "elsewhere" / "2.png")
    (tmp_path / "data" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "cat" / "up").symlink_to(tmp_path / "data" / "cat")
    assert len(load_data("image_folder", path=tmp_path / "data")) == 2


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "LA"])
def test_other_8_bit_modes_are_read_as_rgb(tmp_path, mode):
    pixels = _picture(tmp_path / "x" / "1.png", mode=mode)
    loaded = load_data("image_folder", path=tmp_path)
    assert np.array_equal((loaded.images[0] * 255).round().byte().permute(1, 2, 0).numpy(), pixels)


def test_csv_rows_give_order_index_and_label_by_file_name_or_id(folder):
    table = _table(folder, "picture,what\nc,4\na.png,0\nb,7\n")
    options = {"path": folder, "labels_csv": table, "image_column": "picture", "label_column": "what"}
    whole = load_data("image_folder", **options)
    part = load_data("image_folder", offset=1, limit=1, **options)
    assert whole.labels.tolist() == [4, 0, 7]
    assert part.indices.tolist() == [1]
    assert torch.equal(part.images[0], whole.images[1])
    assert torch.equal(whole.images[0], load_data("image_folder", limit=1, **options).images[0])


def test_label_base_1_makes_labels_0_based(folder):
    table = _table(folder, "image,label\na,1\nb,1000\n")
    loaded = load_data("image_folder", path=folder, labels_csv=table, label_base=1)
    assert loaded.labels.tolist() == [0, 999]
    table = _table(folder, "image,label\na,0\n")
    with pytest.raises(ValueError, match="label 0 is below `label_base` 1"):
        load_data("image_folder", path=folder, labels_csv=table, label_base=1)


def test_only_the_pictures_asked_for_are_read(folder):
    (folder / "b.png").write_bytes(b"not a picture")
    table = _table(folder, "image,label\na,0\nb,1\nc,2\n")
    loaded = load_data("image_folder", path=folder, labels_csv=table, offset=2)
    assert loaded.labels.tolist() == [2]


def test_size_resizes_pictures_of_any_size(tmp_path):
    _picture(tmp_path / "x" / "1.png", size=(9, 4))
    _picture(tmp_path / "x" / "2.png", size=(3, 20))
    assert load_data("image_folder", path=tmp_path, size=8).images.shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"2\.png.*\(20, 3\).*1\.png.*\(4, 9\).*`size`"):
        load_data("image_folder", path=tmp_path)


def test_real_neurips_2017_pictures(real_data):
    root = real_data / "nips2017"
    columns = {"image_column": "ImageId", "label_column": "TrueLabel", "label_base": 1}
    table = root / "images.csv"
    loaded = load_data("image_folder", path=root / "images", labels_csv=table, limit=3, size=224, **columns)
    assert loaded.images.shape == (3, 3, 224, 224)
    assert loaded.labels[:2].tolist() == [305, 883]  # TrueLabel 306 and 884
    with Image.open(root / "images" / "0c7ac4a8c9dfa802.png") as picture:
        smaller = picture.convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(smaller)).permute(2, 0, 1) / 255
    assert (loaded.images[0] - expected).abs().max() < 1.5 / 255


@pytest.mark.parametrize("content", [b"", b"no picture at all", "cut off"])
def test_an_unreadable_picture_is_named(folder, content):
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:90] if content == "cut off" else content)
    table = _table(folder, "image,label\na,0\nb,1\n")
    with pytest.raises(ValueError, match=r"b\.png cannot be read"):
        load_data("image_folder", path=folder, labels_csv=table)


def test_a_16_bit_picture_is_refused(tmp_path):
    (tmp_path / "x").mkdir()
    Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)).save(tmp_path / "x" / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png.*8-bit"):
        load_data("image_folder", path=tmp_path)


def test_a_picture_with_16_bits_a_colour_is_refused(tmp_path):
    (tmp_path / "x").mkdir()
    rows = b"".join(b"\x00" + bytes(4 * 6) for _ in range(4))  # no filter, then four pixels of three times two bytes
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    (tmp_path / "x" / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    with pytest.raises(ValueError, match=r"deep\.png cannot be read: it has 16 bits a channel, only 8-bit"):
        load_data("image_folder", path=tmp_path)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("image,label\n", ValueError, "no rows"),
        ("", ValueError, "`image_column`.*no column 'image'"),
        ("image,class\na,1\n", ValueError, "`label_column`.*'label'.*'class'"),
        ("image,label\na,0\nzebra,1\n", FileNotFoundError, "line 3.*'zebra'"),
        ("image,label\n../labels,0\n", FileNotFoundError, "line 2"),
        ("image,label\na,cat\n", ValueError, "line 2.*'cat'.*integer"),
        ("image,label\na,\n", ValueError, "line 2.*integer"),
        ("image,label\na\n", ValueError, "line 2.*integer"),
        ("image,label\na,-1\n", ValueError, "line 2.*below"),
        ("image,label\na,1\nb,0\na.png,2\n", ValueError, "line 4: 'a.png' is the picture of line 2 already"),
        ("image,label,label\na,1,2\n", ValueError, "`label_column`.*has 2 column 'label'"),
        ("image,image,label\na,b,2\n", ValueError, "`image_column`.*has 2 column 'image'"),
    ],
)
def test_a_bad_csv_is_refused_with_its_line(folder, text, error, message):
    with pytest.raises(error, match=message):
        load_data("image_folder", path=folder, labels_csv=_table(folder, text))


def test_an_id_shared_by_two_pictures_is_refused(folder):
    _picture(folder / "a.bmp")
    table = _table(folder, "image,label\na,0\n")
    with pytest.raises(ValueError, match=r"a\.bmp, a\.png"):
        load_data("image_folder", path=folder, labels_csv=table)


def test_without_a_csv_pictures_outside_of_class_folders_are_refused(folder):
    with pytest.raises(ValueError, match=r"no sub-folders.*sub-folder.*`labels_csv`"):
        load_data("image_folder", path=folder)
    _picture(folder / "class" / "d.png")
    with pytest.raises(ValueError, match=r"pictures beside its class folders, such as a\.png"):
        load_data("image_folder", path=folder)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_photographs_are_turned_upright(tmp_path, mode):
    (tmp_path / "x").mkdir()
    picture = Image.fromarray(RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    picture.save(tmp_path / "x" / "1.png", exif=exif)
    loaded = load_data("image_folder", path=tmp_path)
    upright = np.array(picture.rotate(-90, expand=True).convert("RGB"))
    assert np.array_equal((loaded.images[0] * 255).round().byte().permute(1, 2, 0).numpy(), upright)


def test_a_ppm_of_16_bits_is_refused(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "1.ppm").write_bytes(b"P6 2 2 255\n" + bytes(12))
    assert len(load_data("image_folder", path=tmp_path).images) == 1
    (tmp_path / "x" / "1.ppm").write_bytes(b"P6 2 2 65535\n" + bytes(24))
    with pytest.raises(ValueError, match=r"1\.ppm cannot be read: it has 16 bits a channel"):
        load_data("image_folder", path=tmp_path)


def test_of_several_frames_the_first_is_taken_with_a_warning(tmp_path):
    (tmp_path / "x").mkdir()
    frames = [Image.new("RGB", (2, 2), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "x" / "1.tiff", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match=r"1\.tiff has several frames; the first is taken"):
        loaded = load_data("image_folder", path=tmp_path)
    assert loaded.images[0, :, 0, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_become_white_with_a_warning(tmp_path, mode):
    (tmp_path / "x").mkdir()
    picture = Image.new("RGBA", (2, 1), (200, 200, 200, 255))
    picture.putpixel((1, 0), (10, 20, 30, 0))  # a hidden colour
    if mode == "P":
        indexed = Image.new("P", (2, 1))
        indexed.putpalette([200, 200, 200, 10, 20, 30])
        indexed.putpixel((1, 0), 1)
        indexed.save(tmp_path / "x" / "1.png", transparency=1)
    else:
        picture.convert(mode).save(tmp_path / "x" / "1.png")
    with pytest.warns(UserWarning, match=r"1\.png has transparent parts; they become white"):
        loaded = load_data("image_folder", path=tmp_path)
    assert (loaded.images[0, :, 0] * 255).round().T.tolist() == [[200] * 3, [255] * 3]


def test_missing_things_are_named(tmp_path, folder):
    with pytest.raises(ValueError, match="`path`"):
        load_data("image_folder")
    with pytest.raises(FileNotFoundError, match=r"`path`.*nowhere"):
        load_data("image_folder", path=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"`labels_csv`.*none\.csv"):
        load_data("image_folder", path=folder, labels_csv=tmp_path / "none.csv")
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="holds no picture"):
        load_data("image_folder", path=tmp_path / "empty")
    with pytest.raises(ValueError, match="`label_base`"):
        load_data("image_folder", path=folder, labels_csv=tmp_path, label_base=2)
    for option in ({"label_base": 1}, {"label_column": "TrueLabel"}, {"image_column": "ImageId"}):
        with pytest.raises(ValueError, match=f"`{next(iter(option))}` belongs to `labels_csv`, which is not given"):
            load_data("image_folder", path=folder, **option)
