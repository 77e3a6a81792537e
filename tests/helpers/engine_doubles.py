"""A stream of two tasks with loaders and options, on which the engine trains and evaluates."""

from dataclasses import dataclass

import torch

import engine
from helpers.tiny_model import C, pictures
from reports import metrics
from reports.metrics import SELECTIONS
from training import evaluation
from training.state import EngineOptions, Run, TrainState


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

OPTIONS = EngineOptions(
    device=torch.device("cpu"),
    epochs=1,
    vote_group_size=4,
    all_classes=tuple(range(C)),
    clip_grad=None,
    print_freq=1000,
)


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


def make_run(model, options=OPTIONS, *, tasks=STREAM, **parts):
    """What the loop needs beside a model: data of the stream, SGD and empty matrices."""
    rows = {test_set.index for task in tasks for test_set in task.test_sets}
    defaults = {
        "train_loader": lambda task: Loader(*data(task)),
        "test_loader": lambda test_set: Loader(*data(test_set, seed=1)),
        "make_optimizer": lambda: sgd(model),
        "make_scheduler": lambda optimizer: None,
        "matrices": {name: metrics.empty_matrix(len(rows), len(tasks)) for name in SELECTIONS},
    }
    return Run(options, **{**defaults, **parts})


def evaluate(model, options=OPTIONS, test_set=FIRST, size=12, batch_size=4, **parts):
    """One evaluation on images of a test set."""
    loader = Loader(*data(test_set, size), batch_size)
    return evaluation.evaluate(model, loader, test_set, make_run(model, options, **parts))


def run(model, options=OPTIONS, *, tasks=STREAM, on_task_end=None, **parts):
    """The whole stream; returns the accuracy matrices."""
    made = make_run(model, options, tasks=tasks, **parts)
    if on_task_end is not None:
        made.monitor.at_task_end = on_task_end
    engine.train_and_evaluate(model, tasks, TrainState(), made)
    return made.matrices
