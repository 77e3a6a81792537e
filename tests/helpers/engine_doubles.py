"""A stream of two tasks with loaders and settings, on which the engine trains and evaluates."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch

import engine
from cli.settings import FLAGS, Settings
from experiment.precision import Compiled
from helpers.tiny_model import C, pictures
from reports import metrics
from reports.metrics import SELECTIONS
from training import evaluation
from training.objective import Objective
from training.state import Run, TrainState
from utils import Processes


@dataclass
class Task:
    """What the engine reads of a task, and of a test set."""

    index: int
    classes: tuple
    test_sets: tuple = ()
    name: str = "task"


#: Two tasks of three classes, and the stream in which each is tested with all before it.
FIRST, SECOND = Task(0, (0, 2, 4)), Task(1, (1, 3, 5))
STREAM = [Task(0, FIRST.classes, (FIRST,)), Task(1, SECOND.classes, (FIRST, SECOND))]

SETTINGS = Settings().replace(epochs=1, vote_group_size=4, clip_grad=None, print_freq=1000)


def on(device):
    """The only process of a run on a device."""
    return Processes(0, 1, torch.device(device))


class Loader:
    """Batches in a fixed order; each counts `share` times in the global batch."""

    def __init__(self, images, targets, batch_size=4, share=1):
        self.batches = list(zip(images.split(batch_size), targets.split(batch_size), strict=True))
        self.share, self.epochs, self.batch_sampler = share, [], self

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)

    def set_epoch(self, epoch, first_step=0):
        self.epochs.append(epoch)

    def global_batch_size(self, step):
        return self.share * len(self.batches[step][0])


def data(task=FIRST, size=8, seed=0):
    """Images and class ids of a task."""
    generator = torch.Generator().manual_seed(100 * task.index + seed)
    images = pictures(size, generator)
    picks = torch.randint(0, len(task.classes), (size,), generator=generator)
    return images, torch.tensor(task.classes)[picks]


def sgd(model, lr=0.1, momentum=0.0):
    """An optimizer of all that trains."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum)


def make_run(model, *, settings=SETTINGS, tasks=STREAM, classes=tuple(range(C)), **values):
    """A run of a model on the data of the stream, with SGD; `values` are settings and parts."""
    rows = {test_set.index for task in tasks for test_set in task.test_sets}
    parts = {
        "processes": on("cpu"),
        "stream": SimpleNamespace(tasks=tasks, classes=classes),
        "train_loader": lambda task: Loader(*data(task)),
        "test_loader": lambda test_set: Loader(*data(test_set, seed=1)),
        "make_optimizer": lambda: sgd(model),
        "make_scheduler": lambda optimizer: None,
        "matrices": {name: metrics.empty_matrix(len(rows), len(tasks)) for name in SELECTIONS},
        **dict.fromkeys(("backbone", "global_batch", "buffer")),
        **{name: value for name, value in values.items() if name not in FLAGS},
    }
    given = {name: value for name, value in values.items() if name in FLAGS}
    settings = settings.replace(**given)
    objective, passes = Objective(model, settings).compute, getattr(model, "query", None)
    if isinstance(passes, Compiled):
        on_cuda = parts["processes"].device.type == "cuda"
        objective = Compiled(objective, passes.batch_sizes, on_cuda)
    parts.setdefault("objective", objective)
    return Run(settings=settings, model=model, **parts)


def evaluate(model, test_set=FIRST, size=12, batch=4, **values):
    """One evaluation on images of a test set."""
    loader = Loader(*data(test_set, size), batch)
    return evaluation.evaluate(make_run(model, **values), loader, test_set)


def run(model, *, tasks=STREAM, on_task_end=None, **values):
    """The whole stream; returns the accuracy matrices."""
    made = make_run(model, tasks=tasks, **values)
    if on_task_end is not None:
        made.monitor.at_task_end = on_task_end
    engine.train_and_evaluate(made, tasks, TrainState())
    return made.matrices
