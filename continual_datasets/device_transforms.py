"""Image transforms on the device: crops, flips and resizing of a whole batch of cached images.

What a training image looks like is still drawn where it always was, image by image from the global
generators in the loader's workers; but a worker hands on no pixels, only six numbers, the draw.
The pixels made of it on the device are, level for level, those that Pillow makes.

| who | does |
|---|---|
| `DeviceImages` | holds the images of all sources, makes a batch of pixels from crop parameters |
| `PlacedSource` | replaces a source; an item is the index of an image on the device |
| `build_draw` | makes an image's draw of its place, as `build_transform` makes its pixels |

Shapes: B images of a batch, n images, C colour channels, H height, W width in pixels (of the
largest image on the device), S input size in pixels. A draw is (row, top, left, height, width,
flip): the image, the box cut out of it, and whether it is mirrored.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms import RandomResizedCrop

from cli.settings import TransformSettings
from continual_datasets.images import ImageSource
from continual_datasets.transforms import LARGEST_UNCROPPED

#: Reach of the filter in pixels, where nothing is shrunk.
_REACH = {"bilinear": 1, "bicubic": 2}
#: Pillow computes with weights of so many fractional bits.
_WEIGHT_BITS = 22
#: Before version 13, Pillow always resized across first, then down.
_FIRST_PASS_VARIES = int(PIL.__version__.split(".")[0]) >= 13
#: Images that are copied at once, so that no second copy of all is ever held.
_COPIED_TOGETHER = 256


def why_not_on_device(options: TransformSettings) -> str | None:
    """Name the options that only the transforms of the workers know; None if there are none."""
    flags = list(_flags_of_workers(options))
    if not flags:
        return None
    return f"{', '.join(flags)} {'needs' if len(flags) == 1 else 'need'} the loader's workers"


def _flags_of_workers(options: TransformSettings) -> Iterator[str]:
    if options.aa:
        yield f"--aa {options.aa}"
    if options.color_jitter:
        yield f"--color-jitter {options.color_jitter}"
    if options.reprob:
        yield f"--reprob {options.reprob}"
    if options.train_resize is not None:
        yield f"--train_resize {options.train_resize}"
    if options.train_jpeg is not None:
        yield f"--train_jpeg {options.train_jpeg}"
    if options.train_interpolation not in _REACH:
        yield f"--train-interpolation {options.train_interpolation}"


# In the workers: places and draws


class Place(NamedTuple):
    """Index and size of an image on the device.

    Attributes:
        row: Its number among all images there.
        height: In pixels.
        width: In pixels.
    """

    row: int
    height: int
    width: int


class PlacedSource:
    """A source whose images are on the device: items are (`Place`, class id).

    Holds no pixels, so it costs nothing to send to a worker.

    Args:
        source: The source; its `arrays()` are on the device.
        first_row: Row of its first image there.
    """

    def __init__(self, source: ImageSource, first_row: int) -> None:
        arrays = source.arrays()
        assert arrays is not None, "images in files cannot be on the device"
        self.classes = source.classes
        self.targets = source.targets
        self.by_class = source.by_class
        self.first_row = first_row
        self._digest = source.digest()
        self._sizes = [array.shape[1:3] for array in arrays]
        self._ends = list(accumulate(map(len, arrays)))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:  # a Place instead of an image
        at = range(len(self))[index]  # from the end if negative; an IndexError beyond
        height, width = self._sizes[bisect_right(self._ends, at)]
        return Place(self.first_row + at, height, width), int(self.targets[at])

    def digest(self) -> str:
        """That of the source."""
        return self._digest

    def arrays(self) -> list[NDArray[np.uint8]] | None:
        """None: the images are on the device."""
        return None


def build_draw(train: bool, options: TransformSettings) -> Callable[[Any], Tensor]:
    """Build the way from the place of an image to its draw.

    Args:
        train: Whether to draw a crop and a flip from torch's global generator, the very same as
            `build_transform` in the same state of it. Otherwise the draw is the whole image.
        options: See `TransformSettings`.

    Returns:
        Function from a `Place` to an int64 tensor (6,).
    """
    if not train:
        return _draw_whole
    scale, ratio = list(options.scale), list(options.ratio)
    return partial(_draw_crop, scale=scale, ratio=ratio, hflip=options.hflip)


def _draw_whole(place: Place) -> Tensor:
    return torch.tensor((place.row, 0, 0, place.height, place.width, 0))  # (6,)


def _draw_crop(place: Place, scale: list[float], ratio: list[float], hflip: float) -> Tensor:
    box = RandomResizedCrop.get_params(_no_pixels(place.height, place.width), scale, ratio)
    flip = bool(torch.rand(1) < hflip)
    return torch.tensor((place.row, *box, flip))  # (6,)


@lru_cache
def _no_pixels(height: int, width: int) -> Tensor:
    """An image that has a size and no pixels."""
    return torch.empty((1, height, width), device="meta")


# On the device: pixels


def place(
    sources: Sequence[ImageSource], device: torch.device
) -> tuple[DeviceImages, list[ImageSource]]:
    """Copies the images of sources to the device; returns them, and the sources to use instead."""
    arrays = [source.arrays() or [] for source in sources]
    ends = accumulate(map(len, sources))
    placed: list[ImageSource] = [
        PlacedSource(source, end - len(source)) for source, end in zip(sources, ends, strict=True)
    ]
    return DeviceImages([array for part in arrays for array in part], device), placed


def num_bytes(arrays: Sequence[NDArray[np.uint8]]) -> int:
    """Bytes that `DeviceImages` takes for these images."""
    return sum(map(len, arrays)) * int(np.prod(_common_shape(arrays)))


def _common_shape(arrays: Sequence[NDArray[np.uint8]]) -> tuple[int, int, int]:
    """C, H and W that all images fit in; one channel if all are grey."""
    channels = 3 if any(array.ndim == 4 for array in arrays) else 1
    return channels, max(a.shape[1] for a in arrays), max(a.shape[2] for a in arrays)


class DeviceImages:
    """Pictures on the device, and what the model sees of them.

    Making pixels never waits for the device; shapes depend on the number of draws and S alone.

    Args:
        arrays: Grey values (n_i, H_i, W_i) or colours (n_i, H_i, W_i, 3), uint8.
        device: Where to store them.

    Attributes:
        pixels: All of them in order, (n, C, H, W) uint8; smaller ones fill the upper left.
    """

    def __init__(self, arrays: Sequence[NDArray[np.uint8]], device: torch.device) -> None:
        shape = (sum(map(len, arrays)), *_common_shape(arrays))
        self.pixels = torch.zeros(shape, dtype=torch.uint8, device=device)  # (n, C, H, W)
        first = 0
        for array in arrays:
            self._fill(first, array)
            first += len(array)

    def _fill(self, first: int, array: NDArray[np.uint8]) -> None:
        height, width = array.shape[1:3]
        for at in range(0, len(array), _COPIED_TOGETHER):
            part = np.array(array[at : at + _COPIED_TOGETHER])  # writable, which torch asks for
            images = torch.from_numpy(part).to(self.pixels.device)  # a few as in `array`
            images = images.unsqueeze(1) if array.ndim == 3 else images.permute(0, 3, 1, 2)
            rows = slice(first + at, first + at + len(part))
            self.pixels[rows, :, :height, :width] = images

    def train_pixels(self, draws: Tensor, options: TransformSettings) -> Tensor:
        """Crop, resize and flip, as `build_transform(train=True, ...)` does.

        Args:
            draws: From `build_draw(train=True, ...)`, (B, 6), on the device.
            options: Options that `why_not_on_device` has nothing against.

        Returns:
            Pixels (B, 3, S, S), uint8.
        """
        rows, top, left, height, width, flip = draws.unsqueeze(-1).unbind(1)  # (B, 1) each
        down = torch.arange(options.input_size, device=draws.device)  # (S,)
        across = torch.where(flip == 1, options.input_size - 1 - down, down)  # (B, S)
        size = torch.full_like(rows, options.input_size)  # (B, 1)
        vertical = _Axis(top, height, size, down.expand_as(across))
        horizontal = _Axis(left, width, size, across)
        return self._resample(rows[:, 0], vertical, horizontal, options.train_interpolation)

    def test_pixels(self, draws: Tensor, options: TransformSettings) -> Tensor:
        """Resize and cut the centre out, as `build_transform(train=False, ...)` does.

        Args:
            draws: From `build_draw(train=False, ...)`, (B, 6), on the device.
            options: See `TransformSettings`.

        Returns:
            Pixels (B, 3, S, S), uint8.
        """
        rows, top, left, height, width, _ = draws.unsqueeze(-1).unbind(1)  # (B, 1) each
        short = torch.minimum(height, width)  # (B, 1)
        vertical = _central(top, height, short, options.input_size)
        horizontal = _central(left, width, short, options.input_size)
        return self._resample(rows[:, 0], vertical, horizontal, options.test_interpolation)

    def _resample(
        self, rows: Tensor, vertical: _Axis, horizontal: _Axis, interpolation: str
    ) -> Tensor:
        images = self.pixels.index_select(0, rows)  # (B, C, H, W)
        if _FIRST_PASS_VARIES and vertical.places.shape[1] < images.shape[2]:
            images = _resize_in_due_order(images, vertical, horizontal, interpolation)
        else:
            images = _resize(images, vertical, horizontal, interpolation)  # (B, C, S, S)
        return images.expand(-1, 3, -1, -1).contiguous()  # (B, 3, S, S)


class _Axis(NamedTuple):
    """What is resized along one axis, and which pixels of the result are wanted.

    Attributes:
        first: First pixel of the box, (B, 1).
        length: Pixels of the box, (B, 1).
        resized: Pixels that it is resized to, (B, 1).
        places: Which of these are wanted, (B, S).
    """

    first: Tensor
    length: Tensor
    resized: Tensor
    places: Tensor


def _resize_in_due_order(
    images: Tensor, vertical: _Axis, horizontal: _Axis, interpolation: str
) -> Tensor:
    """Resize each image along the axis first that Pillow takes first; for the rest as `_resize`.

    It is the vertical one where the height shrinks by more than twice what the width does. Such
    images are turned over the diagonal, and back in the end.
    """
    shrinks = vertical.length - vertical.resized  # (B, 1)
    narrows = horizontal.length - horizontal.resized  # (B, 1)
    is_turned = (shrinks > 0) & (shrinks > 2 * narrows)  # (B, 1)
    across = _either(is_turned, vertical, horizontal)
    down = _either(is_turned, horizontal, vertical)
    is_turned = is_turned[:, :, None, None]  # (B, 1, 1, 1)
    height, width = images.shape[2:]
    side = max(height, width)
    images = pad(images, (0, side - width, 0, side - height))  # (B, C, side, side)
    images = torch.where(is_turned, images.mT, images)
    images = _resize(images, down, across, interpolation)  # (B, C, S, S)
    return torch.where(is_turned, images.mT, images)


def _either(is_first: Tensor, first: _Axis, second: _Axis) -> _Axis:
    pairs = zip(first, second, strict=True)
    return _Axis(*(torch.where(is_first, one, other) for one, other in pairs))


def _resize(images: Tensor, vertical: _Axis, horizontal: _Axis, interpolation: str) -> Tensor:
    """Resize across, then down, each rounded to 8 bits.

    Pixels and weights are whole numbers; float64 holds their products and sums exactly.

    Args:
        images: (B, C, H, W), uint8.
        vertical: What is wanted of the H pixels of a column.
        horizontal: What is wanted of the W pixels of a row.
        interpolation: A key of `_FILTERS`.

    Returns:
        (B, C, S, S), uint8.
    """
    channels, height, width = images.shape[1:]
    across = _weights(horizontal, width, interpolation)  # (B, S, W)
    sums = images.double().flatten(1, 2) @ across.mT  # (B, C * H, S)
    rows = _to_levels(sums).unflatten(1, (channels, height))  # (B, C, H, S)
    down = _weights(vertical, height, interpolation)  # (B, S, H)
    return _to_levels(down.unsqueeze(1) @ rows).to(torch.uint8)  # (B, C, S, S)


def _central(first: Tensor, length: Tensor, short: Tensor, input_size: int) -> _Axis:
    """One axis of a test image.

    Args:
        first: First pixel of the box, (B, 1).
        length: Pixels of the box, (B, 1).
        short: Pixels of the box's shorter side, (B, 1).
        input_size: S.
    """
    places = torch.arange(input_size, device=first.device)  # (S,)
    if input_size <= LARGEST_UNCROPPED:
        resized = torch.full_like(length, input_size)  # (B, 1)
        return _Axis(first, length, resized, places.expand(len(first), -1))
    resized = int(256 / 224 * input_size) * length // short  # (B, 1)
    margin = ((resized - input_size).double() / 2).round().long()  # (B, 1); half to even
    return _Axis(first, length, resized, margin + places)


def _weights(axis: _Axis, num_pixels: int, interpolation: str) -> Tensor:
    """Share of every pixel of the image in every pixel of the result, in 2^-22.

    Args:
        axis: What is wanted.
        num_pixels: Pixels of the images along the axis, H or W.
        interpolation: A key of `_FILTERS`.

    Returns:
        Whole numbers, (B, S, H or W) float64.

    Source: Pillow's Resample.c, each operation in its order, so that each is rounded as there.
    """
    scale = axis.length.double() / axis.resized.double()  # (B, 1)
    stretch = scale.clamp(min=1)  # (B, 1); shrinking averages over as many pixels
    reach = _REACH[interpolation] * stretch  # (B, 1)
    center = (axis.places.double() + 0.5) * scale  # (B, S), in pixels of the box
    first = (center - reach + 0.5).trunc().clamp(min=0)  # (B, S)
    stop = torch.minimum((center + reach + 0.5).trunc(), axis.length.double())  # (B, S)
    pixels = torch.arange(num_pixels, device=scale.device) - axis.first  # (B, W), from the box on
    x = pixels.double().unsqueeze(1)  # (B, 1, W)
    distance = (x - center.unsqueeze(2) + 0.5) * (1.0 / stretch).unsqueeze(2)  # (B, S, W)
    filtered = _FILTERS[interpolation](distance.abs_())  # (B, S, W)
    filtered *= (x >= first.unsqueeze(2)) & (x < stop.unsqueeze(2))  # nothing beyond the box
    filtered /= filtered.sum(2, keepdim=True)
    filtered *= 2**_WEIGHT_BITS
    return filtered.add_(filtered.sign(), alpha=0.5).trunc_()  # half away from zero


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance).clamp_(min=0)


def _cubic(distance: Tensor) -> Tensor:
    """Keys' cubic with a = -0.5, of distances >= 0."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * -0.5
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


_FILTERS = {"bilinear": _triangle, "bicubic": _cubic}


def _to_levels(sums: Tensor) -> Tensor:
    """Round sums of 2^-22 to levels 0..255, in place."""
    half = 2 ** (_WEIGHT_BITS - 1)
    return sums.add_(half).mul_(2**-_WEIGHT_BITS).floor_().clamp_(0, 255)
