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

MAIN = Path(__file__).resolve().parents[1] / "main.py"

#: A ViT-Ti/16 on digits of 160 pixels: as in real runs, nearly all time is spent in the model.
WORKLOAD = [
    "--dataset", "digits", "--num_tasks", "2", "--classes_per_task", "1", "--epochs", "1",
    "--model", "vit_tiny_patch16_224", "--pretrained", "false", "--input-size", "160",
]  # fmt: skip
SHAPE = ["--device", "cpu", "--num_workers", "0", "--vote_group_size", "8", "--lr_scale", "none"]


def seconds(processes: int, flags: list[str]) -> float:
    """Seconds of training and evaluation in one run, on a core for each process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    program = [sys.executable, *(torchrun if processes > 1 else []), str(MAIN), *flags, *SHAPE]
    os.sched_setaffinity(0, CORES[:processes])  # which the processes inherit
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [*program, "--batch-size", str(16 // processes), "--output_dir", folder],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        timing = json.loads(Path(folder, "results.json").read_text())["timing"]
    return sum(task["train_seconds"] + task["eval_seconds"] for task in timing)


if __name__ == "__main__":
    CORES = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--repetitions", type=int, default=3)
    options, rest = parser.parse_known_args()
    turns = [[seconds(n, rest or WORKLOAD) for n in (1, 2)] for _ in range(options.repetitions)]
    one, two = map(statistics.median, zip(*turns, strict=True))
    print(f"medians {one:.2f} s and {two:.2f} s: two processes are {one / two:.2f} times as fast")
