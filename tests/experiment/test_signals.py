"""A run that a scheduler asks to stop saves its state, logs that, and can be resumed."""

import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress

import pytest

import continual_dataloader
import engine
import main
import utils
from continual_datasets import task_data
from experiment import describe, resume, session, training_run
from experiment.signals import EXIT_CODE, Preempted, StopSignals
from helpers.killed_commands import Child, exit_code, four_tasks, in_child
from helpers.resumed_runs import (
    ALWAYS,
    contents,
    differing,
    load,
    newest,
    outcome,
    start,
)
from training import evaluation

pytestmark = pytest.mark.usefixtures("restore_logging")

SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]

each_signal = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)


@pytest.fixture(autouse=True)
def heard():
    """What this process hears that no run listens to; by default it would end the tests."""
    came = []
    earlier = [signal.signal(n, lambda number, _: came.append(number)) for n in SIGNALS]
    yield came
    for number, handler in zip(SIGNALS, earlier, strict=True):
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


def sending(patch, place, name, number, at=1, behind=False):
    """Lets a function send a signal to this process when it is called for the n-th time."""
    function, calls = getattr(place, name), Counter()

    def signalled(*args, **kwargs):
        calls.update("n")
        if calls["n"] == at and not behind:
            send(number)
        result = function(*args, **kwargs)
        if calls["n"] == at and behind:
            send(number)
        return result

    patch.setattr(place, name, signalled)
    return calls


# Listening


def test_exit_code_is_the_one_for_temporary_failures():
    assert EXIT_CODE == os.EX_TEMPFAIL == 75


@each_signal
def test_signal_stops_at_once_what_is_no_training(number):
    with StopSignals() as signals:
        with pytest.raises(Preempted, match=number.name):
            send(number)
        assert signals.received is number


@each_signal
def test_signal_is_only_remembered_where_it_is_deferred(number):
    with StopSignals() as signals:
        with signals.deferred():
            assert signals.received is None
            send(number)
        assert signals.received is number


def test_signals_stop_at_once_again_behind_what_defers_them():
    with StopSignals() as signals:
        with pytest.raises(KeyError), signals.deferred():
            raise KeyError
        with pytest.raises(Preempted):
            send(signal.SIGTERM)


def test_first_signal_is_the_one_that_stops():
    with StopSignals() as signals:
        with signals.deferred():
            send(signal.SIGUSR1)
            send(signal.SIGTERM)
        send(signal.SIGUSR2)  # it is on its way out
        assert signals.received is signal.SIGUSR1


def test_second_signal_does_not_disturb_the_end():
    with StopSignals() as signals:
        with pytest.raises(Preempted):
            send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert signals.received is signal.SIGTERM


def test_preempted_is_no_error():
    assert not issubclass(Preempted, Exception)


def test_handlers_are_restored_and_hear_what_comes_later(heard):
    earlier = [signal.getsignal(number) for number in SIGNALS]
    with suppress(KeyError), StopSignals():
        assert not set(earlier) & {signal.getsignal(number) for number in SIGNALS}
        raise KeyError
    assert [signal.getsignal(number) for number in SIGNALS] == earlier
    send(signal.SIGUSR1)
    assert heard == [signal.SIGUSR1]


def test_hand_on_tells_who_listened_before(heard):
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    with StopSignals() as signals, signals.deferred():
        for number in SIGNALS:
            send(number)
        assert heard == []
    signals.hand_on()
    assert heard == [signal.SIGTERM, signal.SIGUSR1]


# Runs that are asked to stop


def assert_goes_on(command, whole, folder):
    assert start(command, folder) == 0
    assert differing(outcome(whole), outcome(folder)) == []


@each_signal
def test_signal_in_a_step_saves_after_it_or_the_next(
    command, whole, tmp_path, monkeypatch, capsys, number
):
    """Two steps make an epoch."""
    with monkeypatch.context() as patch:
        steps = sending(patch, engine, "_forward_backward", number, at=3)
        assert start(command, tmp_path) == EXIT_CODE
    assert steps["n"] in (3, 4)
    step = steps["n"] - 2
    text = capsys.readouterr().out
    assert f"{number.name} stopped the run after task 1, epoch 2, step {step}" in text
    assert "resume it by the same command with --resume auto" in text
    position = load(newest(tmp_path)).position
    assert (position.task, position.epoch, position.step) == (0, 1, step)
    assert_goes_on(command, whole, tmp_path)


