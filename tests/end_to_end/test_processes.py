"""Who a process is, and how several of them work and end together."""

import importlib
import itertools
import os
import random
import re
import shutil
import signal
import threading
import time
from datetime import timedelta
from functools import partial
from unittest.mock import Mock

import pytest
import torch

import main
import utils
from cli.settings import Settings
from experiment import checkpoints, rendezvous, resume
from experiment.signals import EXIT_CODE
from helpers.finished_runs import Run, read
from helpers.process_groups import by_launcher, by_mpi, by_nobody, by_slurm, free_port, together
from helpers.process_runs import GONE, assert_equal_runs, assert_equal_usage, run, shape
from reports.metrics import SELECTIONS

slow = partial(pytest.param, marks=pytest.mark.slow)

# What a process does in the middle of a run


def act(where, actions, rank):
    """Lets processes, by rank, do something before they call a function the n-th time."""
    name, number = where
    module, name = name.rsplit(".", 1)
    calls, function = itertools.count(1), getattr(importlib.import_module(module), name)

    def call(*args, **keywords):
        if next(calls) == number and rank in actions:
            actions[rank]()
        return function(*args, **keywords)

    setattr(importlib.import_module(module), name, call)


def signalled(number):
    return partial(signal_itself, number)


def signal_itself(number):
    if number == signal.SIGINT:  # which a shell lets its background processes ignore
        signal.signal(number, signal.default_int_handler)
    os.kill(os.getpid(), number)


def fail():
    raise ValueError("boom")


# Several processes equal one


@pytest.mark.parametrize(
    ("count", "batch", "group", "environment"),
    [
        (1, 12, 3, lambda _: {"RANK": "0", "WORLD_SIZE": "1"}),  # which has nobody to meet
        # Steps of 12 and 1 images: nothing for one process.
        pytest.param(2, 6, 3, by_slurm(2), marks=pytest.mark.smoke),
        # And nothing for three; three vote groups of test images for four.
        (4, 3, 3, by_mpi(4)),
        slow(3, 3, 3, None),  # 9 and 4 images: 3, 1 and none
    ],
    ids=["1", "2 of Slurm", "4 of MPI", "3"],
)
def test_several_processes_equal_one(alone, pictures, tmp_path, count, batch, group, environment):
    done = run(tmp_path, count, shape(batch, group, pictures, tmp_path), environment=environment)
    assert done.codes == [0] * count, done.text
    assert_equal_runs(tmp_path, alone(count * batch, group))
    assert f"{count * batch} images a step, vote group of {group}\n" in done.texts[0]
    assert f"Processes: {count} on cpu" in done.texts[0]
    assert done.texts[1:] == [""] * (count - 1)  # one process speaks


#: What is drawn, or counted, over all processes.
REPLAY = ["--buffer_size", "14"]
COUNTED = ["--diversify", "frequency", "--buffer_per_class", "2", "--pull_constraint_coeff", "1"]


@pytest.mark.parametrize(
    ("flags", "count", "batch"),
    [(COUNTED, 2, 6), slow(COUNTED, 3, 3), slow(REPLAY, 2, 6), slow(REPLAY, 3, 3)],
)
def test_several_processes_replay_and_count_as_one(pictures, tmp_path, flags, count, batch):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    done = run(alone, 1, [*shape(count * batch, 3, pictures, alone), *flags], environment=by_nobody)
    assert done.codes == [0], done.text
    done = run(shared, count, [*shape(batch, 3, pictures, shared), *flags])
    assert done.codes == [0] * count, done.text
    assert_equal_runs(shared, alone)
    for task in (1, 2):
        one, two = (checkpoints.load(checkpoints.task_path(f, task)) for f in (alone, shared))
        assert two.buffer.tolist() == one.buffer.tolist() != []
        counters = [key for key in one.model if "served" in key]
        assert len(counters) == (2 if flags is COUNTED else 0)
        assert all(torch.equal(two.model[key], one.model[key]) for key in counters)
    if counters:  # of 2 epochs of 13, and of 12 and as many replayed images for each vote group
        assert one.model["prompt.served_before"].sum() == 2 * 2 * 13
        assert one.model["prompt.served_now"].sum() == 2 * 2 * (12 + 4 * 3)


