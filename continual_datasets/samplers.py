"""Which images make a batch, and which of them are this process's: keys only, nothing is loaded.

The order of training images is a pure function of (seed, task, epoch), the draw of replayed ones of
(seed, task, epoch, step). Test images keep the order of their data set.

Shapes: n images of a data set, m images in the buffer, R replayed images that join each vote group.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from cli.settings import Settings
from continual_datasets.random_streams import Stream, generator
from continual_datasets.task_data import Key, Replayed, TestKey, TrainKey
from utils import Processes

#: Maximum of asynchronous steps on a GPU; a stop request takes effect after at most so many.
_MOST_UNREAD = 10

#: Maximum of images whose queries are computed in one pass ahead of several steps.
_MOST_AHEAD = 192

ImageIds = NDArray[np.int64]


@dataclass(frozen=True)
class Batching:
    """How images are put into batches and shared by the processes: in whole vote groups."""

    settings: Settings
    processes: Processes  # this process among all
    global_batch: int  # training images of all processes in a full step, without replayed ones

    @property
    def test_batch(self) -> int:
        """Test images of a full batch of this process: whole vote groups, at least one."""
        size = self.settings.optimizer.batch_size
        if self.processes.device.type == "cuda":
            size = max(size, 256)
        size, votes = self.settings.data.eval_batch_size or size, self.settings.vote_group_size
        return max(1, size // votes) * votes

    @property
    def fill_sizes(self) -> tuple[int, ...]:
        """Batch sizes, ascending, that the second pass of an evaluation takes; empty on the CPU."""
        parts = (4, 2, 1) if self.processes.device.type == "cuda" else ()
        return tuple(-(-self.test_batch // part) for part in parts)

    def filled(self, num_images: int) -> int:
        """The smallest of `fill_sizes` that holds so many images; on the CPU, their number."""
        return next((size for size in self.fill_sizes if size >= num_images), num_images)

    @property
    def train_batches(self) -> tuple[int, int]:
        """Images of this process in a full batch of training, without and with replay."""
        groups = _cut(range(self.global_batch), self.settings.vote_group_size)
        groups = groups[self.share(self.global_batch)]
        own = sum(map(len, groups))
        return own, own + self.settings.replayed_per_group * len(groups)

    @property
    def full_batches(self) -> set[int]:
        """Images of this process in full batches, of training and of tests."""
        return {*self.train_batches, self.test_batch}

    @property
    def read_every(self) -> int:
        """Steps between two readings of their results; reading costs nothing on a CPU."""
        on_cuda = self.processes.device.type == "cuda"
        return min(self.settings.output.print_freq, _MOST_UNREAD) if on_cuda else 1

    @property
    def queries_ahead(self) -> int:
        """Training batches whose queries are computed in one pass, if these are small.

        A divisor of `read_every`: a run resumes from steps that are read, and gives the same
        numbers only if it computes the same passes.
        """
        own, every = self.train_batches[0], self.read_every
        divisors = (n for n in range(1, every + 1) if every % n == 0)
        return max(n for n in divisors if n == 1 or n * own <= _MOST_AHEAD)

    @property
    def pass_sizes(self) -> set[int]:
        """Images of full passes through the model."""
        return {*self.full_batches, *(self.queries_ahead * size for size in self.train_batches)}

    def num_steps(self, num_images: int) -> int:
        """Steps of an epoch of so many training images."""
        full_steps, rest = divmod(num_images, self.global_batch)
        return full_steps + (rest > 0 and not self.settings.optimizer.drop_last)

    def num_groups(self, num_images: int) -> int:
        """Vote groups of so many images; the last may be smaller."""
        return -(-num_images // self.settings.vote_group_size)

    def share(self, num_images: int) -> slice:
        """Which of the vote groups of so many images are this process's."""
        groups, rank = self.num_groups(num_images), self.processes.rank
        return slice(*(groups * at // self.processes.world_size for at in (rank, rank + 1)))


class GlobalBatchSampler(Sampler[list[Key]]):
    """This process's piece of every global batch.

    The order of the images depends on seed, task and epoch alone. It is cut into global batches;
    of each, every process takes a run of whole vote groups, the same places of each batch. The last
    batch may be short: then a process may have fewer images or none, so that all take equally many
    steps. Nothing is padded, and nothing dropped unless `--drop_last` asks for it. Every vote group
    is followed by the R replayed images with which it votes.

    Args:
        num_images: n, the images of the task.
        batching: How they are put into batches.
        task: Index of the task.
        buffer: Numbers of the images that may be replayed, (m,); empty: none are.
    """

    def __init__(
        self, num_images: int, batching: Batching, task: int, buffer: Sequence[int] | ImageIds = ()
    ) -> None:
        self.num_images, self.batching, self.task, self.buffer = num_images, batching, task, buffer
        self.settings = batching.settings
        self.replays = len(buffer) > 0  # whether images are replayed
        self.epoch = self.first_step = 0

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch that the next iteration delivers, and from which step on."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return self.batching.num_steps(self.num_images)

    def global_batch_size(self, step: int) -> int:
        """Images of all processes in a step of the epoch, counted from 0; replayed ones too."""
        full = self.batching.global_batch
        own = min(full, self.num_images - step * full)
        return own + self.replays * self.settings.replayed_per_group * self.batching.num_groups(own)

    def __iter__(self) -> Iterator[list[Key]]:
        rng = generator(self.settings.run.seed, Stream.ORDER, self.task, self.epoch)
        order, full = rng.permutation(self.num_images).tolist(), self.batching.global_batch
        share = self.batching.share(full)
        for step in range(self.first_step, len(self)):
            piece = order[step * full : (step + 1) * full]
            keys = [TrainKey(self.task, self.epoch, position) for position in piece]
            groups = _cut(keys, self.settings.vote_group_size)
            if self.replays:
                pairs = zip(groups, self._replayed(step), strict=False)  # the last step is short
                groups = [own + replayed for own, replayed in pairs]
            yield list(chain.from_iterable(groups[share]))

    def _replayed(self, step: int) -> list[list[Key]]:
        """What joins each vote group of a full step: each image once, if there are enough."""
        per_group = self.settings.replayed_per_group
        number = per_group * self.batching.num_groups(self.batching.global_batch)
        rng = generator(self.settings.run.seed, Stream.REPLAY, self.task, self.epoch, step)
        images = rng.choice(self.buffer, number, replace=number > len(self.buffer)).tolist()
        draws = enumerate(images, start=step * number)
        return _cut([Replayed(self.task, self.epoch, *draw) for draw in draws], per_group)


def evaluation_batches(num_images: int, batching: Batching, test_set: int) -> list[list[Key]]:
    """The batches of this process's share of a test set, in the data set's order.

    Vote groups are consecutive images of the whole set. Each process gets a run of whole groups (or
    none at all), and a batch holds whole groups: as many as fit into it, at least one. Every image
    is seen exactly once by one of the processes.
    """
    keys: list[Key] = [TestKey(test_set, position) for position in range(num_images)]
    groups = _cut(keys, batching.settings.vote_group_size)[batching.share(num_images)]
    return _cut(list(chain.from_iterable(groups)), batching.test_batch)


def _cut(items: Sequence[Any], size: int) -> list[Any]:
    """Pieces of so many items; the last may be smaller."""
    return [items[at : at + size] for at in range(0, len(items), size)]
