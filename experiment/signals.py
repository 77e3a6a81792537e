"""Signals that ask a run to stop: it saves its state at the next step boundary and leaves.

Schedulers warn a job before they kill it: SIGTERM, or SIGUSR1 or SIGUSR2 some time ahead. SIGHUP
comes when the terminal is closed. Ctrl-C ends a run at once.
"""

import atexit
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

#: Exit code of a run that stopped so and has saved its state ("temporary failure" of sysexits.h).
EXIT_CODE = 75

#: Exit code after Ctrl-C.
INTERRUPTED = 130

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class Preempted(BaseException):  # no error, like KeyboardInterrupt
    """The run was asked to stop, and does."""


class StopSignals:
    """Remembers signals that ask the run to stop, inside a `with` block.

    Args:
        numbers: The signals.

    Attributes:
        idle: Whether nothing is under way that must be finished or saved first: the first signal
            then raises `Preempted` at once.
        received: The signals that came, in order.
        saved: Whether there is a state of the run, from which it can resume.
    """

    def __init__(self, numbers: Iterable[signal.Signals] = _SIGNALS) -> None:
        self.numbers, self.idle, self.saved = tuple(numbers), False, False
        self.received: list[signal.Signals] = []
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in self.numbers:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                self._earlier[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Leaves signals to the earlier handlers, while the process blocks outside of Python."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    @property
    def exit_code(self) -> int:
        """Exit code of a run that was stopped, by a signal to this process or to another."""
        number = self.received[0] if self.received else signal.SIGTERM
        return EXIT_CODE if self.saved else 128 + number

    def check(self) -> None:
        """Raises `Preempted` if a signal has come."""
        if self.received:
            raise Preempted(f"{self.received[0].name} stopped the program outside of training")

    def hand_on(self) -> None:
        """Calls the earlier handler of every signal that came."""
        for number in self.received:
            if callable(handler := self._earlier.get(number)):
                handler(number, None)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(signal.Signals(number))
        if self.idle and len(self.received) == 1:  # after the first it is on its way out
            self.check()


def was_stopped(code: int) -> bool:
    """Whether this is the exit code of a run that a signal asked to stop."""
    return code == EXIT_CODE or code - 128 in _SIGNALS


def ignore_stop_signals() -> None:
    """Keeps the exit code of a process that ends anyway."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def leave_on_interrupt() -> None:
    """Lets Ctrl-C end the process without a traceback, whatever is imported or cleared up."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _leave)
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # the last step of the exit


@contextmanager
def interruptible() -> Iterator[None]:
    """Lets Ctrl-C raise KeyboardInterrupt in the body."""
    earlier = signal.getsignal(signal.SIGINT)
    if earlier is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)


def _leave(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)
