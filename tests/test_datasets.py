import pickle
import shutil
import time
import warnings
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR100

import datasets
from datasets import DataError, count_classes, find_source, load_source, open_image
from test_downloads import finish, serve, start, write_tar

# CIFAR-100


def cifar_files(num_train=200, num_test=100):
    """CIFAR-100 as its authors pickled it: three files; an image is a row, plane by plane."""
    rng = np.random.default_rng(0)

    def split(n):
        return {
            "data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
            "fine_labels": [i % 100 for i in range(n)],
            "coarse_labels": [i % 20 for i in range(n)],
            "filenames": [f"{i}.png" for i in range(n)],
            "batch_label": "tiny",
        }

    meta = {
        "fine_label_names": [f"class_{i:02}" for i in range(100)],
        "coarse_label_names": [f"super_{i}" for i in range(20)],
    }
    return {"train": split(num_train), "test": split(num_test), "meta": meta}


@pytest.fixture
def cifar(monkeypatch, tmp_path):
    """A tiny CIFAR-100 that torchvision's reader takes for the true one, and its server."""
    contents = cifar_files()
    raw = {name: pickle.dumps(content) for name, content in contents.items()}
    (tmp_path / "server").mkdir()
    archive = tmp_path / "server" / CIFAR100.filename
    write_tar(archive, {f"cifar-100-python/{name}": data for name, data in raw.items()})
    (tmp_path / "server" / "login.html").write_text("log in to the wireless network")
    sums = {name: md5(data).hexdigest() for name, data in raw.items()}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    monkeypatch.setattr(CIFAR100, "tgz_md5", md5(archive.read_bytes()).hexdigest())
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(tmp_path / "server") as server:
        monkeypatch.setattr(CIFAR100, "url", f"{server.address}/{CIFAR100.filename}")
        yield contents, raw, server


def unpack_cifar(raw, folder):
    (folder / "cifar-100-python").mkdir(parents=True)
    for name, data in raw.items():
        (folder / "cifar-100-python" / name).write_bytes(data)


@pytest.mark.parametrize("name", ["CIFAR100", "cifar100", "Split-CIFAR100", "split-cifar100"])
def test_cifar100_is_read_from_the_original_layout(cifar, tmp_path, monkeypatch, name):
    contents, raw, _ = cifar
    unpack_cifar(raw, tmp_path / "data")
    monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:1/nowhere")  # nothing may be fetched
    train, test = load_source(name, tmp_path / "data")
    assert (len(train), len(test)) == (200, 100)
    assert train.classes == contents["meta"]["fine_label_names"]
    assert train.targets.dtype == np.int64
    assert train.targets.tolist() == contents["train"]["fine_labels"]
    image, target = test[7]
    assert image.mode == "RGB"
    assert target == 7
    planes = contents["test"]["data"][7].reshape(3, 32, 32)
    assert np.array_equal(np.asarray(image), planes.transpose(1, 2, 0))


def test_cifar100_is_downloaded_once_by_processes_that_start_together(cifar, tmp_path):
    _, raw, server = cifar
    data_path = tmp_path / "new" / "folder"
    server.pause()
    together = [start(load_source, "CIFAR100", data_path) for _ in range(2)]
    assert server.half_sent.wait(20)
    time.sleep(0.5)  # the other one has time to download, too, if nothing stops it
    server.go_on.set()
    for process in together:
        finish(process)
    assert server.downloads == [f"/{CIFAR100.filename}"]
    names = sorted(path.name for path in data_path.iterdir())
    assert names == [".l2p.lock", "cifar-100-python"]
    for name, data in raw.items():
        assert (data_path / "cifar-100-python" / name).read_bytes() == data


def test_cifar100_is_downloaded_after_a_killed_download(cifar, tmp_path):
    contents, _, server = cifar
    server.pause()
    killed = start(load_source, "CIFAR100", tmp_path / "data")
    assert server.half_sent.wait(20)
    killed.kill()
    killed.join(20)
    server.go_on.set()
    assert not (tmp_path / "data" / "cifar-100-python").exists()
    train, _ = load_source("CIFAR100", tmp_path / "data")
    assert train.targets.tolist() == contents["train"]["fine_labels"]
    assert len(server.downloads) == 2


