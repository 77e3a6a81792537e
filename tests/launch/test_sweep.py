"""sweep.py: what a sweep consists of, what of it runs, and how it stops and resumes."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from submitit.core.utils import DelayedSubmission

import sweep
from cli.configurations import CONFIG_DIR
from cli.parser import UsageError, parse
from cli.paths import ROOT
from helpers.commands import wait_until
from helpers.tiny_flags import SWIFT, TINY_ANY, TINY_VIT
from launch import local_runs, submitit_jobs, sweep_plan
from launch.options import SweepOptions, take
from reports import draw

pytest_plugins = ["helpers.fake_slurm"]

#: A base that runs anywhere; its configuration names the data.
BASE = [
    "digits_l2p", *TINY_ANY, "--model-kwargs", *(f"{n}={v}" for n, v in TINY_VIT.items()), *SWIFT,
    "--num_tasks", "2", "--plots", "false",
]  # fmt: skip
POOL = ["figure4_pool", *BASE]

#: Stands for main.py: leaves results at once. What else it does depends on --lr.
FAKE = """
import json, os, signal, sys, time
from cli import parser

settings, _ = parser.parse(sys.argv[1:])
folder = settings.output_folder
lr = settings.optimizer.lr
folder.mkdir(parents=True, exist_ok=True)
with (folder / "starts.txt").open("a") as file:
    print(os.environ.get("CUDA_VISIBLE_DEVICES"), file=file)
if lr in (13, 16) and not (folder / "stopped").exists():
    signal.signal(signal.SIGTERM, (lambda *_: sys.exit(75)) if lr == 13 else signal.SIG_IGN)
    (folder / "stopped").write_text(f"{os.getpid()}\\n")
    time.sleep(60)
if lr == 14:
    sys.exit("error: the disk is full")
if lr == 15:
    sys.exit(0)
