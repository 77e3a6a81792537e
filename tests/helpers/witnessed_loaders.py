"""Small streams, their loaders, and loaders that show which process has loaded an image."""

import os
from itertools import chain

import numpy as np
import pytest
import torch

from cli.settings import Settings, TransformSettings
from continual_dataloader import Loaders
from continual_datasets.images import ArraySource
from continual_datasets.pipeline import ImagePipeline
from continual_datasets.samplers import Batching
from continual_datasets.task_data import RunData, TrainKey
from continual_datasets.task_splits import by_classes
from utils import Processes

CPU = torch.device("cpu")
ON_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=ON_CUDA)]
SMALL = TransformSettings(input_size=16)


def batching(batch_size, votes, *, rank=0, world_size=1, total=None, device=CPU, **settings):
    """How images are put into batches; `replayed` of them join each vote group."""
    if per_group := settings.pop("replayed", 0):
        settings |= {"buffer_size": 1, "replay_batch": per_group * batch_size // votes}
    settings = {"num_workers": 0, "test_cache": 0, **settings}
    made = Settings().replace(batch_size=batch_size, vote_group_size=votes, **settings)
    return Batching(made, Processes(rank, world_size, device), total or batch_size * world_size)


def make_source(per_class, num_classes=6, seed=0, name="name"):
    """Images of noise with as many of each class, in random order."""
    rng = np.random.default_rng(seed)
    targets = rng.permutation(np.repeat(np.arange(num_classes), per_class))
    images = rng.integers(0, 256, (len(targets), 20, 24, 3), dtype=np.uint8)
    return ArraySource(images, targets, [f"{name}{i}" for i in range(num_classes)])


def without(source, class_id):
    """The images of all classes but one."""
    keep = source.targets != class_id
    return ArraySource(source.images[keep], source.targets[keep], source.classes)


def rows(stream):
    """Rows of the accuracy matrix that are filled after each task."""
    return [[test_set.index for test_set in task.test_sets] for task in stream.tasks]


def make_stream(options=SMALL, per_class=7, order=(3, 1, 5, 0, 2, 4), num_test=5, prepare=None):
    """Three tasks of two classes; a test set of each."""
    pipeline = ImagePipeline(options, CPU)
    if prepare is not None:
        pipeline.train_transform, pipeline.test_transform = prepare
    sources = make_source(per_class), make_source(num_test, seed=1)
    return by_classes(*sources, [order[first : first + 2] for first in (0, 2, 4)], pipeline)


def epoch_batches(stream, task, options, epoch, first_step=0, buffer=None):
    """The batches of an epoch of a task, loaded by workers of their own."""
    batches = Loaders(stream, options, buffer).train(stream.tasks[task])
    batches.batch_sampler.set_epoch(epoch, first_step)
    return list(batches)


def load(stream, *keys, seed=42):
    """What the workers make of images: pixels and class ids."""
    loaded = RunData(stream, seed).__getitems__(keys)
    return torch.stack([image for image, _ in loaded]), [target for _, target in loaded]


def train_keys(task, epoch, positions):
    return [TrainKey(task, epoch, position) for position in positions]


def assert_same(batches, expected):
    """To the last bit."""
    for batch, wanted in zip(batches, expected, strict=True):
        assert all(torch.equal(*pair) for pair in zip(batch, wanted, strict=True))


def joined(pieces):
    return list(chain.from_iterable(pieces))


class Witness:
    """A transform that makes of every image the number of its process, and counts them."""

    def __init__(self):
        self.calls = 0

    def __call__(self, _image):
        self.calls += 1
        return torch.tensor([os.getpid(), 0.0])


def witnessed(options, per_class=7):
    """A stream of three tasks without pixels, its loaders, and who loads test images."""
    train, test = Witness(), Witness()
    stream = make_stream(per_class=per_class, prepare=(train, test), num_test=per_class)
    return stream, Loaders(stream, options), test


def pids(batches):
    """Numbers of the processes that have loaded these batches."""
    return {int(pid) for images, _ in batches for pid in images[:, 0].tolist()}
