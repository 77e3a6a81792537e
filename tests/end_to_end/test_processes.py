"""Who a process is, and how several of them work and end together."""

import importlib
import itertools
import os
import random
import re
import shutil
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch

import main
import utils
from experiment import checkpoints, resume
from experiment.signals import EXIT_CODE
from helpers.process_groups import by_launcher, by_slurm, free_port, together
from helpers.process_runs import (
    assert_equal_runs,
    assert_equal_usage,
    results,
    run,
    shape,
    step_losses,
)
from reports.metrics import SELECTIONS

KILLED = -signal.SIGKILL


# What a process does in the middle of a run


def act(name, number, actions, rank, grace=None):
    """Lets processes, by rank, do something when they call a function the n-th time.

    Args:
        name: Module and function.
        number: Of the call, from 1.
        actions: What each does then, just before the call.
        rank: This process.
        grace: Seconds for which a process may still leave by itself; None: as usual.
    """
    utils._GRACE = utils._GRACE if grace is None else grace
    module, name = name.rsplit(".", 1)
    calls, function = itertools.count(1), getattr(importlib.import_module(module), name)

    def call(*args, **keywords):
        if next(calls) == number and rank in actions:
            actions[rank]()
        return function(*args, **keywords)

    setattr(importlib.import_module(module), name, call)


def impatient(rank):
    utils._GRACE = 0.5


def signal_itself(number):
    if number == signal.SIGINT:  # which a shell lets its background processes ignore
        signal.signal(number, signal.default_int_handler)
    os.kill(os.getpid(), number)


def fail():
    raise ValueError("boom")


# Several processes equal one


def test_runs_of_these_tests_could_differ(alone):
    """Votes overrule images, several prompts serve, some predictions are right, and losses move."""
    found = results(alone(12, 3))
    assert any(entry["batch"] != entry["instance"] for entry in found["prompt_usage"])
    assert all(np.count_nonzero(entry["batch"]) > 2 for entry in found["prompt_usage"])
    assert 0 < found["batch"]["average_accuracy"] < 100
    assert {sum(entry["batch"]) for entry in found["prompt_usage"]} == {2 * 7}  # of every image
    places, losses = step_losses(alone(12, 3))
    assert [place[-4:-1] for place in places] == ["0/2", "1/2", "0/2", "1/2", "0/1", "0/1"]
    assert len(set(losses)) > 5


@pytest.mark.parametrize(
    ("count", "batch", "group"),
    [
        (2, 6, 3),  # steps of 12 and 1 images: nothing for one process
        (4, 3, 3),  # and nothing for three; three vote groups of test images for four processes
        (3, 3, 3),  # 9 and 4 images: 3, 1 and none
    ],
)
def test_several_processes_equal_one(alone, pictures, tmp_path, count, batch, group):
    done = run(tmp_path, count, shape(batch, group, pictures, tmp_path))
    assert done.codes == [0] * count, done.text
    assert_equal_runs(tmp_path, alone(count * batch, group))
    assert f"{count * batch} images a step, vote group of {group}\n" in done.texts[0]
    assert f"Processes: {count} on cpu" in done.texts[0]
    assert done.texts[1:] == [""] * (count - 1)  # one process speaks


