"""Random numbers that depend on what they are for, not on what was drawn before.

Whatever a run draws is a pure function of its seed and of a place in the run (task, epoch, image or
step), independent of world size, worker count and interruptions.
"""

from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What random numbers are for, so that no two purposes ever share them."""

    ORDER = 0
    AUGMENTATION = 1
    MODEL = 2
    SCHEDULE = 3
    RESERVOIR = 4
    REPLAY = 5
    REPLAY_AUGMENTATION = 6
    TEST_ORDER = 7
    TRAINING_PART = 8


def random_words(seed: int, stream: Stream, *place: int, num_words: int) -> list[int]:
    """Words of 32 random bits for one purpose and place in the run (task, epoch, ...)."""
    sequence = np.random.SeedSequence(seed % 2**64, spawn_key=(int(stream), *place))
    return sequence.generate_state(num_words).tolist()


def generator(seed: int, stream: Stream, *place: int) -> np.random.Generator:
    """A generator for one purpose and place in the run (task, epoch, ...)."""
    return np.random.default_rng(random_words(seed, stream, *place, num_words=4))


def seed_model(device: torch.device, seed: int, *place: int) -> None:
    """Seeds what a model draws by itself (dropout, stochastic depth) on a device.

    Not `torch.manual_seed`: that seeds every accelerator of the machine, too.
    """
    (word,) = random_words(seed, Stream.MODEL, *place, num_words=1)
    torch.default_generator.manual_seed(word)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(word)
