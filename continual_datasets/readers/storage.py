"""How the files of a data set get into its folder: downloaded by torchvision, or unpacked, once.

However many processes start together, one of them prepares a folder, under a lock; the others find
it finished. torchvision writes in place: that leaves halves behind when it is interrupted, and
overwrites what a user has put there. So a folder is prepared in a hidden one beside it and takes
its place by renaming: it is whole or absent, also after a kill and on file systems without locks.
"""

import logging
import re
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout
from torchvision.datasets.utils import calculate_md5, extract_archive

from continual_datasets.images import DataError
from continual_datasets.readers.class_folders import Splits, folders_in

logger = logging.getLogger(__name__)

_TMP_PREFIX = ".l2p-unfinished-"
_LEFT_OVER_AFTER = 24 * 3600.0  # seconds
_WAIT_UNREPORTED = 3.0  # seconds
_MISSING = (RuntimeError, DataError, FileNotFoundError)  # torchvision raises the first

#: Reads a data set under a folder; with True, downloads it there first. Raises one of `_MISSING` if
#: it is missing or damaged.
Reader = Callable[[Path, bool], Splits]


@dataclass(frozen=True)
class Downloaded:
    """A data set that torchvision downloads; paths of files are those under `--data-path`."""

    name: str  # what to call it
    folder: str  # its folder under `--data-path`
    url: str  # where its files come from
    files: dict[str, str]  # MD5 sum of each file that is downloaded
    parts: dict[str, str] = field(default_factory=dict)  # MD5 sums of the files packed in those

    def load(self, data_path: Path, read: Reader) -> Splits:
        """Read the data set; if it is missing or damaged, one process downloads it first.

        Raises:
            DataError: If the data set is missing and cannot be downloaded.
        """
        with suppress(*_MISSING):
            return read(data_path, False)  # complete data need neither a lock nor write permission
        problems: list[str] = []
        try:
            with one_at_a_time(data_path):
                try:
                    return read(data_path, False)  # another process was faster
                except _MISSING as error:
                    present, problems = self._find(data_path)
                    problems[:0] = [str(error)] if isinstance(error, DataError) else []
                found = "; ".join(problems) or "missing"
                logger.info("downloading %s to %s: %s", self.name, data_path, found)
                self._download(data_path / self.folder, present, read)
            return read(data_path, False)
        except Exception as error:  # sockets, HTTP, tar and the file system each have their own
            found = f" ({'; '.join(problems)})" if problems else ""
            missing = ", ".join(str(data_path / file) for file in self.parts or self.files)
            files = " and ".join(Path(file).name for file in self.files)
            (folder,) = {(data_path / file).parent for file in self.files}
            raise DataError(
                f"{self.name} is missing or damaged{found}: expected {missing}, and the download "
                f"failed ({_reason(error)}). Get {files} from {self.url} and put it in {folder}, "
                f"or give as --data-path the folder that holds {self.folder}"
            ) from error

    def _download(self, target: Path, present: dict[str, Path], read: Reader) -> None:
        with new_folder(target) as tmp_dir:
            for file in present.keys() & self.files.keys():  # torchvision downloads the others
                (tmp_dir / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(present[file], tmp_dir / file)
            try:
                read(tmp_dir, True)
            except RuntimeError as error:
                problems = "; ".join([str(error), *self._find(tmp_dir)[1]])
                raise DataError(problems.replace(f"{tmp_dir}/", "")) from error

    def _find(self, folder: Path) -> tuple[dict[str, Path], list[str]]:
        """The files with the published checksums, also in the folder itself; how others differ."""
        good, differing = {}, []
        for file, expected in (self.files | self.parts).items():
            places = dict.fromkeys((folder / file, folder / Path(file).name))
            for path in filter(Path.is_file, places):
                if (found := calculate_md5(path)) == expected:
                    good[file] = path
                else:
                    differing.append(f"{path}: checksum differs, MD5 {found} instead of {expected}")
        return good, differing


@dataclass(frozen=True)
class Unpacked:
    """A data set that people get by hand: its folder, or an archive that is unpacked."""

    name: str  # what to call it
    folder: str  # its folder under `--data-path`
    archive: str  # the same, packed
    layout: str  # what belongs in the folder
    url: str  # where to get it
    num_classes: int  # of the published archive
    find_classes: Callable[[Path], list[str]]  # in the folder; DataError if they are not right
    member: str = ""  # what its sub-folders are called, if `--data-path` may be the folder

    def count_classes(self, data_path: Path) -> int:
        """Look for the classes; an archive that is not unpacked yet is taken for complete."""
        root = self._find(data_path)
        return self.num_classes if root is None else len(self.find_classes(root))

    def prepare(self, data_path: Path) -> tuple[Path, list[str]]:
        """The folder of the data, unpacked if need be, and its classes.

        Raises:
            DataError: If the data are missing or incomplete, or the archive is damaged.
        """
        root = self._find(data_path) or self._unpack(data_path / self.archive)
        return root, self.find_classes(root)

    def expected(self, root: Path) -> str:
        """What belongs in the folder, for messages."""
        return f"expected {root}/{self.layout}, see {self.url}"

    def _find(self, data_path: Path) -> Path | None:
        """The folder of the data; None if there is only the archive."""
        if (data_path / self.folder).is_dir():
            return data_path / self.folder
        if data_path.is_dir() and any(re.fullmatch(self.member, x) for x in folders_in(data_path)):
            return data_path
        if (data_path / self.archive).is_file():
            return None
        raise DataError(
            f"{self.name} is not in {data_path}: expected {data_path / self.folder}/{self.layout}, "
            f"or {self.archive} to unpack. It is not downloaded by itself: get it from {self.url}"
        )

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
                f"{archive} cannot be unpacked ({_reason(error)}): get it anew, or unpack it "
                f"yourself so that {target} is there"
            ) from error
        return target


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process at a time run the body, among all that name the same folder.

    The lock ends with its process, however that ends; its file stays. A folder that cannot be
    locked (read only, a file system without locks) stops nobody: `new_folder` is safe without.
    """
    # A soft lock, filelock's way out where there is no flock, would outlive a killed process.
    lock = FileLock(folder / ".l2p.lock", fallback_to_soft=False)
    try:
        lock.acquire(timeout=_WAIT_UNREPORTED)
    except Timeout:
        logger.info("another process prepares %s: waiting", folder)
        lock.acquire(poll_interval=0.5)
    except OSError as error:
        logger.info("%s cannot be locked (%s): continuing without a lock", folder, error)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder to work in; what is then in it under target's name becomes the target.

    That happens in one step, after the body and only if it succeeds. What was there before is moved
    aside, never removed; what another process put there meanwhile is as good as ours and stays.
    What a killed process leaves is hidden, and deleted by a later call after 24 hours.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for path in target.parent.glob(f"{_TMP_PREFIX}*"):
        with suppress(OSError):  # another process removes it, or it is another user's
            if time.time() - path.lstat().st_mtime > _LEFT_OVER_AFTER:
                shutil.rmtree(path)
    is_damaged = target.is_symlink() or target.exists()
    with tempfile.TemporaryDirectory(
        prefix=_TMP_PREFIX, dir=target.parent, ignore_cleanup_errors=True
    ) as tmp_dir:
        yield Path(tmp_dir)
        if is_damaged:
            aside = target.with_name(f"{target.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
            target.rename(aside)
            logger.warning("%s is incomplete or damaged: moved to %s", target, aside)
        try:
            Path(tmp_dir, target.name).rename(target)
        except OSError:
            if not target.exists():
                raise
            logger.info("another process has prepared %s meanwhile: using that", target)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
