"""Commands of main.py in this process, and what a finished run leaves in its folder."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import torch

import main
from cli.settings import Settings
from experiment import checkpoints
from helpers.engine_doubles import on

#: What an evaluation does not take from the run.
HERE = "--num_workers", "0", "--device", "cpu"


def typed(*words):
    """Exit code, standard output and standard error of a command."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main.main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


def rejected(*words):
    """Why a command line is rejected."""
    code, _, err = typed(*words)
    assert code == 2
    return err


def failed(*words):
    """What a command prints that begins and fails."""
    code, out, _ = typed(*words)
    assert code == 1
    return out


def evaluate(folder, *flags, name="eval_results"):
    """The results of an evaluation, given little more than the folder, and what it prints."""
    code, out, err = typed("--eval", "--output_dir", folder, *HERE, *flags)
    assert (code, err) == (0, ""), out + err
    return read(folder / f"{name}.json"), out


def read(path):
    """The content of a JSON file."""
    return json.loads(path.read_text())


def made_up(matrices, reports, tasks, test_sets, **settings):
    """A run of which nothing is real but its results; tasks and test sets are names."""
    stream = SimpleNamespace(
        tasks=[SimpleNamespace(name=name, data=range(16)) for name in tasks],
        test_sets=[SimpleNamespace(name=name) for name in test_sets],
        class_order=[[0]] * len(tasks),
        earlier=(),
        train=SimpleNamespace(classes=["a"]),
        train_digest="0",
        pipeline=SimpleNamespace(on_device=False),
    )
    return SimpleNamespace(
        settings=Settings().replace(**settings),
        processes=on("cpu"),
        stream=stream,
        model=torch.nn.Linear(1, 1),
        backbone={"name": "vit"},
        global_batch=1,
        batching=SimpleNamespace(test_batch=1),
        device=torch.device("cpu"),
        matrices=matrices,
        reports=reports,
    )


class Run:
    """A finished run."""

    def __init__(self, folder):
        self.folder = folder
        self.results = read(folder / "results.json")

    @property
    def log(self):
        return (self.folder / "log.txt").read_text()

    @property
    def stats(self):
        """The lines of its log_stats.txt."""
        return [json.loads(line) for line in (self.folder / "log_stats.txt").open()]

    def checkpoint(self, task):
        return checkpoints.load(checkpoints.task_path(self.folder, task))

    @property
    def model(self):
        """Tensors after the second task."""
        return self.checkpoint(2).model
