"""The reader of CORe50: by session, by published file lists, or all sessions together.

Files are opened when they are asked for; only paths are held, in an order that depends on nothing
but their names. An archive in the folder of the data is unpacked once.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from continual_datasets.images import DataError, FileSource, join_names
from continual_datasets.readers.class_folders import (
    ClassFiles,
    DomainList,
    Domains,
    Splits,
    check_same_classes,
    files_in,
    folders_in,
    gather,
    images_in,
)
from continual_datasets.readers.storage import Published

_TRAIN_SESSIONS = (1, 2, 4, 5, 6, 8, 9, 11)
_TEST_SESSIONS = (3, 7, 10)
_NUM_OBJECTS = 50
_CORE50 = Published(
    "CORe50",
    folder="core50_128x128",
    archive="core50_128x128.zip",
    layout="s1/o1/C_01_01_000.png and so on, sessions s1 to s11 of objects o1 to o50",
    url="https://vlomonaco.github.io/core50/",
    member="s1",
)


def load_core50(data_path: Path) -> Splits:
    """Read CORe50 without its domains: all training sessions, and all test sessions."""
    root = _CORE50.prepare(data_path)
    classes = _core50_classes(root)
    return _sessions(root, _TRAIN_SESSIONS, classes), _sessions(root, _TEST_SESSIONS, classes)


def count_core50(data_path: Path) -> int:
    """Compare the objects of all sessions; what is still packed is taken for complete."""
    root = _CORE50.find(data_path)
    return _NUM_OBJECTS if root is None else len(_core50_classes(root))


def load_core50_domains(data_path: Path, file_lists: Path | None) -> Domains:
    """Read CORe50 by domain: eight training sessions, and three others that test all of them.

    Args:
        data_path: Holds `core50_128x128`.
        file_lists: Folder of published lists of the setting "new instances", such as
            `batches_filelists/NI_inc/run0`; each training list is a domain then.
    """
    root = _CORE50.prepare(data_path)
    classes = _core50_classes(root)
    if file_lists is not None:
        return _listed_domains(root, file_lists, classes)
    train = {f"s{number}": _sessions(root, [number], classes) for number in _TRAIN_SESSIONS}
    test_name = "+".join(f"s{number}" for number in _TEST_SESSIONS)
    return dict(train), {test_name: _sessions(root, _TEST_SESSIONS, classes)}


def list_core50_domains(data_path: Path, file_lists: Path | None) -> DomainList:
    """Look for the sessions, and for the training lists if there are lists."""
    num_classes = count_core50(data_path)
    if file_lists is None:
        return DomainList(tuple(f"s{number}" for number in _TRAIN_SESSIONS), num_classes)
    return DomainList(tuple(map(_domain_of, _train_lists(file_lists))), num_classes)


def _core50_classes(root: Path) -> list[str]:
    """Names of the objects, o2 before o10, after comparing them between all sessions."""
    layout = f"expected {root}/{_CORE50.layout}, see {_CORE50.url}"
    folders = set(folders_in(root))
    sessions = [f"s{number}" for number in sorted((*_TRAIN_SESSIONS, *_TEST_SESSIONS))]
    if missing := [name for name in sessions if name not in folders]:
        raise DataError(f"no session {join_names(missing)} in {root}; {layout}")
    classes = _objects_in(root / sessions[0])
    if not classes:
        raise DataError(f"no object in {root / sessions[0]}; {layout}")
    for name in sessions[1:]:
        check_same_classes(root / sessions[0], classes, root / name, _objects_in(root / name))
    return classes


def _objects_in(session: Path) -> list[str]:
    names = (name for name in folders_in(session) if re.fullmatch(r"o\d+", name))
    return sorted(names, key=lambda name: int(name[1:]))


def _sessions(root: Path, numbers: Iterable[int], classes: Sequence[str]) -> FileSource:
    groups = (
        ClassFiles(f"s{number}/{name}", class_id, images_in(root / f"s{number}" / name))
        for number in numbers
        for class_id, name in enumerate(classes)
    )
    return gather(root, groups, classes)


# CORe50's published file lists


_LIST_LAYOUT = (
    "expected train_batch_00_filelist.txt, train_batch_01_filelist.txt, ... and test_filelist.txt, "
    f"such as in batches_filelists/NI_inc/run0 of batches_filelists.zip, see {_CORE50.url}"
)
_TEST_LIST = "test_filelist.txt"


def _listed_domains(root: Path, file_lists: Path, classes: Sequence[str]) -> Domains:
    reader = _ListReader(root, classes)
    train = {_domain_of(path): reader.read(path) for path in _train_lists(file_lists)}
    return dict(train), {"test": reader.read(file_lists / _TEST_LIST)}


def _domain_of(train_list: Path) -> str:
    return train_list.name.removeprefix("train_").removesuffix("_filelist.txt")


def _train_lists(file_lists: Path) -> list[Path]:
    """The training lists in their order; checks that none is missing, nor the test list."""
    if not file_lists.is_dir():
        raise DataError(f"no folder {file_lists}; {_LIST_LAYOUT}")
    names = files_in(file_lists)
    found = (re.fullmatch(r"train_batch_(\d+)_filelist\.txt", name) for name in names)
    by_number = {int(match[1]): file_lists / match[0] for match in found if match}
    missing = sorted(set(range(max(by_number, default=0) + 1)) - set(by_number))
    absent = [f"train_batch_{number:02}_filelist.txt" for number in missing]
    if _TEST_LIST not in names:
        absent.append(_TEST_LIST)
    if absent:
        raise DataError(f"no {join_names(absent)} in {file_lists}; {_LIST_LAYOUT}")
    return [path for _, path in sorted(by_number.items())]


class _ListReader:
    """Reads lists of images and compares every line with the folders.

    Args:
        root: What the paths in the lists are relative to.
        classes: Names of the objects, indexed by class id.
    """

    def __init__(self, root: Path, classes: Sequence[str]) -> None:
        self.root = root
        self.classes = classes
        self.class_ids = {name: class_id for class_id, name in enumerate(classes)}
        self.present: dict[str, set[str]] = {}  # files of every folder that was looked into

    def read(self, path: Path) -> FileSource:
        """Read a list.

        Raises:
            DataError: If a line is wrong; the message names the file and the line.
        """
        names, targets = [], []
        for number, line in enumerate(self._lines(path), start=1):
            if not line.strip():
                continue
            try:
                name, class_id = self._entry(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}") from error
            names.append(name)
            targets.append(class_id)
        if not names:
            raise DataError(f"{path}: the list is empty; {_LIST_LAYOUT}")
        return FileSource(names, targets, self.classes, self.root)

    def _lines(self, path: Path) -> list[str]:
        try:
            return path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not a text file ({error.reason})") from error

    def _entry(self, line: str) -> tuple[str, int]:
        match = re.fullmatch(r"(\S+)\s+(\d+)\s*", line)
        if match is None:
            raise ValueError(f"{line!r} is not of the form 's11/o1/C_11_01_000.png 0'")
        path = PurePosixPath(match[1])
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{path} leaves {self.root}")
        if re.fullmatch(r"s\d+/o\d+/[^/]+", str(path)) is None:
            raise ValueError(f"{path} is not of the form s11/o1/C_11_01_000.png")
        if path.name not in self._files(str(path.parent)):
            raise ValueError(f"there is no {self.root / path}")
        class_id = self.class_ids.get(path.parent.name)
        if class_id is None:
            raise ValueError(f"object {path.parent.name} is not in the sessions s1 to s11")
        if class_id != int(match[2]):
            raise ValueError(f"label {match[2]} of {path}: object {path.parent.name} is {class_id}")
        return str(path), class_id

    def _files(self, folder: str) -> set[str]:
        if folder not in self.present:
            exists = (self.root / folder).is_dir()
            self.present[folder] = set(files_in(self.root / folder)) if exists else set()
        return self.present[folder]
