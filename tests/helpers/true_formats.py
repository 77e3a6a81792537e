"""Tiny data sets in the files and folders in which the true ones are published.

`write(name, data_path, monkeypatch)` writes one, and makes torchvision find the published
checksums. Every class has a colour (or grey level) of its own, so that it can be learned at a
glance.
"""

import pickle
import struct
from functools import partial
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import utils

from continual_datasets.images import DataError
from continual_datasets.readers.registry import SOURCES, load_parts

LETTERS = "ABCDEFGHIJ"
OBJECTS = (1, 2, 10)
TRAIN_SESSIONS = (1, 2, 4, 5, 6, 8, 9, 11)
TEST_SESSIONS = (3, 7, 10)
WNIDS = ("n01443537", "n01484850", "n02007558")
ANIMALS = ("ant", "bee", "cat")
DOMAINS = ("paint", "photo", "sketch")


def load_one(name, data_path):
    """The training and test images of a single data set."""
    (train,), (test,) = (split.values() for split in load_parts(name, data_path))
    return train, test


def rejected(call, *args):
    """The one-line message with which something is rejected."""
    with pytest.raises(DataError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def digest(path):
    return md5(path.read_bytes()).hexdigest()


def take_for_published(name, folder, monkeypatch):
    """Makes the files in a folder have the published checksums, by their names."""
    reader = SOURCES[name]
    published = {Path(file).name: right for file, right in (*reader.files, *reader.parts)}
    paths = [path for path in folder.rglob("*") if path.name in published]
    sums = {digest(path): published[path.name] for path in paths}
    plain = utils.calculate_md5
    monkeypatch.setattr(utils, "calculate_md5", lambda path: sums.get(x := plain(path), x))


def picture(class_id, seed, size=(20, 18)):
    """A picture (H, W, 3) in the colour of its class; one of 125 that differ by 58 and more."""
    levels = np.array([class_id % 5, class_id // 5 % 5, class_id // 25]) * 58 + 12
    noise = np.random.default_rng([class_id, seed]).integers(-12, 13, (*size, 3))
    return (levels + noise).astype(np.uint8)


def grey_picture(class_id, seed):
    """A picture (28, 28) in the grey level of its class; one of ten that differ by 24."""
    noise = np.random.default_rng([class_id, seed]).integers(-8, 9, (28, 28))
    return (class_id * 24 + 12 + noise).astype(np.uint8)


def mixed_labels(num_classes, per_class):
    """Class ids as data sets have them: all classes mixed."""
    return np.random.default_rng(num_classes).permutation(num_classes * per_class) % num_classes


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)


# Arrays

square = partial(picture, size=(32, 32))

#: Number of classes, of training and test images per class, and how an image is made.
ARRAYS = {
    "CIFAR10": (10, 5, 2, square),
    "CIFAR100": (100, 2, 1, square),
    "MNIST": (10, 5, 2, grey_picture),
    "FashionMNIST": (10, 5, 2, grey_picture),
    "KMNIST": (10, 5, 2, grey_picture),
    "SVHN": (10, 5, 2, square),
}


def arrays(name, times=1):
    """Images (n, H, W) or (n, H, W, 3) and class ids for training and test, or so many times."""
    num_classes, *per_class, make = ARRAYS[name]
    for seed, number in enumerate(per_class):
        labels = mixed_labels(num_classes, times * number)
        yield np.stack([make(c, 10**6 * seed + i) for i, c in enumerate(labels)]), labels


def write_cifar(folder, key, batches, meta, classes):
    folder.mkdir(parents=True)
    for name, (images, labels) in batches.items():
        planes = images.transpose(0, 3, 1, 2).reshape(len(labels), 3072)
        batch = {"data": planes, key: labels.tolist(), "batch_label": "tiny"}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / meta).write_bytes(pickle.dumps(classes))


def write_cifar10(data_path, train, test):
    parts = zip(*(np.split(values, 5) for values in train), strict=True)
    batches = {f"data_batch_{i}": part for i, part in enumerate(parts, start=1)}
    classes = "airplane automobile bird cat deer dog frog horse ship truck".split()
    folder, batches = data_path / "cifar-10-batches-py", {**batches, "test_batch": test}
    write_cifar(folder, "labels", batches, "batches.meta", {"label_names": classes})


def write_cifar100(data_path, train, test):
    batches = {"train": train, "test": test}
    classes = {"fine_label_names": [f"class_{i:02}" for i in range(100)]}
    write_cifar(data_path / "cifar-100-python", "fine_labels", batches, "meta", classes)


def idx_bytes(values):
    header = struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return header + values.astype(np.uint8).tobytes()


def write_idx(data_path, train, test, name="MNIST"):
    (data_path / name / "raw").mkdir(parents=True)
    for prefix, (images, labels) in (("train", train), ("t10k", test)):
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            (data_path / name / "raw" / f"{prefix}-{kind}-ubyte").write_bytes(idx_bytes(values))


def write_svhn(data_path, train, test):
    """Digit 0 has label 10."""
    (data_path / "SVHN").mkdir(parents=True)
    for split, (images, labels) in (("train", train), ("test", test)):
        stored = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        content = {"X": images.transpose(1, 2, 3, 0), "y": stored}  # X: (H, W, 3, n)
        savemat(data_path / "SVHN" / f"{split}_32x32.mat", content, do_compression=True)


# Folders of images


def write_flowers102(data_path):
    """Two training images, one validation and one test image per class; JPEG."""
    folder = data_path / "flowers-102"
    labels = mixed_labels(102, 4)
    for number, class_id in enumerate(labels, start=1):
        save(folder / "jpg" / f"image_{number:05}.jpg", picture(class_id, number))
    by_class = np.array([np.flatnonzero(labels == class_id) + 1 for class_id in range(102)])
    splits = {"trnid": by_class[:, :2], "valid": by_class[:, 2], "tstid": by_class[:, 3]}
    savemat(folder / "setid.mat", {name: ids.reshape(1, -1) for name, ids in splits.items()})
    savemat(folder / "imagelabels.mat", {"labels": labels[None] + 1})


def class_folders(folder, names, images, suffix=".png"):
    return [(f"{folder}/{x}/{i}{suffix}", c) for c, x in enumerate(names) for i in range(images)]


def core50_images(sessions):
    """Two images of every object in these sessions, in their order."""
    return [
        (f"s{session}/o{number}/C_{session:02}_{number:02}_{i:03}.png", class_id)
        for session in sessions
        for class_id, number in enumerate(OBJECTS)
        for i in range(2)
    ]


def core50_list(sessions):
    """The same as in CORe50's published file lists."""
    return "".join(f"{path} {class_id}\n" for path, class_id in core50_images(sessions))


#: Every image and its class.
FOLDERS = {
    "NotMNIST": [
        *class_folders("notMNIST/Train", LETTERS, 4), *class_folders("notMNIST/Test", LETTERS, 2),
    ],
    "CORe50": [(f"core50_128x128/{path}", c) for path, c in core50_images(range(1, 12))],
    "Imagenet-R": class_folders("imagenet-r", WNIDS, 10, ".jpg"),
    "ImageFolder": [*class_folders("train", ANIMALS, 6), *class_folders("val", ANIMALS, 2)],
    "domains": [
        pair
        for domain in DOMAINS
        for split, images in (("train", 4), ("test", 2))
        for pair in class_folders(f"{domain}/{split}", ANIMALS[:2], images)
    ],
    "domains with common test": [
        *(pair for domain in DOMAINS for pair in class_folders(f"{domain}/train", ANIMALS[:2], 4)),
        *class_folders("test", ANIMALS[:2], 4),
    ],
}  # fmt: skip


def write_images(data_path, images, make=lambda c, seed: picture(7 * c + 1, seed)):
    for seed, (path, class_id) in enumerate(images):
        save(data_path / path, make(class_id, seed))


def write_core50(data_path):
    """The images; and beside them the published file lists, with the sessions in another order."""
    write_images(data_path, FOLDERS["CORe50"])
    lists = data_path / "batches_filelists" / "NI_inc" / "run0"
    lists.mkdir(parents=True)
    for batch, session in enumerate(reversed(TRAIN_SESSIONS)):
        (lists / f"train_batch_{batch:02}_filelist.txt").write_text(core50_list([session]))
    (lists / "test_filelist.txt").write_text(core50_list(TEST_SESSIONS))


#: What writes a data set of `registry.SOURCES`, or two folders of domains, to a folder: images and
#: class ids, if they are arrays.
WRITERS = {
    "CIFAR10": write_cifar10,
    "CIFAR100": write_cifar100,
    "MNIST": write_idx,
    "FashionMNIST": partial(write_idx, name="FashionMNIST"),
    "KMNIST": partial(write_idx, name="KMNIST"),
    "SVHN": write_svhn,
    "Flowers102": write_flowers102,
    "digits": lambda _: None,  # they come with scikit-learn
    **{name: partial(write_images, images=images) for name, images in FOLDERS.items()},
    "NotMNIST": partial(write_images, images=FOLDERS["NotMNIST"], make=grey_picture),
    "CORe50": write_core50,
}


def write(name, data_path, monkeypatch=None, times=1):
    """Writes a data set; where torchvision compares checksums, it finds the published ones."""
    WRITERS[name](data_path, *(arrays(name, times) if name in ARRAYS else ()))
    if monkeypatch and getattr(SOURCES.get(name), "downloadable", False):
        take_for_published(name, data_path, monkeypatch)