matrix = [[90.0, 80.0 + settings.prompts.length], [None, 70.0]]
results = {name: {"accuracy_matrix": matrix} for name in ("batch", "instance")}
results["run"] = {"images_per_step": settings.optimizer.batch_size}
results |= {"class_order": [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], "class_names": list("0123456789")}
results |= {"config": settings.stored(), "seed": settings.run.seed, "command": settings.command()}
(folder / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture
def call(tmp_path, capsys, monkeypatch, no_launcher):
    """Calls sweep.py with something quick in the place of main.py; gives code, output, errors."""
    folder = tmp_path / "program"
    folder.mkdir()
    (folder / "main.py").write_text(FAKE)
    monkeypatch.setattr(local_runs, "ROOT", folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    handlers = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background

    def run(*argv):
        code = sweep.main([*map(str, argv), "--output_dir", str(tmp_path / "out")])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def planned(*argv):
    return sweep_plan.make_sweep(*take(SweepOptions, [*map(str, argv), "--output_dir", "/tmp/s"]))


def rejection(*argv):
    with pytest.raises(UsageError) as rejected:
        planned(*argv)
    return rejected.value.problems


def write_sweep(folder, **content):
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def starts(folder):
    """How often each run was started."""
    paths = sorted(folder.glob("*/*/starts.txt"))
    return {f"{p.parent.relative_to(folder)}": len(p.read_text().splitlines()) for p in paths}


# What a sweep consists of


GRID = {"length": [1, 5], "top_k": [2, 4]}
ARMS = {"plain": None, "mask": {"diversify": "mask"}}


@pytest.mark.parametrize(
    ("content", "names", "last", "axes"),
    [
        (
            {"grid": GRID},
            ["length=1,top_k=2", "length=1,top_k=4", "length=5,top_k=2", "length=5,top_k=4"],
            {"length": 5, "top_k": 4},
            ["length", "top_k"],
        ),
        (
            {"grid": {"size": [5, 9]}, "arms": ARMS},
            ["plain,size=5", "plain,size=9", "mask,size=5", "mask,size=9"],
            {"diversify": "mask", "size": 9},
            [],
        ),
        (
            {"grid": {"top_k": [2, 4], "length": [5, 1]}, "against": "length"},
            ["top_k=2,length=5", "top_k=2,length=1", "top_k=4,length=5", "top_k=4,length=1"],
            {"top_k": 4, "length": 1},
            ["length", "top_k"],
        ),
    ],
    ids=["grid", "arms with a grid", "axes"],
)
def test_arms_of_a_sweep(content, names, last, axes):
    arms, found_axes = sweep_plan.expand("x", content)
    assert list(arms) == names
    assert list(arms.values())[-1] == last
    assert found_axes == axes


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
    ((setting, value),) = settings.items()
    assert sweep_plan.expand("x", {"grid": {setting: [value]}})[0] == {name: settings}
    parsed, problems = parse(sweep_plan._words(setting, value))
    assert problems == []
    assert parsed.stored().items() >= settings.items()


def test_words_of_the_command_line_find_their_place():
    words = [
        "--seeds", "1", "2", "digits_l2p", "--grid", "length=1,5", "top-k=2", "mine.yaml",
        "--grid=length=7", "--dry-run", "--epochs", "3", "--scale", "0.5", "1",
    ]  # fmt: skip
    options, base, _ = take(SweepOptions, words)
    assert (options.seeds, options.dry_run) == ((1, 2), True)
    assert base == ["digits_l2p", "mine.yaml", "--epochs", "3", "--scale", "0.5", "1"]
    expected = {"grid": {"length": ["1", "5", "7"], "top_k": ["2"]}}
    assert sweep_plan.read_grid(options.grid) == expected


def test_shipped_sweeps_are_listed_and_show_their_command(capsys):
    assert sweep.main(["--list"]) == 0
    listed = capsys.readouterr().out
    for path in sweep_plan.SWEEP_DIR.glob("*.yaml"):
        assert len(sweep_plan.expand("x", sweep_plan.read_file(path.stem))[0]) > 1
        first, *lines = path.read_text().splitlines()
        assert re.search(rf"^  {path.stem} +{first[2:]}$", listed, re.MULTILINE)
        assert any(line.startswith(f"#   python sweep.py {path.stem} ") for line in lines)


def test_list_needs_no_torch():
    code = "import sys, sweep; sweep.main(['--list']); print({'torch', 'timm'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


def test_table_5_has_the_settings_of_the_configurations():
    arms, _ = sweep_plan.expand("table5", sweep_plan.read_file("table5"))
    single, diversified = (
        yaml.safe_load((CONFIG_DIR / f"{name}.yaml").read_text())
        for name in ("single_prompt", "diversified")
    )
    assert arms == {
        "single_prompt": single,
        "no_key_value_pair": {**diversified, "prompt_key": False},
        "not_diversified": {**diversified, "diversify": "none"},
        "full": diversified,
    }


# What is rejected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "must hold arms, lines of `name: {setting: value}`, or grid"),
        ({"grid": {"length": 5}}, "must hold arms"),
        ({"arms": ["a"]}, "must hold arms"),
        ({"arms": {"a": 1}}, "must hold arms"),
        ({"arm": {"a": {}}, "grid": {"length": [1]}}, "must hold arms"),
        (
            {"arms": {"a": {"lenght": 1}, "b": {}}},
            "a: --lenght is no option",
        ),
        ({"grid": {"length": ["long", 1]}}, "length=long: --length long: 'long' is not a whole"),
        ({"arms": {"a": {"output-dir": "x"}}}, "--output_dir: sweep.py sets it"),
        ({"grid": {"length": [1, 1]}}, "two arms have the name and the folder length=1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sweep_that_makes_no_sense_is_rejected(tmp_path, no_launcher, content, message):
    (problem,) = rejection(write_sweep(tmp_path, **content), *BASE)
    assert message in problem


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["table4", *BASE], "'table4' is no sweep: begin with one of --list"),
        ([], "'' is no sweep: begin with one of --list"),
        ([*POOL, "--seed", 1], "--seed: sweep.py sets it"),
        ([*POOL, "--eval"], "--resume and --eval are two commands"),
        ([*POOL, "--bogus"], "--bogus is no option"),
        ([*POOL, "--seeds", 2**32], "--seeds 4294967296: must be in"),
        ([*POOL, "--nodes", 2], "--nodes is for jobs: give --submitit, too"),
        ([*POOL, "--submitit", "--jobs", 2], "--jobs is for runs of this machine"),
        (["--grid", "length=1,", *BASE], "length=none: --length none: 'none' is not"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_command_line_that_makes_no_sense_is_rejected(no_launcher, argv, message):
    (problem,) = rejection(*argv)
    assert problem.startswith(message)


def test_rejection_reports_all_and_leaves_no_trace(call, tmp_path):
    code, _, error = call(*POOL, "--bogus", "--jobs", 0, "--seed", 4)
    assert code == 2
    assert error.startswith("sweep.py: this command line cannot run:\n  - ")
    assert error.count("\n  - ") == 3
    assert not (tmp_path / "out").exists()


def test_impossible_arms_are_left_out_unless_all_are(no_launcher):
    found = planned("--grid", "size=5,20", "top_k=2,10", *BASE)
    arms = ["size=5,top_k=2", "size=20,top_k=2", "size=20,top_k=10"]
    assert [run.name for run in found.runs] == [f"{arm}/seed42" for arm in arms]
    ((reason, names),) = found.left_out.items()
    assert reason == "--top_k 10 exceeds --size 5: lower --top_k or enlarge the pool"
    assert names == ["size=5,top_k=10"]
    assert len(rejection("--grid", "size=3,5", "top_k=10,20", *BASE)) == 4


# What runs


def test_run_is_main_with_flags_of_its_arm(no_launcher):
    grid = ["--grid", "length=1,5", "diversify=frequency"]
    run = planned(*grid, *BASE, "--seeds", 3, 3, 4).runs[2]
    assert run.name == "length=5,diversify=frequency/seed3"
    assert run.folder == Path("/tmp/s/length=5,diversify=frequency/seed3")
    assert run.argv == [
        *BASE, "--length", "5", "--diversify", "frequency", "--seed", "3",
        "--output_dir", str(run.folder), "--resume", "auto",
    ]  # fmt: skip
    assert (run.settings.prompts.length, run.settings.run.seed) == (5, 3)


def test_runs_are_reported_summed_up_and_not_run_again(call, tmp_path):
    flags = ["--grid", "length=1,2", *BASE, "--seeds", 1]
    code, text, _ = call(*flags, "--dry_run")
    assert code == 0
    assert "--grid: 2 runs, 0 done, 2 to run\n" in text
    assert f"\n  python main.py {BASE[0]} " in text
    assert not (tmp_path / "out").exists()
    code, text, error = call(*flags)
    assert (code, error) == (0, "")
    lines = [line for line in text.splitlines() if line.startswith("[")]
    assert lines[0] == "[1/2] length=1/seed1: starts"
    end = r"\[1/2\] length=1/seed1: accuracy 75.50 \(instance-wise\), \d s"
    assert re.fullmatch(end, lines[1])
    assert len(lines) == 4
    assert "75.50" in text.partition("\n\n")[2]  # the table
    assert f"python summarize.py {tmp_path / 'out'} --format csv" in text
    assert (tmp_path / "out" / "logs" / "length=2-seed1.txt").read_text() == ""
    (tmp_path / "out" / "length=2" / "seed1" / "results.json").unlink()
    flags[1] = "length=1,2,4"
    code, text, _ = call(*flags)
    assert code == 0
    assert "3 runs, 1 done, 2 to run\n" in text
    expected = {"length=1/seed1": 1, "length=2/seed1": 2, "length=4/seed1": 1}
    assert starts(tmp_path / "out") == expected
    code, text, _ = call(*flags)
    assert (code, "starts" in text) == (0, False)
    assert "77.00" in text  # of length 4


@pytest.fixture
def folder(call, tmp_path):
    """The folder of a finished run of length 1."""
    assert call("--grid", "length=1", *BASE)[0] == 0
    return tmp_path / "out" / "length=1" / "seed42"


def test_other_settings_are_another_run_but_other_places_are_not(folder, call, tmp_path):
    first = ["--grid", "length=1", *BASE]
    order = tmp_path / "order.txt"
    order.write_text("0 1 2 3 4 5 6 7 8 9")
    same = ["--data-path", tmp_path, "--num_workers", 1, "--print_freq", 3, "--vote_group_size", 8]
    (tmp_path / "glyph.npz").touch()
    for flags, difference in (
        (same, None),
        (["--epochs", 2], "epochs 1 in place of 2"),
        (["--prompt_key", "false"], "prompt_key true in place of false"),
        (["--vote_group_size", 4], "vote_group_size 8 in place of 4"),
        (["--num_tasks", "none"], "num_tasks 2 in place of none"),
        (["--dataset", "CIFAR10", "--data-path", tmp_path], "dataset digits in place of CIFAR10"),
        (["--pretrained", tmp_path / "glyph.npz"], "pretrained False in place of glyph.npz"),
        (["--submitit", "--tasks_per_node", 2], "images_per_step 8 in place of 16"),
    ):
        code, text, error = call(*first, *flags, "--dry_run")
        message = f"{folder} holds a run with other settings: {difference}; give another"
        assert ("1 run, 1 done" in text or "1 runs, 1 done" in text) == (difference is None), error
        assert (code, message in error) == ((0, False) if difference is None else (2, True)), error
    path = folder / "results.json"
    results = json.loads(path.read_text())
    results["config"]["class_order"] = "elsewhere.txt"
    path.write_text(json.dumps(results))
    assert "1 done" in call(*first, "--class_order", order, "--dry_run")[1]
    order.write_text("1 0 2 3 4 5 6 7 8 9")
    code, _, error = call(*first, "--class_order", order, "--dry_run")
    assert code == 2
    assert "class_order 0 1 2 3 4 5 6 7 8 9 in place of 1 0 2 3 4 5 6 7 8 9" in error


def test_results_are_drawn_against_what_the_sweep_varies(folder, call, tmp_path, monkeypatch):
    drawn = []

    def draw_comparison(groups, *words):
        drawn.append(([group.label for group in groups], *words))
        return [], ["accuracy_against: no"]

    monkeypatch.setattr(draw, "draw_comparison", draw_comparison)
    flags = [*BASE, "--plots", "true"]
    path = write_sweep(tmp_path, grid={"length": [1, 2], "top_k": [2, 40]}, against="top_k")
    text = call(path, *flags)[1]
    assert "left out: length=1,top_k=40  length=2,top_k=40" in text
    place = tmp_path / "out" / "comparison"
    assert drawn.pop() == (["length=1,top_k=2", "length=2,top_k=2"], place, "length")
    assert f"accuracy_against: no\nDrawn in {place}\n" in text
    path = write_sweep(tmp_path, grid={"length": [1, 2], "top_k": [2, 3]}, against="top_k")
    call(path, *flags)
    assert drawn.pop()[2:] == ("top_k", "length")
    text = call("--grid", "length=1", "num_workers=0,1", *flags)[1]  # two that count as one
    assert "has the configuration and the seed 42 of" in text


def test_failed_run_is_reported_and_the_others_continue(call, tmp_path):
    code, text, _ = call("--grid", "lr=14,15,1", *BASE)
    assert code == 1
    log = tmp_path / "out" / "logs" / "lr=14-seed42.txt"
    assert re.search(
        rf"lr=14/seed42: failed with exit code 1, {re.escape(str(log))} ends as below, \d s\n"
        "    error: the disk is full\n",
        text,
    )
    assert "lr=15/seed42: failed: " in text
    assert "lr=1/seed42: accuracy" in text
    assert "2 of 3 runs are unfinished" in text


def test_processes_beside_each_other_get_a_gpu_each(call, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-x")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("utils.usable_cores", lambda: 7)
    grid = ["--grid", "length=1,2", *BASE, "--device", "auto"]
    assert call(*grid, "--jobs", 2)[0] == 0
    used = [path.read_text().strip() for path in (tmp_path / "out").glob("*/*/starts.txt")]
    assert set(used) == {"3", "GPU-x"}
    runs = planned(*grid).runs
    found = local_runs._environments(runs, 3)
    assert [e["CUDA_VISIBLE_DEVICES"] for e in found] == ["3", "GPU-x", "3"]
    assert [e["OMP_NUM_THREADS"] for e in found] == ["2"] * 3
    assert local_runs._environments(runs, 1) == [{"CUDA_VISIBLE_DEVICES": "3"}]
    on_cpu = planned("--grid", "length=1", *BASE).runs
    assert local_runs._environments(on_cpu, 1) == [{}]


def signalled(call, flags, paths, number, times=1, mark="\n"):
    """Calls sweep.py, which gets a signal when all files are there, with a mark in them."""

    def send():
        wait_until(lambda: all(p.exists() and p.read_text().count(mark) > 0 for p in paths))
        for _ in range(times):
            os.kill(os.getpid(), number)
            threading.Event().wait(0.2)

    thread = threading.Thread(target=send)
    thread.start()
    found = call(*flags)
    thread.join()
    return found


def is_gone(mark):
    """Whether the process that wrote its id has ended."""
    return not Path("/proc", mark.read_text().strip()).exists()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 75)]
)
def test_stopped_sweep_ends_its_runs_and_resumes(call, tmp_path, number, code):
    flags = ["--grid", "length=1,2,3", *BASE, "--lr", 13, "--jobs", 2]
    marks = [tmp_path / "out" / f"length={n}" / "seed42" / "stopped" for n in (1, 2)]
    found, text, _ = signalled(call, flags, marks, number)
    assert found == code
    assert f"{number.name}: runs are asked to save and to stop" in text
    assert text.count("/seed42: was stopped, ") == 2
    assert "Call the same command again to resume." in text
    assert not (tmp_path / "out" / "length=3").exists()
    assert all(map(is_gone, marks))
    if number == signal.SIGTERM:
        assert call("--grid", "length=1,2", *flags[2:])[0] == 0
        assert starts(tmp_path / "out") == {"length=1/seed42": 2, "length=2/seed42": 2}


def test_second_interrupt_ends_runs_at_once(call, tmp_path):
    mark = tmp_path / "out" / "length=1" / "seed42" / "stopped"
    flags = ["--grid", "length=1", *BASE, "--lr", 16]
    code, _, error = signalled(call, flags, [mark], signal.SIGINT, times=2)
    assert (code, error) == (130, "interrupted: the same command resumes; jobs of Slurm continue\n")
    assert is_gone(mark)


def test_second_sweep_in_a_folder_is_rejected(call, tmp_path):
    flags = ["--grid", "length=1", *BASE]
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".sweep.lock"):
        code, _, error = call(*flags)
        assert (code, "another sweep.py uses " in error) == (2, True)
        assert call(*flags, "--dry_run")[0] == 0