@pytest.mark.slow
def test_process_without_an_image_in_its_first_step_scales_the_loss_too(pictures, tmp_path):
    flags = [*shape(13, 13, pictures, tmp_path), "--amp", "fp16", "--epochs", "1"]
    done = run(tmp_path, 2, flags)
    assert done.codes == [0, 0], done.text


def test_evaluation_in_several_processes_equals_one(alone, pictures, tmp_path):
    folder = tmp_path / "run"
    expected = Run(shutil.copytree(alone(12, 3), folder)).results
    flags = ["--eval", "--output_dir", folder, "--device", "cpu", "--num_workers", "0"]
    done = run(tmp_path, 4, [*flags, "--save_predictions"])
    assert done.codes == [0] * 4, done.text
    assert done.texts[0].count("Reproduces the stored accuracies") == 4
    assert done.texts[1:] == [""] * 3
    table = (folder / "predictions.csv").read_text()
    assert (folder / "eval_predictions.csv").read_text() == table
    header, *rows = (line.split(",") for line in table.splitlines())
    names = "test_set,image,target,batch,instance,batch_prompts,instance_prompts"
    assert header == names.split(",")
    assert [row[0] for row in rows] == ["task1"] * 7 + ["task2"] * 7
    assert all(row[1].startswith(f"val/{row[2]}/") for row in rows)
    for column, name in enumerate(SELECTIONS, 3):
        parts = (rows[:7], rows[7:])
        hits = [100 * sum(row[2] == row[column] for row in part) / 7 for part in parts]
        assert hits == [row[1] for row in expected[name]["accuracy_matrix"]]
    assert any(row[5].split() != sorted(row[6].split()) for row in rows)
    found = read(folder / "eval_results.json")
    assert [found[name] for name in SELECTIONS] == [expected[name] for name in SELECTIONS]
    assert_equal_usage(found["prompt_usage"], expected["prompt_usage"])


# Stopped, and resumed in another number of processes


def resume_in(count, folder, pictures):
    done = run(folder, count, [*shape(2, 2, pictures, folder), "--resume", "auto"])
    assert done.codes == [0] * count, done.text
    return done


@pytest.mark.parametrize(
    ("number", "rank", "count"), [slow(signal.SIGTERM, 1, 1), (signal.SIGUSR1, 0, 4)]
)
def test_signal_to_one_process_stops_all_and_any_number_resumes(
    alone, pictures, tmp_path, number, rank, count
):
    hook = partial(stop_slowly, resume.newest_path(tmp_path), number, rank)
    done = run(tmp_path, 2, shape(2, 2, pictures, tmp_path), hook)
    assert done.codes == [EXIT_CODE, EXIT_CODE], done.text
    place = "stopped the run after task 1, epoch 2, step 3"
    assert f"{number.name} {place}" in done.texts[rank]
    assert f"another process {place}" in done.texts[1 - rank]
    done = resume_in(count, tmp_path, pictures)
    assert "task 1, 1 of 2 epochs and 3 steps done" in done.texts[0]
    assert "4 images a step, vote group of 2" in done.texts[0]
    warning = "2 of 4 processes have nothing to train on: 4 images a step are 2 vote groups"
    assert (warning in done.texts[0]) == (count == 4)
    assert_equal_runs(tmp_path, alone(4, 2), stopped=True)


def stop_slowly(path, number, stopping, rank):
    """In the second step of the second epoch; a signal that comes in it is found in the third.

    While the second state is written (the first ends an epoch), the other process has to wait.
    """
    act(("engine.train_step", 6), {stopping: signalled(number)}, rank)
    act(("experiment.resume.save", 2), {0: partial(time.sleep, 0.5)}, rank)
    act(("experiment.session._report", 1), {1: partial(check_saved, path)}, rank)


def check_saved(path):
    assert torch.load(path, weights_only=True)["position"]["step"] == 3


