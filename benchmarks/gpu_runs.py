"""Stages of `gpu_check.py` that run tests and whole command lines, each in a process of its own."""

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_check import ROOT, Check

#: Largest difference of two accuracies that are equal, in percent: two images of the digits. Sums
#: on a GPU have no fixed order, so rounding may change the prediction of an image.
_EQUAL = 3.0
#: Makes a single process use collectives wherever several would, by NCCL on a GPU.
_ALONE = """
import torch, utils
device, utils.store = torch.device({device!r}), torch.distributed.FileStore({file!r}, 1)
utils.init_processes(utils.Processes(device=device))
utils.is_alone = lambda: False
"""
#: Makes processes use gloo, which takes several on one GPU, as NCCL does not.
_GLOO = """
import torch.distributed as dist
init = dist.init_process_group
dist.init_process_group = lambda *, backend, device_id, **kw: init("gloo", **kw)
"""


def run_tests(check: Check) -> None:
    """Passes if the tests marked `gpu` do, golden numbers included, the slow ones left out."""
    signs = re.compile(r'mark\.gpu|"device", DEVICES')
    paths = [
        str(path) for path in Path("tests").rglob("test_*.py") if signs.search(path.read_text())
    ]
    paths.sort(key=lambda path: ("golden" not in path, "gpu" in path))
    options = ["-v", "--tb=short", "--color=no", "-rfE", "-m", "gpu and not slow"]
    options += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    runs = Runs(check)
    tests = runs.start("pytest", [*options, *paths], module="pytest")
    if (code := runs.wait("pytest", check.seconds_left - 8)) is None:
        tests.send_signal(signal.SIGINT)  # then it reports what failed, and where it hung
        runs.wait("pytest")
    text = runs.text("pytest")
    counts = Counter(re.findall(r"^tests/.* (PASSED|FAILED|SKIPPED|ERROR) +\[", text, re.M))
    failed = [line[:300] for line in re.findall(r"^(?:FAILED|ERROR) (.*)", text, re.M)]
    check.note(tests=dict(counts), failed=failed, exit_code=code)
    check.expect(f"{counts['FAILED']} tests failed, pytest ended with {code}", code == 0)


def run_digits(check: Check) -> None:
    """Passes if runs that stop and resume, on the GPU and on the CPU, equal one that does not stop.

    With four workers and pinned memory; they exit with 75 where a signal stops them, else with 0.
    """
    gpu, flags = check.device, [*_digits(check), "--resume", "auto", "--data_on_device", "false"]
    flags += ["--num_workers", "2" if check.tiny else "4", "--pin-mem"]
    whole, cuda, cpu = (check.own / name for name in ("whole", "on-cuda", "and-on-cpu"))
    runs = Runs(check)

    def start(log: str, folder: Path, device: str = gpu) -> None:
        runs.start(log, [*flags, "--device", device, "--output_dir", str(folder)])

    def stop(**numbers: signal.Signals) -> None:
        """Sends each run a signal as soon as it trains."""
        waiting = dict(numbers)
        while waiting and check.seconds_left > 3:
            for log in [*waiting]:
                if "Train: Epoch[" in runs.text(log) or runs.wait(log, 0.01) is not None:
                    runs.children[log].send_signal(waiting.pop(log))
        for log in numbers:
            runs.expect(log, 75)

    start("whole", whole)
    start("stopped", cuda)
    start("stopped_again", cpu)
    stop(stopped=signal.SIGUSR1, stopped_again=signal.SIGTERM)
    start("resumed", cuda)
    start("resumed_on_cpu", cpu, "cpu")
    stop(resumed_on_cpu=signal.SIGUSR1)
    start("resumed_back", cpu)
    for log in ("whole", "resumed", "resumed_back"):
        runs.expect(log, 0)
    runs.start("eval", ["--eval", "--device", gpu, "--output_dir", str(whole)])
    runs.expect("eval", 0)
    runs.compare(whole, whole, "eval_results.json")
    for folder in (cuda, cpu):
        runs.compare(whole, folder)


