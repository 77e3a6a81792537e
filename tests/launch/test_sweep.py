"""sweep.py: what a sweep consists of, what of it runs, and how it stops and resumes."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import submitit
import yaml

import launch.sweep
import sweep
from cli.configurations import CONFIG_DIR
from cli.parser import UsageError, parse
from cli.paths import ROOT
from helpers.tiny_flags import SWIFT, TINY_ANY, TINY_VIT
from launch import job_array, local_runs, sweep_plan
from reports import draw

#: A base that runs anywhere; its configuration names the data.
BASE = [
    "digits_l2p", *TINY_ANY, "--model-kwargs", *(f"{n}={v}" for n, v in TINY_VIT.items()), *SWIFT,
    "--num_tasks", "2", "--plots", "false",
]  # fmt: skip

#: Stands for main.py: leaves results at once. What else it does depends on --lr.
FAKE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from cli import configurations, parser

settings, _ = parser.parse(sys.argv[1:])
folder = settings.output_folder
lr = settings.optimizer.lr
folder.mkdir(parents=True, exist_ok=True)
with (folder / "starts.txt").open("a") as file:
    print(os.environ.get("CUDA_VISIBLE_DEVICES"), file=file)
config = settings.stored()
(folder / "config.yaml").write_text(configurations.to_yaml(config))
if lr == 13 and not (folder / "stopped").exists():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    helper = subprocess.Popen(["sleep", "600"])
    (folder / "stopped").write_text(str(helper.pid))
    time.sleep(600)
if lr == 16:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / "stopped").write_text(str(os.getpid()))
    time.sleep(600)
if lr == 14:
    print("error: the disk is full")
    sys.exit(1)
if lr == 15:
    sys.exit(0)
matrix = [[90.0, 80.0 + settings.prompts.length], [None, 70.0]]
results = {name: {"accuracy_matrix": matrix} for name in ("batch", "instance")}
run = {"images_per_step": settings.optimizer.batch_size}
results |= {"config": config, "seed": settings.run.seed, "command": settings.command(), "run": run}
(folder / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts something quick in the place of main.py."""
    folder = tmp_path / "program"
    folder.mkdir()
    (folder / "main.py").write_text(FAKE)
    monkeypatch.setattr(local_runs, "ROOT", folder)
    monkeypatch.setattr(local_runs, "_POLL_SECONDS", 0.01)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def call(tmp_path, capsys, no_launcher):
    """Calls sweep.py; gives exit code, standard output and standard error."""

    def run(*argv, to="out"):
        code = sweep.main([*map(str, argv), "--output_dir", str(tmp_path / to)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def plan(*argv, to="/tmp/sweep"):
    options, base = sweep._parse([*map(str, argv), "--output_dir", str(to)])
    return launch.sweep.make_plan(options, base)


def rejection(*argv, to="/tmp/sweep"):
    with pytest.raises(UsageError) as rejected:
        plan(*argv, to=to)
    return rejected.value.problems


def write_sweep(folder, **content):
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def starts(folder):
    """How often each run was started."""
    return {
        str(path.parent.relative_to(folder)): len(path.read_text().splitlines())
        for path in sorted(folder.glob("*/*/starts.txt"))
    }


# What a sweep consists of


def test_grid_combines_all_values():
    found = sweep_plan.make_sweep("x", {}, {"length": [1, 5], "top_k": [2, 4]})
    assert [arm.name for arm in found.arms] == [
        "length=1,top_k=2", "length=1,top_k=4", "length=5,top_k=2", "length=5,top_k=4",
    ]  # fmt: skip
    assert found.arms[2].settings == {"length": 5, "top_k": 2}
    assert (found.against, found.lines) == ("length", "top_k")


def test_arms_with_a_grid_take_each_combination(tmp_path):
    arms = {"plain": {}, "mask": {"diversify": "mask"}}
    found = sweep_plan.load_sweep(str(write_sweep(tmp_path, arms=arms, grid={"size": [5, 10]})))
    assert [arm.name for arm in found.arms] == [
        "plain,size=5", "plain,size=10", "mask,size=5", "mask,size=10",
    ]  # fmt: skip
    assert found.arms[3].settings == {"diversify": "mask", "size": 10}
    assert (found.against, found.lines) == (None, None)


def test_single_value_is_on_no_axis():
    found = sweep_plan.make_sweep("x", {}, {"length": [1], "top_k": [2, 4]})
    assert (found.against, found.lines) == ("top_k", None)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"lr": 0.1}, "lr=0.1"),
        ({"prompt_key": False}, "prompt_key=false"),
        ({"clip_grad": None}, "clip_grad=none"),
        ({"scale": [0.05, 1.0]}, "scale=0.05_1.0"),
        ({"pretrained": "../a b/x.npz"}, "pretrained=.._a_b_x.npz"),
        ({"freeze": []}, "freeze=none"),
        ({"model_kwargs": {"depth": 2, "num_heads": 2}}, "model_kwargs=depth_2_num_heads_2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_reach_the_command_line_and_a_folder_name(settings, name):
    (arm,) = sweep_plan.make_sweep("x", {}, {key: [value] for key, value in settings.items()}).arms
    assert arm.name == name
    found, problems = parse(arm.flags())
    assert problems == []
    assert found.stored().items() >= settings.items()


def test_words_of_the_command_line_find_their_place():
    options, base = sweep._parse(
        ["--seeds", "1", "2", "digits_l2p", "--grid", "length=1,5", "top-k=2", "mine.yaml",
         "--epochs", "3", "--scale", "0.5", "1"]
    )  # fmt: skip
    assert options.seeds == [1, 2]
    assert options.grid == ["length=1,5", "top-k=2"]
    assert base == ["digits_l2p", "mine.yaml", "--epochs", "3", "--scale", "0.5", "1"]
    assert sweep_plan.parse_grid(options.grid) == {"length": ["1", "5"], "top_k": ["2"]}


@pytest.mark.parametrize("path", sorted(sweep_plan.SWEEP_DIR.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_sweep_can_be_read_and_shows_its_command(path):
    found = sweep_plan.load_sweep(path.stem)
    assert len(found.arms) > 1
    text = path.read_text()
    assert "Wang et al., CVPR 2022" in text
    assert f"#   python sweep.py {path.stem} " in text
    assert f"  {path.stem} " in sweep_plan.list_sweeps()


def test_table_5_has_the_settings_of_the_configurations():
    arms = {arm.name: arm.settings for arm in sweep_plan.load_sweep("table5").arms}
    assert list(arms) == [
        "single_prompt", "no_key_value_pair", "not_diversified", "full",
    ]  # fmt: skip
    single = (CONFIG_DIR / "single_prompt.yaml").read_text()
    assert arms["single_prompt"] == yaml.safe_load(single)
    assert arms["no_key_value_pair"]["prompt_key"] is False
    assert arms["not_diversified"]["diversify"] == "none"
    assert arms["full"] == {}


def test_list_shows_every_sweep(capsys):
    assert sweep.main(["--list"]) == 0
    assert "  table5 " in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--list", "--help"])
def test_answer_about_the_program_needs_no_torch(flag):
    code = (
        "import sys, sweep\n"
        "try: sweep.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'matplotlib', 'timm'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, flag]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


# What is rejected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "there is nothing in it"),
        ({"arms": {"a": {"lenght": 1}}}, "a: --lenght is no option: did you mean --length?"),
        ({"grid": {"length": ["long"]}}, "grid: --length long: 'long' is not a whole number"),
        ({"grid": {"length": 5}}, "grid must be lines of `setting: [value, ...]`"),
        ({"grid": {"length": []}}, "grid must be lines of `setting: [value, ...]`"),
        ({"arms": ["a"]}, "arms must be lines of `name: {setting: value}`"),
        ({"grid": {"seed": [1, 2]}}, "grid: seed cannot be swept over, give --seeds"),
        ({"arms": {"a": {"output-dir": "x"}}}, "a: output-dir cannot be swept over"),
        ({"grid": {"length": [1, 1]}}, "there are two arms length=1"),
        ({"arms": {"../a": {}}}, "'../a' cannot be the name of an arm"),
        ({"arms": {"jobs": {}}}, "'jobs' cannot be the name of an arm"),
        ({"arm": {"a": {}}}, "arm is no part of a sweep"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sweep_that_makes_no_sense_is_rejected(tmp_path, content, message):
    with pytest.raises(UsageError) as rejected:
        sweep_plan.load_sweep(str(write_sweep(tmp_path, **content)))
    (problem,) = rejected.value.problems
    assert message in problem


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["table4", *BASE], "'table4' is no sweep: did you mean table5?"),
        ([], "SWEEP is missing"),
        (["figure4_pool", *BASE, "--seed", 1], "--seed: sweep.py gives it to each run"),
        (["figure4_pool", *BASE, "--eval"], "--eval: sweep.py gives it to each run"),
        (["figure4_pool", *BASE, "--bogus"], "--bogus is no option"),
        (["figure4_pool", *BASE, "--seeds", 1, 1], "--seeds names 1 twice"),
        (["figure4_pool", *BASE, "--seeds", 2**32], "--seeds 4294967296: must be in"),
        (["figure4_pool", *BASE, "--jobs", 0], "--jobs 0: must be at least 1"),
        (["figure4_pool", *BASE, "--nodes", 2], "--nodes is for jobs: give --submitit, too"),
        (["figure4_pool", *BASE, "--wait"], "--wait is for jobs: give --submitit, too"),
        (["figure4_pool", *BASE, "--submitit", "--jobs", 2], "--jobs is for runs of this machine"),
        (["figure4_pool", *BASE, "--submitit", "--timeout", 0], "--timeout 0: must be at least 1"),
        (
            ["figure4_pool", *BASE, "--submitit", "--cluster", "local", "--max_parallel", 2],
            "--max_parallel: --cluster local starts all jobs at once",
        ),
        (["--grid", "length=1,", *BASE], "--grid length=1,: a value is missing"),
        (["--grid", "length=1", "length=2", *BASE], "--grid names length twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_command_line_that_makes_no_sense_is_rejected(no_launcher, argv, message):
    (problem,) = rejection(*argv)
    assert problem.startswith(message)


def test_rejection_reports_all_and_leaves_no_trace(call, tmp_path):
    code, _, error = call("figure4_pool", *BASE, "--bogus", "--jobs", 0, "--seed", 4)
    assert code == 2
    assert error.startswith("sweep.py: this command line cannot run:\n  - ")
    assert error.count("\n  - ") == 3
    assert not (tmp_path / "out").exists()


def test_every_impossible_arm_is_reported_at_once(tmp_path, no_launcher):
    arms = {"large": {"top_k": 11}, "none": {"length": 0}, "good": {}}
    path = write_sweep(tmp_path, arms=arms)
    assert rejection(path, *BASE) == [
        "large: --top_k 11 exceeds --size 10: lower --top_k or enlarge the pool",
        "none: --length 0: must be at least 1",
    ]
    first, *others = rejection(path, *BASE, "--epochs", 0)
    assert first == "--epochs 0: must be at least 1"  # of all of them
    assert len(others) == 2


def test_impossible_combinations_of_a_grid_are_left_out(no_launcher):
    found = plan("--grid", "size=5,20", "top_k=2,10", *BASE)
    assert [run.arm for run in found.runs] == [
        "size=5,top_k=2", "size=20,top_k=2", "size=20,top_k=10",
    ]  # fmt: skip
    (reason,) = found.left_out["size=5,top_k=10"]
    assert reason.startswith("--top_k 10 exceeds --size 5")
    assert len(rejection("--grid", "size=3,5", "top_k=10,20", *BASE)) == 4  # none is possible


def test_arms_that_come_to_the_same_are_rejected(no_launcher):
    hint, problem = rejection("table5", *BASE)
    assert problem.startswith("not_diversified and full are the same here")
    assert hint.startswith("table5 needs a base with diversified selection")
    assert len(plan("table5", *BASE, "--diversify", "frequency").runs) == 4
    (problem,) = rejection("--grid", "num_workers=0,1", *BASE)  # what is computed is the same
    assert problem.startswith("num_workers=0 and num_workers=1 are the same here")


# What runs


def test_run_is_main_with_flags_of_its_arm(tmp_path, no_launcher):
    run = plan("--grid", "length=1,5", "diversify=frequency", *BASE, "--seeds", 3, 4).runs[2]
    assert (run.arm, run.seed) == ("length=5,diversify=frequency", 3)
    assert run.folder == Path("/tmp/sweep/length=5,diversify=frequency/seed3")
    assert list(run.argv) == [
        *BASE, "--length", "5", "--diversify", "frequency", "--seed", "3",
        "--output_dir", str(run.folder), "--resume", "auto",
    ]  # fmt: skip
    assert (run.config["length"], run.config["seed"]) == (5, 3)


def test_dry_run_shows_what_would_run(fake, call, tmp_path):
    flags = ["--grid", "length=1,2", *BASE]
    code, text, _ = call(*flags, "--dry_run")
    assert code == 0
    assert "--grid: 2 runs, 0 done, 2 to run\n" in text
    assert f"  to run     python main.py {BASE[0]} " in text
    assert not (tmp_path / "out").exists()
    assert call("--grid", "length=1", *BASE)[0] == 0
    assert "  done       python main.py " in call(*flags, "--dry_run")[1]


def test_runs_are_reported_and_summed_up(fake, call, tmp_path):
    code, text, error = call("--grid", "length=1,2", *BASE, "--seeds", 1, 2)
    assert (code, error) == (0, "")
    lines = [line for line in text.splitlines() if line.startswith("[")]
    assert lines[0] == "[1/4] length=1/seed1: starts"
    assert re.fullmatch(
        r"\[1/4\] length=1/seed1: accuracy 75.50, forgetting 9.00 \(instance-wise\), \d s", lines[1]
    )
    assert len(lines) == 8
    assert "75.50" in text.partition("\n\n")[2]  # the table
    assert f"python summarize.py {tmp_path / 'out'} --format csv" in text
    assert (tmp_path / "out" / "logs" / "length=2-seed1.txt").read_text() == ""


def test_figure_shows_the_axes_of_the_sweep(fake, call, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(draw, "draw_comparison", lambda *words: drawn.append(words))
    path = write_sweep(tmp_path, grid={"length": [1, 2], "top_k": [2, 3]}, against="top_k")
    _, text, _ = call(path, *BASE, "--plots", "true")
    (groups, folder, against, lines), *_ = drawn
    assert [group.label for group in groups] == [
        f"length={length},top_k={k}" for length in (1, 2) for k in (2, 3)
    ]
    assert (folder, against, lines) == (tmp_path / "out" / "comparison", "top_k", "length")
    assert f"Drawn in {folder}\n" in text


def test_figure_leaves_out_a_setting_of_which_one_value_is_possible(fake, call, tmp_path):
    code, text, _ = call("--grid", "length=1,2", "top_k=2,40", *BASE, "--plots", "true")
    assert code == 0
    assert "left out: length=1,top_k=40  length=2,top_k=40" in text
    assert f"Drawn in {tmp_path / 'out' / 'comparison'}\n" in text
    assert (tmp_path / "out" / "comparison" / "accuracy_against.png").exists()


def test_finished_run_of_another_number_of_tasks_is_rejected(fake, call):
    assert call("--grid", "length=1,2", *BASE)[0] == 0
    code, _, error = call("--grid", "length=1,2", *BASE, "--num_tasks", "none")
    assert code == 2
    assert "--num_tasks 2 in place of none" in error


def test_finished_runs_are_not_run_again(fake, call, tmp_path):
    assert call("--grid", "length=1,2", *BASE)[0] == 0
    (tmp_path / "out" / "length=2" / "seed42" / "results.json").unlink()
    code, text, _ = call("--grid", "length=1,2,4", *BASE)
    assert code == 0
    assert "3 runs, 1 done, 2 to run\n" in text
    assert starts(tmp_path / "out") == {
        "length=1/seed42": 1, "length=2/seed42": 2, "length=4/seed42": 1,
    }  # fmt: skip
    _, text, _ = call("--grid", "length=1,2,4", *BASE)
    assert "starts" not in text
    assert "84.00" not in text.partition("\n\n")[0]
    assert "77.00" in text  # of length 4


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--epochs", 2], "--epochs 1 in place of 2"),
        (["--prompt_key", "false"], "--prompt_key true in place of false"),
        (["--vote_group_size", 4], "--vote_group_size 8 in place of 4"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("finished", [True, False])
def test_folder_of_another_run_is_rejected(fake, call, tmp_path, flags, difference, finished):
    assert call("--grid", "length=1", *BASE)[0] == 0
    folder = tmp_path / "out" / "length=1" / "seed42"
    if not finished:
        (folder / "results.json").unlink()
    code, _, error = call("--grid", "length=1,2", *BASE, *flags)
    assert code == 2
    assert f"{folder} holds a run with other settings: {difference}; give another" in error
    assert starts(tmp_path / "out") == {"length=1/seed42": 1}


def test_other_place_or_speed_is_the_same_run(fake, call, tmp_path):
    assert call("--grid", "length=1", *BASE)[0] == 0
    flags = ["--data-path", tmp_path, "--num_workers", 1, "--print_freq", 3]
    assert "1 run, 1 done" in call("--grid", "length=1", *BASE, *flags)[1]


def test_run_of_other_processes_is_rejected(fake, call, no_cuda):
    assert call("--grid", "length=1", *BASE)[0] == 0
    jobs = ["--submitit", "--cluster", "local", "--tasks_per_node", 2, "--gpus_per_node", 0]
    code, _, error = call("--grid", "length=1", *BASE, *jobs)
    assert code == 2
    assert "8 images a step of all processes in place of 16" in error


def test_failed_run_is_reported_and_the_others_continue(fake, call, tmp_path):
    code, text, _ = call("--grid", "lr=14,15,1", *BASE)
    assert code == 1
    log = tmp_path / "out" / "logs" / "lr=14-seed42.txt"
    assert re.search(
        rf"lr=14/seed42: failed with exit code 1 after \d s; {re.escape(str(log))} ends with\n"
        "    error: the disk is full\n",
        text,
    )
    assert "lr=15/seed42: failed: " in text
    assert "lr=1/seed42: accuracy" in text
    assert "2 of 3 runs are not finished." in text


@pytest.mark.parametrize(
    ("codes", "code"), [([0, 0], 0), ([0, 1], 1), ([0, 75], 75), ([75, 1, 0], 1)]
)
def test_exit_code_shows_the_worst_end(codes, code):
    assert local_runs._worst(codes) == code


def test_processes_beside_each_other_get_a_gpu_each(fake, call, tmp_path, monkeypatch):
    monkeypatch.setattr(local_runs, "_gpus", lambda: ["3", "GPU-x"])
    grid = ["--grid", "length=1,2,3,4,5", *BASE, "--device", "auto", "--plots", "false"]
    assert call(*grid, "--jobs", 3)[0] == 0
    used = [path.read_text().strip() for path in (tmp_path / "out").glob("*/*/starts.txt")]
    assert set(used) == {"3", "GPU-x"}
    runs = plan(*grid, to=tmp_path / "new").runs
    found = [e["CUDA_VISIBLE_DEVICES"] for e in local_runs._environments(runs, 3)]
    assert found == ["3", "GPU-x", "3"]
    assert all("OMP_NUM_THREADS" not in e for e in local_runs._environments(runs, 1))


def test_explicit_device_is_left_alone(monkeypatch, no_launcher):
    monkeypatch.setattr(local_runs, "_gpus", lambda: ["3", "4"])
    runs = plan("--grid", "length=1", *BASE).runs  # on the CPU
    assert list(local_runs._environments(runs, 1)) == [{}]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 75)]
)
def test_stopped_sweep_ends_its_runs_and_resumes(fake, call, tmp_path, number, code):
    flags = ["--grid", "length=1,2,3", *BASE, "--lr", 13, "--jobs", 2]
    marks = [tmp_path / "out" / f"length={n}" / "seed42" / "stopped" for n in (1, 2)]
    thread = threading.Thread(target=signal_when, args=(marks, number))
    thread.start()
    found, text, _ = call(*flags)
    thread.join()
    assert found == code
    assert f"{number.name}: 2 runs asked to save and to stop" in text
    assert text.count("/seed42: was stopped after ") == 2
    assert "Call the same command again to resume." in text
    assert not (tmp_path / "out" / "length=3").exists()
    for mark in marks:
        assert is_gone(int(mark.read_text()))
    (tmp_path / "out" / "length=3" / "seed42").mkdir(parents=True)
    (tmp_path / "out" / "length=3" / "seed42" / "stopped").touch()
    assert call(*flags)[0] == 0
    assert starts(tmp_path / "out")["length=1/seed42"] == 2


def test_second_interrupt_ends_runs_at_once(fake, call, tmp_path):
    mark = tmp_path / "out" / "length=1" / "seed42" / "stopped"
    thread = threading.Thread(target=signal_when, args=([mark], signal.SIGINT, 2))
    thread.start()
    code, text, _ = call("--grid", "length=1", *BASE, "--lr", 16)
    thread.join()
    assert code == 130
    assert "1 run asked to save and to stop (Ctrl-C again ends them at once)" in text
    assert is_gone(int(mark.read_text()))


def signal_when(marks, number, times=1):
    """Signals this process when all files are there, with something in them."""
    end = time.monotonic() + 30
    while not all(mark.exists() and mark.read_text() for mark in marks):
        if time.monotonic() > end:
            break
        time.sleep(0.01)
    for _ in range(times):
        os.kill(os.getpid(), number)
        time.sleep(0.2)


def is_gone(pid):
    """Whether a process has ended, or is about to be noticed as ended."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        try:
            if Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def test_second_sweep_in_a_folder_is_rejected(fake, call, tmp_path):
    with launch.sweep._locked(tmp_path / "out"):
        code, _, error = call("--grid", "length=1", *BASE)
    assert code == 2
    assert "another sweep.py is at work there" in error
    assert call("--grid", "length=1", *BASE)[0] == 0


def test_run_whose_sweep_was_killed_keeps_the_folder(fake, call, tmp_path):
    (run,) = plan("--grid", "length=1", *BASE, "--lr", 16, to=tmp_path / "out").runs
    with launch.sweep._locked(tmp_path / "out") as lock:
        child = local_runs.Child(run, tmp_path / "log.txt", {}, lock)
    try:
        assert "another sweep.py is at work there" in call("--grid", "length=1", *BASE)[2]
    finally:
        child.kill()
    assert call("--grid", "length=1", *BASE)[0] == 0


# Jobs


@pytest.fixture
def slurm(fake, tmp_path, monkeypatch, no_launcher):
    """Pretends that there is Slurm; what its commands say can be set."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def say(name, *lines, code=0):
        text = "".join(f"echo '{line}'\n" for line in lines)
        (folder / name).write_text(f"#!/bin/sh\n{text}exit {code}\n")
        (folder / name).chmod(0o755)

    say("srun")
    say("sbatch", "Submitted batch job 4711")
    say("sacct", "JobID|State|NodeList", "4711_[0-3]|PENDING|None")
    say("squeue", code=1)
    watcher = submitit.SlurmJob.watcher
    yield SimpleNamespace(say=say, forget=watcher.clear)
    watcher.clear()
    watcher._registered.clear()


def load_trainer(path):
    """Arguments and folder of a submitted trainer, read where the program is not found."""
    code = (
        "import json, sys\n"
        "from submitit.core.utils import DelayedSubmission\n"
        "trainer = DelayedSubmission.load(sys.argv[1]).function\n"
        "print(json.dumps([trainer.argv, trainer.output_dir]))"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code, path]
    done = subprocess.run(command, cwd=path.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_is_left_is_submitted_as_one_array(slurm, call, tmp_path):
    call("--grid", "length=1", *BASE)
    flags = ["--submitit", "--max_parallel", 2, "--partition", "long", "--timeout", 7]
    code, text, error = call("--grid", "length=1,2,3", *BASE, "--seeds", 42, 43, *flags)
    assert (code, error) == (0, "")
    jobs = tmp_path / "out" / "jobs"
    script = (jobs / "4711" / "4711_submission.sh").read_text()
    for wish in ("array=0-4%2", "partition=long", "time=7", "job-name=l2p"):
        assert f"#SBATCH --{wish}\n" in script
    argv, output_dir = load_trainer(jobs / "4711_1" / "4711_1_submitted.pkl")
    assert argv[-2:] == ["--resume", "auto"]
    assert output_dir == str(tmp_path / "out" / "length=2" / "seed42")
    assert "Submitted 5 runs:" in text
    assert f"length=2/seed42  job 4711_1  {jobs}/4711_1/4711_1_0_log.out" in text
    assert "scancel 4711" in text


def test_jobs_on_their_way_are_not_submitted_again(slurm, call):
    flags = ["--grid", "length=1,2", *BASE, "--submitit"]
    assert "Submitted 2 runs" in call(*flags)[1]
    slurm.say("sbatch", "Submitted batch job 4712")
    code, text, _ = call(*flags)
    assert code == 0
    assert "2 runs, 0 done, 2 queued or running as jobs, 0 to run\n" in text
    assert "Submitted" not in text
    assert "starts" not in call("--grid", "length=1,2", *BASE)[1]  # nor run here
    assert "  job 4711_0 python main.py" in call(*flags, "--dry_run")[1]
    slurm.forget()
    slurm.say("sacct", "JobID|State|NodeList", "4711_0|FAILED|n1", "4711_1|RUNNING|n1")
    text = call(*flags)[1]
    assert "1 queued or running as jobs, 1 to run\n" in text
    assert "length=1/seed42  job 4712 " in text


@pytest.mark.parametrize(
    ("queue", "code", "live"),
    [("4711_0 long l2p", 0, 2), (None, 0, 0), ("slurm_load_jobs error", 1, 2)],
    ids=["queued", "gone", "unknown"],
)
def test_without_accounting_the_queue_decides(slurm, call, queue, code, live):
    flags = ["--grid", "length=1,2", *BASE, "--submitit", "--dry_run"]
    call(*flags[:-1])
    slurm.say("sacct", "JobID|State|NodeList")
    slurm.say("squeue", *filter(None, [queue]), code=code)
    counts = f"{live} queued or running" if live else "0 done, 2 to run"
    assert counts in call(*flags)[1]


def test_failing_sbatch_is_reported(slurm, call):
    slurm.say("sbatch", code=1)
    code, _, error = call("--grid", "length=1,2", *BASE, "--submitit")
    assert code == 1
    assert error.startswith("error: ")


# The real thing


@pytest.mark.slow
def test_stopped_sweep_ends_as_if_never_stopped(tmp_path, no_launcher):
    flags = ["--grid", "length=1,2", *BASE, "--epochs", "2", "--jobs", "2"]

    def start(to):
        command = [sys.executable, ROOT / "sweep.py", *flags, "--output_dir", tmp_path / to]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    process = start("stopped")
    logs = [tmp_path / "stopped" / "logs" / f"length={n}-seed42.txt" for n in (1, 2)]
    end = time.monotonic() + 120
    while not all(log.exists() and "Train: " in log.read_text() for log in logs):
        assert time.monotonic() < end
        time.sleep(0.02)
    process.terminate()
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 75, text
    assert "was stopped" in text
    assert start("stopped").wait(timeout=300) == 0
    assert "Resuming from " in logs[0].read_text()
    assert start("whole").wait(timeout=300) == 0
    for name in ("length=1", "length=2"):
        one, other = (
            json.loads((tmp_path / to / name / "seed42" / "results.json").read_text())
            for to in ("stopped", "whole")
        )
        assert one["instance"] == other["instance"]
        assert one["training_curve"] == other["training_curve"]


@pytest.mark.slow
def test_local_jobs_finish_a_sweep(call, tmp_path, monkeypatch):
    monkeypatch.setattr(job_array, "_POLL_SECONDS", 0.1)
    monkeypatch.chdir(tmp_path)  # where jobs do not find the program
    flags = ["--grid", "length=1,2", *BASE, "--submitit", "--cluster", "local"]
    code, text, error = call(*flags, "--gpus_per_node", 0, "--wait")
    assert (code, error) == (0, ""), text
    assert "Submitted 2 runs:" in text
    assert re.search(r"^length=2/seed42: accuracy \d", text, re.MULTILINE)
    assert "squeue" not in text
    code, text, _ = call(*flags, "--gpus_per_node", 0)
    assert code == 0
    assert "2 runs, 2 done, 0 to run" in text
    assert "Mean" in text


@pytest.mark.slow
def test_local_jobs_are_seen_by_later_commands_and_their_failure_is_reported(
    call, tmp_path, monkeypatch
):
    monkeypatch.setattr(job_array, "_POLL_SECONDS", 0.1)
    flags = ["--grid", "length=1,2", *BASE, "--device", "cuda", "--submitit", "--cluster", "local"]
    assert call(*flags, "--gpus_per_node", 0)[0] == 0
    code, text, _ = call(*flags, "--gpus_per_node", 0, "--wait")
    assert "2 queued or running as jobs, 0 to run" in text
    assert code == 1
    assert "ended without finishing the run" in text