@pytest.mark.parametrize("rank", [slow(0), 1])
def test_signal_in_an_evaluation_stops_all(alone, pictures, tmp_path, rank):
    """In the second evaluation after the second task; the other process loses this one."""
    actions = {rank: signalled(signal.SIGTERM)}
    hook = partial(act, ("engine.evaluate", 3), actions)
    done = run(tmp_path, 2, shape(2, 2, pictures, tmp_path), hook)
    assert (done.codes[rank], done.codes[1 - rank]) == (EXIT_CODE, 1), done.text
    assert "SIGTERM stopped the run in an evaluation" in done.texts[rank]
    assert GONE in done.texts[1 - rank]
    done = resume_in(4, tmp_path, pictures)
    assert "task 2, 2 of 2 epochs and 0 steps done" in done.texts[0]
    assert_equal_runs(tmp_path, alone(4, 2))


# Failing, together


STEP, ALONE = ("engine.train_step", 2), ("experiment.live_log.open_live_log", 1)


@pytest.mark.parametrize(
    ("action", "place", "rank", "code", "reason"),
    [
        (fail, STEP, 0, 1, "ValueError: boom"),
        slow(fail, STEP, 2, 1, "ValueError: boom"),
        (signalled(signal.SIGKILL), ALONE, 1, -signal.SIGKILL, ""),
        slow(signalled(signal.SIGKILL), STEP, 0, -signal.SIGKILL, ""),
        (signalled(signal.SIGINT), STEP, 1, 130, "interrupted: "),
    ],
    ids=["error of 0", "error of 2", "kill of 1", "kill of 0", "Ctrl-C of 1"],
)
def test_process_that_ends_ends_all(pictures, tmp_path, action, place, rank, code, reason):
    """While the others wait in a collective; they say so in one line."""
    hook = partial(act, place, {rank: action})
    done = run(tmp_path, 3, shape(3, 3, pictures, tmp_path), hook, within=15)
    assert done.codes[rank] == code
    assert reason in done.texts[rank]
    assert ("Traceback" in done.texts[rank]) == (action is fail)
    for other in {0, 1, 2} - {rank}:
        assert done.codes[other] == 1
        assert done.texts[other].splitlines()[-1].startswith(GONE)
        assert done.texts[other].count("error: ") == 1


def test_first_process_alone_rejects_a_state(pictures, tmp_path):
    """It looks for the state; the others wait for what it finds."""
    flags = [*shape(3, 3, pictures, tmp_path / "out"), "--resume", tmp_path]
    done = run(tmp_path, 2, flags, within=15)
    assert done.codes == [2, 1], done.text
    assert "there is no state of a run, such as last.pth" in done.texts[0]


def test_loss_that_is_no_number_ends_all_when_the_model_is_saved(pictures, tmp_path):
    flags = "--opt sgd --lr 1000 --lr_scale none --weight-decay 1000 --clip-grad none".split()
    path = tmp_path / "checkpoint" / "last_finite_checkpoint.pth"
    hook = partial(save_slowly, path)
    done = run(tmp_path, 2, [*shape(3, 3, pictures, tmp_path), *flags], hook, within=15)
    assert done.codes == [1, 1]
    assert all("loss is nan in task 1, epoch 2, step 2" in text for text in done.texts), done.text
    assert "resume" not in done.text  # which would end in the same way
    assert "Traceback" not in done.text
    assert checkpoints.load(path).model.keys() >= {"prompt.prompt", "head.weight"}


def save_slowly(path, rank):
    act(("experiment.training_run.save_checkpoint", 1), {0: partial(time.sleep, 0.5)}, rank)
    act(("experiment.session._report", 1), {1: path.stat}, rank)


@pytest.mark.slow
def test_work_of_one_process_may_take_longer_than_a_collective(pictures, tmp_path):
    done = run(tmp_path, 2, shape(3, 3, pictures, tmp_path / "out"), work_slowly)
    assert done.codes == [0, 0], done.text


