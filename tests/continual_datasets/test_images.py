"""Images of every format as RGB, sources of them, and what is said about damaged ones."""

import os
import pickle
import tracemalloc
import warnings

import numpy as np
import pytest
from PIL import Image

from continual_datasets.images import (
    ArraySource,
    ConcatSource,
    DataError,
    FileSource,
    open_image,
    os_errors_as_data_errors,
)
from continual_datasets.pipeline import PlacedSource
from helpers.true_formats import rejected

# Images of every kind

RED, CLEAR = (200, 40, 30), (0, 0, 0, 0)


def palette_image(transparent):
    image = Image.new("P", (6, 4), 1)
    image.putpalette([0, 0, 0, *RED])
    image.paste(0, (0, 0, 3, 4))
    return image, {"transparency": transparent} if transparent is not None else {}


def rgba_image():
    image = Image.new("RGBA", (6, 4), (*RED, 255))
    image.paste(CLEAR, (0, 0, 3, 4))
    return image


def sixteen_bit(dtype=np.uint16):
    values = np.full((4, 6), 65535, dtype=dtype)
    values[:, :3] = 25700  # 100 * 257
    return values


def test_open_image_converts_every_mode_to_rgb(tmp_path):
    """Images whose left half and right half have known colours."""
    white, black = (255,) * 3, (0,) * 3
    rgb = rgba_image().convert("RGB")
    la = Image.merge("LA", (Image.new("L", (6, 4), 90), rgba_image().getchannel("A")))
    big_endian = Image.frombytes("I;16B", (6, 4), sixteen_bit(">u2").tobytes())
    kinds = {
        "rgb.png": (rgb, {}, black, RED),
        "grey.png": (Image.new("L", (6, 4), 90), {}, (90,) * 3, (90,) * 3),
        "la.png": (la, {}, white, (90,) * 3),
        "rgba.png": (rgba_image(), {}, white, RED),
        "rgba.webp": (rgba_image(), {"lossless": True, "exact": True}, white, RED),
        "palette.png": (*palette_image(None), black, RED),
        "palette_index.png": (*palette_image(0), white, RED),
        "palette_bytes.png": (*palette_image(b"\x00\xff"), white, RED),
        "cmyk.tif": (rgb.convert("CMYK"), {}, black, RED),
        "bilevel.png": (rgba_image().getchannel("A").convert("1"), {}, black, white),
        "sixteen.png": (Image.fromarray(sixteen_bit()), {}, (100,) * 3, white),
        "sixteen.tif": (Image.fromarray(sixteen_bit()), {}, (100,) * 3, white),
        "sixteen.pgm": (Image.fromarray(sixteen_bit()), {}, (100,) * 3, white),
        "integer.tif": (Image.fromarray(sixteen_bit(np.int32)), {}, (100,) * 3, white),
        "big_endian.tif": (big_endian, {}, (100,) * 3, white),
        "ycbcr.jpg": (rgb.convert("YCbCr"), {"quality": 100, "subsampling": 0}, None, None),
    }
    modes = set()
    for name, (saved, options, left, right) in kinds.items():
        path = tmp_path / name
        saved.save(path, **options)
        with Image.open(path) as raw:
            modes.add(raw.mode)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            image = open_image(path)
        assert (image.mode, image.size) == ("RGB", (6, 4)), path
        if left is not None:
            assert image.getpixel((0, 0)) == left, path
            assert image.getpixel((5, 3)) == right, path
    assert {"RGB", "L", "LA", "RGBA", "P", "CMYK", "1", "I;16", "I;16B", "I"} <= modes


