"""Runs the runs of a sweep on this machine, one or several at a time; signals stop them all."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cli.paths import ROOT
from experiment import signals
from launch.sweep_plan import Run, count_runs
from reports.stored_runs import ResultsError

#: Signals of terminals, users and schedulers that stop a sweep.
_STOP_SIGNALS = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2,
)  # fmt: skip

#: Seconds between two checks which runs have ended.
_POLL_SECONDS = 0.1

#: Lines of a failed run's output that are shown.
_LAST_LINES = 10


def run_here(runs: Sequence[Run], num_jobs: int | None, logs: Path, lock: int) -> int:
    """Runs on this machine, and prints how each run ends.

    Args:
        runs: The runs.
        num_jobs: How many run at a time; None: one.
        logs: Folder of their output.
        lock: File descriptor that locks the folder of the sweep.

    Returns:
        0, 1 if a run failed, 130 after Ctrl-C, or 75 after another signal.
    """
    waiting = deque(enumerate(runs, start=1))
    slots = list(_environments(runs, num_jobs or 1))
    active: dict[int, tuple[str, Child]] = {}
    codes = []
    with _stop_signals() as received:
        try:
            were_asked = False
            while active or (waiting and not received):
                for slot, environment in enumerate(slots):
                    if slot not in active and waiting and not received:
                        number, run = waiting.popleft()
                        title = f"[{number}/{len(runs)}] {run.name}"
                        print(f"{title}: starts", flush=True)
                        log = logs / f"{run.arm}-seed{run.seed}.txt"
                        active[slot] = title, Child(run, log, environment, lock)
                for slot, (title, child) in list(active.items()):
                    if child.has_ended():
                        del active[slot]
                        codes.append(_report_end(title, child))
                if received and active:
                    if not were_asked:
                        _ask_to_stop(received[0], [child for _, child in active.values()])
                        were_asked = True
                    if received.count(signal.SIGINT) > 1:
                        break
                time.sleep(_POLL_SECONDS)
        finally:
            for _, child in active.values():
                child.kill()
    if received:
        print("Call the same command again to resume.", flush=True)
        return 130 if received[0] == signal.SIGINT else signals.EXIT_CODE
    return _worst(codes)


def last_lines(path: Path) -> str:
    """The last lines of a log, indented."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-_LAST_LINES:])


class Child:
    """A run in a process of its own, with a session of its own.

    Args:
        run: The run.
        log: Where its output goes.
        environment: Environment variables on top of those of this process.
        lock: File descriptor of a lock, which the run inherits and so holds as long as it runs,
            even if this process is killed.
    """

    def __init__(self, run: Run, log: Path, environment: dict[str, str], lock: int) -> None:
        self.run, self.log = run, log
        self.started = time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "main.py"), *run.argv],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                pass_fds=(lock,),
                start_new_session=True,  # signals of the terminal go to this process alone
            )

    @property
    def seconds(self) -> int:
        """Time since its start."""
        return round(time.monotonic() - self.started)

    def has_ended(self) -> bool:
        """Whether it has ended; if so, kills the processes that it left behind."""
        if self.process.poll() is None:
            return False
        self.kill()
        return True

    def stop(self) -> None:
        """Asks it to save its state and to end."""
        self.process.terminate()

    def kill(self) -> None:
        """Kills it and all processes that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _worst(codes: list[int]) -> int:
    """One exit code for those of several runs."""
    if set(codes) <= {0}:
        return 0
    return signals.EXIT_CODE if set(codes) <= {0, signals.EXIT_CODE} else 1


def _environments(runs: Sequence[Run], num_jobs: int) -> Iterator[dict[str, str]]:
    """Environment variables for each of the runs at a time: a GPU, and a share of the cores."""
    import utils

    gpus = _gpus() if any(run.config["device"] in ("auto", "cuda") for run in runs) else []
    for slot in range(num_jobs):
        environment = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
        if num_jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, utils.usable_cores() // num_jobs))
        yield environment


def _gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    if not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number in range(torch.cuda.device_count())]
    return visible.split(",")[: torch.cuda.device_count()]


@contextmanager
def _stop_signals() -> Iterator[list[signal.Signals]]:
    """Collects the signals that stop a sweep, while its body runs."""
    received: list[signal.Signals] = []
    earlier = {
        number: signal.signal(number, lambda n, _: received.append(signal.Signals(n)))
        for number in _STOP_SIGNALS
    }
    try:
        yield received
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _ask_to_stop(number: signal.Signals, children: list[Child]) -> None:
    hint = " (Ctrl-C again ends them at once)" if number == signal.SIGINT else ""
    print(f"{number.name}: {count_runs(children)} asked to save and to stop{hint}", flush=True)
    for child in children:
        child.stop()


def _report_end(title: str, child: Child) -> int:
    """Prints how a run ended; returns its exit code, 1 if it left no results."""
    code = child.process.returncode
    if code in (signals.EXIT_CODE, -signal.SIGTERM):
        print(f"{title}: was stopped after {child.seconds} s", flush=True)
        return signals.EXIT_CODE
    if code == 0:
        try:
            print(f"{title}: {child.run.result()}, {child.seconds} s", flush=True)
            return 0
        except ResultsError as error:
            print(f"{title}: failed: {error}", flush=True)
            return 1
    print(f"{title}: failed with exit code {code} after {child.seconds} s; {child.log} ends with")
    print(last_lines(child.log), flush=True)
    return 1
