"""Runs of this machine, one or several at a time, that stop together."""

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

#: Signals that stop a sweep: of people, terminals and schedulers.
_STOP_SIGNALS = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2,
)  # fmt: skip

#: Seconds between two looks at runs.
_LOOK = 0.1

#: Lines of a failed run's output that are shown.
_LAST_LINES = 10


def run_here(runs: Sequence[Run], num_jobs: int | None, logs: Path, lock: int) -> int:
    """Runs on this machine, and tells how each ends.

    Args:
        runs: The runs.
        num_jobs: How many run at a time; None: one.
        logs: Folder of their output.
        lock: Descriptor that locks the folder of the sweep.

    Returns:
        0, 1 if a run failed, 130 after Ctrl-C, or 75 after another signal.
    """
    waiting = deque(enumerate(runs, start=1))
    slots = list(_environments(runs, num_jobs or 1))
    active: dict[int, tuple[str, Child]] = {}
    codes = []
    with _stop_signals() as came:
        try:
            told = False
            while active or (waiting and not came):
                for slot, environment in enumerate(slots):
                    if slot not in active and waiting and not came:
                        number, run = waiting.popleft()
                        title = f"[{number}/{len(runs)}] {run.name}"
                        print(f"{title}: starts", flush=True)
                        log = logs / f"{run.arm}-seed{run.seed}.txt"
                        active[slot] = title, Child(run, log, environment, lock)
                for slot, (title, child) in list(active.items()):
                    if child.has_ended():
                        del active[slot]
                        codes.append(_tell_end(title, child))
                if came and active:
                    told = told or _tell_stop(came[0], [child for _, child in active.values()])
                    if came.count(signal.SIGINT) > 1:
                        break
                time.sleep(_LOOK)
        finally:
            for _, child in active.values():
                child.kill()
    if came:
        print("Call the same command again to go on.", flush=True)
        return 130 if came[0] == signal.SIGINT else signals.EXIT_CODE
    return _worst(codes)


def last_lines(path: Path) -> str:
    """The end of a log, indented."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-_LAST_LINES:])


class Child:
    """A run in a process of its own, with a session of its own.

    Args:
        run: The run.
        log: Where its output goes.
        environment: Variables that it gets beside those of this process.
        lock: Descriptor that it holds as long as it runs, even if this process is killed.
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
        """How long it has run."""
        return round(time.monotonic() - self.started)

    def has_ended(self) -> bool:
        """Whether it has; nothing that it has started is left then."""
        if self.process.poll() is None:
            return False
        self.kill()
        return True

    def stop(self) -> None:
        """Asks it to save its state and to leave."""
        self.process.terminate()

    def kill(self) -> None:
        """Ends it and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _worst(codes: list[int]) -> int:
    """One exit code for those of several runs."""
    if set(codes) <= {0}:
        return 0
    return signals.EXIT_CODE if set(codes) <= {0, signals.EXIT_CODE} else 1


def _environments(runs: Sequence[Run], num_jobs: int) -> Iterator[dict[str, str]]:
    """What processes that run beside each other get: a GPU each, and their share of the cores."""
    from experiment import build

    gpus = _gpus() if any(run.config["device"] in ("auto", "cuda") for run in runs) else []
    for slot in range(num_jobs):
        environment = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
        if num_jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, build.usable_cores() // num_jobs))
        yield environment


def _gpus() -> list[str]:
    """GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    if not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number in range(torch.cuda.device_count())]
    return visible.split(",")[: torch.cuda.device_count()]


@contextmanager
def _stop_signals() -> Iterator[list[signal.Signals]]:
    """Collects the signals that stop a sweep."""
    came: list[signal.Signals] = []
    earlier = {
        number: signal.signal(number, lambda n, _: came.append(signal.Signals(n)))
        for number in _STOP_SIGNALS
    }
    try:
        yield came
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _tell_stop(number: signal.Signals, children: list[Child]) -> bool:
    hint = " (Ctrl-C again ends them at once)" if number == signal.SIGINT else ""
    print(f"{number.name}: {count_runs(children)} asked to save and to stop{hint}", flush=True)
    for child in children:
        child.stop()
    return True


def _tell_end(title: str, child: Child) -> int:
    """Says how a run ended; returns its exit code, 1 if it left no results."""
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
