"""The table of data sets: their names, and every one of them in its published format."""

import gzip
import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat

from continual_datasets.images import DataError, FileSource
from continual_datasets.readers.registry import (
    FIVE_DATASETS,
    SOURCES,
    count_classes,
    find_sources,
    list_domains,
    load_parts,
)
from helpers.data_server import NOWHERE, point
from helpers.tables import assert_says, cases
from helpers.true_formats import ARRAYS, arrays, idx_bytes, load_one, rejected, write

IN_MEMORY = [*ARRAYS, "digits"]

# Names


def test_aliases_and_letter_case():
    labels = {
        "Split-CIFAR10": "CIFAR10", "split-cifar100": "CIFAR100", "Fashion-MNIST": "FashionMNIST",
        "Flower102": "Flowers102", "Flowers-102": "Flowers102", "OxfordFlowers102": "Flowers102",
        "ImageNetR": "Imagenet-R", "split-imagenet-r": "Imagenet-R",
        "Kuzushiji-MNIST": "KMNIST",
    }  # fmt: skip
    for label, name in {**labels, **dict(zip(SOURCES, SOURCES, strict=True))}.items():
        for spelled in (label, label.lower(), label.upper()):
            assert find_sources(spelled) == {name: SOURCES[name]}
    assert sum(len(reader.aliases) for reader in SOURCES.values()) == len(labels)


def test_list_of_names_keeps_its_order():
    assert list(find_sources("mnist , SVHN,fashion-mnist")) == ["MNIST", "SVHN", "FashionMNIST"]
    five = ["SVHN", "MNIST", "CIFAR10", "NotMNIST", "FashionMNIST"]
    assert list(find_sources("5-Datasets")) == list(FIVE_DATASETS) == five
    assert list(find_sources("digits,5-datasets")) == ["digits", *five]


WRONG_NAMES = """
CIFAR101
    --dataset CIFAR101 is unknown: choose one of CIFAR10, CIFAR100, MNIST
MNIST,CIFAR101,foo
    CIFAR101, foo are unknown .. SVHN .. 5-datasets (SVHN, MNIST
MNIST,,SVHN
    (an empty entry) is unknown .. SVHN
MNIST,
    an empty entry
MNIST,SVHN,mnist
    MNIST 2 times
Split-CIFAR100,cifar100
    CIFAR100 2 times
5-datasets,mnist
    MNIST 2 times
MNIST,ImageFolder
    ImageFolder cannot be one of several .. --data-path
foo,SVHN,SVHN,imagefolder
    foo is unknown .. SVHN 2 times .. ImageFolder cannot
"""


@pytest.mark.parametrize(("names", "expected"), cases(WRONG_NAMES))
def test_names_are_rejected_with_all_that_is_wrong(names, expected):
    with pytest.raises(ValueError) as caught:
        find_sources(names)
    assert not isinstance(caught.value, DataError)
    assert "\n" not in str(caught.value)
    assert_says([str(caught.value)], expected)


def test_count_classes_needs_no_data_where_they_can_be_downloaded(tmp_path):
    nowhere = Path("/nowhere")
    assert count_classes("Split-CIFAR100", nowhere) == 100
    assert count_classes("digits", nowhere) == 10
    assert count_classes("SVHN,MNIST,CIFAR10,FashionMNIST,Flowers102", nowhere) == 142
    assert "/nowhere is not a folder" in rejected(count_classes, "ImageFolder", nowhere)
    message = rejected(count_classes, "MNIST,NotMNIST,CORe50,Imagenet-R", tmp_path)
    for folder in ("notMNIST", "core50_128x128", "imagenet-r"):
        assert str(tmp_path / folder) in message


@pytest.mark.slow
def test_several_data_sets_are_read_one_by_one(tmp_path, monkeypatch):
    write("MNIST", tmp_path, monkeypatch)
    assert count_classes("digits,MNIST", tmp_path) == 20
    for at, split in enumerate(load_parts("digits,MNIST", tmp_path)):
        assert list(split) == ["digits", "MNIST"]
        for name, source in split.items():
            assert source.digest() == load_one(name, tmp_path)[at].digest()


@pytest.mark.parametrize(
    ("name", "problem"),
    [("MNIST", "has no domains: choose one of CORe50, ImageFolder"), ("foo", "foo is unknown"),
     ("5-datasets", "has no domains"), ("CORe50,CIFAR100", "has no domains")],
)  # fmt: skip
def test_domains_are_known_for_some_data_sets_only(tmp_path, name, problem):
    with pytest.raises(ValueError, match=problem):
        list_domains(name, tmp_path)