def work_slowly(rank):
    utils._TIMEOUT = timedelta(seconds=1.5)
    for place in (
        "experiment.image_check._find_damaged", "experiment.live_log.open_live_log",
        "experiment.run_record.write", "experiment.describe.conclude",
    ):  # fmt: skip
        act((place, 1), {0: partial(time.sleep, 2)}, rank)
    act(("experiment.build.build_stream", 1), {1: partial(time.sleep, 2)}, rank)


#: Flags of the last process alone; exit codes; the message of all.
DIFFERENT = [
    ("--lr 0.1 --epochs 3", [2, 2], "--epochs is 2 in process 0, 3 in process 1"),
    slow("--resume auto", [2, 2], "--resume is none in process 0, auto in process 1"),
    ("--data-path FEWER", [1, 1], "training images (--data-path) is 25 in process 0, 24 in proc"),
    slow("--data-path OTHER", [1, 1], "test images (--data-path) is "),
    ("--data-path LONGER", [1, 1], "the sizes of image files (--data-path) is "),
    slow("--class_order ORDER", [1, 1], "classes (--class_order) is [[0, 1], [2, 3]] in process"),
    slow("--data-path nowhere", [1, 2], "process 1: --data-path nowhere does not exist"),
    slow("--class_order UNKNOWN", [1, 1], "unknown class 'e': give class names"),
]


@pytest.mark.parametrize(("more", "codes", "said"), DIFFERENT)
def test_processes_that_differ_end_together(pictures, tmp_path, more, codes, said):
    """Else they would train together, and report numbers of a mixture."""
    for name, path in {"FEWER": "train/a/1.png", "OTHER": "val/a/1.png"}.items():
        (shutil.copytree(pictures, tmp_path / name) / path).rename(tmp_path / name / "val/a/x.png")
    with (shutil.copytree(pictures, tmp_path / "LONGER") / "val/a/1.png").open("ab") as file:
        file.write(b"more")
    (tmp_path / "ORDER").write_text("b a c d")
    (tmp_path / "UNKNOWN").write_text("b a c e")
    more = [str(tmp_path / word) if word.isupper() else word for word in more.split()]
    done = run(tmp_path, 2, shape(3, 3, pictures, tmp_path / "out"), more=more, within=20)
    assert done.codes == codes, done.text
    assert all(said in text.splitlines()[-1] for text in done.texts), done.text
    assert not any((tmp_path / "out").glob("*"))


@pytest.mark.slow
def test_processes_that_evaluate_other_checkpoints_end_together(alone, pictures, tmp_path):
    for rank in (0, 1):  # on a disk of its own each
        path = shutil.copytree(alone(12, 3), tmp_path / str(rank) / "run") / "checkpoint"
    with (path / "task2_checkpoint.pth").open("ab") as file:
        file.write(b"other")
    hook = partial(_in_folder_of_rank, tmp_path)
    done = run(tmp_path, 2, ["--eval", "--output_dir", "run", "--device", "cpu"], hook)
    assert done.codes == [1, 1], done.text
    assert all("error: the sha256 of task2_checkpoint.pth is " in text for text in done.texts)


def _in_folder_of_rank(folder, rank):
    os.chdir(folder / str(rank))


@pytest.mark.slow
def test_signal_while_a_process_waits_for_others_ends_all(pictures, tmp_path):
    """The third is missing; the second is asked to stop."""
    hook = partial(act, ("experiment.rendezvous._exchange", 1), {1: _signal_soon})
    flags = [*shape(3, 3, pictures, tmp_path), "--device", "cpu"]
    done = run(tmp_path, 2, flags, hook, environment=by_launcher(3, free_port()), within=20)
    assert done.codes[0] == 1, done.text
    assert GONE + "process 1: SIGTERM stopped the program outside of training)" in done.texts[0]


def _signal_soon():
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()


# What they exchange