def test_cifar100_complete_folder_is_read_without_lock_or_write(cifar, tmp_path, monkeypatch):
    _, raw, server = cifar
    unpack_cifar(raw, tmp_path / "data")
    folders = [tmp_path / "data" / "cifar-100-python", tmp_path / "data"]
    monkeypatch.setattr(datasets, "one_at_a_time", lambda _: pytest.fail("took the lock"))
    try:
        for folder in folders:
            folder.chmod(0o555)
        before = [folder.stat().st_mtime_ns for folder in folders]  # root writes all the same
        load_source("CIFAR100", tmp_path / "data")
        assert [folder.stat().st_mtime_ns for folder in folders] == before
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert server.downloads == []


@pytest.mark.parametrize("damaged", ["train", "test", "meta"])
def test_cifar100_damaged_folder_is_kept_and_replaced(cifar, tmp_path, caplog, damaged):
    contents, raw, _ = cifar
    data_path = tmp_path / "data"
    unpack_cifar({**raw, damaged: raw[damaged][:-10]}, data_path)
    train, test = load_source("CIFAR100", data_path)
    assert train.targets.tolist() == contents["train"]["fine_labels"]
    assert test.targets.tolist() == contents["test"]["fine_labels"]
    (aside,) = data_path.glob("cifar-100-python.damaged-*")
    assert (aside / damaged).read_bytes() == raw[damaged][:-10]
    assert f"moved to {aside}" in caplog.text


@pytest.mark.parametrize("damaged", ["train", "test", "meta"])
def test_cifar100_is_unpickled_only_with_the_right_checksum(cifar, tmp_path, monkeypatch, damaged):
    _, raw, _ = cifar
    unpickled = tmp_path / "unpickled"
    unpack_cifar({**raw, damaged: pickle.dumps(MakesFolder(unpickled))}, tmp_path / "data")
    monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:1/nowhere")
    with pytest.raises(DataError):
        load_source("CIFAR100", tmp_path / "data")
    assert not unpickled.exists()
    pickle.loads((tmp_path / "data" / "cifar-100-python" / damaged).read_bytes())
    assert unpickled.exists()


class MakesFolder:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def test_cifar100_failed_download_leaves_the_damaged_folder(cifar, tmp_path, monkeypatch):
    _, raw, _ = cifar
    unpack_cifar({"train": raw["train"]}, tmp_path / "data")
    monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:1/nowhere")
    with pytest.raises(DataError):
        load_source("CIFAR100", tmp_path / "data")
    names = sorted(path.name for path in (tmp_path / "data").iterdir())
    assert names == [".l2p.lock", "cifar-100-python"]
    assert (tmp_path / "data" / "cifar-100-python" / "train").read_bytes() == raw["train"]


def test_cifar100_archive_that_was_put_there_is_unpacked(cifar, tmp_path):
    _, _, server = cifar
    (tmp_path / "data").mkdir()
    shutil.copy(tmp_path / "server" / CIFAR100.filename, tmp_path / "data")
    train, _ = load_source("CIFAR100", tmp_path / "data")
    assert len(train) == 200
    assert server.downloads == []
    assert (tmp_path / "data" / CIFAR100.filename).is_file()


def test_cifar100_archive_with_a_member_outside_is_named(cifar, tmp_path, monkeypatch):
    archive = tmp_path / "server" / CIFAR100.filename
    write_tar(archive, {"cifar-100-python/train": b"", "../evil": b"evil"})
    monkeypatch.setattr(CIFAR100, "tgz_md5", md5(archive.read_bytes()).hexdigest())
    with pytest.raises(DataError) as caught:
        load_source("CIFAR100", tmp_path / "data")
    assert CIFAR100.filename in str(caught.value)
    assert "'../evil'" in str(caught.value)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".l2p.lock"]


@pytest.mark.parametrize("page", ["missing.tar.gz", "login.html"])
def test_cifar100_failed_download_says_what_to_do(cifar, tmp_path, monkeypatch, page):
    server = CIFAR100.url.rpartition("/")[0]
    monkeypatch.setattr(CIFAR100, "url", f"{server}/{page}")
    with pytest.raises(DataError) as caught:
        load_source("CIFAR100", tmp_path / "data")
    message = str(caught.value)
    for part in (str(tmp_path / "data" / "cifar-100-python"), "--data-path", CIFAR100.url):
        assert part in message
    assert "\n" not in message