# Every data set


@pytest.mark.parametrize("name", SOURCES)
def test_true_format_is_read(tmp_path, monkeypatch, name):
    write(name, tmp_path, monkeypatch)
    train, test = load_one(name, tmp_path)
    assert isinstance(test, FileSource) == SOURCES[name].in_files == (name not in IN_MEMORY)
    assert count_classes(name, tmp_path) == len(train.classes) == len(set(train.classes))
    assert test.classes == train.classes
    colours = []
    for source in (train, test):
        image, target = source[len(source) - 1]
        assert (image.mode, target) == ("RGB", source.targets[-1])
        assert source.targets.dtype == np.int64
        assert len(source) == len(source.targets)
        assert set(source.targets) == set(range(len(train.classes)))
        assert pickle.loads(pickle.dumps(source))[3][0] == source[3][0]
        with pytest.raises(IndexError):
            source[len(source)]
        colours.append(np.array([np.asarray(image).mean((0, 1)) for image, _ in source]))
    if name != "digits":  # whose classes have no colour of their own
        means = [colours[0][train.targets == c].mean(0) for c in range(len(train.classes))]
        nearest = [np.abs(means - colour).sum(1).argmin() for colour in colours[1]]
        assert nearest == test.targets.tolist()


@pytest.mark.parametrize(("name", "file"), [
    ("CIFAR100", "cifar-100-python/train"), ("MNIST", "MNIST/raw/train-images-idx3-ubyte"),
    ("SVHN", "SVHN/test_32x32.mat"), ("NotMNIST", "notMNIST/Test/C/1.png"),
])  # fmt: skip
def test_pipe_in_the_place_of_a_file_is_rejected(tmp_path, monkeypatch, name, file):
    write(name, tmp_path, monkeypatch)
    point(monkeypatch, NOWHERE)
    (tmp_path / file).unlink()
    os.mkfifo(tmp_path / file)
    assert str(tmp_path / Path(file).parts[0]) in rejected(load_one, name, tmp_path)


def test_folder_of_a_downloaded_data_set_given_itself_is_named(tmp_path, monkeypatch):
    """It is not downloaded into itself; and one below is named if it cannot be downloaded."""
    point(monkeypatch, NOWHERE)
    data_path = tmp_path / "data"
    for name, inside in {"CIFAR100": ".", "MNIST": "raw"}.items():
        write(name, data_path, monkeypatch)
        given = data_path / SOURCES[name].folder / inside
        message = rejected(load_one, name, given)
        assert message == f"{name} is not in {given}: give --data-path {data_path}"
        message = rejected(load_one, name, tmp_path)
        assert message.endswith(f"; give the folder below: --data-path {data_path}")


def assert_read(splits, name, times=1):
    """Whether these are the images of a data set, in their order."""
    for source, (images, labels) in zip(splits, arrays(name, times), strict=True):
        assert source.targets.tolist() == labels.tolist()
        colours = images if images.ndim == 4 else np.stack([images] * 3, axis=-1)
        for (image, _), pixels in zip(source, colours, strict=True):
            assert np.array_equal(np.asarray(image), pixels)


#: Data sets; how many times the tiny data (several megabytes); where they are; the first class.
@pytest.mark.parametrize(("name", "times", "folder", "first_class"), [
    ("CIFAR10", 15, "", "airplane"), ("CIFAR100", 4, "", "class_00"), ("MNIST", 60, "", "0"),
    ("FashionMNIST", 1, "", "T-shirt/top"), ("KMNIST", 1, "", "o"),
    ("SVHN", 15, "", "0"), ("SVHN", 1, "SVHN", "0"),
])  # fmt: skip
def test_arrays_are_read_in_their_order_and_take_less_than_twice_the_data(
    tmp_path, monkeypatch, name, times, folder, first_class
):
    write(name, tmp_path, monkeypatch, times)
    before = sorted(tmp_path.rglob("*"))
    load_one(name, tmp_path / folder)  # what is imported on the way is not counted
    tracemalloc.start()
    splits = load_one(name, tmp_path / folder)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sorted(tmp_path.rglob("*")) == before
    assert_read(splits, name, times)
    assert splits[0].classes[0] == first_class
    data = sum(source.images.nbytes for source in splits)
    if times > 1:
        assert data > 3_000_000
        assert peak < 2 * data
        assert held < 1.1 * data
    if name == "SVHN":
        stored = loadmat(tmp_path / "SVHN" / "test_32x32.mat")["y"]
        assert set(stored.ravel()) == set(range(1, 11))  # 10 means digit 0
        assert splits[0].images[3].flags.c_contiguous


