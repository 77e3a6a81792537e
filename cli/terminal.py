"""Standard output and error: a program does not end because of them.

Text from files and names of folders cannot send control sequences to a terminal.
"""

import io
import logging
import os
import re
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

logger = logging.getLogger(__name__)

#: Errors of writing to standard output, except that it is no longer read.
_failures: list[OSError] = []


def printable(text: str, kept: str = "\n\t") -> str:
    """Escapes the control characters and lone surrogates of a text, except those in `kept`."""
    return "".join(
        one if one.isprintable() or one in kept else one.encode("unicode_escape").decode("ascii")
        for one in text
    )


def one_line(text: str) -> str:
    """Escapes line breaks and tabs, too."""
    return printable(text, kept="")


def make_robust() -> None:
    """Lets a program run on when its standard output or error is closed, full or no longer read.

    Characters that their encoding lacks are escaped. Neither Ctrl-C nor logging prints a traceback.
    """
    logging.raiseExceptions = False
    sys.excepthook = _report_end
    for number in range(3):  # else the next file that is opened would be a standard stream
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for number, name in (1, "stdout"), (2, "stderr"):
        stream = getattr(sys, name)
        with suppress(OSError):  # a test's or a notebook's stream is no file
            if stream is None or stream.fileno() == number:
                setattr(sys, name, _robust(stream, number))


def run_program(main: Callable[[], int]) -> NoReturn:
    """Runs a program whose output counts, and ends the process with its exit code."""
    make_robust()
    sys.exit(exit_code(main()))


def exit_code(code: int) -> int:
    """The exit code of a program whose output counts: 1 in place of 0 if it was not written.

    A reader that stops early, such as `| head`, is no failure.
    """
    sys.stdout.flush()
    return code or len(_failures)


def said(error: BaseException) -> str:
    """The first line of an error's message; the last one if a DataLoader's worker raised it.

    At most 2000 letters, without colours. Where torch rejects a file and advises unsafe loading,
    what the file must hold instead.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    if re.search("weights.only", text, re.IGNORECASE):
        return "it does not hold tensors and plain values alone, as torch.save writes them"
    lines = text.splitlines() or [type(error).__name__]
    of_worker = lines[1:2] == ["Original Traceback (most recent call last):"]
    return lines[-1 if of_worker else 0][:2000]


def reason(error: BaseException) -> str:
    """The name of an error and what it says, see `said`."""
    name, text = type(error).__name__, said(error)
    return name if text == name else f"{name}: {text}"


@contextmanager
def tolerated(what: str, then: str) -> Iterator[None]:
    """Logs any error in its body as one warning, where an error must not end a run.

    Args:
        what: What fails.
        then: What follows from that, or what can be done.
    """
    try:
        yield
    except Exception as error:  # libraries raise many kinds
        logger.warning("%s (%s): %s", what, reason(error), then)


def _robust(stream: Any, number: int) -> io.TextIOWrapper:
    """A text stream like the given one, to the same file, which raises no errors."""
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(number, "w", closefd=False)),
        encoding=getattr(stream, "encoding", None),
        errors="backslashreplace",
        line_buffering=stream is not None and (stream.line_buffering or stream.write_through),
    )


class _Output(io.FileIO):
    """A standard stream that drops everything after a failure."""

    def write(self, data: Any) -> int:
        """Writes bytes; returns how many of them count as written."""
        try:
            while (count := super().write(data)) is None:  # a non-blocking file that is not ready
                select.select([], [self], [])
            return count
        except OSError as error:
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), self.fileno())
            if self.fileno() == 1 and not isinstance(error, BrokenPipeError):
                _failures.append(error)
                print(f"standard output is lost from here on: {error.strerror}", file=sys.stderr)
            return len(data)


def _report_end(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