def exchange(rank):
    place = rendezvous.join(Settings().replace(device="cpu"))
    assert place.rank == utils.rank() == rank
    assert utils.is_main_process() == (rank == 0)
    large = random.Random(0).randbytes(3_000_000)
    for data in (("", b""), ("name", b"\0\xff state"), large):
        assert utils.share(data if rank == 0 else b"of another process") == data
    assert utils.sum_over_processes(torch.tensor([rank, 1.0])).tolist() == [3, 3]
    given = [torch.arange(6.0).view(2, 3), torch.tensor(4.0)]
    trained = [torch.nn.Parameter(torch.ones_like(value)) for value in given]
    frozen = torch.nn.Parameter(torch.ones(5), requires_grad=False)
    if rank > 0:  # the first has no image
        for parameter, value in zip(trained, given, strict=True):
            parameter.grad = rank * value
    utils.sum_gradients([trained[0], frozen, trained[1]])
    for parameter, value in zip(trained, given, strict=True):
        torch.testing.assert_close(parameter.grad, 3 * value)
    assert frozen.grad is None
    utils.close_processes()
    assert not torch.distributed.is_initialized()


def test_three_processes_exchange(tmp_path):
    done = together(tmp_path, 3, exchange)
    assert done.codes == [0, 0, 0], done.text


def test_error_of_the_own_device_is_no_lost_process(monkeypatch):
    monkeypatch.setattr(utils, "is_alone", lambda: False)
    out_of_memory = torch.OutOfMemoryError
    for error, is_lost in (
        (RuntimeError("Connection closed by peer"), True),
        (torch.distributed.DistBackendError("NCCL error"), True),
        (out_of_memory("CUDA out of memory"), False),
        (torch.distributed.DistBackendError("Last error: Cuda failure 'out of memory'"), False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (getattr(torch, "AcceleratorError", out_of_memory)("illegal access"), False),
    ):
        monkeypatch.setattr(torch.distributed, "all_reduce", Mock(side_effect=error))
        raised = utils.LostProcessError if is_lost else type(error)
        with pytest.raises(raised, match=str(error)):
            utils.sum_over_processes(torch.ones(1))


def join(rank):
    url = "env://" if rank == 0 else os.environ["ELSEWHERE"]
    rendezvous.join(Settings().replace(device="cpu", dist_url=url))
    assert utils.sum_over_processes(torch.ones(1)).item() == 2
    utils.close_processes()


def test_processes_meet_where_dist_url_says(tmp_path):
    port, wrong = free_port(), {"MASTER_PORT": "1"}
    url, usual = {"ELSEWHERE": f"tcp://127.0.0.1:{port}"}, by_launcher(2, port)
    done = together(tmp_path, 2, join, lambda rank: usual(rank) | url | (wrong if rank else {}))
    assert done.codes == [0, 0], done.text


# Who a process is


STEP = {
    "SLURM_JOB_ID": "71", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[007-008]", "SLURM_JOB_NODELIST": "gpu[001-9]",
}  # fmt: skip
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "2"}

MPIRUN = {f"OMPI_COMM_WORLD_{name}": "1" for name in ("RANK", "LOCAL_RANK")}
MPIRUN |= {"OMPI_COMM_WORLD_SIZE": "2"}
MPIEXEC = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}

#: What the shell of an allocation, or a batch script, finds.
ALLOCATION = {
    "SLURM_JOB_ID": "71", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4",
    "SLURM_JOB_NODELIST": "gpu[007-008]", "SLURM_JOB_NUM_NODES": "2",
}  # fmt: skip

INTERACTIVE = {**ALLOCATION, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "4294967290"}

