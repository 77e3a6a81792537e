"""How a folder of data gets in place: made by one process, whole or absent.

However many processes start together, one of them prepares a folder, under a lock; the others find
it finished. torchvision writes in place: that leaves halves behind when it is interrupted, and
overwrites what a user has put there. So a folder is prepared in a hidden one beside it and takes
its place by renaming: it is whole or absent, also after a kill and on file systems without locks.
"""

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

_TMP_PREFIX = ".l2p-unfinished-"
_LEFT_OVER_AFTER = 24 * 3600.0  # seconds
_WAIT_UNREPORTED = 3.0  # seconds


def take_lock(file: Path, seconds: float) -> FileLock:
    """Locks a file, which is created; the lock ends with the process, even if it is killed.

    Where locking is impossible (a read-only folder, a file system without locks), that is logged,
    and the lock is not held.

    Raises:
        Timeout: If another process holds it for so long; below 0 seconds waits forever.
    """
    # A soft lock, filelock's way out where there is no flock, would outlive a killed process.
    lock = FileLock(file, fallback_to_soft=False)
    try:
        lock.acquire(timeout=seconds, poll_interval=0.2)
    except Timeout:
        raise
    except OSError as error:
        logger.info("%s cannot be locked (%s): continuing without a lock", file.parent, error)
    return lock


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process at a time run the body, among all that name the same folder.

    A folder that cannot be locked stops nobody: `new_folder` is safe without.
    """
    try:
        lock = take_lock(folder / ".l2p.lock", _WAIT_UNREPORTED)
    except Timeout:
        logger.info("another process prepares %s: waiting", folder)
        lock = take_lock(folder / ".l2p.lock", -1)
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