#: What is drawn, or counted, over all processes.
SHARED = {
    "replay": ["--buffer_size", "14"],
    "frequency": [
        "--diversify",
        "frequency",
        "--buffer_per_class",
        "2",
        "--pull_constraint_coeff",
        "1",
    ],
}


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize(
    ("count", "batch", "group"),
    [(2, 6, 3), pytest.param(3, 3, 3, marks=pytest.mark.slow)],
)
def test_several_processes_replay_and_count_as_one(pictures, tmp_path, name, count, batch, group):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    flags = shape(count * batch, group, pictures, alone)
    done = run(alone, 1, [*flags, *SHARED[name]], environment=lambda rank: {})
    assert done.codes == [0], done.text
    done = run(shared, count, [*shape(batch, group, pictures, shared), *SHARED[name]])
    assert done.codes == [0] * count, done.text
    assert_equal_runs(shared, alone)
    for task in (1, 2):
        one, two = (checkpoints.load(checkpoints.task_path(f, task)) for f in (alone, shared))
        assert two.buffer.tolist() == one.buffer.tolist() != []
        counters = [key for key in one.model if "served" in key]
        assert len(counters) == (2 if name == "frequency" else 0)
        assert all(torch.equal(two.model[key], one.model[key]) for key in counters)
    if counters:  # of 2 epochs of 13, and of 12 and as many replayed images for each vote group
        assert one.model["prompt.served_before"].sum() == 2 * 2 * 13
        assert one.model["prompt.served_now"].sum() == 2 * 2 * (12 + 4 * 3)


def test_run_with_replay_goes_on_in_another_number(pictures, tmp_path):
    """Stopped in the second task, where three replayed images join every four."""
    flags = [*SHARED["frequency"], "--replay_batch", "3"]
    alone, parts = tmp_path / "alone", tmp_path / "parts"
    sizes = {"batch": 4, "group": 4}
    reference = [*shape(8, 4, pictures, alone), *flags, "--replay_batch", "6"]
    assert run(alone, 1, reference, environment=lambda rank: {}).codes == [0]
    actions = {1: partial(signal_itself, signal.SIGTERM)}
    where = ("engine.train_step", 5)
    done = stopped(parts, pictures, actions, *flags, where=where, **sizes)
    assert done.codes == [EXIT_CODE, EXIT_CODE], done.text
    assert torch.load(resume.newest_path(parts), weights_only=True)["position"]["task"] == 1
    done = go_on(parts, 3, pictures, *flags, **sizes)
    assert done.codes == [0] * 3, done.text
    assert "task 2, 0 of 2 epochs and 2 steps done" in done.texts[0]
    assert_equal_runs(parts, alone, stopped=True)


