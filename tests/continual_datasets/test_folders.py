import hashlib
import logging
import os
import pickle
import shutil
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import Flowers102

from continual_datasets.images import ConcatSource, DataError, open_image
from continual_datasets.readers import storage
from continual_datasets.readers.registry import (
    count_classes,
    list_domains,
    load_domains,
    load_source,
)
from helpers import true_formats
from helpers.archives import write_tar
from helpers.forked_calls import finish, start
from helpers.http_server import serve
from helpers.true_formats import (
    DOMAINS,
    LETTERS,
    OBJECTS,
    TEST_SESSIONS,
    TRAIN_SESSIONS,
    WNIDS,
    digest,
)


def rejected(call, *args):
    """The one-line message with which something is rejected."""
    with pytest.raises(DataError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names_in(source, folder):
    return [os.path.relpath(path, folder) for path in source.paths]


def pack(folder, archive, prefix=""):
    """Pack the content of a folder and remove it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [f"{prefix}{path.relative_to(folder).as_posix()}" for path in files]
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as packed:
            for path, name in zip(files, names, strict=True):
                packed.write(path, name)
    else:
        with tarfile.open(archive, "w") as packed:
            for path, name in zip(files, names, strict=True):
                packed.add(path, name)
    shutil.rmtree(folder)


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
    for hidden in (tmp_path / "train" / ".ipynb_checkpoints", nested / ".ipynb_checkpoints"):
        hidden.mkdir()
        shutil.copy(nested / "x.PNG", hidden / "x-checkpoint.png")
    (tmp_path / "train" / "ant" / "._x.png").write_bytes(b"of another system")
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


# Image folders, one per domain


def test_domains_have_test_images_of_their_own(tmp_path):
    true_formats.write_domains(tmp_path)
    assert len(list_domains("imagefolder", tmp_path).names) == 3
    train, test = load_domains("ImageFolder", tmp_path)
    assert list(train) == list(test) == list(DOMAINS)
    for name in DOMAINS:
        assert train[name].classes == test[name].classes == ["ant", "bee"]
        assert names_in(train[name], tmp_path / name / "train") == [
            *(f"ant/{i}.png" for i in range(4)),
            *(f"bee/{i}.png" for i in range(4)),
        ]
        assert test[name].targets.tolist() == [0, 0, 1, 1]
        assert test[name].paths[3] == str(tmp_path / name / "test" / "bee" / "1.png")


@pytest.mark.parametrize("name", ["test", "val"])
def test_domains_have_common_test_images(tmp_path, name):
    true_formats.write_domains_with_common_test(tmp_path)
    (tmp_path / "test").rename(tmp_path / name)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "notes.txt").touch()
    train, test = load_domains("ImageFolder", tmp_path)
    assert list(train) == list(DOMAINS)
    assert list(test) == [name]
    assert test[name].targets.tolist() == [0] * 4 + [1] * 4
    assert test[name].paths[0] == str(tmp_path / name / "ant" / "0.png")


def test_domains_may_call_their_test_images_val(tmp_path):
    true_formats.write_domains(tmp_path)
    (tmp_path / "photo" / "test").rename(tmp_path / "photo" / "val")
    _, test = load_domains("ImageFolder", tmp_path)
    assert test["photo"].paths[0] == str(tmp_path / "photo" / "val" / "ant" / "0.png")
    assert test["paint"].paths[0] == str(tmp_path / "paint" / "test" / "ant" / "0.png")


DOMAIN_PROBLEMS = {
    "missing": (shutil.rmtree, ["is not a folder"]),
    "empty": (lambda root: [shutil.rmtree(root), root.mkdir()], ["no domain in"]),
    "plain": (lambda root: (root / "train").mkdir(), ["holds a folder train"]),
    "no train": (
        lambda root: (root / "photo" / "train").rename(root / "photo" / "training"),
        ["no folder train in", "photo"],
    ),
    "no test": (
        lambda root: shutil.rmtree(root / "photo" / "test"),
        ["no test images of domain photo"],
    ),
    "no class": (
        lambda root: [shutil.rmtree(root / "paint/train"), (root / "paint/train").mkdir()],
        ["no class folder in", "paint/train"],
    ),
}
CLASS_PROBLEMS = {
    "class missing": (shutil.rmtree, "sketch/train", "bee"),
    "test class missing": (shutil.rmtree, "photo/test", "ant"),
    "class added": (os.mkdir, "photo/train", "fly"),
}


@pytest.mark.parametrize("problem", DOMAIN_PROBLEMS)
def test_domain_layout_problem_is_named_with_the_layout(tmp_path, problem):
    root = tmp_path / "pictures"
    true_formats.write_domains(root)
    change, expected = DOMAIN_PROBLEMS[problem]
    change(root)
    message = rejected(list_domains, "ImageFolder", root)
    for part in (str(root), "<domain>/train/<class>", "test/<class>", *expected):
        assert part in message
    assert rejected(load_domains, "ImageFolder", root) == message


@pytest.mark.parametrize("problem", CLASS_PROBLEMS)
def test_domains_with_other_classes_are_rejected(tmp_path, problem):
    true_formats.write_domains(tmp_path)
    change, folder, name = CLASS_PROBLEMS[problem]
    change(tmp_path / folder / name)
    message = rejected(list_domains, "ImageFolder", tmp_path)
    for part in (str(tmp_path / "paint" / "train"), str(tmp_path / folder), f": {name}"):
        assert part in message


def test_common_test_images_of_other_classes_are_rejected(tmp_path):
    true_formats.write_domains_with_common_test(tmp_path)
    (tmp_path / "test" / "fly").mkdir()
    message = rejected(list_domains, "ImageFolder", tmp_path)
    assert f"only in {tmp_path / 'test'}: fly" in message


def test_domains_without_images_are_named(tmp_path):
    true_formats.write_domains(tmp_path)
    remove_images(tmp_path, "photo/train/bee")
    assert len(list_domains("ImageFolder", tmp_path).names) == 3
    assert "photo/train" in rejected(load_domains, "ImageFolder", tmp_path)


def test_image_folder_has_no_file_lists(tmp_path):
    true_formats.write_domains(tmp_path)
    for call in (list_domains, load_domains):
        assert "belong to CORe50" in rejected(call, "ImageFolder", tmp_path, tmp_path)


# notMNIST


@pytest.mark.parametrize("splits", [("Train", "Test"), ("train", "test"), ("TRAIN", "Test")])
def test_not_mnist_is_read_whatever_the_letter_case(tmp_path, splits):
    true_formats.write_not_mnist(tmp_path, splits=splits)
    (tmp_path / "notMNIST" / splits[0] / "A" / "notes.txt").touch()
    (tmp_path / "notMNIST" / splits[0] / "A" / "._A0.png").touch()
    assert count_classes("notmnist", tmp_path) == 10
    train, test = load_source("NOTMNIST", tmp_path)
    assert train.classes == list(LETTERS)
    assert train.targets.tolist() == [i for i in range(10) for _ in range(4)]
    expected = [f"{letter}/{letter}{i}.png" for letter in LETTERS for i in range(2)]
    assert names_in(test, tmp_path / "notMNIST" / splits[1]) == expected
    image, target = train[13]
    written = true_formats.grey_picture(3, 401)
    assert target == 3
    assert np.array_equal(np.asarray(image), np.stack([written] * 3, -1))


def test_not_mnist_leaves_out_files_that_are_no_png_and_names_them(tmp_path, caplog):
    true_formats.write_not_mnist(tmp_path)
    folder = tmp_path / "notMNIST"
    bad = [folder / "Test/J/J1.png", folder / "Train/A/A0.png", folder / "Train/A/Z.png"]
    bad[0].write_bytes(b"")
    bad[1].write_bytes(b"\x89PNG\r\n\x1a")
    Image.new("L", (28, 28)).save(bad[2], format="gif")
    train, test = load_source("NotMNIST", tmp_path)
    assert (len(train), len(test)) == (39, 19)
    assert names_in(train, folder / "Train")[:4] == ["A/A1.png", "A/A2.png", "A/A3.png", "B/B0.png"]
    assert train.targets.tolist()[:4] == [0, 0, 0, 1]
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    for path in bad:
        assert str(path) in record.getMessage()
    assert "left out 3 files" in record.getMessage()


def test_not_mnist_names_a_png_that_is_broken_further_in(tmp_path):
    true_formats.write_not_mnist(tmp_path)
    path = tmp_path / "notMNIST" / "Train" / "B" / "B2.png"
    path.write_bytes(path.read_bytes()[:60])
    train, _ = load_source("NotMNIST", tmp_path)
    assert len(train) == 40
    assert rejected(train.__getitem__, 6).startswith(f"{path}: ")


@pytest.mark.parametrize("prefix", ["notMNIST/", ""])
def test_not_mnist_zip_is_unpacked_once(tmp_path, monkeypatch, prefix):
    true_formats.write_not_mnist(tmp_path)
    pack(tmp_path / "notMNIST", tmp_path / "notMNIST.zip", prefix)
    assert count_classes("NotMNIST", tmp_path) == 10
    assert not (tmp_path / "notMNIST").exists()
    together = [start(load_source, "NotMNIST", tmp_path) for _ in range(2)]
    for process in together:
        finish(process)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".l2p.lock", "notMNIST", "notMNIST.zip"]
    monkeypatch.setattr(storage, "unpack", lambda *_: pytest.fail("unpacked again"))
    train, test = load_source("NotMNIST", tmp_path)
    assert (len(train), len(test)) == (40, 20)


@pytest.mark.parametrize("gone", ["Test", "Train/C", "Test/J"])
def test_not_mnist_incomplete_folder_is_named_at_once(tmp_path, gone):
    true_formats.write_not_mnist(tmp_path)
    shutil.rmtree(tmp_path / "notMNIST" / gone)
    message = rejected(count_classes, "NotMNIST", tmp_path)
    for part in (str(tmp_path / "notMNIST"), gone[-1], "Train/<A to J>/*.png", "Adversarial"):
        assert part in message
    assert rejected(load_source, "NotMNIST", tmp_path) == message


def test_not_mnist_letter_without_an_image_is_named(tmp_path):
    true_formats.write_not_mnist(tmp_path)
    for path in (tmp_path / "notMNIST" / "Test" / "C").iterdir():
        path.write_bytes(b"")
    assert f"{tmp_path}/notMNIST/Test/C" in rejected(load_source, "NotMNIST", tmp_path)


# What people get by hand

BY_HAND = {
    "NotMNIST": ("notMNIST", "notMNIST.zip", "Train/<A to J>", "Adversarial-Continual-Learning"),
    "CORe50": ("core50_128x128", "core50_128x128.zip", "s1/o1/", "vlomonaco.github.io/core50"),
    "Imagenet-R": ("imagenet-r", "imagenet-r.tar", "<n01443537", "hendrycks/imagenet-r"),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_missing_data_name_the_place_the_layout_and_the_origin(tmp_path, name):
    folder, archive, layout, url = BY_HAND[name]
    message = rejected(count_classes, name, tmp_path)
    for part in (f"{tmp_path / folder}/{layout}", archive, url):
        assert part in message
    assert rejected(load_source, name, tmp_path) == message
    assert rejected(count_classes, name, tmp_path / "nowhere").startswith(
        message.split(" is not")[0]
    )


@pytest.mark.parametrize("name", BY_HAND)
def test_damaged_archive_is_named(tmp_path, name):
    folder, archive, *_ = BY_HAND[name]
    (tmp_path / archive).write_bytes(b"half of it")
    message = rejected(load_source, name, tmp_path)
    assert str(tmp_path / archive) in message
    assert not (tmp_path / folder).exists()


def test_archive_with_a_member_outside_is_rejected(tmp_path):
    write_tar(tmp_path / "imagenet-r.tar", {"imagenet-r/n01443537/0.jpg": b"", "../evil": b""})
    assert "'../evil'" in rejected(load_source, "Imagenet-R", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".l2p.lock", "imagenet-r.tar"]


# Flowers-102


def test_flowers_are_read_from_the_true_layout(tmp_path, monkeypatch):
    true_formats.write_flowers102(tmp_path, monkeypatch)
    train, test = load_source("OxfordFlowers102", tmp_path)
    assert (len(train), len(test), len(train.classes)) == (204, 102, 102)
    labels = true_formats.mixed_labels(102, 4)
    for source in (train, test):
        numbers = [int(path[-9:-4]) for path in source.paths]
        assert source.targets.tolist() == [labels[number - 1] for number in numbers]
        image, target = source[17]
        assert image == open_image(tmp_path / f"flowers-102/jpg/image_{numbers[17]:05}.jpg")
        written = true_formats.colour_picture(target, numbers[17])
        assert np.abs(np.asarray(image).mean((0, 1)) - written.mean((0, 1))).max() < 4
    assert train.targets.tolist() == [class_id for class_id in range(102) for _ in range(2)]


def serve_flowers(folder, server, monkeypatch):
    true_formats.write_flowers102(folder, monkeypatch)
    jpg = folder / "flowers-102" / "jpg"
    contents = {f"jpg/{path.name}": path.read_bytes() for path in jpg.iterdir()}
    archive = write_tar(folder / "flowers-102" / "102flowers.tgz", contents)
    files = {**Flowers102._file_dict, "image": (archive.name, digest(archive))}
    monkeypatch.setattr(Flowers102, "_file_dict", files)
    monkeypatch.setattr(Flowers102, "_download_url_prefix", f"{server.address}/flowers-102/")


@pytest.fixture
def flowers(tmp_path, monkeypatch):
    (tmp_path / "server").mkdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(tmp_path / "server") as server:
        serve_flowers(tmp_path / "server", server, monkeypatch)
        yield tmp_path / "server" / "flowers-102", server


def test_flowers_are_downloaded_once(tmp_path, flowers):
    _, server = flowers
    for _ in range(2):
        assert len(load_source("Flowers102", tmp_path / "data")[1]) == 102
    names = ["102flowers.tgz", "imagelabels.mat", "setid.mat"]
    assert server.downloads == [f"/flowers-102/{name}" for name in names]
    folder = tmp_path / "data" / "flowers-102"
    assert sorted(path.name for path in folder.iterdir()) == ["imagelabels.mat", "jpg", "setid.mat"]


def test_flowers_damage_is_mended_with_what_is_still_good(tmp_path, flowers):
    folder, server = flowers
    shutil.copytree(folder, tmp_path / "data" / "flowers-102")
    savemat(tmp_path / "data" / "flowers-102" / "setid.mat", {"trnid": [[1]]})
    assert len(load_source("Flowers102", tmp_path / "data")[0]) == 204
    assert server.downloads == ["/flowers-102/setid.mat"]


def test_flowers_missing_images_are_named(tmp_path, monkeypatch, flowers):
    folder, _ = flowers
    shutil.copytree(folder, tmp_path / "data" / "flowers-102")
    (tmp_path / "data" / "flowers-102" / "102flowers.tgz").unlink()
    train, _ = load_source("Flowers102", tmp_path / "data")
    os.remove(train.paths[5])
    monkeypatch.setattr(Flowers102, "_download_url_prefix", "http://127.0.0.1:1/")
    message = rejected(load_source, "Flowers102", tmp_path / "data")
    for part in (os.path.basename(train.paths[5]), str(tmp_path / "data"), "http://127.0.0.1:1/"):
        assert part in message


# CORe50


@pytest.mark.parametrize("folder", ["core50_128x128", "."])
def test_core50_sessions_are_domains_in_their_order(tmp_path, folder):
    true_formats.write_core50(tmp_path, folder=folder)
    root = tmp_path / folder
    assert len(list_domains("core50", tmp_path).names) == 8
    assert count_classes("CORe50", tmp_path) == 3
    train, test = load_domains("CORe50", tmp_path)
    assert list(train) == ["s1", "s2", "s4", "s5", "s6", "s8", "s9", "s11"]
    assert list(test) == ["s3+s7+s10"]
    for source in (*train.values(), *test.values()):
        assert source.classes == ["o1", "o2", "o10"]
    expected = [true_formats.core50_name(11, number, i) for number in OBJECTS for i in range(2)]
    assert names_in(train["s11"], root) == expected
    assert train["s11"].targets.tolist() == [0, 0, 1, 1, 2, 2]
    sessions = [name.split("/")[0] for name in names_in(test["s3+s7+s10"], root)]
    assert sessions == ["s3"] * 6 + ["s7"] * 6 + ["s10"] * 6
    image, target = train["s11"][5]
    assert target == 2
    assert np.array_equal(np.asarray(image), true_formats.colour_picture(15, 1101, (16, 16)))


def test_core50_without_domains_joins_the_sessions(tmp_path):
    true_formats.write_core50(tmp_path)
    train, test = load_source("CORe50", tmp_path)
    domains, common = load_domains("CORe50", tmp_path)
    assert list(train.paths) == [path for source in domains.values() for path in source.paths]
    assert train.targets.tolist() == [0, 0, 1, 1, 2, 2] * 8
    assert list(test.paths) == list(common["s3+s7+s10"].paths)


def test_core50_zip_is_unpacked_once(tmp_path, monkeypatch):
    true_formats.write_core50(tmp_path)
    pack(tmp_path / "core50_128x128", tmp_path / "core50_128x128.zip", "core50_128x128/")
    assert count_classes("CORe50", tmp_path) == 50  # the published set
    assert len(list_domains("CORe50", tmp_path).names) == 8
    assert not (tmp_path / "core50_128x128").exists()
    assert len(load_domains("CORe50", tmp_path)[0]["s1"]) == 6
    monkeypatch.setattr(storage, "unpack", lambda *_: pytest.fail("unpacked again"))
    assert len(load_source("CORe50", tmp_path)[0]) == 48
    assert count_classes("CORe50", tmp_path) == 3


CORE50_DAMAGE = {
    "session missing": (lambda root: shutil.rmtree(root / "s7"), ["no session s7"]),
    "object missing": (lambda root: shutil.rmtree(root / "s9/o2"), ["s9", "only in s1: o2"]),
    "object added": (lambda root: (root / "s3/o50").mkdir(), ["only in s3: o50"]),
    "no objects": (
        lambda root: [shutil.rmtree(root / "s1"), (root / "s1").mkdir()],
        ["no object in", "s1"],
    ),
}


@pytest.mark.parametrize("damage", CORE50_DAMAGE)
def test_core50_damage_is_named_at_once(tmp_path, damage):
    true_formats.write_core50(tmp_path)
    change, expected = CORE50_DAMAGE[damage]
    change(tmp_path / "core50_128x128")
    for call in (count_classes, list_domains, load_source, load_domains):
        message = rejected(call, "CORe50", tmp_path)
        for part in (str(tmp_path / "core50_128x128"), *expected):
            assert part in message


def test_core50_object_without_images_is_named(tmp_path):
    true_formats.write_core50(tmp_path)
    for path in (tmp_path / "core50_128x128" / "s9" / "o2").iterdir():
        path.unlink()
    for call in (load_source, load_domains):
        assert f"{tmp_path}/core50_128x128/s9/o2" in rejected(call, "CORe50", tmp_path)


# CORe50's file lists


@pytest.fixture
def lists(tmp_path):
    """The folder of published lists, beside the data."""
    true_formats.write_core50(tmp_path)
    return tmp_path / "batches_filelists" / "NI_inc" / "run0"


def test_file_lists_are_domains_in_their_order(tmp_path, lists):
    (lists / "readme.txt").write_text("not a list")
    assert len(list_domains("CORe50", tmp_path, lists).names) == 8
    train, test = load_domains("CORe50", tmp_path, lists)
    assert list(train) == [f"batch_{i:02}" for i in range(8)]
    for source, session in zip(train.values(), reversed(TRAIN_SESSIONS), strict=True):
        lines = true_formats.core50_list([session]).splitlines()
        assert names_in(source, tmp_path / "core50_128x128") == [line.split()[0] for line in lines]
        assert source.targets.tolist() == [int(line.split()[1]) for line in lines]
        assert source.classes == ["o1", "o2", "o10"]
    assert list(test) == ["test"]
    lines = true_formats.core50_list(TEST_SESSIONS).splitlines()
    assert names_in(test["test"], tmp_path / "core50_128x128") == [
        line.split()[0] for line in lines
    ]


def test_file_lists_keep_the_order_of_their_lines(tmp_path, lists):
    path = lists / "train_batch_03_filelist.txt"
    lines = path.read_text().splitlines()[::-1]
    path.write_bytes("\r\n".join(lines).encode())
    source = load_domains("CORe50", tmp_path, lists)[0]["batch_03"]
    assert names_in(source, tmp_path / "core50_128x128") == [line.split()[0] for line in lines]
    assert source.targets.tolist() == [2, 2, 1, 1, 0, 0]


def test_file_lists_are_ordered_by_number(tmp_path, lists):
    for i in range(8, 102):
        shutil.copy(
            lists / "train_batch_00_filelist.txt", lists / f"train_batch_{i:02}_filelist.txt"
        )
    assert len(list_domains("CORe50", tmp_path, lists).names) == 102
    assert list(load_domains("CORe50", tmp_path, lists)[0])[98:] == [
        *("batch_98", "batch_99", "batch_100", "batch_101")
    ]


LINE = "s11/o1/C_11_01_000.png"
BAD_LINES = {
    "label of another object": (f"{LINE} 1", "label 1 of s11/o1/C_11_01_000.png: object o1 is 0"),
    "label too high": (f"{LINE} 3", "label 3"),
    "negative label": (f"{LINE} -1", "not of the form"),
    "no label": (LINE, "not of the form"),
    "no number": (f"{LINE} o1", "not of the form"),
    "more": (f"{LINE} 0 0", "not of the form"),
    "no such image": ("s11/o1/C_11_01_999.png 0", "there is no"),
    "no such folder": ("s12/o1/C_12_01_000.png 0", "there is no"),
    "a folder": ("s11/o1 0", "not of the form"),
    "deeper": ("s11/o1/x/C_11_01_000.png 0", "not of the form"),
    "absolute": ("/etc/passwd 0", "leaves"),
    "outside": (f"../core50_128x128/{LINE} 0", "leaves"),
    "outside at the end": ("s11/o1/.. 0", "leaves"),
}


@pytest.mark.parametrize("name", ["train_batch_02_filelist.txt", "test_filelist.txt"])
@pytest.mark.parametrize("bad", BAD_LINES)
def test_file_list_line_is_rejected_with_its_number(tmp_path, lists, bad, name):
    line, reason = BAD_LINES[bad]
    before = (lists / name).read_text().splitlines()
    (lists / name).write_text("\n".join([*before[:3], line, *before[3:]]))
    message = rejected(load_domains, "CORe50", tmp_path, lists)
    assert message.startswith(f"{lists / name}, line 4: ")
    assert reason in message


def test_blank_lines_of_a_file_list_are_skipped(tmp_path, lists):
    before = load_domains("CORe50", tmp_path, lists)[0]["batch_02"]
    path = lists / "train_batch_02_filelist.txt"
    path.write_text("\n" + path.read_text() + "\n  \n")
    after = load_domains("CORe50", tmp_path, lists)[0]["batch_02"]
    assert list(after.paths) == list(before.paths)
    assert after.targets.tolist() == before.targets.tolist()
    path.write_text("\n\n")
    assert "the list is empty" in rejected(load_domains, "CORe50", tmp_path, lists)


@pytest.mark.parametrize(("name", "wanted"), [("CORe50", ["s11", "s2"]), ("ImageFolder", None)])
def test_domains_are_learned_in_the_order_that_is_wanted(tmp_path, name, wanted):
    if wanted is None:
        true_formats.write_domains(tmp_path)
        wanted = [DOMAINS[2], DOMAINS[0]]
    else:
        true_formats.write_core50(tmp_path)
    all_train, all_test = load_domains(name, tmp_path)
    train, test = load_domains(name, tmp_path, wanted=wanted)
    assert list(train) == wanted == list(list_domains(name, tmp_path, wanted=wanted).names)
    assert list(test) == (list(all_test) if name == "CORe50" else wanted)
    for domain in wanted:
        assert list(train[domain].paths) == list(all_train[domain].paths)


def test_digest_tells_files_and_labels_apart(tmp_path):
    true_formats.write_core50(tmp_path)
    train, _ = load_domains("CORe50", tmp_path)
    digests = {source.digest() for source in train.values()}
    assert len(digests) == len(train)
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "core50_128x128", moved / "core50_128x128")
    again, _ = load_domains("CORe50", moved)
    assert {source.digest() for source in again.values()} == digests
    joined = ConcatSource(list(train.values()), train["s1"].classes)
    swapped = ConcatSource(list(reversed(train.values())), train["s1"].classes)
    assert joined.digest() != swapped.digest()


def test_file_list_with_an_unknown_object_is_rejected(tmp_path, lists):
    root = tmp_path / "core50_128x128"
    shutil.copytree(root / "s1" / "o1", root / "s12" / "o7")
    with (lists / "test_filelist.txt").open("a") as file:
        file.write("s12/o7/C_01_01_000.png 0\n")
    assert "line 19: object o7" in rejected(load_domains, "CORe50", tmp_path, lists)


@pytest.mark.parametrize(
    "gone", ["train_batch_00_filelist.txt", "train_batch_05_filelist.txt", "test_filelist.txt", "*"]
)
def test_missing_file_lists_are_named_at_once(tmp_path, lists, gone):
    for path in lists.glob(gone):
        path.unlink()
    message = rejected(list_domains, "CORe50", tmp_path, lists)
    expected = "train_batch_00_filelist.txt, test_filelist.txt" if gone == "*" else gone
    assert message.startswith(f"no {expected} in {lists}; expected train_batch_00_filelist.txt")
    assert rejected(load_domains, "CORe50", tmp_path, lists) == message


def test_file_lists_that_cannot_be_read_are_named(tmp_path, lists):
    assert str(tmp_path / "none") in rejected(list_domains, "CORe50", tmp_path, tmp_path / "none")
    path = lists / "train_batch_01_filelist.txt"
    path.write_bytes(b"")
    assert rejected(load_domains, "CORe50", tmp_path, lists).startswith(
        f"{path}: the list is empty"
    )
    path.write_bytes(b"\xff\xfe")
    assert rejected(load_domains, "CORe50", tmp_path, lists).startswith(f"{path}: not a text file")


def test_file_lists_look_into_every_folder_once(tmp_path, lists, monkeypatch):
    looked = []

    def scandir(folder):
        looked.append(str(folder))
        return original(folder)

    original = os.scandir
    monkeypatch.setattr("os.scandir", scandir)
    load_domains("CORe50", tmp_path, lists)
    objects = [folder for folder in looked if os.path.basename(folder).startswith("o")]
    assert len(objects) == len(set(objects)) == 33


# ImageNet-R


@pytest.mark.parametrize("folder", ["imagenet-r", "."])
def test_imagenet_r_is_read_from_the_true_layout(tmp_path, folder):
    true_formats.write_imagenet_r(tmp_path, folder=folder)
    (tmp_path / folder / "misc").mkdir()
    assert count_classes("ImagenetR", tmp_path) == 3
    train, test = load_source("Split-ImageNet-R", tmp_path)
    assert train.classes == test.classes == list(WNIDS)
    assert train.targets.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert test.targets.tolist() == [0] * 2 + [1] * 2 + [2] * 2
    both = names_in(train, tmp_path / folder) + names_in(test, tmp_path / folder)
    assert sorted(both) == [f"{wnid}/{i}.jpg" for wnid in WNIDS for i in range(10)]
    image, target = train[20]
    assert image == open_image(train.paths[20])
    assert (image.mode, target) == ("RGB", 2)
    assert str(tmp_path / folder / WNIDS[2]) == os.path.dirname(train.paths[20])


#: By `printf %s n01443537/art_0.jpg | sha256sum` and so on.
SUMS = {
    "art_0.jpg": "07c9fe29",
    "art_1.jpg": "bdd9d690",
    "cartoon_2.jpg": "79890992",
    "graffiti_3.jpg": "efd5d9e9",
    "origami_4.jpg": "1747baa3",
    "sketch_5.jpg": "0abe2921",
    "tattoo_6.jpg": "15590186",
    "toy_7.jpg": "90701b76",
}


def write_renditions(root, names, wnids=WNIDS):
    for wnid in wnids:
        (root / wnid).mkdir(parents=True)
        for name in names:
            Image.new("RGB", (4, 4)).save(root / wnid / name)


def test_imagenet_r_split_is_by_the_sums_of_the_names(tmp_path):
    write_renditions(tmp_path / "imagenet-r", SUMS)
    for name, checksum in SUMS.items():
        assert hashlib.sha256(f"n01443537/{name}".encode()).hexdigest().startswith(checksum)
    train, test = load_source("Imagenet-R", tmp_path)
    expected = sorted(sorted(SUMS, key=SUMS.__getitem__)[:2])  # 8 / 5, rounded
    assert (
        [os.path.basename(path) for path in test.paths[:2]]
        == expected
        == ["art_0.jpg", "sketch_5.jpg"]
    )
    rest = sorted(set(SUMS) - set(expected))
    assert [os.path.basename(path) for path in train.paths[:6]] == rest


def test_imagenet_r_split_depends_on_nothing_but_names(tmp_path, monkeypatch):
    write_renditions(tmp_path / "one" / "imagenet-r", SUMS)
    write_renditions(tmp_path / "other" / "imagenet-r", list(SUMS)[::-1], WNIDS[1:])
    before = sorted((tmp_path / "one").rglob("*"))
    first = load_source("Imagenet-R", tmp_path / "one")
    original = os.scandir
    monkeypatch.setattr("os.scandir", lambda folder: Reversed(original(folder)))
    np.random.seed(7)
    again = load_source("Imagenet-R", tmp_path / "one")
    fewer = load_source("Imagenet-R", tmp_path / "other")
    for one, other, part in zip(first, again, fewer, strict=True):
        assert list(one.paths) == list(other.paths)
        names = names_in(one, tmp_path / "one")[np.sum(one.targets == 0) :]
        assert names == names_in(part, tmp_path / "other")
    assert sorted((tmp_path / "one").rglob("*")) == before


class Reversed:
    """Another order in which a file system lists a folder."""

    def __init__(self, entries):
        self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

    def __enter__(self):
        return iter(self.entries)

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize(("images", "tests"), [(2, 1), (3, 1), (7, 1), (8, 2), (12, 2), (13, 3)])
def test_imagenet_r_fifth_is_rounded(tmp_path, images, tests):
    write_renditions(tmp_path / "imagenet-r", [f"{i}.jpg" for i in range(images)])
    train, test = load_source("Imagenet-R", tmp_path)
    assert np.bincount(test.targets).tolist() == [tests] * 3
    assert np.bincount(train.targets).tolist() == [images - tests] * 3


def test_imagenet_r_class_with_one_image_is_rejected(tmp_path):
    true_formats.write_imagenet_r(tmp_path)
    for path in sorted((tmp_path / "imagenet-r" / WNIDS[1]).iterdir())[1:]:
        path.unlink()
    assert WNIDS[1] in rejected(load_source, "Imagenet-R", tmp_path)


def test_imagenet_r_needs_two_classes(tmp_path):
    true_formats.write_imagenet_r(tmp_path)
    for wnid in WNIDS[1:]:
        shutil.rmtree(tmp_path / "imagenet-r" / wnid)
    for call in (count_classes, load_source):
        message = rejected(call, "Imagenet-R", tmp_path)
        assert "1 classes" in message
        assert "hendrycks" in message


def test_imagenet_r_tar_is_unpacked_once(tmp_path, monkeypatch):
    true_formats.write_imagenet_r(tmp_path)
    pack(tmp_path / "imagenet-r", tmp_path / "imagenet-r.tar", "imagenet-r/")
    assert count_classes("Imagenet-R", tmp_path) == 200  # the published set
    assert len(load_source("Imagenet-R", tmp_path)[0]) == 24
    monkeypatch.setattr(storage, "unpack", lambda *_: pytest.fail("unpacked again"))
    assert len(load_source("Imagenet-R", tmp_path)[1]) == 6
    assert count_classes("Imagenet-R", tmp_path) == 3


def test_imagenet_r_names_a_broken_image(tmp_path):
    true_formats.write_imagenet_r(tmp_path)
    train, _ = load_source("Imagenet-R", tmp_path)
    with open(train.paths[4], "r+b") as file:
        file.truncate(200)
    assert rejected(train.__getitem__, 4).startswith(f"{train.paths[4]}: ")


# Memory and processes

LAZY = ["NotMNIST", "Flowers102", "CORe50", "Imagenet-R", "ImageFolder"]


@pytest.mark.parametrize("name", LAZY)
def test_folders_hold_paths_and_no_pixels(tmp_path, monkeypatch, name):
    true_formats.TRUE_FORMATS[name](tmp_path, monkeypatch)
    load_source(name, tmp_path)  # what is imported on the way is not counted
    held = []
    for _ in range(3):  # the servers of other tests, in threads, may still allocate
        tracemalloc.start()
        sources = load_source(name, tmp_path)
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert min(held) < 20_000 + 100 * sum(len(source) for source in sources)
    for source in sources:
        letters = sum(len(os.path.basename(os.path.dirname(path))) + 40 for path in source.paths)
        assert len(pickle.dumps(source)) < 6_000 + letters


@pytest.mark.parametrize("name", LAZY)
def test_folders_open_images_only_when_asked(tmp_path, monkeypatch, name):
    true_formats.TRUE_FORMATS[name](tmp_path, monkeypatch)
    for path in (*tmp_path.rglob("*.png"), *tmp_path.rglob("*.jpg")):
        path.write_bytes(b"\x89PNG\r\n\x1a\nand so on")
    for source in load_source(name, tmp_path):
        assert rejected(source.__getitem__, 0).startswith(f"{source.paths[0]}: ")
