"""Readers of data sets that people get by hand: notMNIST, CORe50 and ImageNet-R, folders of images.

Files are opened when they are asked for; only paths are held, in an order that depends on nothing
but their names.
"""

import hashlib
import logging
import os
import re
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from torchvision.datasets.utils import extract_archive

from cli.paths import open_regular
from continual_datasets.images import DataError, FileSource, Parts, join_names
from continual_datasets.readers.class_folders import (
    DomainList,
    Reader,
    Splits,
    common_classes,
    folders_in,
    gather,
    is_split,
    nearby,
    val_or_test,
)
from continual_datasets.readers.storage import new_folder, one_at_a_time

logger = logging.getLogger(__name__)


class Unpacked(Reader):
    """A folder that is there, or an archive that is unpacked."""

    folder: str  # the folder under `--data-path`
    archive: str  # the same, packed
    layout: str  # what belongs in the folder
    url: str  # where to get it
    member = ""  # what its sub-folders are called, if `--data-path` may be the folder
    in_files = True

    _find_classes: Callable[[Path], list[str]]  # in the folder; DataError if they are not right
    _read: Callable[[Path, list[str]], Splits]  # images of these classes in the folder

    def count_classes(self, data_path: Path) -> int:
        """Looks for the classes; an archive that is not unpacked yet is taken for complete."""
        root = self._find(data_path)
        return self.num_classes if root is None else len(self._find_classes(root))

    def load(self, data_path: Path) -> Splits:
        """Reads the data; DataError if they are missing or incomplete, or the archive damaged."""
        return self._read(*self._prepare(data_path))

    def _prepare(self, data_path: Path) -> tuple[Path, list[str]]:
        """The folder of the data, unpacked if need be, and its classes."""
        root = self._find(data_path) or self._unpack(data_path / self.archive)
        return root, self._find_classes(root)

    def _expected(self, root: Path) -> str:
        return f"expected {root}/{self.layout}, see {self.url}"

    def _find(self, data_path: Path) -> Path | None:
        """The folder of the data; None if there is only the archive."""
        if found := self._look_in(data_path):
            return None if found.is_file() else found
        raise DataError(
            f"{self.name} is not in {data_path}: expected {data_path / self.folder}/{self.layout}, "
            f"or {self.archive} to unpack. It is not downloaded by itself: get it from {self.url}"
            + nearby(data_path, lambda folder: self._look_in(folder) is not None)
        )

    def _look_in(self, folder: Path) -> Path | None:
        """The folder of the data, or their archive, if one is in a folder."""
        if (folder / self.folder).is_dir():
            return folder / self.folder
        if folder.is_dir() and self._is_root(folder):
            return folder
        return archive if (archive := folder / self.archive).is_file() else None

    def _is_root(self, folder: Path) -> bool:
        """Whether a folder holds the data itself."""
        return bool(folders_in(folder, self.member))

    def _unpack(self, archive: Path) -> Path:
        """Unpacks the archive, which holds the folder or what belongs in it; others wait."""
        target = archive.with_name(self.folder)
        try:
            with one_at_a_time(target.parent):
                if target.exists():
                    return target
                logger.info("unpacking %s", archive)
                with new_folder(target) as tmp_dir:
                    content = tmp_dir / "content"
                    if hasattr(tarfile, "data_filter"):  # older torchvision unpacks without
                        tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
                    extract_archive(archive, content)
                    inner = content / target.name
                    (inner if inner.is_dir() else content).rename(tmp_dir / target.name)
        except Exception as error:  # tar, zip and the file system each have their own
            raise DataError(
                f"{archive} cannot be unpacked ({str(error) or repr(error)}): get it anew, or "
                f"unpack it yourself so that {target} is there"
            ) from error
        return target


