"""Every fast way through the command line gives what the plain way gives, or says what it is."""

import json
from functools import partial

import pytest
import torch

import main
import utils
from cli import parser
from continual_datasets.samplers import Batching
from helpers.finished_runs import Run
from helpers.resumed_runs import stop_when
from helpers.tiny_flags import TINY_DIGITS
from helpers.tiny_model import differing
from reports.metrics import SELECTIONS

pytestmark = pytest.mark.usefixtures("restore_logging")


def train(folder, flags="", code=0):
    assert main.main([*TINY_DIGITS, *flags.split(), "--output_dir", str(folder)]) == code
    return Run(folder) if code == 0 else None


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The runs of some flags, each trained once."""
    runs = {}

    def find(flags=""):
        if flags not in runs:
            runs[flags] = train(tmp_path_factory.mktemp("run") / "out", flags)
        return runs[flags]

    return find


@pytest.fixture
def plain(finished):
    return finished()


def assert_same(run, plain):
    """To the last bit."""
    assert not differing(run.model, plain.model)
    for name in (*SELECTIONS, "prompt_usage"):
        assert run.results[name] == plain.results[name]
    assert run.stats == plain.stats


def assert_near(run, plain, **tolerances):
    for stats, wanted in zip(run.stats, plain.stats, strict=True):
        for name, tolerance in tolerances.items():
            assert stats[name] == pytest.approx(wanted[name], abs=tolerance)


@pytest.mark.parametrize(
    "flags",
    [
        "--data_on_device true",
        "--data_on_device true --num_workers 1",  # which draws
        "--num_workers 2",
        "--test_cache 0 --grad_checkpointing",
    ],
)
def test_exact_ways_give_the_same_run(plain, finished, flags):
    run = finished(flags)
    assert_same(run, plain)
    assert run.results["numerics"] == {
        **{"amp": None, "tf32": False, "compile": False, "eval_batch_size": 16},
        "grad_checkpointing": "grad_checkpointing" in flags,
        "data_on_device": "data_on_device" in flags,
    }
    assert not any(plain.results["numerics"][name] for name in ("amp", "data_on_device"))


def test_images_on_the_device_follow_the_transforms_and_can_be_replayed(tmp_path):
    flags = "--norm half --train-interpolation bicubic --buffer_per_class 4"
    workers = train(tmp_path / "workers", flags)
    assert_same(train(tmp_path / "device", f"{flags} --data_on_device true"), workers)


# Other numbers, by name


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_amp_is_named_and_near_the_plain_run(plain, finished, amp):
    run = finished(f"--amp {amp}")
    assert run.results["numerics"]["amp"] == amp
    assert not torch.equal(run.model["head.weight"], plain.model["head.weight"])
    assert_near(run, plain, train_Loss=0.05, average_Loss=0.1)


def test_eval_repeats_the_precision_of_the_run_or_takes_another(finished, caplog):
    folder = finished("--amp bf16").folder
    here = f"--eval --device cpu --num_workers 0 --output_dir {folder}"
    others = "--amp none --data_on_device true"
    for flags, amp, on_device, reproduced in (("", "bf16", False, 4), (others, None, True, 0)):
        caplog.clear()
        assert main.main([*here.split(), *flags.split()]) == 0
        assert caplog.text.count("Reproduces the stored accuracies") >= reproduced
        numerics = json.loads((folder / "eval_results.json").read_text())["numerics"]
        assert (numerics["amp"], numerics["data_on_device"]) == (amp, on_device)


@pytest.mark.parametrize(
    "flags", [pytest.param("--amp fp16", marks=pytest.mark.slow), "--data_on_device true"]
)
def test_stopped_and_resumed_is_never_stopped(tmp_path, monkeypatch, flags):
    """Inside a task and between tasks, with a loss scale that overflows and falls at first."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", partial(scaler, init_scale=2.0**30))
    whole, folder = train(tmp_path / "whole", flags), tmp_path / "out"
    places = [(0, 0, 8), (1, 0, 0)]
    with monkeypatch.context() as patch:
        stop_when(patch, lambda state, _: (state.task, state.epoch, state.step) in places)
        train(folder, flags, code=75)
        train(folder, f"{flags} --resume auto", code=75)
    assert_same(train(folder, f"{flags} --resume auto"), whole)


@pytest.mark.slow
def test_compiled_run_is_near_the_plain_one(plain, tmp_path):
    torch._dynamo.reset()
    run = train(tmp_path / "out", "--compile")
    assert run.results["numerics"]["compile"] is True
    assert_near(run, plain, train_Loss=2e-4, **{"average_Acc@1": 1})


def test_steps_are_read_together_on_a_gpu_alone():
    """Reading costs nothing where nothing runs ahead."""
    for name, every, print_freq in (("cpu", 1, 7), ("cuda", 7, 7), ("cuda", 10, 1000)):
        settings, _ = parser.parse(["--print_freq", str(print_freq)])
        device = torch.device(name)
        batching = Batching(settings, utils.Processes(0, 1, device), global_batch=16)
        assert (batching.read_every, batching.queries_ahead) == (every, every)
        assert batching.test_batch == {"cpu": 16, "cuda": 256}[name]