def test_evaluation_in_several_processes_equals_one(alone, pictures, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(alone(12, 3), folder)
    found = []
    for count in (1, 2, 4):
        flags = ["--eval", "--output_dir", folder, "--device", "cpu", "--num_workers", "0"]
        done = run(tmp_path, count, flags)
        assert done.codes == [0] * count, done.text
        assert done.texts[0].count("Reproduces the stored accuracies") == 4
        assert done.texts[1:] == [""] * (count - 1)
        found.append(results(folder, "eval_results"))
    for other in (results(folder), *found[1:]):
        for selection in SELECTIONS:
            assert other[selection] == found[0][selection]
        assert_equal_usage(other["prompt_usage"], found[0]["prompt_usage"])


def test_one_process_of_a_launcher_is_a_group(alone, pictures, tmp_path):
    assert run(tmp_path, 1, shape(12, 3, pictures, tmp_path)).codes == [0]
    assert_equal_runs(tmp_path, alone(12, 3))


# Stopped, and going on in another number of processes


def stopped(
    folder, pictures, actions, *flags, where=("engine.train_step", 6), batch=2, group=2, **more
):
    """A run in two processes that do something in the sixth of its 14 steps.

    That is the second of the second epoch; a signal that comes in it is found in the third.
    """
    flags = [*shape(batch, group, pictures, folder), *flags]
    return run(folder, 2, flags, partial(act, *where, actions, **more))


def go_on(folder, count, pictures, *flags, batch=2, group=2):
    return run(folder, count, [*shape(batch, group, pictures, folder), "--resume", "auto", *flags])


@pytest.mark.parametrize(
    ("number", "rank", "count"), [(signal.SIGTERM, 1, 1), (signal.SIGUSR1, 0, 4)]
)
def test_signal_to_one_process_stops_all_and_any_number_goes_on(
    alone, pictures, tmp_path, number, rank, count
):
    done = stopped(tmp_path, pictures, {rank: partial(signal_itself, number)})
    assert done.codes == [EXIT_CODE, EXIT_CODE], done.text
    place = "stopped the run after task 1, epoch 2, step 3"
    assert f"{number.name} {place}" in done.texts[rank]
    assert f"another process {place}" in done.texts[1 - rank]
    done = go_on(tmp_path, count, pictures)
    assert done.codes == [0] * count, done.text
    assert "task 1, 1 of 2 epochs and 3 steps done" in done.texts[0]
    assert "4 images a step, vote group of 2" in done.texts[0]
    warning = "2 of 4 processes have nothing to train on: 4 images a step are 2 vote groups"
    assert (warning in done.texts[0]) == (count == 4)
    assert_equal_runs(tmp_path, alone(4, 2), stopped=True)


def test_killed_run_goes_on_in_another_number(alone, pictures, tmp_path):
    """From the state of the last step, by processes that cannot share the batch evenly."""
    actions = {rank: partial(signal_itself, signal.SIGKILL) for rank in (0, 1)}
    sizes = {"batch": 6, "group": 3}  # six steps
    where = ("engine.train_step", 4)
    done = stopped(tmp_path, pictures, actions, "--save_every", "1e-9", where=where, **sizes)
    assert done.codes == [KILLED, KILLED]
    done = go_on(tmp_path, 3, pictures, **sizes)
    assert done.codes == [0, 0, 0], done.text
    assert "task 1, 1 of 2 epochs and 1 steps done" in done.texts[0]
    assert "12 images a step, vote group of 3\n" in done.texts[0]
    assert "Processes: 3 on cpu" in done.texts[0]
    assert_equal_runs(tmp_path, alone(12, 3), stopped=True)


def test_run_goes_on_with_the_same_images_a_step(alone, pictures, tmp_path):
    done = stopped(tmp_path, pictures, {1: partial(signal_itself, signal.SIGUSR2)})
    assert done.codes == [EXIT_CODE, EXIT_CODE], done.text
    newest = resume.newest_path(tmp_path).read_bytes()

    done = go_on(tmp_path, 2, pictures, "--batch-size", "4")
    assert done.codes == [2, 2]
    problem = "--batch-size 4 in 2 processes, 8 images a step, where the run has 4"
    assert problem in done.texts[0]
    assert "Traceback" not in done.text
    assert resume.newest_path(tmp_path).read_bytes() == newest

    done = go_on(tmp_path, 1, pictures, "--batch-size", "4")
    assert done.codes == [0], done.text
    assert "4 images a step" in done.text
    assert_equal_runs(tmp_path, alone(4, 2), stopped=True)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_signal_in_an_evaluation_stops_all(alone, pictures, tmp_path, rank):
    """In the second evaluation after the second task; only one process knows."""
    actions = {rank: partial(signal_itself, signal.SIGTERM)}
    done = stopped(tmp_path, pictures, actions, where=("engine.evaluate", 3), grace=0.5)
    assert done.codes == [EXIT_CODE, EXIT_CODE], done.text
    assert "SIGTERM stopped the run in an evaluation" in done.texts[rank]
    assert done.seconds < 15
    done = go_on(tmp_path, 4, pictures)
    assert done.codes == [0] * 4, done.text
    assert "task 2, 2 of 2 epochs and 0 steps done" in done.texts[0]
    assert_equal_runs(tmp_path, alone(4, 2))


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("where", [("experiment.build.build_stream", 1), ("engine.evaluate", 2)])
def test_signal_to_one_process_stops_an_evaluation_of_checkpoints(alone, tmp_path, rank, where):
    actions = {rank: partial(signal_itself, signal.SIGTERM)}
    flags = ["--eval", "--output_dir", alone(12, 3), "--device", "cpu", "--num_workers", "0"]
    done = run(tmp_path, 2, flags, partial(act, *where, actions, grace=0.5), within=15)
    assert done.codes == [EXIT_CODE, EXIT_CODE], done.text
    assert "SIGTERM stopped the " in done.texts[rank]


def save_slowly(rank):
    """Writing the state takes longer than another process waits."""
    act("engine.train_step", 6, {1: partial(signal_itself, signal.SIGTERM)}, rank, grace=0.5)
    act(
        "experiment.resume.save", 2, {0: partial(time.sleep, 2.5)}, rank
    )  # the first ends the first epoch


@pytest.mark.slow
def test_state_is_saved_however_long_it_takes(pictures, tmp_path):
    done = run(tmp_path, 2, shape(2, 2, pictures, tmp_path), save_slowly)
    assert done.codes == [EXIT_CODE, EXIT_CODE], done.text
    state = torch.load(resume.newest_path(tmp_path), weights_only=True)
    assert (state["position"]["epoch"], state["position"]["step"]) == (1, 3)


# Failing, together


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_failing_process_ends_all_with_its_error(pictures, tmp_path, rank):
    """While the others wait in a collective."""
    hook = partial(act, "engine.train_step", 2, {rank: fail}, grace=0.5)
    done = run(tmp_path, 3, shape(3, 3, pictures, tmp_path), hook, within=15)
    assert done.codes == [1, 1, 1], done.text
    assert "ValueError: boom" in done.texts[rank]
    assert "Traceback" in done.texts[rank]
    for other in {0, 1, 2} - {rank}:
        assert "Traceback" not in done.texts[other]
        assert f"error: process {rank} ended: ValueError: boom" in done.texts[other]


def test_damaged_image_of_one_process_is_named_by_all(pictures, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    broken = data / "train" / "a" / "0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    flags = [*shape(3, 3, data, tmp_path / "out"), "--num_workers", "1"]
    done = run(tmp_path, 2, flags, impatient, within=15)
    assert done.codes == [1, 1]
    assert "Traceback" not in done.text
    own = [rank for rank in (0, 1) if f"error: {broken}: " in done.texts[rank]]
    assert len(own) == 1
    assert f"error: process {own[0]} ended: {broken}: " in done.texts[1 - own[0]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "where"),
    [
        (0, ("engine.train_step", 2)),
        (1, ("engine.train_step", 2)),
        (0, ("experiment.training_run._report", 1)),
    ],
)
def test_killed_process_ends_all(pictures, tmp_path, rank, where):
    """Also where the others wait for the first one to finish."""
    hook = partial(act, *where, {rank: partial(signal_itself, signal.SIGKILL)}, grace=0.5)
    done = run(tmp_path, 3, shape(3, 3, pictures, tmp_path), hook, within=15)
    assert done.codes[rank] == KILLED
    others = {0, 1, 2} - {rank}
    assert [done.codes[other] for other in others] == [1, 1], done.text
    assert "Traceback" not in done.text
    for other in others:
        assert " gone" in done.texts[other]


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "grace"), [(0, None), (1, 0.5)])
def test_process_that_hangs_outside_a_collective_is_ended(pictures, tmp_path, rank, grace):
    actions = {rank: partial(time.sleep, 100), 1 - rank: fail}
    hook = partial(act, "engine.train_step", 2, actions, grace=grace)
    done = run(tmp_path, 2, shape(3, 3, pictures, tmp_path), hook, within=15)
    assert done.codes == [1, 1]
    assert "ValueError: boom" in done.texts[1 - rank]
    assert f"error: process {1 - rank} ended: ValueError: boom" in done.texts[rank]


