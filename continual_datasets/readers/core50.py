"""The reader of CORe50: by session, by published file lists, or all sessions together.

Files are opened when they are asked for; only paths are held, in an order that depends on nothing
but their names.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from continual_datasets.images import DataError, FileSource, join_names
from continual_datasets.readers.class_folders import (
    DomainList,
    Domains,
    Splits,
    common_classes,
    folders_in,
    gather,
)
from continual_datasets.readers.storage import Unpacked

_TRAIN_SESSIONS = (1, 2, 4, 5, 6, 8, 9, 11)
_TEST_SESSIONS = (3, 7, 10)


def load_core50(data_path: Path) -> Splits:
    """Read CORe50 without its domains: all training sessions, and all test sessions."""
    root, classes = CORE50.prepare(data_path)
    return _sessions(root, _TRAIN_SESSIONS, classes), _sessions(root, _TEST_SESSIONS, classes)


def find_domains(data_path: Path, file_lists: Path | None) -> DomainList:
    """Find CORe50's domains: eight training sessions; three others test all of them.

    Args:
        data_path: Holds `core50_128x128`.
        file_lists: Folder of published lists of the setting "new instances", such as
            `batches_filelists/NI_inc/run0`; each training list is a domain then.
    """
    num_classes = CORE50.count_classes(data_path)
    if file_lists is not None:
        names = tuple(_train_lists(file_lists))
        return DomainList(names, num_classes, lambda: _listed_domains(data_path, file_lists))
    names = tuple(f"s{number}" for number in _TRAIN_SESSIONS)
    return DomainList(names, num_classes, lambda: _session_domains(data_path))


def _session_domains(data_path: Path) -> Domains:
    root, classes = CORE50.prepare(data_path)
    train = {f"s{number}": _sessions(root, [number], classes) for number in _TRAIN_SESSIONS}
    test_name = "+".join(f"s{number}" for number in _TEST_SESSIONS)
    return dict(train), {test_name: _sessions(root, _TEST_SESSIONS, classes)}


def _find_classes(root: Path) -> list[str]:
    """Names of the objects, o2 before o10, after comparing them between all sessions."""
    sessions = [f"s{number}" for number in sorted((*_TRAIN_SESSIONS, *_TEST_SESSIONS))]
    if missing := sorted(set(sessions) - set(folders_in(root)), key=sessions.index):
        raise DataError(f"no session {join_names(missing)} in {root}; {CORE50.expected(root)}")
    return common_classes([root / name for name in sessions], CORE50.expected(root), _objects_in)


def _objects_in(session: Path) -> list[str]:
    names = (name for name in folders_in(session) if re.fullmatch(r"o\d+", name))
    return sorted(names, key=lambda name: int(name[1:]))


def _sessions(root: Path, numbers: Iterable[int], classes: Sequence[str]) -> FileSource:
    folders = {f"s{number}/{name}": i for number in numbers for i, name in enumerate(classes)}
    return gather(root, classes, folders)


CORE50 = Unpacked(
    "CORe50",
    folder="core50_128x128",
    archive="core50_128x128.zip",
    layout="s1/o1/C_01_01_000.png and so on, sessions s1 to s11 of objects o1 to o50",
    url="https://vlomonaco.github.io/core50/",
    num_classes=50,
    find_classes=_find_classes,
    member="s1",
)


# CORe50's published file lists


_LIST_LAYOUT = (
    "expected train_batch_00_filelist.txt, train_batch_01_filelist.txt, ... and test_filelist.txt, "
    f"such as in batches_filelists/NI_inc/run0 of batches_filelists.zip, see {CORE50.url}"
)
_LINE = "an image of s1 to s11 and its class id, such as 's11/o1/C_11_01_000.png 0'"
_TEST_LIST = "test_filelist.txt"


def _listed_domains(data_path: Path, file_lists: Path) -> Domains:
    root, classes = CORE50.prepare(data_path)
    images = _sessions(root, (*_TRAIN_SESSIONS, *_TEST_SESSIONS), classes)
    class_ids = dict(zip(images.names, images.targets.tolist(), strict=True))

    def read(path: Path) -> FileSource:
        found = _read_list(path, class_ids)
        return FileSource(found, [class_ids[name] for name in found], classes, root)

    train = {domain: read(path) for domain, path in _train_lists(file_lists).items()}
    return dict(train), {"test": read(file_lists / _TEST_LIST)}


def _train_lists(file_lists: Path) -> dict[str, Path]:
    """The training lists by domain, in their order; checks that no list is missing."""
    if not file_lists.is_dir():
        raise DataError(f"no folder {file_lists}; {_LIST_LAYOUT}")
    names = os.listdir(file_lists)
    found = (re.fullmatch(r"train_(batch_(\d+))_filelist\.txt", name) for name in names)
    lists = {int(match[2]): match for match in found if match}
    absent = [
        f"train_batch_{number:02}_filelist.txt"
        for number in range(max(lists, default=0) + 1)
        if number not in lists
    ]
    absent += [] if _TEST_LIST in names else [_TEST_LIST]
    if absent:
        raise DataError(f"no {join_names(absent)} in {file_lists}; {_LIST_LAYOUT}")
    return {match[1]: file_lists / match[0] for _, match in sorted(lists.items())}


def _read_list(path: Path, class_ids: Mapping[str, int]) -> list[str]:
    """The images in a list, each of them compared with those that are there."""
    names = []
    lines = path.read_text(encoding="utf-8", errors="backslashreplace").splitlines()
    for number, line in enumerate(lines, start=1):
        name, *label = line.split() or [""]
        if name and label != [str(class_ids.get(name))]:
            right = f"'{name} {class_ids[name]}'" if name in class_ids else _LINE
            raise DataError(f"{path}, line {number}: {line!r} is not {right}")
        names += [name] if name else []
    if not names:
        raise DataError(f"{path}: the list is empty; {_LIST_LAYOUT}")
    return names