class NotMnist(Unpacked):
    """notMNIST: the letters A to J in many fonts, grey images of 28x28 pixels.

    Files that are no PNG images (the published set has a few) are left out and named in a warning.
    """

    name = "NotMNIST"
    num_classes = 10
    folder = "notMNIST"
    archive = "notMNIST.zip"
    layout = "Train/<A to J>/*.png and Test/<A to J>/*.png"
    url = "https://github.com/facebookresearch/Adversarial-Continual-Learning (data/notMNIST.zip)"

    def _find_classes(self, root: Path) -> list[str]:
        letters = list("ABCDEFGHIJ")
        for split in self._splits(root):
            if missing := [letter for letter in letters if not (split / letter).is_dir()]:
                expected = self._expected(root)
                raise DataError(f"no folder {join_names(missing)} in {split}; {expected}")
        return letters

    def _splits(self, root: Path) -> tuple[Path, Path]:
        """The folders of both splits, in whatever letter case."""
        by_name = {name.lower(): root / name for name in folders_in(root)}
        return by_name.get("train", root / "Train"), by_name.get("test", root / "Test")

    def _read(self, root: Path, classes: list[str]) -> Splits:
        train, test = (gather(split, classes) for split in self._splits(root))
        bad = {path for path in (*train.paths, *test.paths) if not _is_png(path)}
        if bad:
            names = ", ".join(sorted(bad))
            logger.warning("left out %d files that are no PNG images: %s", len(bad), names)
        train, test = (x.select(np.array([y not in bad for y in x.paths])) for x in (train, test))
        return train, test


def _is_png(path: str) -> bool:
    signature = b"\x89PNG\r\n\x1a\n"
    with open_regular(path) as file:
        return file.read(len(signature)) == signature


class Core50(Unpacked):
    """CORe50: 50 objects in eleven sessions, of which eight are domains and three test them all.

    Published lists of the setting "new instances", such as `batches_filelists/NI_inc/run0`, name
    the images of other domains.
    """

    name = "CORe50"
    num_classes = 50
    folder = "core50_128x128"
    archive = "core50_128x128.zip"
    layout = "s1/o1/C_01_01_000.png and so on, sessions s1 to s11 of objects o1 to o50"
    url = "https://vlomonaco.github.io/core50/"
    member = "s1"

    sessions = tuple(f"s{number}" for number in range(1, 12))
    tested = ("s3", "s7", "s10")
    trained = ("s1", "s2", "s4", "s5", "s6", "s8", "s9", "s11")

    def _find_classes(self, root: Path) -> list[str]:
        """The objects, o2 before o10, after comparing them between all sessions."""
        expected = self._expected(root)
        if missing := [name for name in self.sessions if not (root / name).is_dir()]:
            raise DataError(f"no session {join_names(missing)} in {root}; {expected}")
        objects = common_classes([root / name for name in self.sessions], expected, r"o\d+")
        return sorted(objects, key=lambda name: int(name[1:]))

    def _read(self, root: Path, classes: list[str]) -> Splits:
        return gather(root, classes, self.trained), gather(root, classes, self.tested)

    def find_domains(self, data_path: Path, file_lists: Path | None) -> DomainList:
        """Finds the training sessions, or the published training lists in a folder."""
        num_classes = self.count_classes(data_path)
        names = self.trained if file_lists is None else tuple(_find_lists(file_lists))
        return DomainList(names, num_classes, lambda: self._read_domains(data_path, file_lists))

    def _read_domains(self, data_path: Path, lists: Path | None) -> Parts:
        root, classes = self._prepare(data_path)
        if lists is None:
            test = {"+".join(self.tested): gather(root, classes, self.tested)}
            return {name: gather(root, classes, [name]) for name in self.trained}, test
        images = gather(root, classes, self.sessions)
        numbers = {name: number for number, name in enumerate(images.names)}
        train = {name: _read_list(x, images, numbers) for name, x in _find_lists(lists).items()}
        return train, {"test": _read_list(lists / _TEST_LIST, images, numbers)}


_TEST_LIST = "test_filelist.txt"
_LIST_LAYOUT = (
    "expected train_batch_00_filelist.txt, train_batch_01_filelist.txt, ... and test_filelist.txt, "
    f"such as in batches_filelists/NI_inc/run0 of batches_filelists.zip, see {Core50.url}"
)


