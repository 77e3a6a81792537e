"""Runs the runs of a sweep on this machine, one or several at a time; signals stop them all."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cli.paths import ROOT
from cli.terminal import one_line
from experiment.signals import EXIT_CODE, INTERRUPTED, StopSignals, was_stopped
from launch.sweep_plan import Run
from reports import stored_runs
from reports.stored_runs import ResultsError

_POLL_SECONDS = 0.1

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class _Child:
    """A process of main.py, out of reach of the terminal's signals."""

    def __init__(self, run: Run, title: str, environment: dict[str, str], logs: Path) -> None:
        self.run, self.title, self.environment = run, title, environment
        self.log, self.started = logs / f"{run.name.replace('/', '-')}.txt", time.monotonic()
        print(one_line(f"{title}: starts"), flush=True)
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "main.py"), *run.argv],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    def report_end(self) -> int:
        """Prints how it ended; returns 0, 75 if it was stopped, or 1."""
        code, lines = self.process.returncode, []
        if was_stopped(code) or code == -signal.SIGTERM:
            code, end = EXIT_CODE, "was stopped"
        elif code != 0:
            end = f"failed with exit code {code}, {self.log} ends as below"
            code, lines = 1, self.log.read_text("utf-8", errors="replace").splitlines()[-10:]
        else:
            try:
                accuracy = stored_runs.read(self.run.folder).value("instance", "accuracy")
                end = f"accuracy {accuracy:.2f} (instance-wise)"
            except ResultsError as error:
                code, end = 1, f"failed: {error}"
        seconds = round(time.monotonic() - self.started)
        lines = [f"{self.title}: {end}, {seconds} s", *lines]
        print(*map(one_line, lines), sep="\n    ", flush=True)
        return code


def run_here(runs: Sequence[Run], num_jobs: int, logs: Path) -> int:
    """Runs so many at a time on this machine, with their output in `logs`; prints how each ends.

    Returns 0, 1 if a run failed, 130 after Ctrl-C, or 75 after another signal.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting = [(run, f"[{number}/{len(runs)}] {run.name}") for number, run in enumerate(runs, 1)]
    free, active, codes = _environments(runs, num_jobs), list[_Child](), set[int]()
    heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    with StopSignals(heeded) as signals:  # nohup has SIGHUP ignored
        is_asked, received = False, signals.received
        try:
            while active or (waiting and not received):
                while waiting and free and not received:
                    active.append(_Child(*waiting.pop(0), free.pop(0), logs))
                time.sleep(_POLL_SECONDS)
                if received.count(signal.SIGINT) > 1:
                    raise KeyboardInterrupt
                if received and not is_asked:
                    is_asked = True
                    hint = "runs are asked to save and to stop (Ctrl-C again ends them at once)"
                    print(f"{received[0].name}: {hint}", flush=True)
                    for child in active:
                        child.process.terminate()
                for child in [child for child in active if child.process.poll() is not None]:
                    active.remove(child)
                    free.append(child.environment)
                    codes.add(child.report_end())
        finally:
            for child in active:
                child.process.kill()
                child.process.wait()
    if received:
        print("Call the same command again to resume.", flush=True)
        return INTERRUPTED if received[0] == signal.SIGINT else EXIT_CODE
    return next(code for code in (1, EXIT_CODE, 0) if code in codes)  # the worst


def _environments(runs: Sequence[Run], num_jobs: int) -> list[dict[str, str]]:
    """Environment variables for each of the runs at a time: a GPU, and a share of the cores."""
    import torch

    import utils

    gpus: list[dict[str, str]] = [{}]
    cores: dict[str, str] = {}
    if any(run.settings.run.device in ("auto", "cuda") for run in runs):
        count = torch.cuda.device_count()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        gpus = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in visible.split(",")[:count]] or gpus
    if num_jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = {"OMP_NUM_THREADS": str(max(1, utils.usable_cores() // num_jobs))}
    return [gpus[slot % len(gpus)] | cores for slot in range(num_jobs)]
