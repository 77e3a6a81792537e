"""Finds damaged image files before training, once for each output folder."""

import errno
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, count
from pathlib import Path

import numpy as np

import utils
from cli.paths import open_regular
from cli.settings import Settings
from continual_datasets import images
from continual_datasets.images import DataError, FileSource, ImageSource, Parts
from reports import files

#: File in the output folder: paths and reasons, by SHA-256 of all files' names, sizes and dates.
_FILE = "damaged.json"
#: Images that a thread takes at a time; so few that opening them needs no progress and no file.
_PIECE, _FEW = 64, 2000
#: Errors of the machine, not of a file.
_LACKS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)

logger = logging.getLogger(__name__)


def without_damaged(parts: Parts, settings: Settings) -> Parts:
    """Opens every image file of a run; with `--skip_damaged` leaves out those that are damaged.

    Rank 0 opens them, in as many threads as there are loader workers. What it finds in many images
    is stored in the output folder, and used again until a file changes its name, size or date.

    Raises:
        DataError: If images are damaged, naming the first few.
    """
    splits = parts[1:] if settings.run.eval else parts
    sources = [source for split in splits for source in split.values()]
    paths = [path for one in sources if isinstance(one, FileSource) for path in one.paths]
    is_main = utils.is_main_process()
    by_path = _find_damaged(paths, settings) if paths and is_main else {}
    # By number, since another machine may have other folders.
    found = {at: by_path[path] for at, path in enumerate(paths) if path in by_path}
    if not (damaged := utils.share(found)):
        return parts
    first, names = min(damaged), images.join_names([paths[at] for at in damaged])
    reason = damaged[first].removeprefix(str(DataError(f"{paths[first]}: ")))
    message = f"{len(damaged)} of {len(paths)} images are damaged: {names} (the first: {reason})"
    if not settings.data.skip_damaged:
        raise DataError(f"{message}; mend them, or leave them out with --skip_damaged")
    if is_main:
        logger.warning("%s; they are left out", message)
    numbers = count()
    kept = [{name: _rest(one, damaged, numbers) for name, one in part.items()} for part in splits]
    return (parts[0] if settings.run.eval else kept[0]), kept[-1]


def _rest(source: ImageSource, damaged: Mapping[int, str], numbers: Iterator[int]) -> ImageSource:
    """The images of a source that are not damaged; `numbers` counts the files of all sources."""
    if not isinstance(source, FileSource):
        return source
    return source.select(np.array([next(numbers) not in damaged for _ in source.targets], bool))


def _find_damaged(paths: Sequence[str], settings: Settings) -> dict[str, str]:
    """Path and reason of damaged files: stored by an earlier start of the program, or found."""
    folder = settings.output_folder
    # Threads, since Pillow decodes without Python's lock; multiprocessing, its ThreadPool included,
    # would need /dev/shm.
    pool = ThreadPoolExecutor(max(1, min(settings.data.num_workers, utils.usable_cores())))
    try:
        stats = "".join(_of_each(paths, _stat, pool))
        key = images.sha256(os.fsencode(stats))
        if folder is not None and key in (stored := _stored(folder / _FILE)):
            return stored[key]
        reasons = _of_each(paths, _problem, pool)
        if len(paths) > _FEW:
            progress = utils.Progress("Checking the images", print_freq=10 * _FEW)
            reasons = (reason for _, reason in progress.over(reasons, len(paths)))
        found = {path: reason for path, reason in zip(paths, reasons, strict=True) if reason}
    finally:
        pool.shutdown(cancel_futures=True)
    if folder is not None and not settings.run.dry_run and (found or len(paths) > _FEW):
        files.write_json(folder / _FILE, {**_stored(folder / _FILE), key: found})
    return found


def _of_each(
    paths: Sequence[str], look: Callable[[str], str], pool: ThreadPoolExecutor
) -> Iterable[str]:
    pieces = (paths[at : at + _PIECE] for at in range(0, len(paths), _PIECE))
    return chain.from_iterable(pool.map(lambda piece: [look(path) for path in piece], pieces))


def _stored(path: Path) -> dict[str, dict[str, str]]:
    """What earlier starts have found, by key, as far as it is sound."""
    with suppress(Exception), open_regular(path) as file:  # a damaged file may raise anything
        return {
            key: {str(name): str(reason) for name, reason in found.items()}
            for key, found in json.load(file).items()
        }
    return {}


def _stat(path: str) -> str:
    """Name, size and dates of a file: of its content, and of its last change of any kind."""
    with suppress(OSError):  # which opening it reports
        found = os.stat(path)
        return f"{path}\0{found.st_size}\0{found.st_mtime_ns}\0{found.st_ctime_ns}\n"
    return ""


def _problem(path: str) -> str:
    """Why a file cannot be read as an image; empty if it can."""
    try:
        images.open_image(path)
    except DataError as error:
        cause = error.__cause__
        if isinstance(cause, MemoryError) or getattr(cause, "errno", 0) in _LACKS:
            raise
        return str(error)
    return ""
