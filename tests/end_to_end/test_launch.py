"""Every way to start a run, as commands of their own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import main
from conftest import LAUNCHER
from test_processes import (  # noqa: F401
    alone,
    assert_equal_runs,
    by_slurm,
    free_port,
    pictures,
    shape,
)

ROOT = Path(main.__file__).resolve().parent

#: torch.distributed.launch and torchrun, without their number of processes.
LAUNCH = ["-m", "torch.distributed.launch", "--use_env"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]


def start(*words, **environment):
    """Starts a command from another folder."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLURM_") and name not in LAUNCHER
    }
    env |= {"OMP_NUM_THREADS": "1", "L2P_SKIP_INSTALL": "1", **environment}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return subprocess.Popen(
        [str(word) for word in words], cwd=ROOT.parent, env=env, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def end(process, timeout=300):
    """Waits for a command and returns it, with its output."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def command(*words, **environment):
    """Runs a command from another folder and returns it, with its output."""
    return end(start(*words, **environment))


def launch(launcher, count, *flags):
    if launcher is LAUNCH:
        launcher = [*LAUNCH, f"--master_port={free_port()}"]
    program = [f"--nproc_per_node={count}", ROOT / "main.py"]
    return command(sys.executable, *launcher, *program, *flags)


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_two_processes_of_a_launcher_equal_one(alone, pictures, tmp_path):  # noqa: F811
    done = launch(LAUNCH, 2, *shape(6, 3, pictures, tmp_path))
    assert done.returncode == 0, done.stderr
    assert_equal_runs(tmp_path, alone(12, 3))
    assert done.stdout.count("[Average accuracy till task2]") == 1  # one process speaks


@pytest.mark.slow
def test_two_processes_of_torchrun_evaluate(alone, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    shutil.copytree(alone(12, 3), folder)
    done = launch(TORCHRUN, 2, "--eval", "--output_dir", folder, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Reproduces the stored accuracies") == 4


@pytest.mark.slow
def test_failing_process_ends_the_launcher(pictures, tmp_path):  # noqa: F811
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    broken = data / "train" / "a" / "0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    done = launch(TORCHRUN, 2, *shape(3, 3, data, tmp_path / "out"))
    assert done.returncode != 0
    assert f"{broken}: " in done.stdout + done.stderr


@pytest.mark.slow
def test_two_tasks_of_slurm_equal_one(alone, pictures, tmp_path):  # noqa: F811
    """Started by hand with what srun puts into their environment."""
    environment = by_slurm(2)
    program = [sys.executable, ROOT / "main.py", *shape(6, 3, pictures, tmp_path)]
    tasks = [start(*program, **environment(rank)) for rank in (0, 1)]
    first, second = (end(task) for task in tasks)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "votes of 3\n" in first.stdout
    assert "Processes: 2 on cpu" in first.stdout
    assert (second.stdout, second.stderr) == ("", "")
    assert_equal_runs(tmp_path, alone(12, 3))


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
    assert (tmp_path / "plots" / "overview.png").stat().st_size > 10_000
    assert "average accuracy" in done.stdout