# Digits


def test_digits_split_is_fixed_and_stratified(tmp_path):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    train, test = load_source("Digits", tmp_path)
    digits = load_digits()
    expected_train, expected_test = train_test_split(
        range(1797), test_size=0.2, stratify=digits.target, random_state=0
    )
    assert (len(train), len(test)) == (1437, 360)
    assert train.targets.tolist() == digits.target[expected_train].tolist()
    assert test.targets.tolist() == digits.target[expected_test].tolist()
    assert set(np.bincount(test.targets)) <= {35, 36, 37}
    assert train.classes == [str(digit) for digit in range(10)]
    image, _ = test[5]
    assert (image.mode, image.size) == ("RGB", (8, 8))
    expected = digits.images[expected_test[5]] * 255 / 16
    assert np.abs(np.asarray(image)[..., 0] - expected).max() < 1
    assert np.asarray(image).min() == 0  # strokes are bright, the ground is dark


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


def save_all_kinds(folder):
    """Save images whose left half and right half have known colours; return those by path."""
    white, black = (255,) * 3, (0,) * 3
    rgb = rgba_image().convert("RGB")
    la = Image.merge("LA", (Image.new("L", (6, 4), 90), rgba_image().getchannel("A")))
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
        "ycbcr.jpg": (rgb.convert("YCbCr"), {"quality": 100, "subsampling": 0}, None, None),
    }
    for name, (image, options, _, _) in kinds.items():
        image.save(folder / name, **options)
    write_big_endian_tiff(folder / "big_endian.tif")
    expected = {folder / name: (left, right) for name, (_, _, left, right) in kinds.items()}
    return expected | {folder / "big_endian.tif": ((100,) * 3, white)}


def write_big_endian_tiff(path):
    pixels = sixteen_bit(">u2").tobytes()
    entries = [(256, 6), (257, 4), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 4)]
    entries.append((279, len(pixels)))
    header = b"MM\x00*" + (8 + len(pixels)).to_bytes(4, "big")
    directory = len(entries).to_bytes(2, "big")
    for tag, value in entries:
        directory += tag.to_bytes(2, "big") + b"\x00\x04\x00\x00\x00\x01" + value.to_bytes(4, "big")
    path.write_bytes(header + pixels + directory + b"\x00" * 4)


def test_open_image_converts_every_mode_to_rgb(tmp_path):
    expected = save_all_kinds(tmp_path)
    modes = set()
    for path, (left, right) in expected.items():
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


def test_open_image_scales_the_whole_sixteen_bit_range(tmp_path):
    values = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
    Image.fromarray(values).save(tmp_path / "ramp.png")
    ramp = np.asarray(open_image(tmp_path / "ramp.png"))[..., 0]
    assert np.abs(ramp - values / 257).max() <= 0.5