def _find_lists(folder: Path) -> dict[str, Path]:
    """The training lists by domain, in their order; checks that no list is missing."""
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; {_LIST_LAYOUT}")
    files = os.listdir(folder)
    found = (re.fullmatch(r"train_(batch_([0-9]{2,4}))_filelist\.txt", name) for name in files)
    lists = {int(match[2]): match for match in found if match}
    wanted = {n: f"train_batch_{n:02}_filelist.txt" for n in range(max(lists, default=0) + 1)}
    absent = [name for number, name in wanted.items() if number not in lists]
    absent += [] if _TEST_LIST in files else [_TEST_LIST]
    if absent:
        raise DataError(f"no {join_names(absent)} in {folder}; {_LIST_LAYOUT}")
    return {match[1]: folder / match[0] for _, match in sorted(lists.items())}


def _read_list(path: Path, images: FileSource, numbers: Mapping[str, int]) -> FileSource:
    """The images in a list, each line of which is compared with the image of that name."""
    found = []
    with open_regular(path) as file:
        lines = file.read().decode(errors="backslashreplace").splitlines()
    for line_number, line in enumerate(lines, start=1):
        name, *label = line.split() or [""]
        image = numbers.get(name)
        if name and (image is None or label != [str(images.targets[image])]):
            right = "an image of s1 to s11 and its class id, such as 's11/o1/C_11_01_000.png 0'"
            right = right if image is None else f"'{name} {images.targets[image]}'"
            raise DataError(f"{path}, line {line_number}: {line!r} is not {right}")
        found += [] if image is None else [image]
    if not found:
        raise DataError(f"{path}: the list is empty; {_LIST_LAYOUT}")
    return images.select(np.array(found))


class ImagenetR(Unpacked):
    """ImageNet-R, of which a fixed fifth of every class are the test images.

    The published set has no split. Here it follows from the names of the files: in the order of the
    SHA-256 sums of "<class>/<file>", the first fifth of a class (rounded, at least one) are for the
    test. So it is the same everywhere, whatever the seed, and nothing is moved. Where another
    program has moved the images to `train` and `test` (or `val`), its split is used instead.
    """

    name = "Imagenet-R"
    aliases = ("ImageNetR", "Split-Imagenet-R")
    num_classes = 200
    folder = "imagenet-r"
    archive = "imagenet-r.tar"
    layout = "<n01443537 and so on>/*.jpg, a folder for each of 200 classes"
    url = "https://github.com/hendrycks/imagenet-r"
    member = r"n\d{8}"

    def _find_classes(self, root: Path) -> list[str]:
        layout = self._expected(root)
        if is_split(root):
            layout += f", or --dataset ImageFolder --data-path {root} to use its own split"
        return common_classes(self._splits(root) or [root], layout, self.member)

    def _is_root(self, folder: Path) -> bool:
        is_part = folder.name in ("train", "val", "test") and is_split(folder.absolute().parent)
        return not is_part and (super()._is_root(folder) or bool(self._splits(folder)))

    def _splits(self, root: Path) -> list[Path]:
        """The folders of another program's split; none if the classes are as published."""
        splits = [root / "train", val_or_test(root)]
        is_moved = is_split(root) and folders_in(splits[0], self.member)
        return splits if is_moved and not super()._is_root(root) else []

    def _read(self, root: Path, classes: list[str]) -> Splits:
        if splits := self._splits(root):
            logger.info("%s is split already: using %s and %s", self.name, *splits)
            return gather(splits[0], classes), gather(splits[1], classes)
        images = gather(root, classes)
        sums = [hashlib.sha256(os.fsencode(name)).digest() for name in images.names]
        is_test = np.zeros(len(images), dtype=bool)
        for class_id, name in enumerate(classes):
            own = sorted(np.flatnonzero(images.targets == class_id).tolist(), key=sums.__getitem__)
            if len(own) == 1:
                raise DataError(f"only one image in {root}/{name}: one more is needed for the test")
            is_test[own[: max(1, round(len(own) / 5))]] = True
        return images.select(~is_test), images.select(is_test)
