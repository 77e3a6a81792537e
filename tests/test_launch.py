"""Every way to start a run, as commands of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoints
import main
from test_main import TINY

ROOT = Path(main.__file__).resolve().parent


def command(*words, **environment):
    """Runs a command from another folder and returns it, with its output."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "L2P_SKIP_INSTALL": "1", **environment}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return subprocess.run(
        [str(word) for word in words], cwd=ROOT.parent, env=env, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip


def launch(processes, *flags):
    launcher = ["torch.distributed.launch", f"--nproc_per_node={processes}", "--use_env"]
    return command(
        sys.executable, "-m", *launcher, f"--master_port={29500 + os.getpid() % 1000}",
        ROOT / "main.py", *flags,
    )  # fmt: skip


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_two_processes_equal_one(image_folder, tmp_path):
    flags = [*TINY, "--dataset", "ImageFolder", "--data-path", str(image_folder)]
    flags += ["--vote_group_size", "3", "--lr_scale", "none", "--lr", "0.02"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert main.main([*flags, "--batch-size", "6", "--output_dir", str(alone)]) == 0
    done = launch(2, *flags, "--batch-size", "3", "--output_dir", together)
    assert done.returncode == 0, done.stderr

    for name in ("batch", "instance"):
        one, two = (results(folder)[name]["accuracy_matrix"] for folder in (alone, together))
        assert one == two
    assert results(alone)["prompt_usage"] != []
    for entry_one, entry_two in zip(
        results(alone)["prompt_usage"], results(together)["prompt_usage"], strict=True
    ):
        assert entry_one["batch"] == entry_two["batch"]
        assert entry_one["instance"] == entry_two["instance"]
    one, two = (checkpoints.load(checkpoints.task_path(f, 2)).model for f in (alone, together))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-4, rtol=1e-4)
    losses = [
        [json.loads(x)["train_Loss"] for x in (f / "log_stats.txt").read_text().splitlines()]
        for f in (alone, together)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert done.stdout.count("[Average accuracy till task2]") == 1  # one process speaks


def test_launcher_with_one_process_trains_and_evaluates(image_folder, tmp_path):
    flags = [*TINY, "--dataset", "ImageFolder", "--data-path", image_folder]
    done = launch(1, *flags, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    done = launch(1, *flags, "--output_dir", tmp_path, "--eval")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Reproduces the stored accuracies") == 4


def test_refused_command_line_exits_with_two():
    done = command(sys.executable, ROOT / "main.py", "--top_k", "12", "--data-path", "/nowhere")
    assert done.returncode == 2
    assert "--top_k 12 exceeds --size 10" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_embedded_example_reaches_its_numbers(tmp_path):
    done = command("bash", ROOT / "train.sh", "digits_l2p", "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    instance = results(tmp_path)["instance"]
    assert instance["average_accuracy"] >= 85
    assert instance["forgetting"] <= 12
    assert (tmp_path / "results.png").stat().st_size > 10_000
    assert "average accuracy" in done.stdout
