"""Every fast way through the command line gives what the plain way gives, or says what it is."""

import json
import os
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch

import engine
import main
import utils
from cli import parser
from experiment import build, training_run
from helpers.finished_runs import Run
from helpers.tiny_flags import TINY_DIGITS
from reports.metrics import SELECTIONS

pytestmark = pytest.mark.usefixtures("restore_logging")


def train(folder, *flags, code=0):
    assert main.main([*TINY_DIGITS, *flags, "--output_dir", str(folder)]) == code
    return Run(folder) if code == 0 else None


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train(tmp_path_factory.mktemp("plain") / "out")


def assert_same(run, plain):
    """To the last bit."""
    assert run.model.keys() == plain.model.keys()
    for name, value in plain.model.items():
        assert torch.equal(run.model[name], value), name
    for name in SELECTIONS:
        assert run.results[name] == plain.results[name]
    assert run.results["prompt_usage"] == plain.results["prompt_usage"]
    assert run.stats == plain.stats


EXACT = {
    "images on the device": ["--data_on_device", "true"],
    "images on the device, workers draw": ["--data_on_device", "true", "--num_workers", "1"],
    "workers": ["--num_workers", "2"],
    "no cache of test images": ["--test_cache", "0"],
    "activations computed twice": ["--grad_checkpointing"],
}


@pytest.mark.parametrize("flags", EXACT.values(), ids=EXACT)
def test_exact_ways_give_the_same_run(plain, tmp_path, flags):
    assert_same(train(tmp_path / "out", *flags), plain)


@pytest.fixture
def read_together(monkeypatch):
    """Steps are read three at a time, as on a GPU."""
    plain = build.engine_options
    monkeypatch.setattr(build, "engine_options", lambda *args: replace(plain(*args), read_every=3))


@pytest.mark.usefixtures("read_together")
def test_steps_that_are_read_together_give_the_same_run(plain, tmp_path):
    assert_same(train(tmp_path / "out"), plain)


