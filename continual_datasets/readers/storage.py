"""Where the files of a data set are, and how they get there: downloaded or unpacked, once.

However many processes start together, on however many machines: a lock lets one process at a time
prepare a folder; the others find it finished. What is prepared takes its place by renaming, so it
is whole or absent, also where the file system knows no locks: then at worst the work is done more
than once. A data set that is not there is made so:

    with one_at_a_time(data_path):
        ...  # look again: another process may have finished meanwhile
        with new_folder(data_path / "flowers") as tmp_dir:
            unpack(fetch(url, checksum, tmp_dir, found_in=data_path), tmp_dir)
"""

import errno
import hashlib
import logging
import re
import shutil
import stat
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import urlparse

from filelock import FileLock, Timeout
from torch.hub import download_url_to_file

from continual_datasets.images import DataError, ImageSource
from continual_datasets.readers.class_folders import folders_in

logger = logging.getLogger(__name__)

_LOCK = ".l2p.lock"
_TMP_PREFIX = ".l2p-unfinished-"
_LEFT_OVER_AFTER = 24 * 3600.0  # seconds
_WAIT_UNTOLD = 3.0  # seconds


# Data sets that are downloaded


def read_or_download(
    name: str,
    target: Path,
    contents: str,
    url: str,
    read: Callable[[], tuple[ImageSource, ImageSource]],
    download: Callable[[Path], None],
) -> tuple[ImageSource, ImageSource]:
    """Reads a data set; one that is not there, or damaged, is downloaded by one process first.

    Args:
        name: What to call the data set.
        target: Folder of its own for it; everything is written beside it.
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
            with new_folder(target) as tmp_dir:
                download(tmp_dir)
            return read()
    except Exception as error:  # sockets, HTTP, tar and the file system each have their own
        raise DataError(
            f"{name} is missing or damaged{damage}: expected {contents} in {target} and the "
            f"download failed ({_reason(error)}). Get it from {url}, or give as --data-path the "
            f"folder that holds {target.name}"
        ) from error


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
    """Unpacks an archive, if it is there and its folder is not; one process does, others wait.

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
            with new_folder(target) as tmp_dir:
                _unpack_as(archive, tmp_dir / target.name)
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


# Folders that one process prepares


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Lets one process at a time run its body, among all that name the same folder.

    The lock ends with its process, however that ends; its file stays. A folder that cannot be
    locked (read only, a file system without locks) stops nobody: `new_folder` is safe without.
    """
    # A soft lock, filelock's way out where there is no flock, would outlive a killed process.
    lock = FileLock(folder / _LOCK, fallback_to_soft=False)
    try:
        _acquire(lock, folder)
    except OSError as error:
        logger.info("%s cannot be locked (%s): continuing without a lock", folder, error)
    try:
        yield
    finally:
        with suppress(OSError):
            lock.release()


def _acquire(lock: FileLock, folder: Path) -> None:
    try:
        lock.acquire(timeout=_WAIT_UNTOLD)
    except Timeout:
        logger.info("another process prepares %s: waiting", folder)
        lock.acquire(poll_interval=0.5)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Gives an empty folder to work in; what is then in it under target's name becomes the target.

    The place is taken in one step, after the body and only if it succeeds. What stood there
    before is moved aside, never removed, unless another process put it there meanwhile: that is
    as good as ours and stays. The rest of the working folder goes, also on errors; what a killed
    process leaves is hidden, and deleted by a later call after 24 hours.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_overs(target.parent)
    before = _identity(target)
    tmp_dir = Path(tempfile.mkdtemp(prefix=_TMP_PREFIX, dir=target.parent))  # the same file system
    try:
        yield tmp_dir
        if before is not None and _identity(target) == before:
            _move_aside(target)
        _put_in_place(tmp_dir / target.name, target)
    finally:
        shutil.rmtree(tmp_dir, ignore_errors=True)


def _remove_left_overs(folder: Path) -> None:
    for path in folder.glob(f"{_TMP_PREFIX}*"):
        with suppress(OSError):  # another process removes it, or it is another user's
            if time.time() - path.lstat().st_mtime > _LEFT_OVER_AFTER:
                shutil.rmtree(path)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _move_aside(target: Path) -> None:
    aside = target.with_name(f"{target.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
    target.rename(aside)
    logger.warning("%s is incomplete or damaged: moved to %s", target, aside)


def _put_in_place(made: Path, target: Path) -> None:
    try:
        made.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        logger.info("another process has prepared %s meanwhile: using that", target)


# Files and archives


def fetch_into(folder: Path, urls: Iterable[str], checksum: str, found_in: Path) -> Path:
    """Puts a file into a folder: copied if it was downloaded by hand, else from the first mirror.

    Args:
        folder: Where to put it.
        urls: The same file at several places; their last part names it.
        checksum: See `fetch`.
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


def fetch(url: str, checksum: str, folder: Path, found_in: Path) -> Path:
    """Finds a file that was downloaded by hand, or else downloads it.

    Args:
        url: Its last part names the file.
        checksum: Such as `sha256:` and the hexadecimal digest; nothing is taken without.
        folder: Where to download to.
        found_in: Where a file of that name and checksum is taken from if it is there.

    Returns:
        Path of the checked file.

    Raises:
        ValueError: If the download has another checksum.
        OSError: If it fails, as `urllib` and the file system say.
    """
    name = PurePosixPath(urlparse(url).path).name
    present = found_in / name
    if present.is_file() and _checksum(present, checksum) == checksum:
        return present
    path = folder / name
    download_url_to_file(url, str(path))
    if (found := _checksum(path, checksum)) != checksum:
        raise ValueError(f"{url} has the checksum {found} instead of {checksum}")
    return path


def _checksum(path: Path, expected: str) -> str:
    algorithm = expected.partition(":")[0]
    with path.open("rb") as file:  # on FIPS machines, MD5 is allowed for this alone
        digest = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False))
    return f"{algorithm}:{digest.hexdigest()}"


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a tar (compressed or not) or zip archive that holds files and folders only.

    Nothing but their names and contents is taken: permissions come from the user's umask.
    (tarfile's own filters came with Python 3.11.4 only, and let links pass.)

    Raises:
        ValueError: If a member is a link or a device, or would leave the folder.
        Exception: Whatever `tarfile` and `zipfile` raise on damaged archives.
    """
    for name, plain, file in _members(archive):
        if not plain or Path(name).anchor or ".." in Path(name).parts:
            raise ValueError(
                f"{archive.name} is rejected: its member {name!r} is not a file or folder that "
                "stays inside the folder it is unpacked in"
            )
        path = folder / name
        if file is None:
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with file, path.open("wb") as copy:
            shutil.copyfileobj(file, copy)


def _members(archive: Path) -> Iterator[tuple[str, bool, IO[bytes] | None]]:
    """Name of every member, whether it is a file or a folder, and the content of a file."""
    if tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tar:
            for member in tar:
                plain = member.isfile() or member.isdir()
                yield member.name, plain, tar.extractfile(member) if member.isfile() else None
    else:
        with zipfile.ZipFile(archive) as zipped:
            for entry in zipped.infolist():
                plain = not stat.S_ISLNK(entry.external_attr >> 16)
                yield entry.filename, plain, None if entry.is_dir() else zipped.open(entry)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
