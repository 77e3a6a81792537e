"""Tiny data sets in the files and folders in which the true ones are published.

`TRUE_FORMATS[name](data_path, monkeypatch)` writes one; where torchvision compares checksums it is
made to take these files for the true ones. Every class has a colour (or grey level) of its own, so
that it can be learned at a glance.
"""

import gzip
import pickle
import struct
from collections.abc import Callable
from functools import partial
from hashlib import md5
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR10, CIFAR100, SVHN, Flowers102

from continual_datasets.images import DataError
from continual_datasets.readers.registry import load_parts

LETTERS = "ABCDEFGHIJ"
OBJECTS = (1, 2, 10)
TRAIN_SESSIONS = (1, 2, 4, 5, 6, 8, 9, 11)
TEST_SESSIONS = (3, 7, 10)
WNIDS = ("n01443537", "n01484850", "n02007558")
DOMAINS = ("paint", "photo", "sketch")


def load_one(name, data_path):
    """The training and test images of a single data set."""
    (splits,) = load_parts(name, data_path).values()
    return splits


def rejected(call, *args):
    """The one-line message with which something is rejected."""
    with pytest.raises(DataError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def colour_picture(class_id, seed, size=(20, 18)):
    """A picture (H, W, 3) in the colour of its class; one of 125 that differ by 58 and more."""
    levels = np.array([class_id % 5, class_id // 5 % 5, class_id // 25]) * 58 + 12
    noise = np.random.default_rng([class_id, seed]).integers(-12, 13, (*size, 3))
    return (levels + noise).astype(np.uint8)


def grey_picture(class_id, seed, size=(28, 28)):
    """A picture (H, W) in the grey level of its class; one of ten that differ by 24."""
    noise = np.random.default_rng([class_id, seed]).integers(-8, 9, size)
    return (class_id * 24 + 12 + noise).astype(np.uint8)


def mixed_labels(num_classes, per_class):
    """Class ids as data sets have them: all classes mixed."""
    return np.random.default_rng(num_classes).permutation(np.arange(num_classes * per_class)) % (
        num_classes
    )


def pictures(make, labels, first_seed):
    return np.stack([make(c, first_seed + i) for i, c in enumerate(labels)])


colour_square = partial(colour_picture, size=(32, 32))


def save(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, quality=95)


def digest(path):
    return md5(path.read_bytes()).hexdigest()


# CIFAR


def cifar_batch(labels, first_seed, key):
    images = pictures(colour_square, labels, first_seed)  # (n, H, W, 3); in the file three planes
    data = images.transpose(0, 3, 1, 2).reshape(len(labels), 3072)
    return {"data": data, key: labels.tolist(), "batch_label": "tiny"}


def write_cifar(data_path, monkeypatch, kind, contents):
    """Write the files, and make torchvision expect their checksums."""
    folder = data_path / kind.base_folder
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    for files in ("train_list", "test_list"):
        pinned = [[name, digest(folder / name)] for name, _ in getattr(kind, files)]
        monkeypatch.setattr(kind, files, pinned)
    meta = {**kind.meta, "md5": digest(folder / kind.meta["filename"])}
    monkeypatch.setattr(kind, "meta", meta)


def write_cifar10(data_path, monkeypatch, train=5, test=2):
    """Five training images per class in five batches, and two test images."""
    labels = mixed_labels(10, train).reshape(5, -1)
    contents = {
        f"data_batch_{i + 1}": cifar_batch(labels[i], 10**5 * i, "labels") for i in range(5)
    }
    contents["test_batch"] = cifar_batch(mixed_labels(10, test), 10**6, "labels")
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    contents["batches.meta"] = {"label_names": names.split()}
    write_cifar(data_path, monkeypatch, CIFAR10, contents)


def write_cifar100(data_path, monkeypatch, train=2, test=1):
    """Two training images and one test image per class."""
    contents = {
        "train": cifar_batch(mixed_labels(100, train), 0, "fine_labels"),
        "test": cifar_batch(mixed_labels(100, test), 10**6, "fine_labels"),
        "meta": {"fine_label_names": [f"class_{i:02}" for i in range(100)]},
    }
    write_cifar(data_path, monkeypatch, CIFAR100, contents)


# MNIST


def idx_bytes(values):
    header = struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return header + values.astype(np.uint8).tobytes()


def write_idx(folder, packed=False, train=5, test=2):
    """The four files of MNIST: so many images per class."""
    folder.mkdir(parents=True)
    for prefix, per_class, seed in (("train", train, 0), ("t10k", test, 10**6)):
        labels = mixed_labels(10, per_class)
        contents = {
            f"{prefix}-images-idx3-ubyte": idx_bytes(pictures(grey_picture, labels, seed)),
            f"{prefix}-labels-idx1-ubyte": idx_bytes(labels),
        }
        for name, content in contents.items():
            path = folder / (f"{name}.gz" if packed else name)
            path.write_bytes(gzip.compress(content) if packed else content)


# SVHN


def write_svhn(data_path, monkeypatch, train=5, test=2, folder="SVHN"):
    """Five training and two test images per class; digit 0 has label 10."""
    folder = data_path / folder
    folder.mkdir(parents=True, exist_ok=True)
    pinned = {}
    for split, per_class, seed in (("train", train, 0), ("test", test, 10**6)):
        labels = mixed_labels(10, per_class)
        url, name, _ = SVHN.split_list[split]
        images = pictures(colour_square, labels, seed).transpose(1, 2, 3, 0)  # (H, W, 3, n)
        stored = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        savemat(folder / name, {"X": images, "y": stored}, do_compression=True)
        pinned[split] = [url, name, digest(folder / name)]
    monkeypatch.setattr(SVHN, "split_list", pinned)


# notMNIST


def write_not_mnist(data_path, _monkeypatch=None, folder="notMNIST", splits=("Train", "Test")):
    """Four training and two test images per letter."""
    for split, images in zip(splits, (4, 2), strict=True):
        for class_id, letter in enumerate(LETTERS):
            for i in range(images):
                path = data_path / folder / split / letter / f"{letter}{i}.png"
                save(path, grey_picture(class_id, i + 100 * images))


# Flowers-102


def write_flowers102(data_path, monkeypatch):
    """Two training images, one validation and one test image per class; JPEG."""
    folder = data_path / "flowers-102"
    labels = mixed_labels(102, 4)
    for number, class_id in enumerate(labels, start=1):
        save(folder / "jpg" / f"image_{number:05}.jpg", colour_picture(class_id, number))
    by_class = [np.flatnonzero(labels == class_id) + 1 for class_id in range(102)]
    splits = {"trnid": (0, 2), "valid": (2, 3), "tstid": (3, 4)}
    ids = {
        name: np.concatenate([numbers[first:stop] for numbers in by_class])[None]
        for name, (first, stop) in splits.items()
    }
    savemat(folder / "setid.mat", ids)
    savemat(folder / "imagelabels.mat", {"labels": labels[None] + 1})
    files = dict(Flowers102._file_dict)
    for key in ("label", "setid"):
        files[key] = (files[key][0], digest(folder / files[key][0]))
    monkeypatch.setattr(Flowers102, "_file_dict", files)


# CORe50


def core50_name(session, number, image):
    return f"s{session}/o{number}/C_{session:02}_{number:02}_{image:03}.png"


def write_core50(data_path, _monkeypatch=None, folder="core50_128x128", images=2):
    """Eleven sessions of the objects o1, o2 and o10; the published file lists beside them.

    The lists (`batches_filelists/NI_inc/run0`) have the sessions in another order.
    """
    for session in range(1, 12):
        for class_id, number in enumerate(OBJECTS):
            for i in range(images):
                picture = colour_picture(7 * class_id + 1, 100 * session + i, (16, 16))
                save(data_path / folder / core50_name(session, number, i), picture)
    write_core50_lists(data_path / "batches_filelists" / "NI_inc" / "run0", images)


def write_core50_lists(folder, images=2):
    folder.mkdir(parents=True)
    for batch, session in enumerate(reversed(TRAIN_SESSIONS)):
        (folder / f"train_batch_{batch:02}_filelist.txt").write_text(core50_list([session], images))
    (folder / "test_filelist.txt").write_text(core50_list(TEST_SESSIONS, images))


def core50_list(sessions, images=2):
    return "".join(
        f"{core50_name(session, number, i)} {class_id}\n"
        for session in sessions
        for class_id, number in enumerate(OBJECTS)
        for i in range(images)
    )


# ImageNet-R and image folders


def write_class_folders(folder, names, images, seeds=None, suffix=".png"):
    seeds = seeds or count()
    for class_id, name in enumerate(names):
        for i in range(images):
            save(folder / name / f"{i}{suffix}", colour_picture(7 * class_id + 1, next(seeds)))


def write_imagenet_r(data_path, _monkeypatch=None, folder="imagenet-r"):
    """Three classes of ten JPEG images, of which two test."""
    write_class_folders(data_path / folder, WNIDS, 10, suffix=".jpg")
    (data_path / folder / "README.txt").write_text("n01443537 goldfish\n")


def write_image_folder(data_path, _monkeypatch=None):
    """Three classes of six training and two test images."""
    seeds = count()
    for split, images in (("train", 6), ("val", 2)):
        write_class_folders(data_path / split, ("ant", "bee", "cat"), images, seeds)


def write_domains(data_path, _monkeypatch=None):
    """Three domains with test images of their own."""
    seeds = count()
    for domain in DOMAINS:
        for split, images in (("train", 4), ("test", 2)):
            write_class_folders(data_path / domain / split, ("ant", "bee"), images, seeds)


def write_domains_with_common_test(data_path, _monkeypatch=None):
    """Three domains tested by the same images."""
    seeds = count()
    for domain in DOMAINS:
        write_class_folders(data_path / domain / "train", ("ant", "bee"), 4, seeds)
    write_class_folders(data_path / "test", ("ant", "bee"), 4, seeds)


#: Maker of every data set in `registry.SOURCES`, and of two folders of domains.
TRUE_FORMATS: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    "CIFAR10": write_cifar10,
    "CIFAR100": write_cifar100,
    "MNIST": lambda data_path, _: write_idx(data_path / "MNIST" / "raw"),
    "FashionMNIST": lambda data_path, _: write_idx(data_path / "FashionMNIST" / "raw"),
    "SVHN": write_svhn,
    "NotMNIST": write_not_mnist,
    "Flowers102": write_flowers102,
    "CORe50": write_core50,
    "Imagenet-R": write_imagenet_r,
    "ImageFolder": write_image_folder,
    "digits": lambda *_: None,  # they come with scikit-learn
    "domains": write_domains,
    "domains with common test": write_domains_with_common_test,
}
