"""The table of data sets: their names, and every one of them in its published format."""

import gzip
import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat
from torchvision.datasets import MNIST, FashionMNIST

from continual_datasets.images import DataError
from continual_datasets.readers.registry import (
    FIVE_DATASETS,
    SOURCES,
    count_classes,
    find_sources,
    list_domains,
    load_parts,
)
from helpers import true_formats
from helpers.data_server import NOWHERE, point
from helpers.tables import assert_says, cases
from helpers.true_formats import TRUE_FORMATS, idx_bytes, load_one, rejected, write_idx

IN_FILES = ["NotMNIST", "Flowers102", "CORe50", "Imagenet-R", "ImageFolder"]
DOWNLOADABLE = ["CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "SVHN", "Flowers102"]


# Names


def test_aliases_and_letter_case():
    labels = {
        "Split-CIFAR10": "CIFAR10", "split-cifar100": "CIFAR100", "Fashion-MNIST": "FashionMNIST",
        "Flower102": "Flowers102", "Flowers-102": "Flowers102", "OxfordFlowers102": "Flowers102",
        "ImageNetR": "Imagenet-R", "split-imagenet-r": "Imagenet-R",
    }  # fmt: skip
    for label, name in {**labels, **dict(zip(SOURCES, SOURCES, strict=True))}.items():
        for spelled in (label, label.lower(), label.upper()):
            assert find_sources(spelled) == {name: SOURCES[name]}
    assert sum(len(spec.aliases) for spec in SOURCES.values()) == len(labels)


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
,
    an empty entry
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


def test_count_classes_needs_no_data_where_they_can_be_downloaded():
    nowhere = Path("/nowhere")
    assert count_classes("Split-CIFAR100", nowhere) == 100
    assert count_classes("digits", nowhere) == 10
    assert count_classes("SVHN,MNIST,CIFAR10,FashionMNIST,Flowers102", nowhere) == 142
    with pytest.raises(DataError, match="/nowhere is not a folder"):
        count_classes("ImageFolder", nowhere)


def test_table_says_what_needs_a_folder_is_downloaded_or_is_in_files():
    def those(field, value=True):
        return [name for name, spec in SOURCES.items() if getattr(spec, field) is value]

    assert those("needs_data_path", False) == ["digits"]
    assert those("downloadable") == DOWNLOADABLE
    assert those("in_files") == IN_FILES
    assert those("any_data") == ["ImageFolder"]


def test_count_classes_names_every_data_set_that_is_missing(tmp_path):
    message = rejected(count_classes, "MNIST,NotMNIST,CORe50,Imagenet-R", tmp_path)
    for folder in ("notMNIST", "core50_128x128", "imagenet-r"):
        assert str(tmp_path / folder) in message


@pytest.mark.parametrize("name", DOWNLOADABLE)
def test_count_classes_names_a_file_without_read_permission(tmp_path, monkeypatch, name):
    TRUE_FORMATS[name](tmp_path, monkeypatch)
    (path, *_) = (path for path in tmp_path.rglob("*") if path.is_file())
    monkeypatch.setattr("os.access", lambda asked, mode: (asked, mode) != (path, os.R_OK))
    assert rejected(count_classes, f"digits,{name}", tmp_path) == f"{path}: Permission denied"


def test_five_datasets_are_read_one_by_one(tmp_path, monkeypatch):
    for name in FIVE_DATASETS:
        TRUE_FORMATS[name](tmp_path, monkeypatch)
    assert count_classes("5-datasets", tmp_path) == 50
    parts = load_parts("5-datasets", tmp_path)
    assert tuple(parts) == FIVE_DATASETS
    for name, (train, test) in parts.items():
        alone, _ = load_one(name, tmp_path)
        assert train.classes == test.classes == alone.classes
        assert train.targets.tolist() == alone.targets.tolist()
        assert train[2][0] == alone[2][0]


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
    TRUE_FORMATS[name](tmp_path, monkeypatch)
    train, test = load_one(name, tmp_path)
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


# CIFAR


@pytest.mark.parametrize(("name", "batches", "key"), [
    ("CIFAR10", [f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)], "labels"),
    ("CIFAR100", ["cifar-100-python/train"], "fine_labels"),
])  # fmt: skip
def test_cifar_is_read_in_the_order_of_its_batches(tmp_path, monkeypatch, name, batches, key):
    TRUE_FORMATS[name](tmp_path, monkeypatch)
    point(monkeypatch, name, NOWHERE)
    train, _ = load_one(name, tmp_path)
    raw = [pickle.loads((tmp_path / batch).read_bytes(), encoding="latin1") for batch in batches]
    assert train.classes[:2] in (["airplane", "automobile"], ["class_00", "class_01"])
    assert train.targets.tolist() == [label for batch in raw for label in batch[key]]
    planes = raw[-1]["data"][-1].reshape(3, 32, 32)
    assert np.array_equal(np.asarray(train[-1][0]), planes.transpose(1, 2, 0))