# Jobs


def test_what_is_left_is_submitted_as_one_array_and_once(folder, fake_slurm, call, tmp_path):
    flags = ["--grid", "length=1,2", *BASE, "--seeds", 42, 43, "--submitit"]
    wishes = ["--max_parallel", 2, "--partition", "long", "--timeout", 7]
    code, text, error = call(*flags, *wishes)
    assert (code, error) == (0, "")
    jobs = tmp_path / "out" / "jobs"
    script = (jobs / "4711" / "4711_submission.sh").read_text()
    for wish in ("array=0-2%2", "partition=long", "time=7", "job-name=l2p"):
        assert f"#SBATCH --{wish}\n" in script
    argv, output_dir = DelayedSubmission.load(jobs / "4711_1" / "4711_1_submitted.pkl").args
    assert argv[-2:] == ["--resume", "auto"]
    assert output_dir == str(tmp_path / "out" / "length=2" / "seed42")
    assert f"length=2/seed42: job 4711_1, follow tail -F {jobs}/4711_1/4711_1_0_log.out" in text
    fake_slurm("squeue", "4711_0", "4711_1", "4711_2", "12", "13_0")
    text = call(*flags)[1]
    assert "4 runs, 1 done, 3 queued or running as jobs, 0 to run\n" in text
    assert "length=2/seed42: job 4711_1, " in text
    assert "starts" not in call(*flags[:-1])[1]  # nor run here
    fake_slurm("squeue", "4711_1")
    fake_slurm("sbatch", "Submitted batch job 4712")
    text = call(*flags)[1]
    assert "1 queued or running as jobs, 2 to run\n" in text
    assert "length=2/seed43: job 4712_1, " in text
    fake_slurm("squeue", code=1)
    code, _, error = call(*flags)
    assert (code, error.startswith("error: ")) == (1, True)


