"""The replay buffer of L2P-R: a class-balanced reservoir of training images.

The buffer refers to images by their number among all training images of the run; pixels are read
from the data set again, and augmented anew, whenever an image is replayed.

Every image has a random priority that follows from the seed alone, and of each class the buffer
keeps the images of lowest priority among all that were offered. That is a uniform sample of what
the class has shown so far, as reservoir sampling gives it, but it depends neither on the order in
which images came nor on what was drawn before: it is the same in every process and after a stop.

Shapes: n training images of the run, m images in the buffer.

Source: Wang et al., CVPR 2022, section 5 (L2P-R; the paper gives the sizes, not the recipe).
"""

from itertools import islice, zip_longest

import numpy as np
from numpy.typing import NDArray

from cli.settings import ReplaySettings
from continual_datasets.random_streams import Stream, generator


class ReplayBuffer:
    """What of earlier tasks is shown again.

    Args:
        targets: Class id of every training image of the run, (n,).
        seed: Seed of the run.
        settings: How many images it holds at most: in all, shared evenly by the classes seen, or
            of each class.

    Attributes:
        indices: Numbers of the images in it, ascending, (m,).
    """

    def __init__(self, targets: NDArray[np.int64], seed: int, settings: ReplaySettings) -> None:
        self.targets, self.settings = targets, settings
        self.priorities = generator(seed, Stream.RESERVOIR).permutation(len(targets))  # (n,)
        self.indices = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def add(self, indices: NDArray[np.int64]) -> None:
        """Offers the images of a finished task.

        The classes take turns, the lowest id first, until there is no place or no image left: so a
        class that lacks images leaves its places to the others, and none gets more when images of
        others come.
        """
        offered = np.union1d(self.indices, indices)
        offered = offered[np.argsort(self.priorities[offered])]
        targets = self.targets[offered]
        by_class = [offered[targets == class_id].tolist() for class_id in np.unique(targets)]
        turns = islice(zip_longest(*by_class), self.settings.buffer_per_class)
        kept = [image for turn in turns for image in turn if image is not None]
        self.indices = np.sort(np.array(kept[: self.settings.buffer_size], dtype=np.int64))
