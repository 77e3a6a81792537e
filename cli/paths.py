"""Files and folders: where our programs are, how to call them, and files that are safe to read."""

import errno
import os
import shlex
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NewType

#: The folder of main.py.
ROOT = Path(__file__).resolve().parent.parent

#: A file or a folder, as text. As the type of a setting: `~` is the home folder.
PathStr = NewType("PathStr", str)


def expanded(path: str) -> str:
    """A path in which `~`, or `~name`, at the start is the home folder of a user.

    Raises:
        ValueError: If there is no such user, or no file can have that name.
    """
    full = os.path.expanduser(path)
    if full.startswith("~"):
        home = full.split("/")[0]
        raise ValueError(f"there is no home folder {home}: write ./{path} for a file of that name")
    try:
        encoded = os.fsencode(full)
    except UnicodeEncodeError:
        encoded = b"\0"
    names = encoded.split(b"/")
    if b"\0" in encoded or len(encoded) >= 4096 or max(map(len, names)) > 255:
        raise ValueError("no file can have that name, or one so long")
    return full


def open_regular(path: str | Path, mode: str = "rb") -> IO[bytes]:
    """Opens a file of bytes; never a pipe or a device, which may block or have no end.

    Raises:
        OSError: If it is missing, no regular file, or cannot be opened.
    """
    no_wait = getattr(os, "O_NONBLOCK", 0)
    file: IO[Any] = open(path, mode, opener=lambda name, flags: os.open(name, flags | no_wait))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return file


def command(program: str, *words: str | Path) -> str:
    """A command line that calls one of our programs as the running one was called.

    It repeats the path, the interpreter and, for main.py, torch's launcher or train.sh, which sets
    L2P_COMMAND.
    """
    script, path, start = Path(sys.argv[0]), ROOT / program, sys.orig_argv[:1]
    if program == "main.py" and "L2P_COMMAND" in os.environ:
        return f"{os.environ['L2P_COMMAND']} {shlex.join(map(str, words))}".rstrip()
    with suppress(OSError, ValueError):  # only Linux has /proc; the current folder may be gone
        if script.resolve().parent != ROOT:  # such as a notebook, or a job of submitit
            path = path.relative_to(Path.cwd())
        else:
            path, started = script.with_name(program), sys.orig_argv
            if program == "main.py" and "TORCHELASTIC_RUN_ID" in os.environ:
                started = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
            start = started[: started.index(sys.argv[0])]
    return shlex.join(map(str, [*start, path, *words]))