# MNIST and Fashion-MNIST


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [MNIST, FashionMNIST])
def test_idx_files_are_read_unpacked_or_packed_by_anybody(tmp_path, monkeypatch, kind, packed):
    raw = tmp_path / kind.__name__ / "raw"
    write_idx(raw, packed=packed)  # by another gzip than the published files
    if not packed:
        (raw / f"{LABELS_FILE}.gz").write_bytes(b"half a file that is not needed")
    point(monkeypatch, kind.__name__, NOWHERE)
    before = sorted(tmp_path.rglob("*"))
    train, test = load_one(kind.__name__, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert (len(train), len(test)) == (50, 20)
    assert train.images.flags.writeable
    assert train.classes == (list("0123456789") if kind is MNIST else FashionMNIST.classes)
    write_idx(tmp_path / "unpacked")
    labels = (tmp_path / "unpacked" / LABELS_FILE).read_bytes()[8:]
    assert test.targets.tolist() == list(labels)
    pixels = (tmp_path / "unpacked" / IMAGES_FILE).read_bytes()[16:][7 * 784 : 8 * 784]
    image = np.asarray(train[7][0])
    assert image.shape == (28, 28, 3)
    assert all(image[..., channel].tobytes() == pixels for channel in range(3))


IMAGES_FILE, LABELS_FILE = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
IDX_DAMAGE = {
    "empty": (IMAGES_FILE, lambda _: b""),
    "truncated": (IMAGES_FILE, lambda content: content[:-100]),
    "truncated labels": (LABELS_FILE, lambda content: content[:-1]),
    "longer": (IMAGES_FILE, lambda content: content + b"x"),
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
    TRUE_FORMATS["MNIST"](tmp_path, monkeypatch)
    point(monkeypatch, "MNIST", NOWHERE)
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


# SVHN and digits


@pytest.mark.parametrize("folder", ["SVHN", "."])
def test_svhn_is_read_in_a_folder_of_its_own_or_not(tmp_path, monkeypatch, folder):
    true_formats.write_svhn(tmp_path, monkeypatch, folder=folder)
    before = sorted(tmp_path.rglob("*"))
    train, test = load_one("svhn", tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert train.images.shape == (50, 32, 32, 3)
    assert train.images[3].flags.c_contiguous
    assert train.classes == list("0123456789")
    raw = loadmat(tmp_path / folder / "test_32x32.mat")
    assert set(raw["y"].ravel()) == set(range(1, 11))
    assert test.targets.tolist() == [label % 10 for label in raw["y"].ravel()]
    assert np.array_equal(np.asarray(test[5][0]), raw["X"][..., 5])


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


# Memory


LARGER = {  # several megabytes, in the proportions of the true data
    "CIFAR10": (true_formats.write_cifar10, 100, 20),
    "CIFAR100": (true_formats.write_cifar100, 10, 2),
    "MNIST": (lambda folder, _, *sizes: write_idx(folder / "MNIST/raw", False, *sizes), 480, 80),
    "SVHN": (true_formats.write_svhn, 100, 35),
}


@pytest.mark.parametrize("name", LARGER)
def test_loading_takes_less_than_twice_the_data(tmp_path, monkeypatch, name):
    write, *sizes = LARGER[name]
    write(tmp_path, monkeypatch, *sizes)
    load_one(name, tmp_path)  # what is imported on the way is not counted
    tracemalloc.start()
    splits = load_one(name, tmp_path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    data = sum(source.images.nbytes for source in splits)
    assert data > 3_000_000
    assert peak < 2 * data
    assert held < 1.1 * data


@pytest.mark.parametrize("name", IN_FILES)
def test_folders_hold_paths_and_open_images_only_when_asked(tmp_path, monkeypatch, name):
    TRUE_FORMATS[name](tmp_path, monkeypatch)
    for path in (*tmp_path.rglob("*.png"), *tmp_path.rglob("*.jpg")):
        path.write_bytes(b"\x89PNG\r\n\x1a\nand so on")
    load_one(name, tmp_path)  # what is imported on the way is not counted
    held = []
    for _ in range(3):  # the servers of other tests, in threads, may still allocate
        tracemalloc.start()
        sources = load_one(name, tmp_path)
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert min(held) < 20_000 + 100 * sum(len(source) for source in sources)
    for source in sources:
        letters = sum(len(Path(path).parent.name) + 40 for path in source.paths)
        assert len(pickle.dumps(source)) < 6_000 + letters
        assert rejected(source.__getitem__, 0).startswith(f"{source.paths[0]}: ")
