"""Runs that resume, and all that a run leaves, to be compared bit for bit."""

import dataclasses
import json

import torch

import main
from experiment import checkpoints, resume, training_run

#: Exit code of a run that was asked to stop.
STOPPED = 75

#: After every step.
ALWAYS = ["--save_every", "0.0001"]


def place(folder):
    """Where a saved run stopped: task, epoch, step, evaluated test sets."""
    position = resume.load(resume.newest_path(folder)).position
    return position.task, position.epoch, position.step, len(position.evaluations)


def stop_when(patch, when):
    """Lets runs save and stop at boundaries for which `when(state, update)` is true."""
    at_boundary = training_run.Checkpointer.at_boundary

    def stopping(checkpointer, state, update, stop=False):
        at_boundary(checkpointer, state, update, stop or when(state, update))

    patch.setattr(training_run.Checkpointer, "at_boundary", stopping)


def start(argv, folder, *more):
    """Starts a run, or resumes it; returns the exit code."""
    return main.main([*argv, "--output_dir", str(folder), "--resume", "auto", *more])


def outcome(folder):
    """Everything that a run gives but times and places, by name, bit for bit."""
    results = json.loads((folder / "results.json").read_text())
    del results["timing"], results["command"]
    found = {"results.json": results, "log_stats.txt": (folder / "log_stats.txt").read_text()}
    if (table := folder / "predictions.csv").exists():
        found[table.name] = table.read_text()
    for path in checkpoints.find(folder).values():
        found[path.name] = vars(checkpoints.load(path)).copy()
    state = resume.load(resume.newest_path(folder))
    names = ("model", "optimizer", "buffer")
    found["last.pth"] = {name: getattr(state, name) for name in names}
    found["position"] = state.position.task, state.position.step
    return {k: v for k, v in flat(found) if not k.endswith(("/config/output_dir", "/path"))}


def flat(value, name=""):
    """Pairs of a name and a plain value, of all that lies inside."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    inside = {}
    if isinstance(value, torch.Tensor):
        plain = (value.dtype, value.shape, value.flatten().view(torch.uint8).tolist())
    elif isinstance(value, dict):
        plain, inside = list(value), value
    elif isinstance(value, list | tuple):
        plain, inside = len(value), dict(enumerate(value))
    else:
        plain = repr(value)
    yield name, (type(value), plain)
    for key, item in inside.items():
        yield from flat(item, f"{name}/{key}".removeprefix("/"))


def differing(one, other):
    """Names of what two outcomes do not share."""
    return sorted(k for k in one.keys() | other.keys() if one.get(k) != other.get(k))


def assert_resumes(argv, folder, whole, *more):
    """Resumes a run to its end; it equals one that never stopped."""
    assert start(argv, folder, *more) == 0
    assert differing(outcome(whole), outcome(folder)) == []


def contents(folder):
    """All files of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
