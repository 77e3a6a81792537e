"""A run that a scheduler asks to stop saves its state, logs that, and can be resumed."""

import itertools
import os
import signal
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from unittest.mock import Mock

import pytest

import continual_dataloader
import engine
import main
import utils
from continual_datasets import task_data
from experiment import describe, resume, session, training_run
from experiment.session import Session
from experiment.signals import EXIT_CODE, Preempted, StopSignals, was_stopped
from helpers.killed_commands import exit_code, in_child
from helpers.process_groups import by_nobody, together
from helpers.resumed_runs import ALWAYS, assert_resumes, contents, place, start
from training import evaluation, objective

pytestmark = pytest.mark.usefixtures("restore_logging")

SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]


@pytest.fixture(autouse=True)
def heard():
    """What this process hears that no run listens to; by default it would end the tests.

    However a run ends, it has restored the handlers.
    """
    came = []

    def hear(number, _):
        came.append(number)

    earlier = [signal.signal(number, hear) for number in SIGNALS]
    yield came
    found = [signal.signal(*pair) for pair in zip(SIGNALS, earlier, strict=True)]
    assert found == [hear] * len(SIGNALS)


def sending(patch, where, name, number, at=1, behind=False):
    """Lets a function send a signal to this process when it is called for the n-th time."""
    function, calls = getattr(where, name), Counter()

    def signalled(*args, **kwargs):
        calls.update("n")
        if calls["n"] == at and not behind:
            signal.raise_signal(number)
        result = function(*args, **kwargs)
        if calls["n"] == at and behind:
            signal.raise_signal(number)
        return result

    patch.setattr(where, name, signalled)
    return calls


# Listening


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_first_signal_stops_at_once_what_is_idle(number):
    assert EXIT_CODE == os.EX_TEMPFAIL == 75
    with StopSignals() as signals:
        signals.idle = True
        signals.check()
        with pytest.raises(Preempted, match=f"{number.name} stopped the program outside of"):
            signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)  # it is on its way out
        assert signals.received == [number, signal.SIGTERM]


def test_handlers_are_restored_and_hear_what_comes_later(heard):
    earlier = [signal.getsignal(number) for number in SIGNALS]
    with suppress(KeyError), StopSignals() as signals:
        with signals.suspended():
            signal.raise_signal(signal.SIGUSR2)
        assert not set(earlier) & {signal.getsignal(number) for number in SIGNALS}
        raise KeyError
    assert [signal.getsignal(number) for number in SIGNALS] == earlier
    signal.raise_signal(signal.SIGUSR1)
    assert heard == [signal.SIGUSR2, signal.SIGUSR1]


def test_hand_on_tells_who_listened_before(heard):
    handler = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    with StopSignals() as signals:
        for number in SIGNALS:
            signal.raise_signal(number)
        assert heard == []
    signals.hand_on()
    signal.signal(signal.SIGUSR2, handler)
    assert heard == [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]


def test_hangup_that_nohup_ignores_stays_ignored():
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGHUP)
        assert signals.received == []
        with signals.suspended():
            pass
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    signal.signal(signal.SIGHUP, handler)


@pytest.mark.parametrize(
    ("asked", "saved", "code"), [(False, True, 1), (True, True, EXIT_CODE), (True, False, 143)]
)
def test_process_that_loses_another_was_stopped_if_it_was_asked_to(capsys, asked, saved, code):
    with StopSignals() as signals, Session(signals) as run:
        signals.saved = saved
        if asked:
            signal.raise_signal(signal.SIGTERM)
        raise utils.LostProcessError("another process of the run is gone (closed)")
    assert run.code == code
    assert was_stopped(run.code) is asked
    assert "another process of the run is gone (closed)" in capsys.readouterr().out


# Runs that are asked to stop: two tasks, two epochs of two steps each


@pytest.mark.parametrize(
    ("where", "name", "at", "stopped", "message"),
    [
        (objective, "masked_cross_entropy", 3, (0, 1, 2, 0), "after task 1, epoch 2, step 2"),
        (objective, "masked_cross_entropy", 4, (0, 2, 0, 0), "in an evaluation"),  # not begun
        (training_run.Checkpointer, "at_boundary", 1, (0, 0, 2, 0), "after task 1, epoch 1, step"),
        (engine, "evaluate", 3, (1, 2, 0, 1), "in an evaluation"),  # the first test set is done
    ],
    ids=["in a step", "in the last step of a task", "between two steps", "in an evaluation"],
)
def test_signal_saves_what_was_done(
    command, whole, tmp_path, monkeypatch, capsys, where, name, at, stopped, message
):
    number, done = SIGNALS[at % 2], stopped[-1]
    with monkeypatch.context() as patch:
        sending(patch, where, name, number, at=at)
        if not done:
            patch.setattr(evaluation, "find_overruled", None)
        assert start(command, tmp_path, *(ALWAYS if done else [])) == EXIT_CODE
    text = capsys.readouterr().out
    assert f"{number.name} stopped the run {message}" in text
    assert "resume it by the same command with --resume auto" in text
    assert place(tmp_path) == stopped
    evaluations = sending(monkeypatch, engine, "evaluate", None, at=0)
    assert_resumes(command, tmp_path, whole)
    assert evaluations["n"] == (1 if done else 3)  # what is saved is not evaluated again


