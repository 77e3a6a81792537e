"""Small streams, their loaders, and loaders that show which process has loaded an image."""

import os

import numpy as np
import torch

from cli.settings import TransformSettings
from continual_dataloader import Loaders
from continual_datasets.images import ArraySource
from continual_datasets.pipeline import ImagePipeline
from continual_datasets.task_splits import Transforms, by_classes
from continual_datasets.transforms import build_transform

CPU = torch.device("cpu")
SMALL = TransformSettings(input_size=16)


def make_source(per_class, num_classes=6, seed=0):
    """Images of noise with as many of each class, in random order."""
    rng = np.random.default_rng(seed)
    targets = rng.permutation(np.repeat(np.arange(num_classes), per_class))
    images = rng.integers(0, 256, (len(targets), 20, 24, 3), dtype=np.uint8)
    return ArraySource(images, targets, [f"name{i}" for i in range(num_classes)])


def make_stream(
    options=SMALL, per_class=7, order=(3, 1, 5, 0, 2, 4), seed=42, prepare=None, num_test=5
):
    """Three tasks of two classes; a test set of each."""
    pair = prepare or (build_transform(True, options), build_transform(False, options))
    sources = make_source(per_class), make_source(num_test, seed=1)
    groups = [order[first : first + 2] for first in (0, 2, 4)]
    return by_classes(*sources, groups, Transforms(*pair, seed))


def make_loaders(stream, options, transforms=SMALL, buffer=None):
    """Loaders of a stream on the CPU."""
    return Loaders(stream, options, CPU, ImagePipeline(transforms, CPU), buffer)


def epoch_batches(stream, task, options, epoch, first_step=0, transforms=SMALL, buffer=None):
    """The batches of an epoch of a task, loaded by workers of their own."""
    batches = make_loaders(stream, options, transforms, buffer).train(stream.tasks[task])
    batches.batch_sampler.set_epoch(epoch, first_step)
    return list(batches)


def assert_same(batches, expected):
    """To the last bit."""
    for batch, wanted in zip(batches, expected, strict=True):
        assert all(torch.equal(*pair) for pair in zip(batch, wanted, strict=True))


class Witness:
    """A transform that makes of every image the number of its process, and counts them."""

    def __init__(self):
        self.calls = 0

    def __call__(self, _image):
        self.calls += 1
        return torch.tensor([os.getpid(), 0])


class Negative:
    """In place of a pipeline: changes the sign of test images."""

    def to_input(self, batch, train):
        return batch if train else -batch


def witnessed(options, per_class=7):
    """A stream of three tasks without pixels, its loaders, and who loads test images."""
    train, test = Witness(), Witness()
    stream = make_stream(per_class=per_class, prepare=(train, test), num_test=per_class)
    return stream, Loaders(stream, options, CPU, Negative()), test


def pids(batches):
    """Numbers of the processes that have loaded these batches."""
    return {abs(pid) for images, _ in batches for pid in images[:, 0].tolist()}
