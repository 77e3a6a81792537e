import errno
import gzip
import os
import pickle
import shutil
import time
import tracemalloc
import warnings
from contextlib import contextmanager
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST

from continual_datasets.images import ArraySource, ConcatSource, DataError, FileSource, open_image
from continual_datasets.readers import storage
from continual_datasets.readers.registry import (
    FIVE_DATASETS,
    SOURCES,
    count_classes,
    find_source,
    find_sources,
    has_domains,
    list_domains,
    load_domains,
    load_parts,
    load_source,
)
from helpers import true_formats
from helpers.archives import write_tar
from helpers.forked_calls import finish, start
from helpers.http_server import serve
from helpers.true_formats import TRUE_FORMATS, digest, idx_bytes

# CIFAR-100


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
    monkeypatch.setattr(storage, "one_at_a_time", lambda _: pytest.fail("took the lock"))
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


# CIFAR-10


def test_cifar10_is_read_in_the_order_of_its_batches(tmp_path, monkeypatch):
    TRUE_FORMATS["CIFAR10"](tmp_path, monkeypatch)
    train, test = load_source("Split-CIFAR10", tmp_path)
    assert (len(train), len(test)) == (50, 20)
    assert train.classes[:3] == ["airplane", "automobile", "bird"]
    raw = [
        pickle.loads(
            (tmp_path / "cifar-10-batches-py" / f"data_batch_{i}").read_bytes(), encoding="latin1"
        )
        for i in range(1, 6)
    ]
    assert train.targets.tolist() == [label for batch in raw for label in batch["labels"]]
    planes = raw[4]["data"][3].reshape(3, 32, 32)
    assert np.array_equal(np.asarray(train[43][0]), planes.transpose(1, 2, 0))