@pytest.mark.slow
def test_process_may_still_leave_by_itself(pictures, tmp_path):
    """It is busy for a while when the other fails, and comes to the collective in time."""
    hook = partial(act, "engine.train_step", 2, {0: partial(time.sleep, 2), 1: fail}, grace=20.0)
    done = run(tmp_path, 2, shape(3, 3, pictures, tmp_path), hook)
    assert done.codes == [1, 1]
    assert "error: process 1 ended: ValueError: boom" in done.texts[0]
    assert done.seconds < 15


def test_refusal_by_the_first_process_alone_is_the_exit_code_of_all(pictures, tmp_path):
    """It looks for the state; the others wait for what it finds."""
    flags = [*shape(3, 3, pictures, tmp_path / "out"), "--resume", tmp_path]
    done = run(tmp_path, 2, flags, impatient, within=15)
    assert done.codes == [2, 2], done.text
    assert "there is no state of a run, such as last.pth" in done.texts[0]


def test_loss_that_is_no_number_ends_all_and_the_model_is_saved(pictures, tmp_path):
    flags = ["--lr", "1e30", "--lr_scale", "none", "--clip-grad", "none"]
    slow = {0: partial(time.sleep, 2.5)}
    hook = partial(act, "experiment.training_run.save_checkpoint", 1, slow, grace=0.5)
    done = run(tmp_path, 2, [*shape(3, 3, pictures, tmp_path), *flags], hook, within=15)
    assert done.codes == [1, 1]
    assert all("in task 1, epoch 1, step " in text for text in done.texts), done.text
    assert (tmp_path / "checkpoint" / "last_finite_checkpoint.pth").exists()