#: Environments; rank, world size, local rank, and whether Slurm or MPI is the launcher.
LAUNCHES = [
    ({}, None),
    (TORCHRUN, (5, 8, 2, False)),
    ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0, False)),
    ({**STEP, **TORCHRUN}, (5, 8, 2, False)),  # torchrun, itself started by srun
    (STEP, (3, 4, 1, True)),
    (ALLOCATION, None),
    (INTERACTIVE, None),
    ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
    ({k: v for k, v in ALLOCATION.items() if k != "SLURM_PROCID"}, None),  # of salloc
    (MPIRUN, (1, 2, 1, True)),
    ({**STEP, **MPIRUN}, (1, 2, 1, True)),
    ({**MPIRUN, **TORCHRUN}, (5, 8, 2, False)),
    (MPIEXEC, (1, 2, 1, True)),
    (
        {**MPIEXEC, "MPI_LOCALNRANKS": "1", "MPI_LOCALRANKID": "0", "MASTER_ADDR": "n"},
        (1, 2, 0, True),
    ),
    ({**STEP, "PMI_RANK": "3", "PMI_SIZE": "4"}, (3, 4, 1, True)),  # of `srun --mpi=pmi2`
    ({"PMI_RANK": "0", "PMI_SIZE": "1"}, None),
    ({**INTERACTIVE, "PMIX_RANK": "0"}, None),  # of `srun --mpi=pmix`
]


def test_find_launch():
    for environ, expected in LAUNCHES:
        found = utils.find_launch(environ)
        has_place = found and found.meeting_point is not None
        found = found and (found.rank, found.world_size, found.local_rank, has_place)
        assert found == expected, environ


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


ALONE_AND_LOST = {"RANK": "1", "WORLD_SIZE": "2"}
AT_HOME = {**ALONE_AND_LOST, "MASTER_ADDR": "127.0.0.1"}

