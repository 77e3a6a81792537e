"""Which images make a batch, and which of them are this process's: keys only, nothing is loaded.

The order of training images is a pure function of (seed, task, epoch), the draw of replayed ones of
(seed, task, epoch, step). Test images keep the order of their data set.

Shapes: n images of a data set, m images in the buffer, R replayed images that join each vote group.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from continual_datasets.random_streams import Stream, generator
from continual_datasets.task_data import Key, Replayed, TestKey, TrainKey


@dataclass(frozen=True)
class LoaderOptions:
    """How images are put into batches.

    Attributes:
        batch_size: Images of one process in a batch.
        vote_group_size: Images that choose their prompts together.
        num_workers: Worker processes of the run; 0 loads in the process itself.
        pin_memory: Whether to load into pinned memory, when there is an accelerator.
        seed: Seed of the run; decides the order of training images.
        rank: This process among `world_size`.
        world_size: Processes that share the work.
        global_batch: Images of all processes in a training step; None: as many as their batches
            hold together.
        drop_last: Whether the images that do not fill a last training step are left out.
        replayed_per_group: R, replayed images that join each vote group once the buffer has any.
        eval_batch_size: Test images of one process in a batch; None: `batch_size`.
        test_cache_bytes: Host memory for test images that are cached between evaluations; 0: none
            are.
    """

    batch_size: int
    vote_group_size: int
    num_workers: int = 4
    pin_memory: bool = True
    seed: int = 42
    rank: int = 0
    world_size: int = 1
    global_batch: int | None = None
    drop_last: bool = False
    replayed_per_group: int = 0
    eval_batch_size: int | None = None
    test_cache_bytes: int = 0

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
        first, stop = (
            min(num_images, num_groups * rank // self.world_size * self.vote_group_size)
            for rank in (self.rank, self.rank + 1)
        )
        return slice(first, stop)


def steps_per_epoch(num_images: int, full_batch: int, drop_last: bool) -> int:
    """Steps of an epoch, of all processes together.

    Args:
        num_images: Images of the task.
        full_batch: Images of a full step.
        drop_last: Whether images that do not fill a last step are left out.
    """
    full_steps, rest = divmod(num_images, full_batch)
    return full_steps + (rest > 0 and not drop_last)


class GlobalBatchSampler:
    """This process's piece of every global batch.

    The order of the images depends on seed, task and epoch alone. It is cut into global batches;
    of each, every process takes a run of whole vote groups, the same places of each batch. The last
    batch may be short: then a process may have fewer images or none, so that all take equally many
    steps. Nothing is padded, and nothing dropped unless `drop_last` asks for it.

    Args:
        num_images: n, the images of the task.
        options: See `LoaderOptions`.
        task: Index of the task.
    """

    def __init__(self, num_images: int, options: LoaderOptions, task: int) -> None:
        self.num_images = num_images
        self.options = options
        self.task = task
        self.epoch = 0
        self.first_step = 0

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch that the next iteration delivers, and from which step on."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        options = self.options
        return steps_per_epoch(self.num_images, options.full_batch, options.drop_last)

    def __iter__(self) -> Iterator[list[Key]]:
        return self._batches(self.epoch, self.first_step)

    def global_batch_size(self, step: int) -> int:
        """Images of all processes together in a step of the epoch, counted from 0."""
        full = self.options.full_batch
        return min(full, self.num_images - step * full)

    def _batches(self, epoch: int, first_step: int) -> Iterator[list[Key]]:
        order = self._order(epoch)
        full = self.options.full_batch
        share = self.options.share(full)
        for step in range(first_step, len(self)):
            piece = order[step * full : (step + 1) * full][share]
            yield self._keys(epoch, step, piece)

    def _keys(self, epoch: int, step: int, piece: list[int]) -> list[Key]:
        """Keys of this process's images of a step, given their positions."""
        return [TrainKey(self.task, epoch, position) for position in piece]

    def _order(self, epoch: int) -> list[int]:
        rng = generator(self.options.seed, Stream.ORDER, self.task, epoch)
        return rng.permutation(self.num_images).tolist()


class ReplaySampler(GlobalBatchSampler):
    """Lets R replayed images follow the images of every vote group, with which they vote.

    Args:
        num_images: n, the images of the task.
        options: See `LoaderOptions`.
        task: Index of the task.
        buffer: Numbers of the images that may be replayed, (m,).
    """

    def __init__(
        self, num_images: int, options: LoaderOptions, task: int, buffer: NDArray[np.int64]
    ) -> None:
        super().__init__(num_images, options, task)
        self.buffer = buffer

    def global_batch_size(self, step: int) -> int:
        """Images of all processes together in a step of the epoch, replayed ones included."""
        own = super().global_batch_size(step)
        return own + self.options.replayed_per_group * self.options.num_groups(own)

    def _keys(self, epoch: int, step: int, piece: list[int]) -> list[Key]:
        size, replayed = self.options.vote_group_size, self.options.replayed_per_group
        first_group = self.options.share(self.options.full_batch).start // size
        drawn = self._draw(epoch, step)  # (R * groups of a full step,)
        keys: list[Key] = []
        for group in range(self.options.num_groups(len(piece))):
            own = piece[group * size : (group + 1) * size]
            keys += super()._keys(epoch, step, own)
            first = (first_group + group) * replayed
            keys += [
                Replayed(self.task, epoch, step * len(drawn) + at, int(drawn[at]))
                for at in range(first, first + replayed)
            ]
        return keys

    def _draw(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Images replayed in a step by all processes: each once, if there are enough."""
        number = self.options.replayed_per_group * self.options.num_groups(self.options.full_batch)
        rng = generator(self.options.seed, Stream.REPLAY, self.task, epoch, step)
        return rng.choice(self.buffer, number, replace=number > len(self.buffer))


class TestSampler:
    """This process's share of a test set, in the data set's order.

    Vote groups are consecutive images of the whole set. Each process gets a run of whole groups (or
    none at all), and a batch holds whole groups: as many as fit into it, at least one. Every image
    is seen exactly once by one of the processes.

    Args:
        num_images: n, the images of the test set.
        options: See `LoaderOptions`.
        test_set: Index of the test set.
    """

    __test__ = False  # no test class, whatever pytest thinks of the name

    def __init__(self, num_images: int, options: LoaderOptions, test_set: int) -> None:
        self.positions = range(num_images)[options.share(num_images)]
        self.batch_size = options.test_batch
        self.test_set = test_set

    def __len__(self) -> int:
        return -(-len(self.positions) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for at in range(0, len(self.positions), self.batch_size):
            piece = self.positions[at : at + self.batch_size]
            yield [TestKey(self.test_set, position) for position in piece]
