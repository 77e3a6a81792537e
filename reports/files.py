"""Files that are written whole or not at all."""

import errno
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

#: Part of the name of a file that is being written.
_UNFINISHED = ".unfinished-"


def write_whole(path: Path, write: Callable[[IO[bytes]], Any], keep: Path | None = None) -> None:
    """Writes a file whole or not at all: under a temporary name, synchronised, then renamed.

    Args:
        path: The file; its folder is made.
        write: Writes the content to the open binary file that it is called with.
        keep: New name of the file that was there before; None: it is replaced.

    Raises:
        OSError: If it cannot be written, or is a device, a pipe or a folder, which stays as it is.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{_UNFINISHED}{secrets.token_hex(8)}")
    opened = temporary.open("xb")  # O_EXCL, 0o666 less what the process's umask removes
    try:
        with opened as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk, say
            error.filename = str(path)
        raise


def remove_unfinished(folder: Path) -> None:
    """Removes what `write_whole` left in a folder when the program was killed."""
    for path in folder.glob(f".*{_UNFINISHED}*"):
        path.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Writes a file whole or not at all; see `write_whole`."""
    write_whole(path, lambda file: file.write(content), keep)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any, keep: Path | None = None) -> None:
    """Writes a JSON file whole or not at all, see `write_whole`; not-a-number is rejected."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_bytes(path, text.encode(), keep)
