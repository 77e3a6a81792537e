"""sweep.py: what a sweep consists of, what of it runs, and how it stops and resumes."""

import json
import os
import re
import signal
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from filelock import FileLock
from submitit.core.utils import DelayedSubmission

import sweep
from cli.configurations import CONFIG_DIR
from cli.options import take
from cli.parser import UsageError, parse
from cli.paths import ROOT, command
from helpers.commands import wait_until
from helpers.tables import assert_says, cases
from helpers.tiny_flags import SWIFT, TINY_ANY, TINY_VIT
from launch import local_runs, submitit_jobs, sweep_plan
from launch.sweep_plan import SweepOptions
from reports import draw

pytest_plugins = ["helpers.fake_slurm"]

#: A base that runs anywhere; its configuration names the data.
BASE = [
    "digits_l2p", *TINY_ANY, "--model-kwargs", *(f"{n}={v}" for n, v in TINY_VIT.items()), *SWIFT,
    "--num_tasks", "2", "--plots", "false",
]  # fmt: skip

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
    code = 75 if settings.prompts.length == 1 else 128 + signal.SIGTERM
    signal.signal(signal.SIGTERM, (lambda *_: sys.exit(code)) if lr == 13 else signal.SIG_IGN)
    (folder / "stopped").write_text(f"{os.getpid()}\\n")
    time.sleep(60)
if lr == 14:
    sys.exit("error: the disk\\x1b[2J is full")
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
def out(tmp_path):
    """The folder of the sweeps that a test calls."""
    return tmp_path / "out"