def test_every_exit_code_is_that_of_the_first_failure(pictures, tmp_path):
    hook = partial(act, "engine.train_step", 2, {1: partial(signal_itself, signal.SIGINT)})
    done = run(tmp_path, 2, shape(3, 3, pictures, tmp_path), hook, within=15)
    assert done.codes == [130, 130], done.text
    assert "process 1 ended: interrupted" in done.texts[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_process_that_fails_before_the_others_have_joined_ends_all(pictures, tmp_path, rank):
    """Such as on a machine of its own that lacks the data."""
    flags = [shape(3, 3, pictures, tmp_path)] * 3
    flags[rank] = shape(3, 3, tmp_path / "nowhere", tmp_path)
    done = together(tmp_path, 3, partial(_main_each, flags), within=20)
    assert done.codes == [2, 2, 2], done.text
    assert "nowhere does not exist" in done.text


def _main_each(flags, rank):
    impatient(rank)
    return main.main([str(flag) for flag in flags[rank]])


# What they exchange


def exchange(work, rank):
    """Runs `work(rank)` as one of a group."""
    place = utils.init_processes("cpu")
    assert place.rank == utils.rank() == rank
    assert utils.is_main_process() == (rank == 0)
    work(rank)
    utils.close_processes()
    assert not torch.distributed.is_initialized()


def share_in_turn(rank):
    large = random.Random(0).randbytes(3_000_000)
    for data in (b"", b"\0\xff state", large, b""):
        assert utils.share_bytes(data if rank == 0 else b"of another process") == data


def sum_in_turn(rank):
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


@pytest.mark.parametrize("work", [share_in_turn, sum_in_turn])
def test_three_processes_exchange(tmp_path, work):
    done = together(tmp_path, 3, partial(exchange, work))
    assert done.codes == [0, 0, 0], done.text


def join(rank):
    utils.init_processes("cpu", "env://" if rank == 0 else os.environ["ELSEWHERE"])
    assert utils.sum_over_processes(torch.ones(1)).item() == 2
    utils.close_processes()


def test_processes_meet_where_dist_url_says(tmp_path):
    port = free_port()
    environment = by_launcher(2, port)
    done = together(
        tmp_path,
        2,
        join,
        lambda rank: {
            **environment(rank),
            "MASTER_PORT": str(port if rank == 0 else 1),
            "ELSEWHERE": f"tcp://127.0.0.1:{port}",
        },
    )
    assert done.codes == [0, 0], done.text


def test_tasks_of_slurm_meet_by_themselves(alone, pictures, tmp_path):
    flags = shape(6, 3, pictures, tmp_path)
    done = run(tmp_path, 2, flags, environment=by_slurm(2))
    assert done.codes == [0, 0], done.text
    assert_equal_runs(tmp_path, alone(12, 3))


# Who a process is


STEP = {
    "SLURM_JOB_ID": "71", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[007-008]", "SLURM_JOB_NODELIST": "gpu[001-9]",
}  # fmt: skip
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "2"}