def test_signal_in_the_last_step_of_a_task_saves_before_the_evaluation(
    command, whole, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        sending(patch, engine, "_forward_backward", signal.SIGTERM, at=4)
        patch.setattr(evaluation, "_test_sums", None)
        assert start(command, tmp_path) == EXIT_CODE
    position = load(newest(tmp_path)).position
    assert (position.task, position.epoch, position.evaluations) == (0, 2, [])
    assert_goes_on(command, whole, tmp_path)


def test_second_signal_while_the_state_is_saved_changes_nothing(
    command, whole, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        sending(patch, engine, "train_step", signal.SIGUSR1, at=2, behind=True)
        sending(patch, engine, "_forward_backward", signal.SIGTERM, at=3)
        sending(patch, resume, "take", signal.SIGTERM, at=2)
        sending(patch, resume, "save", signal.SIGUSR2, at=2, behind=True)
        sending(patch, session, "_report", signal.SIGTERM)
        assert start(command, tmp_path) == EXIT_CODE
    position = load(newest(tmp_path)).position
    assert (position.task, position.epoch, position.step) == (0, 1, 1)
    assert_goes_on(command, whole, tmp_path)


def test_signal_between_two_steps_stops_after_the_next(command, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        steps = sending(patch, training_run.Checkpointer, "at_boundary", signal.SIGTERM)
        assert start(command, tmp_path) == EXIT_CODE
    assert steps["n"] == 2
    assert load(newest(tmp_path)).position.step == 2
    assert_goes_on(command, whole, tmp_path)


@each_signal
def test_signal_in_an_evaluation_leaves_at_the_next_batch(
    command, tmp_path, monkeypatch, capsys, number
):
    """A test set is a batch of four images and one of two, each summed up in two ways."""
    argv = [*command, "--batch-size", "4"]
    assert start(argv, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        sums = sending(patch, evaluation, "_test_sums", number, at=9)  # second test set of task 2
        assert start(argv, tmp_path / "stopped") == EXIT_CODE
    assert sums["n"] == 10
    assert f"{number.name} stopped the run in an evaluation" in capsys.readouterr().out
    position = load(newest(tmp_path / "stopped")).position
    assert (position.task, position.epoch, position.evaluations) == (1, 2, [])
    assert_goes_on(argv, tmp_path / "whole", tmp_path / "stopped")


def test_evaluated_test_sets_that_are_saved_are_not_evaluated_again(
    command, whole, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        sending(patch, engine, "evaluate", signal.SIGTERM, at=3)
        assert start(command, tmp_path, *ALWAYS) == EXIT_CODE
    assert len(load(newest(tmp_path)).position.evaluations) == 1
    evaluations = sending(monkeypatch, engine, "evaluate", None, at=0)
    assert_goes_on(command, whole, tmp_path)
    assert evaluations["n"] == 1


def test_signal_before_anything_is_trained_leaves_at_once(
    command, whole, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        sending(patch, main, "assemble", signal.SIGUSR1, behind=True)
        patch.setattr(training_run, "recorded", None)
        assert start(command, tmp_path) == EXIT_CODE
    assert "SIGUSR1 stopped the program outside of training" in capsys.readouterr().out
    assert contents(tmp_path) == {}
    assert_goes_on(command, whole, tmp_path)


@pytest.mark.parametrize(
    ("place", "name"),
    [(utils, "log_to_file"), (describe, "describe"), (training_run, "Checkpointer")],
)
def test_signal_in_the_first_moments_leaves_at_once(
    command, whole, tmp_path, monkeypatch, place, name
):
    with monkeypatch.context() as patch:
        sending(patch, place, name, signal.SIGTERM)
        patch.setattr(engine, "train_step", None)
        assert start(command, tmp_path) == EXIT_CODE
    assert not newest(tmp_path).exists()
    assert_goes_on(command, whole, tmp_path)


def test_signal_behind_the_last_task_leaves_a_complete_run(
    command, whole, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        sending(patch, training_run, "_report", signal.SIGTERM)
        assert start(command, tmp_path) == EXIT_CODE
    monkeypatch.setattr(engine, "train_step", None)
    assert_goes_on(command, whole, tmp_path)
    assert "The run is complete already" in capsys.readouterr().out


def test_run_without_output_dir_stops_too(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = sending(monkeypatch, engine, "_forward_backward", signal.SIGTERM, at=3)
    assert main.main([*command, "--output_dir", ""]) == EXIT_CODE
    assert steps["n"] in (3, 4)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("way", ["done", "stopped", "refused", "failed", "crashed"])
def test_command_restores_the_handlers(command, tmp_path, monkeypatch, heard, way):
    earlier = [signal.getsignal(number) for number in SIGNALS]
    flags = ["--epochs", "0"] if way == "refused" else []
    if way == "stopped":
        sending(monkeypatch, engine, "_forward_backward", signal.SIGUSR1)
    if way in ("failed", "crashed"):
        error = OSError("no") if way == "failed" else KeyError("no")
        monkeypatch.setattr(main, "assemble", lambda *_, **__: (_ for _ in ()).throw(error))
    codes = {"done": 0, "stopped": 75, "refused": 2, "failed": 1, "crashed": 1}
    assert start(command, tmp_path, *flags) == codes[way]
    assert [signal.getsignal(number) for number in SIGNALS] == earlier
    assert heard == ([signal.SIGUSR1] if way == "stopped" else [])


# Runs that are asked to stop from outside


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_run_stopped_at_random_moments_repeats_no_step(command, tmp_path, seed):
    argv = four_tasks(command)
    generator = random.Random(seed)
    assert main.main([*argv, "--output_dir", str(tmp_path / "whole")]) == 0
    again = [*argv, "--output_dir", str(tmp_path / "stopped"), "--resume", "auto"]
    stops, steps, code = Counter(), 0, None
    while code != 0:
        child = Child(again, tmp_path / "log.txt", generator.randint(1, 8))
        number = SIGNALS[stops.total() % 3]
        code = child.kill(number, delay=generator.choice([0, generator.uniform(0, 0.005)]))
        assert code in (0, EXIT_CODE), (tmp_path / "log.txt").read_text()
        stops[child.doing] += code != 0
        steps += child.steps
        assert stops.total() < 100
    assert stops.total() >= 6
    assert steps == 32
    assert differing(outcome(tmp_path / "whole"), outcome(tmp_path / "stopped")) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_loader_workers_outlive_a_signal_to_all_processes(command, whole, tmp_path, number):
    """Schedulers signal every process of a job; the last step must still get its images."""

    def be_a_job():
        os.setsid()
        utils.usable_cores = lambda: 2
        read = task_data.TrainData.__getitem__
        task_data.TrainData.__getitem__ = lambda *args: (time.sleep(0.02), read(*args))[1]

    argv = [*command, "--num_workers", "2", "--output_dir", str(tmp_path), "--resume", "auto"]
    child = Child(argv, tmp_path / "child.txt", moment=3, prepare=be_a_job)
    assert child.kill(number, send=os.killpg) == EXIT_CODE, (tmp_path / "child.txt").read_text()
    position = load(newest(tmp_path)).position
    assert (position.task, position.epoch, position.step) == (0, 1, 1)
    (tmp_path / "child.txt").unlink()
    assert_goes_on(command, whole, tmp_path)


def test_worker_ends_some_time_after_a_signal():
    def worker(bell):
        continual_dataloader._WORKER_SECONDS = 1
        continual_dataloader.outlive_stop_signals(0)
        os.write(bell, b"!")
        for _ in range(500):
            time.sleep(0.01)

    begun, bell = os.pipe()
    pid = in_child(worker, bell)
    os.read(begun, 1)
    for number in SIGNALS:
        os.kill(pid, number)
    time.sleep(0.2)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    assert exit_code(pid) == -signal.SIGALRM


def test_signal_while_an_error_is_told_changes_nothing(monkeypatch, capsys):
    def tell(error):
        signal.raise_signal(signal.SIGTERM)
        return 2, str(error)

    monkeypatch.setattr(session, "_report", tell)
    assert main.main(["--bogus"]) == 2
