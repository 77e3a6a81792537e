"""The replay buffer of L2P-R: a class-balanced reservoir of training images.

The buffer refers to images by their number among all training images of the run; pixels are read
from the data set again, and augmented anew, whenever an image is replayed.

Every image has a random priority that follows from the seed alone, and of each class the buffer
keeps the images of lowest priority among all that were offered. That is a uniform sample of what
the class has shown so far, as reservoir sampling gives it, but it depends neither on the order in
which images came nor on what was drawn before: it is the same in every process and after a stop.

Shapes: n training images of the run, m images in the buffer, C classes.

Source: Wang et al., CVPR 2022, section 5 (L2P-R; the paper gives the sizes, not the recipe).
"""

import numpy as np
from numpy.typing import NDArray

from continual_datasets.random_streams import Stream, generator


class ReplayBuffer:
    """What of earlier tasks is shown again.

    Args:
        targets: Class id of every training image of the run, (n,).
        seed: Seed of the run.
        size: Images that the buffer holds at most, shared evenly by the classes seen; or
        per_class: Images of each class that it holds at most.

    Attributes:
        indices: Numbers of the images in it, ascending, (m,).
    """

    def __init__(
        self,
        targets: NDArray[np.int64],
        seed: int,
        *,
        size: int | None = None,
        per_class: int | None = None,
    ) -> None:
        assert (size is None) != (per_class is None), "one of both"
        self.targets, self.size, self.per_class = targets, size, per_class
        self.priorities = generator(seed, Stream.RESERVOIR).permutation(len(targets))  # (n,)
        self.indices = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def add(self, indices: NDArray[np.int64]) -> None:
        """Offers the images of a finished task."""
        candidates = np.union1d(self.indices, indices)
        candidates = candidates[np.argsort(self.priorities[candidates])]
        targets = self.targets[candidates]
        available = np.bincount(targets)  # (C,)
        if self.per_class is not None:
            quotas = np.minimum(available, self.per_class)
        else:
            quotas = even_shares(available, self.size or 0)
        kept = [candidates[targets == c][:quota] for c, quota in enumerate(quotas)]
        self.indices = np.sort(np.concatenate(kept))


def even_shares(available: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Shares out places as evenly as what is available allows.

    Args:
        available: Images of each class, (C,).
        size: Places.

    Returns:
        Places of each class, (C,): those that lack images get as many as they have, the others
        equally many, and what is left over goes to the lowest class ids, one place each. So a
        class never gets more places when images of others come.
    """
    shares = np.zeros_like(available)
    while size > 0 and (shares < available).any():
        next_places = np.flatnonzero(shares < available)[:size]  # one for each class that has more
        shares[next_places] += 1
        size -= len(next_places)
    return shares