def test_cifar10_is_downloaded(tmp_path, monkeypatch, files):
    folder, server = files
    TRUE_FORMATS["CIFAR10"](folder, monkeypatch)
    contents = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in (folder / "cifar-10-batches-py").iterdir()
    }
    archive = write_tar(folder / CIFAR10.filename, contents)
    monkeypatch.setattr(CIFAR10, "tgz_md5", digest(archive))
    monkeypatch.setattr(CIFAR10, "url", f"{server.address}/{CIFAR10.filename}")
    for _ in range(2):
        assert len(load_source("CIFAR10", tmp_path / "data")[0]) == 50
    assert server.downloads == [f"/{CIFAR10.filename}"]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder and the server of its files."""
    folder = tmp_path / "server"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(folder) as server:
        yield folder, server


# MNIST and Fashion-MNIST


@pytest.mark.parametrize(
    ("name", "kind"), [("mnist", MNIST), ("FashionMNIST", FashionMNIST), ("fashion-mnist", None)]
)
def test_idx_files_are_read_from_the_true_layout(tmp_path, monkeypatch, name, kind):
    kind = kind or FashionMNIST
    TRUE_FORMATS[kind.__name__](tmp_path, monkeypatch)
    train, test = load_source(name, tmp_path)
    assert (len(train), len(test)) == (50, 20)
    assert train.classes == (list("0123456789") if kind is MNIST else FashionMNIST.classes)
    raw = tmp_path / kind.__name__ / "raw"
    labels = (raw / "t10k-labels-idx1-ubyte").read_bytes()[8:]
    assert test.targets.tolist() == list(labels)
    pixels = (raw / "t10k-images-idx3-ubyte").read_bytes()[16:][7 * 784 : 8 * 784]
    image = np.asarray(test[7][0])
    assert image.shape == (28, 28, 3)
    assert all(image[..., channel].tobytes() == pixels for channel in range(3))


def packed_idx(files, kind, monkeypatch, *pages):
    folder, server = files
    true_formats.write_idx(folder / "files", packed=True)
    mirrors = [f"{server.address}/{page}/" for page in pages]
    true_formats.serve_idx(kind, folder / "files", monkeypatch, mirrors)
    return folder / "files", server


@pytest.mark.parametrize(("name", "kind"), [("MNIST", MNIST), ("FashionMNIST", FashionMNIST)])
def test_idx_files_come_from_the_first_mirror_that_has_them(
    tmp_path, monkeypatch, files, name, kind
):
    folder, server = packed_idx(files, kind, monkeypatch, "gone", "wrong", "files", "unused")
    (folder.parent / "wrong").mkdir()
    for file, _ in kind.resources:
        (folder.parent / "wrong" / file).write_bytes(b"log in to the wireless network")
    for _ in range(2):
        train, test = load_source(name, tmp_path / "data")
        assert (len(train), len(test)) == (50, 20)
    pages = [path.split("/")[1] for path in server.downloads]
    assert pages == ["gone", "wrong", "files"] * 4
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [".l2p.lock", name]


def test_idx_files_packed_by_hand_need_no_download(tmp_path, monkeypatch, files):
    folder, server = packed_idx(files, MNIST, monkeypatch, "files")
    shutil.copytree(folder, tmp_path / "data" / "MNIST" / "raw")
    assert len(load_source("MNIST", tmp_path / "data")[0]) == 50
    assert server.downloads == []


def test_idx_download_that_fails_names_every_mirror(tmp_path, monkeypatch, files):
    packed_idx(files, MNIST, monkeypatch, "gone", "away")
    with pytest.raises(DataError) as caught:
        load_source("MNIST", tmp_path / "data")
    message = str(caught.value)
    for part in (*MNIST.mirrors, str(tmp_path / "data" / "MNIST"), "raw", "--data-path"):
        assert part in message
    assert "\n" not in message


def no_idx_download(monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:1/"])


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
IDX_DAMAGE = {
    "empty": (IMAGES, lambda _: b""),
    "truncated": (IMAGES, lambda content: content[:-100]),
    "truncated labels": (LABELS, lambda content: content[:-1]),
    "longer": (IMAGES, lambda content: content + b"x"),
    "a page": (IMAGES, lambda _: b"<html>log in to the wireless network</html>"),
    "still packed": (LABELS, gzip.compress),
    "another size": (IMAGES, lambda _: idx_bytes(np.zeros((50, 14, 56)))),
    "no images": (IMAGES, lambda _: idx_bytes(np.zeros((0, 28, 28)))),
    "images as labels": (LABELS, lambda _: idx_bytes(np.zeros((20, 28, 28)))),
    "label too high": (LABELS, lambda content: content[:-1] + b"\x0a"),
    "fewer labels": (LABELS, lambda _: idx_bytes(np.zeros(19))),
    "missing": (LABELS, lambda _: None),
}


@pytest.mark.parametrize("damage", IDX_DAMAGE)
def test_idx_damage_is_named_by_file(tmp_path, monkeypatch, damage):
    TRUE_FORMATS["MNIST"](tmp_path, monkeypatch)
    no_idx_download(monkeypatch)
    name, change = IDX_DAMAGE[damage]
    path = tmp_path / "MNIST" / "raw" / name
    content = change(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_source("MNIST", tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "MNIST").is_dir()


def test_idx_damage_is_mended_by_a_download(tmp_path, monkeypatch, files, caplog):
    packed_idx(files, MNIST, monkeypatch, "files")
    TRUE_FORMATS["MNIST"](tmp_path / "data", monkeypatch)
    (tmp_path / "data" / "MNIST" / "raw" / IMAGES).write_bytes(b"")
    assert len(load_source("MNIST", tmp_path / "data")[0]) == 50
    (aside,) = (tmp_path / "data").glob("MNIST.damaged-*")
    assert f"moved to {aside}" in caplog.text


# SVHN


@pytest.mark.parametrize("folder", ["SVHN", "."])
def test_svhn_is_read_in_a_folder_of_its_own_or_not(tmp_path, monkeypatch, folder):
    true_formats.write_svhn_files(tmp_path / folder, monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    train, test = load_source("svhn", tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert (len(train), len(test)) == (50, 20)
    assert train.classes == list("0123456789")
    raw = loadmat(tmp_path / folder / "test_32x32.mat")
    assert set(raw["y"].ravel()) == set(range(1, 11))
    assert test.targets.tolist() == [label % 10 for label in raw["y"].ravel()]
    assert np.array_equal(np.asarray(test[5][0]), raw["X"][..., 5])


def test_svhn_is_downloaded_into_its_folder(tmp_path, monkeypatch, files):
    folder, server = files
    pin_svhn(folder, server, monkeypatch)
    data_path = tmp_path / "data"
    for _ in range(2):
        assert len(load_source("SVHN", data_path)[1]) == 20
    assert server.downloads == ["/train_32x32.mat", "/test_32x32.mat"]
    assert sorted(path.name for path in data_path.iterdir()) == [".l2p.lock", "SVHN"]


def pin_svhn(folder, server, monkeypatch):
    true_formats.write_svhn_files(folder, monkeypatch)
    pinned = {
        split: [f"{server.address}/{file}", file, checksum]
        for split, (_, file, checksum) in SVHN.split_list.items()
    }
    monkeypatch.setattr(SVHN, "split_list", pinned)


@pytest.mark.parametrize("place", ["SVHN", "."])
def test_svhn_downloads_only_the_damaged_file(tmp_path, monkeypatch, files, place):
    folder, server = files
    pin_svhn(folder, server, monkeypatch)
    present = tmp_path / "data" / place
    present.mkdir(parents=True)
    shutil.copy(folder / "train_32x32.mat", present)
    (present / "test_32x32.mat").write_bytes(b"damaged")
    train, test = load_source("SVHN", tmp_path / "data")
    assert (len(train), len(test)) == (50, 20)
    assert server.downloads == ["/test_32x32.mat"]
    assert list((tmp_path / "data").glob("SVHN.damaged-*/test_32x32.mat")) or place == "."


def test_svhn_that_cannot_be_downloaded_says_what_to_do(tmp_path, monkeypatch):
    pinned = {
        split: [f"http://127.0.0.1:1/{file}", file, checksum]
        for split, (_, file, checksum) in SVHN.split_list.items()
    }
    monkeypatch.setattr(SVHN, "split_list", pinned)
    with pytest.raises(DataError) as caught:
        load_source("SVHN", tmp_path)
    for part in (str(tmp_path / "SVHN"), "train_32x32.mat and test", "http://127.0.0.1:1/test"):
        assert part in str(caught.value)


def test_file_without_permission_is_named_and_not_downloaded_anew(cifar, tmp_path, monkeypatch):
    _, raw, server = cifar
    unpack_cifar(raw, tmp_path)
    path = tmp_path / "cifar-100-python" / "train"

    def forbidden(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", forbidden)
    with pytest.raises(DataError) as caught:
        load_source("CIFAR100", tmp_path)
    assert str(caught.value) == f"{path}: Permission denied"
    assert server.downloads == []


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


# The table of sources


@pytest.mark.parametrize("name", SOURCES)
def test_true_format_of_every_data_set_is_read(tmp_path, monkeypatch, name):
    TRUE_FORMATS[name](tmp_path, monkeypatch)
    train, test = load_source(name, tmp_path)
    assert count_classes(name, tmp_path) == len(train.classes) == len(set(train.classes))
    assert test.classes == train.classes
    for source in (train, test):
        image, target = source[len(source) - 1]
        assert (image.mode, target) == ("RGB", source.targets[-1])
        assert source.targets.dtype == np.int64
        assert len(source) == len(source.targets)
        assert set(source.targets) == set(range(len(train.classes)))
        assert pickle.loads(pickle.dumps(source))[3][0] == source[3][0]
        with pytest.raises(IndexError):
            source[len(source)]


@pytest.mark.parametrize("name", SOURCES)
def test_every_class_has_a_colour_of_its_own(tmp_path, monkeypatch, name):
    if name == "digits":
        pytest.skip("these are true digits")
    TRUE_FORMATS[name](tmp_path, monkeypatch)
    train, test = load_source(name, tmp_path)
    means = np.zeros((len(train.classes), 3))
    for image, target in (train[i] for i in range(len(train))):
        means[target] += np.asarray(image).mean((0, 1)) / np.sum(train.targets == target)
    for image, target in (test[i] for i in range(len(test))):
        distances = np.abs(means - np.asarray(image).mean((0, 1))).sum(1)
        assert distances.argmin() == target


def aliases():
    return [(name, label) for name, spec in SOURCES.items() for label in (name, *spec.aliases)]


@pytest.mark.parametrize(("name", "label"), aliases())
def test_aliases_and_letter_case(name, label):
    for spelled in (label, label.lower(), label.upper()):
        assert find_source(spelled) is SOURCES[name]
        assert list(find_sources(spelled)) == [name]


def test_names_that_people_type():
    typed = "Split-CIFAR10 split-cifar100 Fashion-MNIST Flower102 OxfordFlowers102 ImageNetR"
    known = "CIFAR10 CIFAR100 FashionMNIST Flowers102 Flowers102 Imagenet-R"
    assert [next(iter(find_sources(name))) for name in typed.split()] == known.split()
    assert "Imagenet-R" in find_sources("split-imagenet-r")


def test_unknown_data_set_lists_the_known_ones():
    for find in (find_source, find_sources):
        with pytest.raises(ValueError, match=r"--dataset CIFAR101 .*CIFAR100, .*ImageFolder"):
            find("CIFAR101")


def test_list_of_names_keeps_its_order():
    assert list(find_sources("mnist , SVHN,fashion-mnist")) == ["MNIST", "SVHN", "FashionMNIST"]
    five = ["SVHN", "MNIST", "CIFAR10", "NotMNIST", "FashionMNIST"]
    assert list(find_sources("5-Datasets")) == five
    assert list(find_sources("digits,5-datasets")) == ["digits", *five]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("MNIST,CIFAR101,foo", ["CIFAR101, foo are unknown", "SVHN", "5-datasets (SVHN, MNIST"]),
        ("MNIST,,SVHN", ["an empty entry", "SVHN"]),
        ("", ["an empty entry"]),
        ("MNIST,", ["an empty entry"]),
        ("MNIST,SVHN,mnist", ["MNIST 2 times"]),
        ("Split-CIFAR100,cifar100", ["CIFAR100 2 times"]),
        ("5-datasets,mnist", ["MNIST 2 times"]),
        ("MNIST,ImageFolder", ["ImageFolder cannot be one of several", "--data-path"]),
        ("foo,SVHN,SVHN,imagefolder", ["foo is unknown", "SVHN 2 times", "ImageFolder cannot"]),
    ],
)
def test_list_of_names_is_rejected_with_all_that_is_wrong(names, expected):
    with pytest.raises(ValueError) as caught:
        find_sources(names)
    assert not isinstance(caught.value, DataError)
    assert "\n" not in str(caught.value)
    for part in expected:
        assert part in str(caught.value)


def test_five_datasets_are_read_one_by_one(tmp_path, monkeypatch):
    for name in FIVE_DATASETS:
        TRUE_FORMATS[name](tmp_path, monkeypatch)
    assert count_classes("5-datasets", tmp_path) == 50
    parts = load_parts("5-datasets", tmp_path)
    assert list(parts) == ["SVHN", "MNIST", "CIFAR10", "NotMNIST", "FashionMNIST"]
    for name, (train, test) in parts.items():
        alone, _ = load_source(name, tmp_path)
        assert train.classes == test.classes == alone.classes
        assert train.targets.tolist() == alone.targets.tolist()
        assert train[2][0] == alone[2][0]


def test_count_classes_needs_no_data_where_they_can_be_downloaded():
    nowhere = Path("/nowhere")
    assert count_classes("Split-CIFAR100", nowhere) == 100
    assert count_classes("digits", nowhere) == 10
    assert count_classes("SVHN,MNIST,CIFAR10,FashionMNIST,Flowers102", nowhere) == 142
    assert not find_source("digits").needs_data_path
    assert [name for name, spec in SOURCES.items() if spec.downloadable] == [
        *("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "SVHN", "Flowers102")
    ]
    with pytest.raises(DataError, match="/nowhere is not a folder"):
        count_classes("ImageFolder", nowhere)


def test_count_classes_names_every_data_set_that_is_missing(tmp_path):
    with pytest.raises(DataError) as caught:
        count_classes("MNIST,NotMNIST,CORe50,Imagenet-R", tmp_path)
    for folder in ("notMNIST", "core50_128x128", "imagenet-r"):
        assert str(tmp_path / folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_domains_are_known_for_some_data_sets_only(tmp_path):
    assert has_domains("core50")
    assert has_domains("ImageFolder")
    assert not has_domains("CIFAR100")
    assert not has_domains("CORe50,CIFAR100")
    for name in ("MNIST", "5-datasets"):
        for ask in (list_domains, load_domains):
            with pytest.raises(ValueError, match="has no domains: choose one of CORe50, Image"):
                ask(name, tmp_path)
    with pytest.raises(ValueError, match="foo is unknown"):
        has_domains("foo")


# Sources


def grey_source(*values):
    images = np.array(values, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    return ArraySource(images, [value % 2 for value in values], ["even", "odd"])


def test_concat_source_joins_images_and_shifts_labels():
    parts = [grey_source(10, 11), grey_source(21), grey_source(30, 31, 32)]
    joined = ConcatSource(parts, [f"class {i}" for i in range(6)], label_offsets=[4, 0, 2])
    assert len(joined) == 6
    assert joined.classes[5] == "class 5"
    assert joined.targets.dtype == np.int64
    assert joined.targets.tolist() == [4, 5, 1, 2, 3, 2]
    for index in (0, 1, 2, 3, 5, np.int64(4), np.int32(5)):
        image, target = joined[index]
        assert image.getpixel((0, 0))[0] == [10, 11, 21, 30, 31, 32][index]
        assert target == joined.targets[index]
        assert type(target) is int


def test_concat_source_counts_from_the_end_and_ends():
    joined = ConcatSource([grey_source(10), grey_source(21, 22)], ["even", "odd"])
    assert joined.targets.tolist() == [0, 1, 0]
    assert joined[-1][0].getpixel((0, 0))[0] == 22
    assert joined[-3][0].getpixel((0, 0))[0] == 10
    assert len(list(joined)) == 3
    for index in (3, -4, np.int64(3)):
        with pytest.raises(IndexError):
            joined[index]


def test_concat_source_takes_parts_without_images():
    empty = ArraySource(np.zeros((0, 4, 4), dtype=np.uint8), [], ["even", "odd"])
    joined = ConcatSource([empty, grey_source(10), empty, grey_source(21), empty], ["even", "odd"])
    assert [image.getpixel((0, 0))[0] for image, _ in joined] == [10, 21]


def test_concat_source_wants_an_offset_for_every_part():
    with pytest.raises(ValueError):
        ConcatSource([grey_source(1), grey_source(2)], ["even", "odd"], label_offsets=[0])


def test_file_source_opens_any_files(tmp_path):
    names = ["a.png", "sub/ünï.png", "sub/b.png"]
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(names):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / name)
    whole = FileSource([str(tmp_path / name) for name in names], [2, 0, 1], "abc")
    inside = FileSource(names, [2, 0, 1], "abc", folder=tmp_path)
    for source in (whole, inside, pickle.loads(pickle.dumps(inside))):
        assert list(source.paths) == [str(tmp_path / name) for name in names]
        assert source.paths[1:] == list(source.paths)[1:]
        assert source.paths[-1] == str(tmp_path / "sub/b.png")
        assert [source[i][0].getpixel((0, 0))[0] for i in range(3)] == [0, 1, 2]
        assert [source[i][1] for i in (np.int64(0), 1, -1)] == [2, 0, 1]
        with pytest.raises(IndexError):
            source[3]


# Memory


@contextmanager
def traced():
    """What is held at the end, and the most that was held at once, in bytes."""
    held = {}
    tracemalloc.start()
    try:
        yield held
        held["now"], held["peak"] = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()


def nbytes(*sources):
    return sum(source.images.nbytes for source in sources)


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "MNIST", "SVHN"])
def test_loading_takes_less_than_twice_the_data(tmp_path, monkeypatch, name):
    write_larger(name, tmp_path, monkeypatch)
    load_source(name, tmp_path)  # what is imported on the way is not counted
    with traced() as held:
        train, test = load_source(name, tmp_path)
    assert nbytes(train, test) > 3_000_000
    assert held["peak"] < 2 * nbytes(train, test)
    assert held["now"] < 1.1 * nbytes(train, test)


def write_larger(name, folder, monkeypatch):
    """Several megabytes, in the proportions of the true data."""
    if name == "CIFAR10":
        true_formats.write_cifar10(folder, monkeypatch, train=100, test=20)
    elif name == "CIFAR100":
        true_formats.write_cifar100(folder, monkeypatch, train=10, test=2)
    elif name == "MNIST":
        true_formats.write_idx(folder / "MNIST" / "raw", train=480, test=80)
    else:
        true_formats.write_svhn_files(folder / "SVHN", monkeypatch, train=100, test=35)


def test_paths_take_little_more_than_their_letters(tmp_path):
    with traced() as held:
        source = FileSource(
            (f"s{i % 11}/o{i % 50}/C_{i:08}.png" for i in range(165_000)),
            np.zeros(165_000, dtype=np.int64),
            ["a"],
            folder=tmp_path,
        )
    assert source.paths[164_999] == str(tmp_path / "s10/o49/C_00164999.png")
    assert held["now"] < 10_000_000
    assert len(pickle.dumps(source)) < 10_000_000


def test_images_are_contiguous_one_by_one(tmp_path, monkeypatch):
    TRUE_FORMATS["SVHN"](tmp_path, monkeypatch)
    train, _ = load_source("SVHN", tmp_path)
    assert train.images.shape == (50, 32, 32, 3)
    assert train.images[3].flags.c_contiguous


# Errors


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
