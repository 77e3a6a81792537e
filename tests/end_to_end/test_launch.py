"""Every way to start a run, as commands of their own."""

import shutil
import sys
from pathlib import Path

import pytest

import main
from helpers.commands import command, end, start
from helpers.process_groups import by_slurm, free_port
from helpers.process_runs import assert_equal_runs, results, shape

ROOT = Path(main.__file__).resolve().parent

#: torch.distributed.launch and torchrun, without their number of processes.
LAUNCH = ["-m", "torch.distributed.launch", "--use_env"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]


def launch(launcher, count, *flags):
    if launcher is LAUNCH:
        launcher = [*LAUNCH, f"--master_port={free_port()}"]
    program = [f"--nproc_per_node={count}", ROOT / "main.py"]
    return command(sys.executable, *launcher, *program, *flags)


@pytest.mark.slow
def test_two_processes_of_a_launcher_equal_one(alone, pictures, tmp_path):
    """Trained by one launcher, evaluated by the other."""
    done = launch(LAUNCH, 2, *shape(6, 3, pictures, tmp_path))
    assert done.returncode == 0, done.stderr
    assert_equal_runs(tmp_path, alone(12, 3))
    assert done.stdout.count("[Average accuracy till task2]") == 1  # one process speaks
    done = launch(TORCHRUN, 2, "--eval", "--output_dir", tmp_path, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Reproduces the stored accuracies") == 4


@pytest.mark.slow
def test_failing_process_ends_the_launcher(pictures, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    broken = data / "train" / "a" / "0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    done = launch(TORCHRUN, 2, *shape(3, 3, data, tmp_path / "out"))
    assert done.returncode != 0
    assert f"{broken}: " in done.stdout + done.stderr


@pytest.mark.slow
def test_two_tasks_of_slurm_equal_one(alone, pictures, tmp_path):
    """Started by hand with what srun puts into their environment."""
    environment = by_slurm(2)
    program = [sys.executable, ROOT / "main.py", *shape(6, 3, pictures, tmp_path)]
    tasks = [start(*program, **environment(rank)) for rank in (0, 1)]
    first, second = (end(task) for task in tasks)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "vote group of 3\n" in first.stdout
    assert "Processes: 2 on cpu" in first.stdout
    assert (second.stdout, second.stderr) == ("", "")
    assert_equal_runs(tmp_path, alone(12, 3))


@pytest.mark.slow
def test_rejected_command_line_exits_with_two():
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