def test_open_image_leaves_the_orientation_to_those_who_took_it(tmp_path):
    """As torchvision and timm do."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (80, 40)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (80, 40)


def test_open_image_scales_the_whole_sixteen_bit_range(tmp_path):
    values = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
    Image.fromarray(values).save(tmp_path / "ramp.png")
    ramp = np.asarray(open_image(tmp_path / "ramp.png"))[..., 0]
    assert np.abs(ramp - values / 257).max() <= 0.5


def test_open_image_names_every_file_it_cannot_read(tmp_path):
    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    for name in ("cut.jpg", "cut.png", "cut.bmp", "cut.webp", "cut.ppm", "cut.tif"):
        picture.save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("not a picture\nat all")
    (tmp_path / "only_header.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((4, 4), 70000, dtype=np.int32)).save(tmp_path / "wide.tif")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.png")
    reasons = {
        "empty.png": "empty", "text.jpg": "not an image", "float.tif": "floating-point",
        "wide.tif": "16-bit range", "dangling.png": "No such file",
        "device.png": "is no regular file", "pipe.png": "is no regular file",
    }  # fmt: skip
    for path in tmp_path.iterdir():
        message = rejected(open_image, path)
        assert message.startswith(f"{path}: "), message
        assert reasons.get(path.name, "") in message


# Sources


def grey_source(*values):
    images = np.array(values, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    return ArraySource(images, [value % 2 for value in values], ["even", "odd"])


def test_concat_source_joins_images_and_shifts_labels():
    empty = ArraySource(np.zeros((0, 4, 4), dtype=np.uint8), [], ["even", "odd"])
    parts = [empty, grey_source(10, 11), grey_source(21), empty, grey_source(30, 31, 32), empty]
    names = [f"class {i}" for i in range(6)]
    ids = [[0, 1], [4, 5], [0, 1], [0, 1], [2, 3], [0, 1]]
    joined = ConcatSource(parts, names, class_ids=ids)
    assert (len(joined), joined.classes) == (6, names)
    assert joined.targets.dtype == np.int64
    assert joined.targets.tolist() == [4, 5, 1, 2, 3, 2]
    for index in (0, 1, 2, 3, 5, np.int64(4), np.int32(5), -1, -6):
        image, target = joined[index]
        assert image.getpixel((0, 0))[0] == [10, 11, 21, 30, 31, 32][index]
        assert (target, type(target)) == (joined.targets[index], int)
    assert len(list(joined)) == 6
    for index in (6, -7, np.int64(6)):
        with pytest.raises(IndexError):
            joined[index]
    assert ConcatSource(parts, ["even", "odd"]).targets.tolist() == [0, 1, 1, 0, 1, 0]
    with pytest.raises(ValueError):
        ConcatSource(parts, names, class_ids=[[0, 1]])


def test_digest_covers_labels_pixels_and_their_shape():
    def placed(*values):
        return PlacedSource(grey_source(*values), 0)

    def joined(*values):
        return ConcatSource([grey_source(*values), grey_source(7)], ["even", "odd"])

    for make in (grey_source, placed, joined):
        digest, of_labels = make(2, 4, 5).digest(), make(2, 4, 5).digests()[0]
        assert digest == make(2, 4, 5).digest() != make(2, 4, 7).digest()
        assert of_labels == make(2, 4, 7).digests()[0] != make(2, 5, 7).digests()[0]
        assert digest[:12] != make(2, 4, 7).digest()[:12]
        assert digest.endswith(f"-{of_labels}")  # which was all in files of early versions
    source, flat = grey_source(2, 4), grey_source(2, 4)
    flat.images = flat.images.reshape(2, 2, 8)
    assert source.digest() == placed(2, 4).digest() != flat.digest()
    source.images = np.asfortranarray(source.images)
    source = ArraySource(source.images, np.array([0, 9, 0, 9])[::2], source.classes)
    assert source.digest() == grey_source(2, 4).digest()


def test_file_source_opens_any_files(tmp_path):
    names = ["a.png", "sub/ünï.png", "sub/b.png"]
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(names):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / name)
    whole = FileSource([str(tmp_path / name) for name in names], [2, 0, 1], "abc")
    inside = FileSource(names, [2, 0, 1], "abc", folder=tmp_path)
    for source in (whole, inside, pickle.loads(pickle.dumps(inside))):
        assert source.paths == [str(tmp_path / name) for name in names]
        assert [source[i][0].getpixel((0, 0))[0] for i in range(3)] == [0, 1, 2]
        assert [source[i][1] for i in (np.int64(0), 1, -1)] == [2, 0, 1]
        with pytest.raises(IndexError):
            source[3]
        some = source.select(np.array([True, False, True]))
        assert some.paths == source.select(np.array([0, 2])).paths == source.paths[::2]
        assert (some[1], some.classes) == (source[2], source.classes)


def test_paths_take_little_more_than_their_letters(tmp_path):
    tracemalloc.start()
    source = FileSource(
        (f"s{i % 11}/o{i % 50}/C_{i:08}.png" for i in range(20_000)), [0] * 20_000, ["a"], tmp_path
    )
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert source.paths[19_999] == str(tmp_path / "s1/o49/C_00019999.png")
    assert max(held, len(pickle.dumps(source))) < 1_200_000


# Errors


@pytest.mark.parametrize(("error", "message"), [
    (PermissionError(13, "Permission denied", "/data/x.mat"), "/data/x.mat: Permission denied"),
    (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
])  # fmt: skip
def test_errors_of_the_file_system_name_the_file(error, message):
    with pytest.raises(DataError) as caught, os_errors_as_data_errors():
        raise error
    assert str(caught.value) == message


def test_data_error_survives_pickling_and_line_breaks():
    error = DataError("two\nlines")
    assert str(error) == "two lines"
    assert str(DataError("caf\udce9")) == "caf\\udce9"
    assert str(pickle.loads(pickle.dumps(error))) == "two lines"
    assert isinstance(error, ValueError)
