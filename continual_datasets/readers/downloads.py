"""Data prepared once, however many processes start together on however many machines.

A lock lets one process at a time prepare a folder; the others find it finished. What is prepared
takes its place by renaming, so it is whole or absent, also where the file system knows no locks:
then at worst the work is done more than once. A data set that is not there is made so:

    with one_at_a_time(data_path):
        ...  # look again: another process may have finished meanwhile
        with new_folder(data_path / "flowers") as workshop:
            unpack(fetch(url, checksum, workshop, found_in=data_path), workshop)
"""

import errno
import hashlib
import logging
import shutil
import stat
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import urlparse

from filelock import FileLock, Timeout
from torch.hub import download_url_to_file

logger = logging.getLogger(__name__)

_LOCK = ".l2p.lock"
_WORKSHOP = ".l2p-unfinished-"
_LEFT_OVER_AFTER = 24 * 3600.0  # seconds
_WAIT_UNTOLD = 3.0  # seconds


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
        logger.info("%s cannot be locked (%s): going on without a lock", folder, error)
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
    """Gives an empty folder to work in; what then lies there under target's name is put in place.

    The place is taken in one step, after the body and only if it succeeds. What stood there
    before is moved aside, never removed, unless another process put it there meanwhile: that is
    as good as ours and stays. The rest of the working folder goes, also on errors; what a killed
    process leaves is hidden, in nobody's way, and removed by a later call, a day on.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_overs(target.parent)
    before = _identity(target)
    workshop = Path(tempfile.mkdtemp(prefix=_WORKSHOP, dir=target.parent))  # the same file system
    try:
        yield workshop
        if before is not None and _identity(target) == before:
            _move_aside(target)
        _put_in_place(workshop / target.name, target)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _remove_left_overs(folder: Path) -> None:
    for path in folder.glob(f"{_WORKSHOP}*"):
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
                f"{archive.name} is refused: its member {name!r} is not a file or folder that "
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
