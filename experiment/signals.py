"""Signals that ask a run to stop: it saves its state at the next step boundary and leaves.

Schedulers warn a job before they kill it: SIGTERM, or SIGUSR1 or SIGUSR2 some time ahead.
"""

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

#: Exit code of a run that stopped so and can be continued ("temporary failure" of sysexits.h).
EXIT_CODE = 75

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


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
    """

    def __init__(self, numbers: Iterable[signal.Signals] = _SIGNALS) -> None:
        self.numbers, self.idle = tuple(numbers), False
        self.received: list[signal.Signals] = []
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._earlier = {number: signal.signal(number, self._receive) for number in self.numbers}
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

    def check(self) -> None:
        """Raises `Preempted` if a signal has come."""
        if self.received:
            raise Preempted(f"{self.received[0].name} stopped the program outside of training")

    def hand_on(self) -> None:
        """Calls the earlier handler of every signal that came."""
        for number in self.received:
            if callable(handler := self._earlier[number]):
                handler(number, None)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(signal.Signals(number))
        if self.idle and len(self.received) == 1:  # after the first it is on its way out
            self.check()


def ignore_stop_signals() -> None:
    """Keeps the exit code of a process that ends anyway."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
