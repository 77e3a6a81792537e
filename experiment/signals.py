"""Signals that ask a run to stop: it saves its state at the next step boundary and leaves.

Schedulers warn a job before they kill it: SIGTERM, or SIGUSR1 or SIGUSR2 some time ahead.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

#: Exit code of a run that stopped so and can be continued ("temporary failure" of sysexits.h).
EXIT_CODE = 75

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Preempted(BaseException):  # no error, like KeyboardInterrupt
    """The run was asked to stop, and does."""


class StopSignals:
    """Listens for signals that ask the run to stop, inside a `with` block.

    At first a signal raises `Preempted` wherever the program is. Inside `deferred()` it is only
    remembered, so that the program can stop where it is ready to.
    """

    def __init__(self) -> None:
        self._came: list[signal.Signals] = []
        self._deferring = False
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._earlier = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    @property
    def received(self) -> signal.Signals | None:
        """The first signal that came, if any."""
        return self._came[0] if self._came else None

    def defer(self) -> None:
        """Only remembers signals from now on: the program is not ready to stop, or ends anyway."""
        self._deferring = True

    def listen(self) -> None:
        """Ends `defer()`; raises `Preempted` if a signal has come meanwhile."""
        self._deferring = False
        if self._came:
            raise self._preempted()

    def hand_on(self) -> None:
        """Calls the earlier handler of every signal that came."""
        for number in self._came:
            if callable(handler := self._earlier[number]):
                handler(number, None)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only remembers signals."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self._came.append(signal.Signals(number))
        if not self._deferring and len(self._came) == 1:  # after the first it is on its way out
            raise self._preempted()

    def _preempted(self) -> Preempted:
        return Preempted(f"{self._came[0].name} stopped the program outside of training")


def ignore_stop_signals() -> None:
    """Keeps the exit code of a process that ends anyway."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