#: What the shell of an allocation, or a batch script, finds.
ALLOCATION = {
    "SLURM_JOB_ID": "71", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4",
    "SLURM_JOB_NODELIST": "gpu[007-008]", "SLURM_JOB_NUM_NODES": "2",
}  # fmt: skip


def without_meeting_point(launch):
    return launch and (launch.rank, launch.world_size, launch.local_rank, launch.by_slurm)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"RANK": "0"}, None),
        (TORCHRUN, (5, 8, 2, False)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0, False)),
        ({**STEP, **TORCHRUN}, (5, 8, 2, False)),  # torchrun, itself started by srun
        (STEP, (3, 4, 1, True)),
        (ALLOCATION, None),
        ({**ALLOCATION, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "4294967290"}, None),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({k: v for k, v in ALLOCATION.items() if k != "SLURM_PROCID"}, None),  # of salloc
    ],
    ids=[
        "nothing", "a rank alone", "torchrun", "torchrun with one", "torchrun in a step", "srun",
        "batch script", "interactive step", "srun with one", "salloc",
    ],
)  # fmt: skip
def test_find_launch(environ, expected):
    launch = utils.find_launch(environ)
    assert without_meeting_point(launch) == expected
    if expected is None or not expected[-1]:
        assert launch is None or launch.meeting_point is None


def meeting_point(**changes):
    launch = utils.find_launch({**STEP, **changes})
    host, port = re.fullmatch(r"tcp://(.*):(\d+)", launch.meeting_point).groups()
    return host, int(port)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[007-009,12],x1", "gpu007"),
        ("gpu[12,007-009]", "gpu12"),
        ("a-b[1-2]-ib", "a-b1-ib"),
        ("127.0.0.[11-12]", "127.0.0.11"),
        ("rack[2-3]n[04-05]", "rack2n04"),
        ("x1,gpu[007-009]", "x1"),
        ("single", "single"),
        ("a-1.cluster.org,a-2.cluster.org", "a-1.cluster.org"),
    ],
)
def test_first_machine_of_a_step_is_where_to_meet(nodes, first):
    assert meeting_point(SLURM_STEP_NODELIST=nodes)[0] == first
    assert meeting_point(SLURM_STEP_NODELIST="", SLURM_JOB_NODELIST=nodes)[0] == first


def test_ports_differ_between_steps_and_stay_in_range():
    ports = [meeting_point(SLURM_JOB_ID=str(job))[1] for job in range(7_000, 7_200)]
    ports += [meeting_point(SLURM_STEP_ID=str(step))[1] for step in range(4, 20)]
    assert len(set(ports)) > 200  # of 216
    assert all(1024 < port < 32768 for port in ports)
    assert len({meeting_point(SLURM_PROCID=str(rank)) for rank in range(4)}) == 1


def test_address_and_port_of_the_user_win():
    assert meeting_point(MASTER_ADDR="10.0.0.7") == ("10.0.0.7", meeting_point()[1])
    assert meeting_point(MASTER_PORT="2345") == ("gpu007", 2345)


def test_port_of_the_user_holds_among_tasks(tmp_path):
    work = partial(exchange, check_port)
    done = together(tmp_path, 3, work, by_slurm(3, MASTER_PORT=str(free_port())))
    assert done.codes == [0, 0, 0], done.text


def check_port(rank):
    store = torch.distributed.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    assert store.port == int(os.environ["MASTER_PORT"])


def test_init_processes_without_launcher_is_one_process(no_launcher):
    assert utils.init_processes("cpu") == utils.Processes(0, 1, torch.device("cpu"))
    assert not torch.distributed.is_initialized()
    assert utils.is_main_process()


