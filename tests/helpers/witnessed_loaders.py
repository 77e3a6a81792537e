"""Loaders that tell which process has loaded an image, and how many it has loaded."""

import os

import numpy as np
import torch

from continual_dataloader import Loaders
from continual_datasets.images import ArraySource
from continual_datasets.pipeline import ToImages
from continual_datasets.task_splits import Transforms, class_incremental


def make_source(per_class, num_classes=6, seed=0):
    """Images of noise with as many of each class, in random order."""
    rng = np.random.default_rng(seed)
    targets = rng.permutation(np.repeat(np.arange(num_classes), per_class))
    images = rng.integers(0, 256, (len(targets), 20, 24, 3), dtype=np.uint8)
    return ArraySource(images, targets, [f"name{i}" for i in range(num_classes)])


class Witness:
    """A transform that makes of every image the number of its process, and counts them."""

    def __init__(self):
        self.calls = 0

    def __call__(self, _image):
        self.calls += 1
        return torch.tensor([os.getpid(), 0])


def witnessed(options, per_class=7):
    """A stream of three tasks without pixels, its loaders, and who loads test images."""
    train, test = Witness(), Witness()
    source = make_source(per_class)
    stream = class_incremental(source, source, range(6), 3, 2, Transforms(train, test, 42))
    to_images = ToImages(lambda batch: batch, lambda batch: -batch)
    return stream, Loaders(stream, options, torch.device("cpu"), to_images), test


def pids(batches):
    """Numbers of the processes that have loaded these batches."""
    return {abs(pid) for images, _ in batches for pid in images[:, 0].tolist()}