@pytest.fixture
def call(tmp_path, out, capsys, monkeypatch, no_launcher):
    """Calls sweep.py with something quick in the place of main.py; gives code, output, errors."""
    folder = tmp_path / "program"
    folder.mkdir()
    (folder / "main.py").write_text(FAKE)
    monkeypatch.setattr(local_runs, "ROOT", folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it

    def run(*argv):
        code = sweep.main([*map(str, argv), "--output_dir", str(out)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run
    signal.signal(signal.SIGINT, earlier)


def planned(*argv):
    return sweep_plan.make_sweep(*take(SweepOptions, [*argv, "--output_dir", "/tmp/s"]))


def starts(folder):
    """How often each run was started."""
    paths = sorted(folder.glob("*/*/starts.txt"))
    return {f"{p.parent.relative_to(folder)}": len(p.read_text().splitlines()) for p in paths}


# What a sweep consists of


def test_arms_of_a_sweep():
    """With the settings of the last one, and the axes of the figure."""
    for content, names, last, axes in (
        ("grid: {length: [1, 5], top_k: [2, 4]}",
         "length=1,top_k=2 length=1,top_k=4 length=5,top_k=2 length=5,top_k=4",
         {"length": 5, "top_k": 4}, ["length", "top_k"]),
        ("{grid: {size: [5, 9]}, arms: {plain: , mask: {diversify: mask}}}",
         "plain,size=5 plain,size=9 mask,size=5 mask,size=9", {"diversify": "mask", "size": 9}, []),
        ("{grid: {top_k: [2, 4], length: [5]}, against: length}",
         "top_k=2,length=5 top_k=4,length=5", {"top_k": 4, "length": 5}, ["length", "top_k"]),
    ):  # fmt: skip
        arms, found = sweep_plan.expand("x", yaml.safe_load(content))
        assert (list(arms), list(arms.values())[-1], found) == (names.split(), last, axes)


def test_values_reach_the_command_line_and_a_folder_name():
    for name, settings in {
        "lr=0.1": {"lr": 0.1},
        "prompt_key=false": {"prompt_key": False},
        "clip_grad=none": {"clip_grad": None},
        "scale=0.05_1.0": {"scale": [0.05, 1.0]},
        "pretrained=.._a_b_x.npz": {"pretrained": "../a b/x.npz"},
        "freeze=none": {"freeze": []},
        "model_kwargs=depth_2_num_heads_2": {"model_kwargs": {"depth": 2, "num_heads": 2}},
    }.items():
        grid = {setting: [value] for setting, value in settings.items()}
        assert sweep_plan.expand("x", {"grid": grid})[0] == {name: settings}
        parsed, problems = parse(sweep_plan._arguments(settings))
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


def test_table_5_has_the_settings_of_the_configurations():
    single, diversified = (
        yaml.safe_load((CONFIG_DIR / f"{name}.yaml").read_text())
        for name in ("single_prompt", "diversified")
    )
    assert sweep_plan.expand("table5", sweep_plan.read_file("table5"))[0] == {
        "single_prompt": single,
        "no_key_value_pair": {**diversified, "prompt_key": False},
        "not_diversified": {**diversified, "diversify": "none"},
        "full": diversified,
    }


def test_arms_that_differ_in_nothing_are_one(no_launcher):
    found = planned("--grid", "top_k=1,3", "prompt_pool=true,false", "head_type=gap", *BASE)
    names = [f"top_k={k},prompt_pool={p},head_type=gap" for k, p in ((1, "true"), (1, "false"))]
    assert [run.name.split("/")[0] for run in found.runs[:2]] == names
    reason = f"equal to {names[1]}: what differs has no effect"
    assert found.left_out == {reason: ["top_k=3,prompt_pool=false,head_type=gap"]}
    assert len(found.runs) == 3


# What is rejected


#: Content of a sweep, or a command line, and what is wrong with it.
REJECTED = """
{}
  must hold arms, lines of `name: {setting: value}`, or grid
grid: {length: 5}
  must hold arms
arms: [a]
  must hold arms
arms: {a: 1}
  must hold arms
{arm: {a: {}}, grid: {length: [1]}}
  must hold arms
arms: {a: {lenght: 1}, b: {}}
  a: --lenght is no option
grid: {length: [long, 1]}
  length=long: --length long: 'long' is not a whole
arms: {a: {output-dir: x}}
  --output_dir: sweep.py sets it
grid: {length: [1, 1]}
  two arms have the name and the folder length=1
table4 BASE --jobs 0 --grid lr
  --jobs 0: must be at least 1 and at most 1000000000
  --grid lr: must be NAME=VALUE
  'table4' is no sweep: did you mean table5?
{grid: {length: [1, 5]}, against: [length]}
  must hold arms
--grid size=SIZES length=SIZES top_k=SIZES BASE
  --grid: makes 10648 arms, 10000 is the most
arms: {.. : {lr: 1}}
  the arm .. has no name
arms: {"": {lr: 1}}
  the arm  has no name
arms: {"a\\0": {lr: 1}}
  the arm a\0 has no name
arms: {"a\\ud800": {lr: 1}}
  the arm a\ud800 has no name
figure4_pool BASE --seed 1
  --seed: sweep.py sets it
figure4_pool BASE --eval
  --resume and --eval are two commands
figure4_pool BASE --bogus --seeds 4294967296 --nodes 2
  --seeds 4294967296: must be in
  --nodes is for jobs: give --submitit, too
  --bogus is no option
figure4_pool BASE --submitit --jobs 2
  --jobs is for runs of this machine
--grid length=1, BASE
  length=none: --length none: 'none' is not
--grid size=3 top_k=10,20 BASE
  size=3,top_k=10: --top_k 10 exceeds
  size=3,top_k=20: --top_k 20 exceeds
"""


def test_sweep_that_makes_no_sense_is_rejected(yaml_file, no_launcher):
    for case, problems in [*cases(REJECTED), ("", ["no sweep is given: begin with one of --list"])]:
        case = case.replace("SIZES", ",".join(map(str, range(22))))
        line = f"{yaml_file(case)} BASE" if case.startswith(("{", "grid", "arms")) else case
        with pytest.raises(UsageError) as rejected:
            planned(*line.replace("BASE", " ".join(BASE)).split())
        assert_says(rejected.value.problems, problems)


def test_rejection_leaves_no_trace(call, out):
    code, _, error = call("figure4_pool", *BASE, "--bogus", "--jobs", 0, "--seed", 4)
    assert (code, error.count("\n  - "), out.exists()) == (2, 3, False)
    assert error.startswith("sweep.py: this command line cannot run:\n  - ")


# What runs


def test_run_is_main_with_flags_of_its_arm(no_launcher):
    """Impossible arms are left out."""
    found = planned("--grid", "size=5,20", "top_k=2,10", *BASE, "--seeds", "3", "3", "4")
    arms = ["size=5,top_k=2", "size=20,top_k=2", "size=20,top_k=10"]
    assert [run.name for run in found.runs] == [f"{a}/seed{seed}" for a in arms for seed in (3, 4)]
    reason = "--top_k 10 exceeds --size 5: lower --top_k or enlarge the pool"
    assert found.left_out == {reason: ["size=5,top_k=10"]}
    run = found.runs[2]
    assert run.folder == Path("/tmp/s/size=20,top_k=2/seed3")
    own = ["--seed", "3", "--output_dir", str(run.folder), "--resume", "auto"]
    assert run.argv == [*BASE, "--size", "20", "--top_k", "2", *own]
    assert run.settings.stored() == parse(run.argv)[0].stored()


def test_runs_are_reported_summed_up_and_not_run_again(call, out):
    flags = ["--grid", "length=1,2", *BASE, "--seeds", 1]
    code, text, _ = call(*flags, "--dry_run")
    assert (code, out.exists()) == (0, False)
    planned_call = command("main.py", BASE[0])
    assert_says([text], [f"--grid: 2 runs, 0 done, 2 to run\n .. \n  {planned_call} "])
    code, text, error = call(*flags)
    assert (code, error) == (0, "")
    lines = [line for line in text.splitlines() if line.startswith("[")]
    assert (len(lines), lines[0]) == (4, "[1/2] length=1/seed1: starts")
    end = r"\[1/2\] length=1/seed1: accuracy 75.50 \(instance-wise\), \d s"
    assert re.fullmatch(end, lines[1])
    as_file = f"{command('summarize.py', out)} --format csv"
    assert_says([text.partition("\n\n")[2]], [f"75.50 .. {as_file}"])  # below the table
    assert (out / "logs" / "length=2-seed1.txt").read_text() == ""
    (out / "length=2" / "seed1" / "results.json").unlink()
    flags[1] = "length=1,2,4"
    code, text, _ = call(*flags)
    assert (code, "3 runs, 1 done, 2 to run\n" in text) == (0, True)
    assert starts(out) == {"length=1/seed1": 1, "length=2/seed1": 2, "length=4/seed1": 1}
    code, text, _ = call(*flags)
    assert (code, "starts" in text, "77.00" in text) == (0, False, True)  # of length 4


@pytest.fixture
def folder(call, out):
    """The folder of a finished run of length 1."""
    assert call("--grid", "length=1", *BASE)[0] == 0
    return out / "length=1" / "seed42"


#: Flags of a run that is finished already; what differs.
DIFFERENCES = """
--data-path PLACE --num_workers 1 --print_freq 3 --vote_group_size 8
--epochs 2
  epochs 1 in place of 2
--prompt_key false
  prompt_key true in place of false
--vote_group_size 4
  vote_group_size 8 in place of 4
--num_tasks none
  num_tasks 2 in place of none
--dataset CIFAR10 --data-path PLACE
  dataset digits in place of CIFAR10
--pretrained PLACE/glyph.npz
  pretrained False in place of glyph.npz
--submitit --tasks_per_node 2
  images_per_step 8 in place of 16
"""


def test_other_settings_are_another_run_but_other_places_are_not(folder, call, tmp_path):
    order = tmp_path / "order.txt"
    (tmp_path / "glyph.npz").touch()

    def assert_differs(line, differences):
        words = line.replace("PLACE", str(tmp_path)).split()
        code, text, error = call("--grid", "length=1", *BASE, *words, "--dry_run")
        message = (
            f"{folder} holds a run with other settings: {'; '.join(differences)}; give another"
        )
        assert (code, message in error) == ((2, True) if differences else (0, False)), error
        assert ("1 runs, 1 done" in text) == (not differences)

    for line, differences in cases(DIFFERENCES):
        assert_differs(line, differences)
    path = folder / "results.json"
    results = json.loads(path.read_text())
    results["config"]["class_order"] = "elsewhere.txt"
    path.write_text(json.dumps(results))
    order.write_text("0 1 2 3 4 5 6 7 8 9")
    assert_differs(f"--class_order {order}", [])
    order.write_text("1 0 2 3 4 5 6 7 8 9")
    difference = "class_order 0 1 2 3 4 5 6 7 8 9 in place of 1 0 2 3 4 5 6 7 8 9"
    assert_differs(f"--class_order {order}", [difference])


def test_results_are_drawn_against_what_the_sweep_varies(folder, call, out, yaml_file, monkeypatch):
    drawn = []

    def draw_comparison(groups, *words):
        drawn.append(([group.label for group in groups], *words))
        return [], ["accuracy_against: no"]

    monkeypatch.setattr(draw, "draw_comparison", draw_comparison)
    flags, place = [*BASE, "--plots", "true"], out / "comparison"
    path = yaml_file("{grid: {length: [1, 2], top_k: [2, 40]}, against: top_k}")
    left_out = "left out: length=1,top_k=40  length=2,top_k=40"
    assert_says(
        [call(path, *flags)[1]], [f"{left_out} .. accuracy_against: no\nDrawn in {place}\n"]
    )
    assert drawn.pop() == (["length=1,top_k=2", "length=2,top_k=2"], place, "length")
    call(yaml_file("{grid: {length: [1, 2], top_k: [2, 3]}, against: top_k}"), *flags)
    assert drawn.pop()[2:] == ("top_k", "length")
    text = call("--grid", "length=1", "num_workers=0,1", *flags)[1]  # two that count as one
    assert "has the configuration and the seed 42 of" in text


@pytest.mark.parametrize("part", ["draw.draw_comparison", "seed_tables.seed_table"])
def test_a_comparison_that_fails_is_a_warning(folder, call, out, monkeypatch, caplog, part):
    monkeypatch.setattr(f"reports.{part}", Mock(side_effect=RuntimeError("a bug")))
    code, text, error = call("--grid", "length=1", *BASE, "--plots", "true")
    assert (code, error, "75.50" in text) == (0, "", part.startswith("draw"))
    again = f"do it again: {command('summarize.py', out)}; {command('plots.py', out)}"
    assert caplog.messages == [f"The runs are not compared (RuntimeError: a bug): {again}"]


def test_failed_run_is_reported_and_the_others_continue(call, out):
    code, text, _ = call("--grid", "lr=14,15,1", *BASE)
    assert code == 1
    log = re.escape(str(out / "logs" / "lr=14-seed42.txt"))
    failed = (
        rf"lr=14/seed42: failed with exit code 1, {log} ends as below, \d s\n"
        r"    error: the disk\\x1b\[2J is full"
    )
    assert re.search(failed, text)
    rest = "lr=15/seed42: failed:  .. lr=1/seed42: accuracy .. 2 of 3 runs are unfinished"
    assert_says([text], [rest])


def test_processes_beside_each_other_get_a_gpu_each(call, out, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-x")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("utils.usable_cores", lambda: 7)
    grid = ["--grid", "length=1,2", *BASE]
    assert call(*grid, "--device", "auto", "--jobs", 2)[0] == 0
    assert {p.read_text().strip() for p in out.glob("*/*/starts.txt")} == {"3", "GPU-x"}
    runs = planned(*grid, "--device", "auto").runs
    assert local_runs._environments(runs, 3) == [
        {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "2"} for gpu in ("3", "GPU-x", "3")
    ]
    assert local_runs._environments(runs, 1) == [{"CUDA_VISIBLE_DEVICES": "3"}]
    assert local_runs._environments(planned(*grid).runs, 1) == [{}]  # on the CPU


def signalled(call, flags, marks, number, times=1):
    """Calls sweep.py, which gets a signal when all runs have left a mark with their process.

    Makes sure that these processes are gone in the end.
    """

    def send():
        wait_until(lambda: all(mark.exists() and mark.read_text() for mark in marks))
        for _ in range(times):
            os.kill(os.getpid(), number)
            threading.Event().wait(0.2)

    thread = threading.Thread(target=send)
    thread.start()
    found = call(*flags)
    thread.join()
    assert not any(Path("/proc", mark.read_text().strip()).exists() for mark in marks)
    return found


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 75)]
)
def test_stopped_sweep_ends_its_runs_and_resumes(call, out, number, code):
    flags = ["--grid", "length=1,2,3", *BASE, "--lr", 13, "--jobs", 2]
    marks = [out / f"length={n}" / "seed42" / "stopped" for n in (1, 2)]
    found, text, _ = signalled(call, flags, marks, number)
    assert found == code
    asked = f"{number.name}: runs are asked to save and to stop"
    assert_says([text], [f"{asked} .. Call the same command again to resume."])
    assert text.count("/seed42: was stopped, ") == 2
    assert not (out / "length=3").exists()
    if number == signal.SIGTERM:
        assert call("--grid", "length=1,2", *flags[2:])[0] == 0
        assert starts(out) == {"length=1/seed42": 2, "length=2/seed42": 2}


def test_second_interrupt_ends_runs_at_once(call, out):
    mark = out / "length=1" / "seed42" / "stopped"
    flags = ["--grid", "length=1", *BASE, "--lr", 16]
    code, _, error = signalled(call, flags, [mark], signal.SIGINT, times=2)
    assert (code, error) == (130, "interrupted: the same command resumes; jobs of Slurm continue\n")


def test_second_sweep_in_a_folder_is_rejected(call, out):
    flags = ["--grid", "length=1", *BASE]
    out.mkdir()
    with FileLock(out / ".sweep.lock"):
        code, _, error = call(*flags)
        assert (code, "another sweep.py uses " in error) == (2, True)
        assert call(*flags, "--dry_run")[0] == 0


# Jobs


def test_what_is_left_is_submitted_as_one_array_and_once(folder, fake_slurm, call, out):
    flags = ["--grid", "length=1,2", *BASE, "--seeds", 42, 43, "--submitit"]
    wishes = ["--max_parallel", 2, "--partition", "long", "--timeout", 7]
    code, text, error = call(*flags, *wishes)
    assert (code, error) == (0, "")
    jobs = out / "jobs"
    script = (jobs / "4711" / "4711_submission.sh").read_text()
    for wish in ("array=0-2%2", "partition=long", "time=7", "job-name=l2p"):
        assert f"#SBATCH --{wish}\n" in script
    argv, output_dir = DelayedSubmission.load(jobs / "4711_1" / "4711_1_submitted.pkl").args
    assert argv[-2:] == ["--resume", "auto"]
    assert output_dir == str(out / "length=2" / "seed42")
    assert f"length=2/seed42: job 4711_1, follow tail -F {jobs}/4711_1/4711_1_0_log.out" in text
    fake_slurm("squeue", "4711_0", "4711_1", "4711_2", "12", "13_0")
    under_way = "4 runs, 1 done, 3 queued or running as jobs, 0 to run\n"
    assert_says([call(*flags)[1]], [f"{under_way} .. length=2/seed42: job 4711_1, "])
    assert "starts" not in call(*flags[:-1])[1]  # nor run here
    fake_slurm("squeue", "4711_1")
    fake_slurm("sbatch", "Submitted batch job 4712")
    rest = "1 queued or running as jobs, 2 to run\n .. length=2/seed43: job 4712_1, "
    assert_says([call(*flags)[1]], [rest])
    fake_slurm("squeue", code=1)
    code, _, error = call(*flags)
    assert (code, error.startswith("error: ")) == (1, True)


@pytest.mark.slow
def test_local_jobs_finish_a_sweep_and_failures_are_reported(call, tmp_path, monkeypatch):
    monkeypatch.setattr(submitit_jobs, "POLL_SECONDS", 0.1)
    monkeypatch.chdir(tmp_path)  # where jobs do not find the program
    local = [*BASE, "--submitit", "--cluster", "local", "--gpus_per_node", 0]
    code, text, error = call("--grid", "length=1,2", *local)
    assert (code, error) == (0, ""), text
    assert_says([text], ["Finished: length=2/seed42\n .. Mean"])
    code, text, error = call("--grid", "length=1,4", *local, "--device", "cuda")
    assert (code, "2 runs, 1 done, 1 to run" in text) == (1, True)
    assert_says([error], ["error: length=4/seed42 failed (exit code 2), see  .. --device cuda"])