def run_processes(check: Check) -> None:
    """Passes if runs of NCCL alone, and of two processes on one GPU over gloo, equal a plain run.

    In the last step of the first task, one of the two has no images; also in fp16. NCCL between two
    processes needs two GPUs, and is tried where there are two.
    """
    runs, folder, device = Runs(check), check.own, check.device.partition(":")[0]
    flags = [*_digits(check), "--vote_group_size", "8", "--lr_scale", "none", "--lr", "0.002"]
    flags += ["--device", device]
    precisions = {"fp32": flags} | ({"fp16": [*flags, "--amp", "fp16"]} if check.on_cuda else {})
    groups = [("gloo", name) for name in precisions]
    if check.facts["gpus"] > 1 and check.computes:
        groups.append(("nccl", "fp32"))
    elif check.on_cuda:
        check.note(**{"NCCL between two processes": "not run: needs two GPUs that compute"})
    pairs = []
    for name, argv in precisions.items():
        one = [*argv, "--batch-size", "16", "--output_dir"]
        runs.start(name, [*one, str(folder / name)])
        if check.computes:  # a simulated GPU has no NCCL
            alone, file = folder / f"alone-{name}", str(folder / f"store-{name}")
            first = _ALONE.format(device=check.device, file=file)
            runs.start(alone.name, [*one, str(alone)], first)
            pairs.append((folder / name, alone))
    for backend, name in groups:
        two, first = folder / f"two-by-{backend}-{name}", _GLOO if backend == "gloo" else ""
        argv = [*precisions[name], "--batch-size", "8", "--output_dir", str(two)]
        argv += ["--dist_url", f"file://{folder}/store-{two.name}"]
        for rank in range(2):
            own = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank * (backend == "nccl")}
            runs.start(f"{two.name}-rank{rank}", argv, first, {**own, "GLOO_SOCKET_IFNAME": "lo"})
        pairs.append((folder / name, two))
    for log in runs.children:
        runs.expect(log, 0)
    for pair in pairs:
        runs.compare(*pair)


def run_out_of_memory(check: Check) -> None:
    """Passes if a run whose GPU has too little memory ends with one line and exit code 1."""
    argv = ["--dataset", "digits", "--num_tasks", "2", "--classes_per_task", "2", "--pretrained"]
    argv += ["false", "--model", "vit_base_patch16_224", "--batch-size", "512", "--device", "cuda"]
    argv += ["--num_workers", "0", "--output_dir", str(check.own / "run")]
    runs, share = Runs(check), 2 / check.facts["gpu_memory"]  # GiB
    runs.start("run", argv, f"import torch; torch.cuda.set_per_process_memory_fraction({share})")
    runs.expect("run", 1)
    lines = [line for line in runs.text("run").splitlines() if "error" in line.lower()]
    check.note(lines=lines)
    one = len(lines) == 1 and "out of memory" in lines[0] and "Traceback" not in runs.text("run")
    check.expect("the error is not one line about memory", one)


def _digits(check: Check) -> list[str]:
    """Flags of short runs on the digits, which report every step."""
    return ["digits_l2p", "--no-plots", "--print_freq", "1", "--epochs", "1" if check.tiny else "2"]


class Runs:
    """Runs of main.py or pytest, by the name of their log; all end with the stage."""

    def __init__(self, check: Check) -> None:
        self.check, self.children = check, dict[str, subprocess.Popen[bytes]]()

    def start(
        self, log: str, argv: list[str], first: str = "", environ: Any = None, module: str = "main"
    ) -> subprocess.Popen[bytes]:
        """Starts a run, which executes some code first, with variables of the environment."""
        if not self.check.facts["cudnn_works"]:
            first = f"import torch; torch.backends.cudnn.enabled = False\n{first}"
        code = f"{first}\nimport sys, {module}; sys.exit({module}.main(sys.argv[1:]))"
        env = os.environ | {name: str(value) for name, value in (environ or {}).items()}
        argv = [sys.executable, "-c", code, *argv]
        with (self.check.own / f"{log}.txt").open("wb") as output:
            child = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=output, stderr=output)
        return self.children.setdefault(log, child)

    def text(self, log: str) -> str:
        """The output of a run so far."""
        return (self.check.own / f"{log}.txt").read_text(errors="replace")

    def wait(self, log: str, seconds: float | None = None) -> int | None:
        """The exit code of a run; None after so many seconds, by default those of the stage."""
        try:
            return self.children[log].wait(seconds or max(0.1, self.check.seconds_left - 3))
        except subprocess.TimeoutExpired:
            return None

    def expect(self, log: str, code: int) -> None:
        """Waits until a run ends, and notes its exit code and, if it is another, its last line."""
        found = self.wait(log)
        last = "" if found == code else self.text(log).strip().rpartition("\n")[2][-300:]
        self.check.note(**{f"{log}: exit code": f"{found} {last}".strip()})
        self.check.expect(f"{log}: exit code {found} instead of {code}", found == code)

    def compare(self, folder: Path, other: Path, file: str = "results.json") -> None:
        """Expects equal accuracies of two runs that have ended."""
        what, paths = f"{other.name}, {file}", (folder / "results.json", other / file)
        if not all(path.exists() for path in paths):
            self.check.expect(f"{what}: no results to compare", False)
            return
        matrices = []
        for results in (json.loads(path.read_text()) for path in paths):
            both = [results[way]["accuracy_matrix"] for way in ("batch", "instance")]
            matrices.append(np.array(both, dtype=float))  # NaN where nothing was evaluated
        one, two = matrices
        most = float(np.nanmax(abs(one - two)))
        equal = most <= _EQUAL and np.array_equal(np.isnan(one), np.isnan(two))
        self.check.note(**{f"{what}: largest difference of an accuracy, percent": most})
        self.check.expect(f"{what}: accuracies differ by {most:.2f}", equal)