def unreadable_files(folder):
    """Write damaged and foreign files; return what their error must mention."""
    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    for name in ("cut.jpg", "cut.png", "cut.bmp", "cut.webp", "cut.ppm", "cut.tif"):
        picture.save(folder / name)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("not a picture\nat all")
    (folder / "only_header.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(folder / "float.tif")
    Image.fromarray(np.full((4, 4), 70000, dtype=np.int32)).save(folder / "wide.tif")
    (folder / "dangling.png").symlink_to(folder / "nothing")
    special = {
        "empty.png": "empty",
        "text.jpg": "not an image",
        "float.tif": "floating-point",
        "wide.tif": "16-bit range",
        "dangling.png": "No such file",
    }
    return {path: special.get(path.name, "") for path in folder.iterdir()}


def test_open_image_names_every_file_it_cannot_read(tmp_path):
    for path, reason in unreadable_files(tmp_path).items():
        with pytest.raises(DataError) as caught:
            open_image(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: "), message
        assert reason in message
        assert "\n" not in message


# Image folders


def write_folder(root, train=("ant", "bee"), test=("ant", "bee"), test_name="val", images=2):
    for split, classes in (("train", train), (test_name, test)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(images):
                Image.new("RGB", (8, 6), (i, 0, 0)).save(root / split / name / f"{i}.png")
    return root


@pytest.mark.parametrize("test_name", ["val", "test"])
def test_image_folder_reads_sorted_classes(tmp_path, test_name):
    write_folder(tmp_path, ("bee", "ant", "Wasp"), ("Wasp", "ant", "bee"), test_name)
    nested = tmp_path / "train" / "ant" / "more" / "deep"
    nested.mkdir(parents=True)
    Image.new("L", (5, 5), 77).save(nested / "x.PNG")
    (tmp_path / "train" / "ant" / "notes.txt").write_text("ignored")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    train, test = load_source("imagefolder", tmp_path)
    assert train.classes == test.classes == ["Wasp", "ant", "bee"]
    assert train.targets.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert train.targets.dtype == np.int64
    assert (len(train), len(test)) == (7, 6)
    assert train[4][0].getpixel((0, 0)) == (77, 77, 77)
    assert train[4][1] == 1
    assert count_classes("ImageFolder", tmp_path) == 3


def test_image_folder_prefers_val_to_test(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "test").mkdir()
    assert len(load_source("ImageFolder", tmp_path)[1]) == 4


def test_image_folder_opens_images_only_when_asked(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / "ant" / "0.png").write_bytes(b"")
    train, _ = load_source("ImageFolder", tmp_path)
    assert train[1][1] == 0
    with pytest.raises(DataError, match=r"ant/0\.png: the file is empty"):
        train[0]


def remove_images(root, *folders):
    for folder in folders:
        for path in (root / folder).rglob("*.png"):
            path.unlink()


FOLDER_PROBLEMS = {
    "missing": (lambda root: None, ["is not a folder", "train/<class>", "val/<class>"]),
    "no train": (lambda root: (root / "val").mkdir(parents=True), ["no folder train"]),
    "no test": (lambda root: write_folder(root, test=()), ["no folder val or test"]),
    "no class": (
        lambda root: [(root / "train").mkdir(parents=True), (root / "val").mkdir()],
        ["no class folder", "train/<class>"],
    ),
    "no image": (
        lambda root: remove_images(write_folder(root), "train"),
        ["no image in any", "train"],
    ),
    "empty class": (
        lambda root: remove_images(write_folder(root), "train/bee"),
        ["class bee", "train"],
    ),
    "empty test class": (
        lambda root: remove_images(write_folder(root), "val/ant"),
        ["class ant", "val"],
    ),
    "one class": (lambda root: write_folder(root, ["ant"], ["ant"]), ["only one class", "ant"]),
    "classes differ": (
        lambda root: write_folder(root, ["ant", "bee"], ["ant", "fly", "gnat"]),
        ["only in train: bee", "only in val: fly, gnat"],
    ),
}


@pytest.mark.parametrize("problem", FOLDER_PROBLEMS)
def test_image_folder_problem_is_named(tmp_path, problem):
    build, expected = FOLDER_PROBLEMS[problem]
    root = tmp_path / "pictures"
    build(root)
    with pytest.raises(DataError) as caught:
        load_source("ImageFolder", root)
    for part in (str(root), *expected):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


# The table of sources and the error


def test_unknown_data_set_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"--dataset CIFAR101 .*CIFAR100, digits, ImageFolder"):
        find_source("CIFAR101")


def test_count_classes_needs_no_data():
    nowhere = Path("/nowhere")
    assert count_classes("Split-CIFAR100", nowhere) == 100
    assert count_classes("digits", nowhere) == 10
    assert not find_source("digits").needs_data_path
    with pytest.raises(DataError, match="/nowhere is not a folder"):
        count_classes("ImageFolder", nowhere)


class Failing(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 3:
            try:
                raise OSError("the cause")
            except OSError as error:
                raise DataError("/data/x.png: the file is: empty") from error
        return torch.zeros(1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_error_is_one_line_wherever_it_is_raised(num_workers):
    message = None
    try:
        list(DataLoader(Failing(), num_workers=num_workers))
    except DataError as error:  # not pytest.raises: it would keep the loader and its workers alive
        message = str(error)
        error.__traceback__ = None
    assert message == "/data/x.png: the file is: empty"


def test_data_error_survives_pickling_and_line_breaks():
    error = DataError("two\nlines")
    assert str(error) == "two lines"
    assert str(pickle.loads(pickle.dumps(error))) == "two lines"
    assert isinstance(error, ValueError)