# The real thing


@pytest.mark.slow
def test_stopped_runs_of_main_resume(call, tmp_path, monkeypatch):
    monkeypatch.setattr(local_runs, "ROOT", ROOT)
    flags = ["--grid", "length=1,2", *BASE, "--epochs", 2, "--jobs", 2]
    logs = [tmp_path / "out" / "logs" / f"length={n}-seed42.txt" for n in (1, 2)]
    code, text, _ = signalled(call, flags, logs, signal.SIGTERM, mark="Train: ")
    assert code == 75, text
    assert call(*flags)[0] == 0
    assert "Resuming from " in logs[0].read_text()


@pytest.mark.slow
def test_local_jobs_finish_a_sweep_and_failures_are_reported(call, tmp_path, monkeypatch):
    monkeypatch.setattr(submitit_jobs, "POLL_SECONDS", 0.1)
    monkeypatch.chdir(tmp_path)  # where jobs do not find the program
    local = ["--submitit", "--cluster", "local", "--gpus_per_node", 0]
    code, text, error = call("--grid", "length=1,2", *BASE, *local)
    assert (code, error) == (0, ""), text
    assert "Finished: length=2/seed42\n" in text
    assert "Mean" in text
    code, text, error = call("--grid", "length=1,4", *BASE, *local, "--device", "cuda")
    assert "2 runs, 1 done, 1 to run" in text
    assert code == 1
    assert "error: length=4/seed42 failed (exit code 2), see " in error
    assert "--device cuda" in error
