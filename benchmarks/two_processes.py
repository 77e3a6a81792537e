"""The speed-up of two processes on two cores over one process on one core.

    python benchmarks/two_processes.py [--repetitions N] [CONFIG ...] [--flags of main.py]

Both run main.py with the same 16 images a step and one thread a process, in turns. Seconds are
those of training and evaluation in results.json (without start-up).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: A ViT-Ti/16 on digits of 160 pixels: as in real runs, nearly all time is spent in the model.
WORKLOAD = [
    "--dataset", "digits", "--num_tasks", "2", "--classes_per_task", "1", "--epochs", "1",
    "--model", "vit_tiny_patch16_224", "--pretrained", "false", "--input-size", "160",
]  # fmt: skip
SHAPE = ["--device", "cpu", "--num_workers", "0", "--vote_group_size", "8", "--lr_scale", "none"]


def seconds(processes: int, flags: list[str]) -> float:
    """Seconds of training and evaluation in one run."""
    cores = sorted(os.sched_getaffinity(0))[:processes]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                sys.executable, *(launcher if processes > 1 else []), ROOT / "main.py", *flags,
                *SHAPE, "--batch-size", str(16 // processes), "--output_dir", folder,
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
            check=True,
        )  # fmt: skip
        timing = json.loads((Path(folder) / "results.json").read_text())["timing"]
    return sum(task["train_seconds"] + task["eval_seconds"] for task in timing)


def compare(repetitions: int, flags: list[str]) -> None:
    """Prints the medians of both and their ratio."""
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repetitions):
        for processes in times:
            times[processes].append(seconds(processes, flags))
            print(f"{processes} process(es): {times[processes][-1]:.2f} s", flush=True)
    one, two = (statistics.median(times[processes]) for processes in (1, 2))
    print(f"medians {one:.2f} s and {two:.2f} s: two processes are {one / two:.2f} times as fast")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments, rest = parser.parse_known_args()
    compare(arguments.repetitions, rest or WORKLOAD)
