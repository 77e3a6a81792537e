"""Wrong values to put in place of those of a file."""

import copy
import random

import torch


def nested(depth):
    """A list in a list in a list, and so on."""
    value = []
    for _ in range(depth):
        value = [value]
    return value


#: None of them may raise anything but the error for people.
HOSTILE = [
    None, True, 0, -1, 1.5, 10**12, 10**400, 10**5000, float("nan"), float("inf"), "x", b"x",
    "\udcff\x1b[31m", [], {}, ["x"], [["x"]], [[-1]], [float("nan")], [[1.0], [1.0, 2.0]], {1: 2},
    nested(3000), {"a": nested(3000)}, torch.ones(3), torch.tensor([-1]), torch.ones(2).to_sparse(),
    torch.ones(2, device="meta"),
]  # fmt: skip


def places(value, *path):
    """Paths of all that is inside a value, of lists in it of the first item alone."""
    yield path
    if isinstance(value, list):
        value = dict(enumerate(value[:1]))
    for key, one in value.items() if isinstance(value, dict) else ():
        yield from places(one, *path, key)


def changed(value, path, other):
    """The same with another value at a path inside it."""
    if not path:
        return other
    value = copy.copy(value)
    value[path[0]] = changed(value[path[0]], path[1:], other)
    return value


def hostile(content, number):
    """What a file holds, with one of the values in one place, so many times."""
    paths, generator = [path for path in places(content) if path], random.Random(0)
    for _ in range(number):
        yield changed(content, generator.choice(paths), generator.choice(HOSTILE))