# MNIST and Fashion-MNIST


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_idx_files_are_read_unpacked_or_packed_by_anybody(tmp_path, name, packed):
    write(name, tmp_path)
    for path in sorted((tmp_path / name / "raw").iterdir()):
        content = b"half a file that is not needed"
        if packed:  # by another gzip than the published files
            content = gzip.compress(path.read_bytes())
            path.unlink()
        path.with_name(f"{path.name}.gz").write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    splits = load_one(name, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert splits[0].images.flags.writeable
    assert_read(splits, name)


IMAGES_FILE, LABELS_FILE = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
IDX_DAMAGE = {
    "empty": (IMAGES_FILE, lambda _: b""),
    "truncated": (IMAGES_FILE, lambda content: content[:-100]),
    "truncated labels": (LABELS_FILE, lambda content: content[:-1]),
    "longer": (IMAGES_FILE, lambda content: content + b"x"),
    "longer by an image": (IMAGES_FILE, lambda content: content + bytes(784)),
    "a page": (IMAGES_FILE, lambda _: b"<html>log in to the wireless network</html>"),
    "still packed": (LABELS_FILE, gzip.compress),
    "another type": (IMAGES_FILE, lambda content: b"\0\0\x09" + content[3:]),
    "another size": (IMAGES_FILE, lambda _: idx_bytes(np.zeros((50, 14, 56)))),
    "no images": (IMAGES_FILE, lambda _: idx_bytes(np.zeros((0, 28, 28)))),
    "images as labels": (LABELS_FILE, lambda _: idx_bytes(np.zeros((20, 28, 28)))),
    "label too high": (LABELS_FILE, lambda content: content[:-1] + b"\x0a"),
    "fewer labels": (LABELS_FILE, lambda _: idx_bytes(np.zeros(19))),
    "missing": (LABELS_FILE, None),
    "truncated .gz": (IMAGES_FILE, lambda content: gzip.compress(content)[:-100]),
    "flipped .gz": (IMAGES_FILE, lambda content: gzip.compress(content)[:-6] + b"\0" * 6),
    "no .gz": (IMAGES_FILE, lambda _: b"<html>"),
}


@pytest.mark.parametrize("damage", IDX_DAMAGE)
def test_idx_damage_is_named_by_file(tmp_path, monkeypatch, damage):
    write("MNIST", tmp_path, monkeypatch)
    point(monkeypatch, NOWHERE)
    name, change = IDX_DAMAGE[damage]
    path = tmp_path / "MNIST" / "raw" / name
    content = path.read_bytes()
    path.unlink()
    if damage.endswith(".gz"):
        path = path.with_name(f"{name}.gz")
    if change is not None:
        damaged = change(content)
        path.write_bytes(damaged)
    message = rejected(load_one, "MNIST", tmp_path)
    assert (f"{path}: damaged, " if change else str(path)) in message
    assert change is None or path.read_bytes() == damaged


# Digits and folders


def test_digits_split_is_fixed_and_stratified(tmp_path):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    train, test = load_one("Digits", tmp_path)
    digits = load_digits()
    expected = train_test_split(range(1797), test_size=0.2, stratify=digits.target, random_state=0)
    for source, indices in zip((train, test), expected, strict=True):
        assert source.targets.tolist() == digits.target[indices].tolist()
        assert source.classes == list("0123456789")
    assert set(np.bincount(test.targets)) <= {35, 36, 37}
    image = np.asarray(test[5][0])
    assert image.shape == (8, 8, 3)
    assert np.abs(image[..., 0] - digits.images[expected[1][5]] * 255 / 16).max() < 1
    assert image.min() == 0  # strokes are bright, the ground is dark


@pytest.mark.parametrize("name", sorted({*SOURCES} - {*IN_MEMORY}))
def test_images_in_files_are_opened_only_when_they_are_asked_for(tmp_path, monkeypatch, name):
    write(name, tmp_path, monkeypatch)
    for path in (*tmp_path.rglob("*.png"), *tmp_path.rglob("*.jpg")):
        path.write_bytes(b"\x89PNG\r\n\x1a\nand so on")
    for source in load_one(name, tmp_path):
        assert rejected(source.__getitem__, 0).startswith(f"{source.paths[0]}: ")