def test_run_in_an_interactive_shell_of_slurm_is_alone(alone, pictures, tmp_path):
    done = run(tmp_path, 1, shape(12, 3, pictures, tmp_path), environment=lambda rank: ALLOCATION)
    assert done.codes == [0], done.text
    assert "Processes: 1 on cpu" in done.text
    assert_equal_runs(tmp_path, alone(12, 3))


def test_world_size_is_checked_against_the_launcher(no_launcher, monkeypatch, tmp_path, capsys):
    for name, value in {**STEP, "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    argv = ["--world_size", "2", "--device", "cpu", "--data-path", str(tmp_path)]
    monkeypatch.setattr(utils, "meet", lambda *_: None, raising=False)
    assert main.main(argv) == 2
    assert "--world_size 2: the launcher started 4 processes" in capsys.readouterr().err


# Where a process computes


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that so many GPUs are visible."""

    def pretend(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


def test_device_auto_is_cpu_without_cuda(no_launcher, no_cuda):
    assert utils.init_processes("auto").device == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_device_cuda_without_cuda_is_an_error(no_launcher, no_cuda, device):
    with pytest.raises(ValueError, match=f"--device {device}: torch finds no CUDA device"):
        utils.init_processes(device)


@pytest.mark.parametrize(
    ("device", "local_rank", "index"),
    [("cuda", 3, 3), ("auto", 2, 2), ("cuda:1", 3, 1), ("cuda:1", 0, 1), ("cuda", 0, 0)],
)
@pytest.mark.parametrize("by_slurm", [False, True])
def test_device_cuda_follows_local_rank_unless_numbered(gpus, device, local_rank, index, by_slurm):
    gpus(4)
    launch = utils.Launch(local_rank=local_rank, by_slurm=by_slurm)
    assert utils.choose_device(device, launch) == torch.device("cuda", index)


def test_device_of_a_task_that_sees_one_gpu_is_the_first(gpus):
    gpus(1)
    launch = utils.Launch(rank=3, world_size=4, local_rank=3, by_slurm=True)
    for device in ("cuda", "auto"):
        assert utils.choose_device(device, launch) == torch.device("cuda", 0)


@pytest.mark.parametrize(("count", "by_slurm"), [(2, False), (2, True), (1, False)])
def test_device_beyond_the_gpus_is_an_error(gpus, count, by_slurm):
    gpus(count)
    with pytest.raises(ValueError, match=f"process 3 asks for GPU 3 of {count}"):
        utils.choose_device("cuda", utils.Launch(local_rank=3, by_slurm=by_slurm))


def test_numbered_device_beyond_the_gpus_is_an_error(gpus):
    gpus(2)
    with pytest.raises(ValueError, match="--device cuda:2: process 0 asks for GPU 2 of 2"):
        utils.choose_device("cuda:2")


def test_device_cpu_ignores_gpus(gpus):
    gpus(2)
    launch = utils.Launch(local_rank=3)
    assert utils.choose_device("cpu", launch) == torch.device("cpu")


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "meta", "mps", "cuda:", "cuda:-1", ""])
def test_device_of_unknown_name_is_a_value_error(no_launcher, device):
    with pytest.raises(ValueError, match=f"--device {device} is unknown"):
        utils.init_processes(device)


# One process alone


def test_sums_of_a_single_process_change_nothing():
    parameter = torch.nn.Parameter(torch.ones(2))
    assert utils.sum_over_processes(torch.tensor([1.0, 2.0])).tolist() == [1, 2]
    utils.sum_gradients([parameter])
    assert parameter.grad is None
    assert utils.share_bytes(b"state") == b"state"


def test_nobody_else_ends(no_launcher):
    utils.announce_end(1, "boom")
    assert utils.announced_end(wait=0.0) is None
    utils.close_processes()
