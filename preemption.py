"""Signals that ask a run to stop: it saves its state at the next step boundary and leaves.

Schedulers warn a job before they kill it: SIGTERM, or SIGUSR1 or SIGUSR2 some time ahead.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

#: Exit code of a run that stopped so and can be continued ("temporary failure" of sysexits.h).
EXIT_CODE = 75

#: How long a DataLoader worker goes on after SIGTERM; schedulers rarely wait longer before they kill.
_WORKER_SECONDS = 30

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Preempted(BaseException):  # no error, like KeyboardInterrupt
    """The run was asked to stop, and does."""


class StopSignals:
    """Listens for signals that ask the run to stop, inside a `with` block.

    At first a signal raises `Preempted` wherever the program is. Inside `deferred()` it is only
    remembered in `received`, so that the program can stop where it is ready to. Afterwards whoever
    listened before gets the signal too.

    Attributes:
        received: The first signal that came, if any.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._deferring = False
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._earlier = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        handler = self._earlier.get(self.received) if self.received else None
        if kind is Preempted and callable(handler):
            handler(self.received, None)

    @contextmanager
    def deferred(self) -> Iterator[Callable[[], bool]]:
        """Only remembers signals; gives a function that tells whether one came."""
        self._deferring = True
        try:
            yield lambda: self.received is not None
        finally:
            self._deferring = False

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            return  # already on the way out
        self.received = signal.Signals(number)
        if not self._deferring:
            raise Preempted(f"{self.received.name} came while nothing was being trained")


def outlive_stop_signals(_worker_id: int) -> None:
    """Lets a DataLoader worker serve the last step when a scheduler signals every process of a job.

    SIGTERM ends it after a while all the same: so does Python, when it clears up.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_WORKER_SECONDS))
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
