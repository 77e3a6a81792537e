"""Where the files of a data set are, and how they get there: downloaded or unpacked, once."""

import logging
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from continual_datasets.images import DataError, ImageSource
from continual_datasets.readers.class_folders import folders_in
from continual_datasets.readers.downloads import fetch, new_folder, one_at_a_time, unpack

logger = logging.getLogger(__name__)


# Data sets that are downloaded


def read_or_download(
    name: str,
    target: Path,
    contents: str,
    url: str,
    read: Callable[[], tuple[ImageSource, ImageSource]],
    download: Callable[[Path], None],
) -> tuple[ImageSource, ImageSource]:
    """Read a data set; one that is not there, or damaged, is downloaded by one process first.

    Args:
        name: What to call the data set.
        target: Folder of its own that it lies in; everything is written beside it.
        contents: What belongs in that folder, in words.
        url: Where it comes from.
        read: Reads it. Where that cannot be done it raises RuntimeError, as torchvision's readers
            do, or DataError to say what is wrong.
        download: Makes a folder of target's name in the empty one that it is given.

    Raises:
        DataError: If the data set is not there and cannot be downloaded.
    """
    data_path = target.parent
    try:
        return read()  # complete data need neither a lock nor the right to write
    except OSError as error:  # the files are there, and nothing that is downloaded would help
        raise DataError(f"{error.filename or target}: {error.strerror}") from error
    except (RuntimeError, DataError):
        damage = ""
    try:
        with one_at_a_time(data_path):
            try:
                return read()  # another process was faster
            except (RuntimeError, DataError) as error:
                damage = f" ({error})" if isinstance(error, DataError) else ""
            logger.info("%s is not in %s%s: downloading %s", name, data_path, damage, url)
            with new_folder(target) as workshop:
                download(workshop)
            return read()
    except Exception as error:  # sockets, HTTP, tar and the file system each have their own
        raise DataError(
            f"{name} is missing or damaged{damage}: expected {contents} in {target} and the "
            f"download failed ({_reason(error)}). Get it from {url}, or give as --data-path the "
            f"folder that holds {target.name}"
        ) from error


def fetch_into(folder: Path, urls: Iterable[str], checksum: str, found_in: Path) -> Path:
    """Put a file into a folder: copied if it was downloaded by hand, else from the first mirror.

    Args:
        folder: Where to put it.
        urls: The same file at several places; their last part names it.
        checksum: See `downloads.fetch`.
        found_in: Where to look for it before.

    Returns:
        Path of the checked file in the folder.

    Raises:
        OSError: If no mirror has it.
    """
    failures = []
    for url in urls:
        try:
            path = fetch(url, checksum, folder, found_in)
        except (OSError, ValueError, HTTPException) as error:
            failures.append(f"{url}: {_reason(error)}")
        else:
            return path if path.parent == folder else Path(shutil.copy(path, folder))
    raise OSError("; ".join(failures))


# Data sets that people get by hand


@dataclass(frozen=True)
class Published:
    """A data set that people get by hand.

    Attributes:
        name: What to call it.
        folder: Its folder under `--data-path`.
        archive: The same, packed.
        layout: What belongs in the folder.
        url: Where to get it.
        member: What its sub-folders are called, if `--data-path` itself may be the folder.
    """

    name: str
    folder: str
    archive: str
    layout: str
    url: str
    member: str | None = None

    def find(self, data_path: Path) -> Path | None:
        """The folder of the data; None if there is none, but the archive.

        Raises:
            DataError: If there is neither.
        """
        if (data_path / self.folder).is_dir():
            return data_path / self.folder
        if self._is_folder_itself(data_path):
            return data_path
        if (data_path / self.archive).is_file():
            return None
        raise DataError(
            f"{self.name} is not in {data_path}: expected {data_path / self.folder}/{self.layout}, "
            f"or {self.archive} to unpack. It is not downloaded by itself: get it from {self.url}"
        )

    def prepare(self, data_path: Path) -> Path:
        """The folder of the data, unpacked if need be."""
        folder = self.find(data_path)
        if folder is not None:
            return folder
        unpack_once(data_path / self.archive, data_path / self.folder)
        return data_path / self.folder

    def _is_folder_itself(self, data_path: Path) -> bool:
        if self.member is None or not data_path.is_dir():
            return False
        return any(re.fullmatch(self.member, name) for name in folders_in(data_path))


def unpack_once(archive: Path, target: Path) -> None:
    """Unpack an archive, if it is there and its folder is not; one process does, others wait.

    Args:
        archive: Holds the folder of target's name, or what belongs in it.
        target: The folder to make.

    Raises:
        DataError: If the archive is damaged, or nothing can be written beside it.
    """
    if target.exists() or not archive.is_file():
        return
    try:
        with one_at_a_time(target.parent):
            if target.exists():
                return
            logger.info("unpacking %s", archive)
            with new_folder(target) as workshop:
                _unpack_as(archive, workshop / target.name)
    except Exception as error:  # tar, zip and the file system each have their own
        raise DataError(
            f"{archive} cannot be unpacked ({_reason(error)}): get it anew, or unpack it yourself "
            f"so that {target} is there"
        ) from error


def _unpack_as(archive: Path, folder: Path) -> None:
    content = folder.with_name(f"{folder.name}.content")
    content.mkdir()
    unpack(archive, content)
    inner = content / folder.name
    (inner if inner.is_dir() else content).rename(folder)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