def test_second_signal_while_the_state_is_saved_changes_nothing(
    command, whole, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        sending(patch, engine, "train_step", signal.SIGUSR1, at=2, behind=True)
        sending(patch, objective, "masked_cross_entropy", signal.SIGTERM, at=3)
        sending(patch, resume, "take", signal.SIGTERM, at=2)
        sending(patch, resume, "save", signal.SIGUSR2, at=2, behind=True)
        sending(patch, session, "_report", signal.SIGTERM)
        assert start(command, tmp_path) == EXIT_CODE
    assert place(tmp_path) == (0, 1, 1, 0)
    assert_resumes(command, tmp_path, whole)


def test_signal_in_an_evaluation_leaves_at_the_next_batch(command, tmp_path, monkeypatch):
    """A test set is a batch of four images and one of two."""
    batches = sending(monkeypatch, evaluation, "find_overruled", signal.SIGUSR2, at=1)
    assert start([*command, "--batch-size", "4", "--epochs", "1"], tmp_path) == EXIT_CODE
    assert batches["n"] == 1
    assert place(tmp_path) == (0, 1, 0, 0)


@pytest.mark.parametrize(
    ("where", "name", "written"),
    [
        (main, "_import_session", []),
        (utils, "log_to_file", []),
        (describe, "describe", ["config.yaml", "log.txt"]),
        (training_run, "Checkpointer", ["config.yaml", "log.txt"]),
    ],
    ids=["import", "log_to_file", "describe", "Checkpointer"],
)
def test_signal_before_anything_is_trained_leaves_at_once(
    command, tmp_path, monkeypatch, capsys, where, name, written
):
    sending(monkeypatch, where, name, signal.SIGUSR1)
    monkeypatch.setattr(engine, "train_step", None)
    assert start(command, tmp_path) == 128 + signal.SIGUSR1  # nothing was saved
    assert "SIGUSR1 stopped the program outside of training" in capsys.readouterr().out
    assert sorted(contents(tmp_path)) == written


def test_interrupt_before_anything_runs_ends_the_program(monkeypatch, capsys):
    monkeypatch.setattr(main, "_import_session", Mock(side_effect=KeyboardInterrupt))
    assert main.main([]) == 130
    assert capsys.readouterr().err == "interrupted before anything ran\n"


def test_signal_behind_the_last_task_leaves_a_complete_run(
    command, whole, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        sending(patch, training_run, "_report", signal.SIGTERM)
        assert start(command, tmp_path) == EXIT_CODE
    monkeypatch.setattr(engine, "train_step", None)
    assert_resumes(command, tmp_path, whole)
    assert "The run is complete already" in capsys.readouterr().out


def test_run_without_output_dir_stops_too(command, tmp_path, monkeypatch, capsys, heard):
    monkeypatch.chdir(tmp_path)
    steps = sending(monkeypatch, objective, "masked_cross_entropy", signal.SIGTERM, at=3)
    assert main.main([*command, "--output_dir", ""]) == 128 + signal.SIGTERM
    assert (steps["n"], heard) == (4, [signal.SIGTERM])  # handed on at the end
    assert contents(tmp_path) == {}
    assert "epoch 2, step 2: nothing is saved" in capsys.readouterr().out


# Runs that are asked to stop from outside


def test_loader_workers_outlive_a_signal_to_all_processes(command, whole, tmp_path):
    """Schedulers signal every process of a job; the last step must still get its images."""

    done = together(tmp_path, 1, partial(be_a_job, command, tmp_path / "out"), by_nobody)
    assert done.codes == [EXIT_CODE], done.text
    assert place(tmp_path / "out") == (0, 1, 1, 0)
    assert_resumes(command, tmp_path / "out", whole)


def be_a_job(command, folder, _rank):
    """A run with two workers that is signalled with them in its second step."""
    os.setsid()
    utils.usable_cores = lambda: 2
    step, steps, read = engine.train_step, itertools.count(1), task_data.RunData._load
    task_data.RunData._load = lambda *args: (time.sleep(0.02), read(*args))[1]

    def signalled(*args):
        if next(steps) == 2:
            os.killpg(0, signal.SIGTERM)
        return step(*args)

    engine.train_step = signalled
    return start(command, folder, "--num_workers", "2")


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