@pytest.mark.usefixtures("read_together")
@pytest.mark.parametrize("step", [2, 20])
def test_signal_between_two_readings_stops_at_once(plain, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch:
        train_step, count = engine.train_step, iter(range(100))

        def stopping(*args, **kwargs):
            if next(count) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return train_step(*args, **kwargs)

        patch.setattr(engine, "train_step", stopping)
        train(tmp_path / "out", code=75)
        assert next(count) <= step + 3
    assert_same(train(tmp_path / "out", "--resume", "auto"), plain)


@pytest.mark.parametrize("flags", [["--norm", "half", "--train-interpolation", "bicubic"]])
def test_images_on_the_device_follow_the_transforms(tmp_path, flags):
    workers = train(tmp_path / "workers", *flags)
    assert_same(train(tmp_path / "device", *flags, "--data_on_device", "true"), workers)


def test_images_on_the_device_can_be_replayed(tmp_path):
    flags = ["--buffer_per_class", "4", "--dataset", "digits"]
    workers = train(tmp_path / "workers", *flags)
    assert_same(train(tmp_path / "device", *flags, "--data_on_device", "true"), workers)


def test_large_evaluation_batches_keep_the_votes(plain, tmp_path):
    run = train(tmp_path / "out", "--eval_batch_size", "64")
    assert run.results["prompt_usage"] == plain.results["prompt_usage"]
    for name in SELECTIONS:
        assert run.results[name]["accuracy_matrix"] == plain.results[name]["accuracy_matrix"]


# Other numbers, by name


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_amp_is_named_and_near_the_plain_run(plain, tmp_path, amp):
    run = train(tmp_path / "out", "--amp", amp)
    assert run.results["numerics"]["amp"] == amp
    assert not torch.equal(run.model["head.weight"], plain.model["head.weight"])
    for stats, wanted in zip(run.stats, plain.stats, strict=True):
        assert stats["train_Loss"] == pytest.approx(wanted["train_Loss"], abs=0.05)
        assert stats["average_Loss"] == pytest.approx(wanted["average_Loss"], abs=0.1)


def test_plain_run_names_its_numerics(plain):
    assert plain.results["numerics"] == {
        "amp": None,
        "tf32": False,
        "compile": False,
        "grad_checkpointing": False,
        "data_on_device": False,
        "eval_batch_size": 16,
    }


def test_images_on_the_device_are_named(tmp_path):
    run = train(tmp_path / "out", "--data_on_device", "true")
    assert run.results["numerics"]["data_on_device"] is True


def test_eval_repeats_the_precision_of_the_run(tmp_path, caplog):
    run = train(tmp_path / "out", "--amp", "bf16")
    caplog.clear()
    here = ["--eval", "--device", "cpu", "--num_workers", "0", "--output_dir", str(run.folder)]
    assert main.main(here) == 0
    assert caplog.text.count("Reproduces the stored accuracies") == 4
    assert json.loads((run.folder / "eval_results.json").read_text())["numerics"]["amp"] == "bf16"
    assert main.main([*here, "--amp", "none", "--data_on_device", "true"]) == 0
    numerics = json.loads((run.folder / "eval_results.json").read_text())["numerics"]
    assert (numerics["amp"], numerics["data_on_device"]) == (None, True)


@pytest.fixture
def high_scale(monkeypatch):
    """A loss scale so high that the first steps overflow and lower it."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", partial(scaler, init_scale=2.0**30))


@pytest.mark.usefixtures("high_scale")
@pytest.mark.parametrize(
    "is_place",
    [
        lambda number, state: number == 8,
        lambda number, state: state.task == 1 and not state.inside_task,
    ],
    ids=["inside a task", "between tasks"],
)
@pytest.mark.parametrize("flags", [["--amp", "fp16"], ["--data_on_device", "true"]])
def test_stopped_and_resumed_is_never_stopped(tmp_path, monkeypatch, flags, is_place):
    whole = train(tmp_path / "whole", *flags)
    folder, count = tmp_path / "out", iter(range(100))
    with monkeypatch.context() as patch:
        at_boundary = training_run.Checkpointer.at_boundary
        patch.setattr(
            training_run.Checkpointer,
            "at_boundary",
            lambda checkpointer, state, update, stop=False: at_boundary(
                checkpointer, state, update, stop or is_place(next(count), state)
            ),
        )
        train(folder, *flags, code=75)
    assert_same(train(folder, *flags, "--resume", "auto"), whole)


def test_resume_in_another_precision_is_rejected(tmp_path, capsys):
    train(tmp_path / "out", "--amp", "bf16")
    state = tmp_path / "out" / "checkpoint" / "last.pth"
    kept = state.read_bytes()
    train(tmp_path / "out", "--resume", "auto", code=2)
    assert "--amp none, where the run has bf16" in capsys.readouterr().err
    assert state.read_bytes() == kept


@pytest.mark.slow
def test_compiled_run_is_near_the_plain_one(plain, tmp_path):
    torch._dynamo.reset()
    run = train(tmp_path / "out", "--compile")
    assert run.results["numerics"]["compile"] is True
    for stats, wanted in zip(run.stats, plain.stats, strict=True):
        assert stats["train_Loss"] == pytest.approx(wanted["train_Loss"], rel=1e-4)
        assert stats["average_Acc@1"] == pytest.approx(wanted["average_Acc@1"], abs=1)


# Rejected command lines

REJECTED = {
    "--amp bf8": "--amp bf8 is unknown: choose one of none, bf16, fp16",
    "--tf32": "--tf32 is for CUDA, and the run would take place on the CPU: leave it out",
    "--data_on_device maybe": "--data_on_device maybe is unknown: choose one of auto, true, false",
    "--data_on_device true --reprob 0.3": "--data_on_device true: --reprob 0.3 needs",
    "--data_on_device true --train_jpeg 95": "--data_on_device true: --train_jpeg 95 needs",
    "--eval_batch_size 0": "--eval_batch_size 0: must be at least 1",
    "--eval_batch_size 7": "--eval_batch_size 7: a vote group, 8 images, must be in one batch",
    "--test_cache -1": "--test_cache -1: must be a finite number that is not negative",
    "--data_on_device true --dataset Flowers102": "the images of Flowers102 are files, opened when",
    "--grad_checkpointing --no-prompt_pool --head_type token": "only the head trains",
}


@pytest.mark.parametrize(("flags", "message"), REJECTED.items())
def test_rejection_says_what_and_why(flags, message, capsys, tmp_path):
    train(tmp_path / "out", *flags.split(), code=2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_compilation_without_a_compiler_is_rejected(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    train(tmp_path / "out", "--compile", code=2)
    assert "--compile needs a C++ compiler: install one of g++" in capsys.readouterr().err


def test_images_in_files_are_not_put_on_the_device(image_folder, tmp_path, capsys):
    flags = ["--dataset", "ImageFolder", "--data-path", str(image_folder)]
    train(tmp_path / "out", *flags, "--data_on_device", "true", code=2)
    assert "--data_on_device true: the images of ImageFolder are files" in capsys.readouterr().err
    run = train(tmp_path / "out", *flags, "--data_on_device", "auto")
    assert run.results["numerics"]["data_on_device"] is False


def test_steps_are_read_together_on_a_gpu_alone():
    """Reading costs nothing where nothing runs ahead."""
    for device, every, print_freq in (("cpu", 1, 7), ("cuda", 7, 7), ("cuda", 10, 1000)):
        settings, _ = parser.parse(["--print_freq", str(print_freq)])
        found = build.engine_options(settings, torch.device(device), (0, 1))
        assert found.read_every == every
        loading = build.loader_options(
            settings, utils.Processes(0, 1, torch.device(device)), global_batch=16
        )
        assert loading.eval_batch_size == {"cpu": 16, "cuda": 256}[device]