#: Environments that are wrong, and the message.
WRONG = [
    *(({**TORCHRUN, "RANK": text}, f"RANK={text}: ") for text in ("abc", "", "-1", "8", "1.5")),
    *(({**TORCHRUN, "WORLD_SIZE": text}, f"WORLD_SIZE={text}: ") for text in ("", "0", "9" * 5000)),
    ({**TORCHRUN, "LOCAL_RANK": "x\n"}, r"LOCAL_RANK=x\n: expected a number from 0 to "),
    ({"RANK": "0"}, "has no WORLD_SIZE"),
    ({"WORLD_SIZE": "2"}, "has no RANK"),
    (ALONE_AND_LOST, "but no MASTER_ADDR and no MASTER_PORT: set it, or start"),
    (AT_HOME, "WORLD_SIZE=2, but no MASTER_PORT"),
    *(({**AT_HOME, "MASTER_PORT": text}, f"MASTER_PORT={text}: ") for text in ("0", "65536", "x")),
    ({**AT_HOME, "MASTER_PORT": "1", "MASTER_ADDR": "http://a"}, "MASTER_ADDR='http://a': "),
    *(({**STEP, name: ""}, f"{name}=: ") for name in STEP if name[6:] in ("PROCID", "LOCALID")),
    ({**STEP, "SLURM_STEP_NUM_TASKS": "two"}, "SLURM_STEP_NUM_TASKS=two: "),
    ({**STEP, "SLURM_PROCID": "4"}, "SLURM_PROCID=4: expected a number from 0 to 3"),
    ({**STEP, "MASTER_PORT": "x"}, "MASTER_PORT=x: "),
    (without(STEP, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), "neither SLURM_STEP_NODELIST nor"),
    ({**MPIRUN, "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, "has no MASTER_ADDR, where"),
    (without(MPIRUN, "OMPI_COMM_WORLD_SIZE"), "has no OMPI_COMM_WORLD_SIZE"),
    *((without(STEP, name), f"has no {name}, but") for name in ("SLURM_PROCID", "SLURM_LOCALID")),
]


def test_environment_that_is_wrong_is_one_problem(monkeypatch, no_launcher, capsys):
    for environ, problem in WRONG:
        with pytest.raises(ValueError) as error:
            utils.find_meeting_point(utils.find_launch(environ), environ=environ)
        assert problem in str(error.value)
        assert "\n" not in str(error.value)
    for name, value in {**AT_HOME, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main.main(["digits_l2p", "--device", "cpu"]) == 2
    assert "  - the environment has RANK=0 and WORLD_SIZE=2, but no" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["tcp://a", "a:1", "tcp://:1", "tcp://a:99999", "file:", "http:x"])
def test_dist_url_that_is_none_is_named(url):
    with pytest.raises(ValueError, match=f"--dist_url {url}: give env://, tcp://HOST:PORT"):
        utils.find_meeting_point(utils.Processes(1, 2), url, {})


def meeting_point(**changes):
    launch = utils.find_launch({**STEP, **changes})
    host, port = re.fullmatch(r"tcp://(.*):(\d+)", launch.meeting_point).groups()
    return host, int(port)


#: Lists of nodes; the first of each.
NODES = """
gpu[007-009,12],x1 gpu007
gpu[12,007-009] gpu12
a-b[1-2]-ib a-b1-ib
127.0.0.[11-12] 127.0.0.11
rack[2-3]n[04-05] rack2n04
x1,gpu[007-009] x1
single single
a-1.cluster.org,a-2.cluster.org a-1.cluster.org
"""


def test_first_machine_of_a_step_is_where_to_meet():
    for nodes, first in map(str.split, NODES.strip().splitlines()):
        assert meeting_point(SLURM_STEP_NODELIST=nodes)[0] == first
        assert meeting_point(SLURM_STEP_NODELIST="", SLURM_JOB_NODELIST=nodes)[0] == first


def test_ports_differ_between_steps_and_those_of_the_user_win():
    ports = [meeting_point(SLURM_JOB_ID=str(job))[1] for job in range(7_000, 7_200)]
    ports += [meeting_point(SLURM_STEP_ID=str(step))[1] for step in range(4, 20)]
    assert len(set(ports)) > 200  # of 216
    assert all(1024 < port < 32768 for port in ports)
    assert len({meeting_point(SLURM_PROCID=str(rank)) for rank in range(4)}) == 1
    assert meeting_point(MASTER_ADDR="10.0.0.7") == ("10.0.0.7", meeting_point()[1])
    assert meeting_point(MASTER_PORT="2345") == ("gpu007", 2345)


# Where a process computes

#: GPUs of a machine, `--device`, local rank (of Slurm: s); what is chosen, or what is said.
DEVICES = """
0 auto 3 -> cpu
2 cpu 3 -> cpu
4 cuda 3 -> cuda:3
4 cuda s3 -> cuda:3
4 auto 2 -> cuda:2
4 cuda:1 0 -> cuda:1
4 cuda:1 s0 -> cuda:1
4 cuda:1 3 -> --device cuda:1: all processes of this machine would share GPU 1
4 cuda:1 s3 -> --device cuda:1: all processes of this machine would share GPU 1
4 cuda 0 -> cuda:0
1 cuda s3 -> cuda:0
1 auto s3 -> cuda:0
1 cuda:0 s3 -> cuda:0
1 cuda:1 s3 -> process 3 asks for GPU 1 of 1
0 cuda 0 -> --device cuda: torch finds no CUDA device
0 cuda:1 0 -> --device cuda:1: torch finds no CUDA device
2 cuda 3 -> process 3 asks for GPU 3 of 2
2 cuda s3 -> process 3 asks for GPU 3 of 2
1 cuda 3 -> process 3 asks for GPU 3 of 1
2 cuda:2 0 -> --device cuda:2: process 0 asks for GPU 2 of 2
"""
UNKNOWN = "gpu", "cpu:x", "meta", "mps", "cuda:", "cuda:-1", ""


def test_choose_device(monkeypatch):
    lines = [line.split(" -> ") for line in DEVICES.strip().splitlines()]
    lines += [(f"4 {device} 0", f"--device {device} is unknown") for device in UNKNOWN]
    for given, expected in lines:
        gpus, device, local_rank = given.split(" ")
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpus=gpus: gpus != "0")
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: int(gpus))
        # Slurm shows each task its own GPU, if there is one.
        url = "tcp://node:12000" if "s" in local_rank else None
        rank = int(local_rank.strip("s"))
        launch = utils.Processes(3, 4, local_rank=rank, meeting_point=url)
        try:
            found = str(utils.choose_device(device, launch))
        except ValueError as error:
            found = str(error)
        assert found == expected or (" " in expected and expected in found), given
