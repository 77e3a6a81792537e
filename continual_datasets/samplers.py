"""Which images make a batch, and which of them are this process's: keys only, nothing is loaded.

The order of training images is a pure function of (seed, task, epoch), the draw of replayed ones of
(seed, task, epoch, step). Test images keep the order of their data set.

Shapes: n images of a data set, m images in the buffer, R replayed images that join each vote group.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from continual_datasets.random_streams import Stream, generator
from continual_datasets.task_data import Key, Replayed, TestKey, TrainKey

ImageIds = NDArray[np.int64]


@dataclass(frozen=True)
class LoaderOptions:
    """How images are put into batches; numbers are those of one process unless all are named."""

    batch_size: int  # training images in a batch
    vote_group_size: int  # images that choose their prompts together
    num_workers: int = 4  # worker processes of the run; 0 loads in the process itself
    pin_memory: bool = True  # whether to load into pinned memory, when there is an accelerator
    seed: int = 42  # of the run; decides the order of training images
    rank: int = 0
    world_size: int = 1  # processes that share the work
    global_batch: int | None = None  # training images of all processes in a step; None: as they are
    drop_last: bool = False  # whether images that do not fill a last training step are left out
    replayed_per_group: int = 0  # R, of each vote group, once the buffer has any
    eval_batch_size: int | None = None  # test images in a batch; None: `batch_size`
    test_cache_bytes: int = 0  # host memory for test images, cached between evaluations

    @property
    def full_batch(self) -> int:
        """Images of all processes in a full training step."""
        return self.global_batch or self.batch_size * self.world_size

    @property
    def test_batch(self) -> int:
        """Test images of a full batch: whole vote groups, at least one."""
        size = self.eval_batch_size or self.batch_size
        return max(1, size // self.vote_group_size) * self.vote_group_size

    @property
    def full_batches(self) -> set[int]:
        """Images of this process in full batches: of training, with replay or not, and of tests."""
        share = self.share(self.full_batch)
        own = share.stop - share.start
        replayed = self.replayed_per_group * self.num_groups(own)
        return {own, own + replayed, self.test_batch}

    def num_groups(self, num_images: int) -> int:
        """Vote groups of so many images; the last may be smaller."""
        return -(-num_images // self.vote_group_size)

    def share(self, num_images: int) -> slice:
        """Which of so many consecutive images are this process's: whole vote groups."""
        num_groups = self.num_groups(num_images)
        groups = [num_groups * rank // self.world_size for rank in (self.rank, self.rank + 1)]
        return slice(*(min(num_images, group * self.vote_group_size) for group in groups))


def steps_per_epoch(num_images: int, full_batch: int, drop_last: bool) -> int:
    """Steps of an epoch of a task, given the images of all processes in a full step."""
    full_steps, rest = divmod(num_images, full_batch)
    return full_steps + (rest > 0 and not drop_last)


class GlobalBatchSampler(Sampler[list[Key]]):
    """This process's piece of every global batch.

    The order of the images depends on seed, task and epoch alone. It is cut into global batches;
    of each, every process takes a run of whole vote groups, the same places of each batch. The last
    batch may be short: then a process may have fewer images or none, so that all take equally many
    steps. Nothing is padded, and nothing dropped unless `drop_last` asks for it. Every vote group
    is followed by the R replayed images with which it votes.

    Args:
        num_images: n, the images of the task.
        options: How they are put into batches.
        task: Index of the task.
        buffer: Numbers of the images that may be replayed, (m,); None or empty: none are.
    """

    def __init__(
        self, num_images: int, options: LoaderOptions, task: int, buffer: ImageIds | None = None
    ) -> None:
        self.num_images, self.options, self.task, self.buffer = num_images, options, task, buffer
        self.epoch = self.first_step = 0

    @property
    def replays(self) -> bool:
        """Whether images are replayed."""
        return self.buffer is not None and len(self.buffer) > 0

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch that the next iteration delivers, and from which step on."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return steps_per_epoch(self.num_images, self.options.full_batch, self.options.drop_last)

    def global_batch_size(self, step: int) -> int:
        """Images of all processes in a step of the epoch, counted from 0; replayed ones too."""
        options, full = self.options, self.options.full_batch
        own = min(full, self.num_images - step * full)
        return own + self.replays * options.replayed_per_group * options.num_groups(own)

    def __iter__(self) -> Iterator[list[Key]]:
        rng = generator(self.options.seed, Stream.ORDER, self.task, self.epoch)
        order = rng.permutation(self.num_images).tolist()
        full = self.options.full_batch
        share = self.options.share(full)
        for step in range(self.first_step, len(self)):
            piece = order[step * full : (step + 1) * full][share]
            own: list[Key] = [TrainKey(self.task, self.epoch, position) for position in piece]
            yield self._with_replayed(own, step) if self.replays else own

    def _with_replayed(self, own: list[Key], step: int) -> list[Key]:
        size, per_group = self.options.vote_group_size, self.options.replayed_per_group
        replayed = self._replayed(step)
        first = self.options.share(self.options.full_batch).start // size * per_group
        keys: list[Key] = []
        for at in range(0, len(own), size):
            keys += own[at : at + size] + replayed[first : first + per_group]
            first += per_group
        return keys

    def _replayed(self, step: int) -> list[Key]:
        """What all processes replay in a full step: each image once, if there are enough."""
        options, buffer = self.options, self.buffer
        assert buffer is not None
        number = options.replayed_per_group * options.num_groups(options.full_batch)
        rng = generator(options.seed, Stream.REPLAY, self.task, self.epoch, step)
        images = rng.choice(buffer, number, replace=number > len(buffer)).tolist()
        draws = range(step * number, (step + 1) * number)
        return [Replayed(self.task, self.epoch, *pair) for pair in zip(draws, images, strict=True)]


def evaluation_batches(num_images: int, options: LoaderOptions, test_set: int) -> list[list[Key]]:
    """The batches of this process's share of a test set, in the data set's order.

    Vote groups are consecutive images of the whole set. Each process gets a run of whole groups (or
    none at all), and a batch holds whole groups: as many as fit into it, at least one. Every image
    is seen exactly once by one of the processes.
    """
    positions, size = range(num_images)[options.share(num_images)], options.test_batch
    keys: list[Key] = [TestKey(test_set, position) for position in positions]
    return [keys[at : at + size] for at in range(0, len(keys), size)]
