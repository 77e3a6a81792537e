"""Image preprocessing, in the DataLoader workers or on the device.

| | in the workers | on the device |
|---|---|---|
| any data | decode, crop, resize, flip to 8-bit pixels | to the model's input |
| data stored on the device | draw crop and flip | crop, enlarge, flip, to the model's input |

Both give the same images, to the last bit.

Shapes: B images, S input size in pixels.
"""

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, chain
from typing import cast

import torch
from torch import Tensor

from cli.settings import TransformSettings
from continual_datasets import device_transforms
from continual_datasets.device_transforms import Place
from continual_datasets.images import ArraySource, ImageSource, Parts
from continual_datasets.transforms import Transform, build_transform, norm_of

#: Part of a GPU's free memory that images may take unless they are asked for.
_SHARE_OF_MEMORY = 0.25
_WORKERS = "the loader's workers"

logger = logging.getLogger(__name__)


class ImagePipeline:
    """What happens to an image, and where.

    Args:
        options: The image transforms.
        device: Where the model is.
        images: All images (n, C, H, W), stored there; None: the workers make pixels.

    Attributes:
        train_transform: What the workers make of a training image.
        test_transform: The same of a test image.
        graph_sizes: Batches of so many images are made by a CUDA graph; by default none are.
        on_device: Whether the images are stored on the device.
    """

    def __init__(
        self, options: TransformSettings, device: torch.device, images: Tensor | None = None
    ) -> None:
        self._options, self._images, self.on_device = options, images, images is not None
        self.train_transform: Transform = build_transform(True, options)
        self.test_transform: Transform = build_transform(False, options)
        if self.on_device:
            self.test_transform = partial(device_transforms.central_crop, options=options)
            self.train_transform = self.test_transform
            if options.augment:
                self.train_transform = partial(device_transforms.random_crop, options=options)
        self._full = torch.tensor(255.0, device=device)  # by a number CUDA would multiply by 1/255
        norm = norm_of(options)
        self._norm = [torch.tensor(part, device=device).view(3, 1, 1) for part in norm]
        self.graph_sizes: set[int] = set()
        self._graphs: dict[tuple[bool, torch.Size], RecordedGraph] = {}

    def to_input(self, batch: Tensor, train: bool) -> Tensor:
        """Input of the model, from what the workers made of the images, on the device.

        It is float32 (B, 3, S, S), in [0, 1] unless a `--norm` is asked for; a float batch is
        returned as it is. All devices compute the same bits.
        """
        if len(batch) not in self.graph_sizes or batch.is_floating_point():
            return self._to_input(batch, train)
        key = train, batch.shape
        if key not in self._graphs:
            self._graphs[key] = RecordedGraph(partial(self._to_input, train=train), batch)
        return self._graphs[key](batch)

    def _to_input(self, batch: Tensor, train: bool) -> Tensor:
        if self._images is not None:
            options = self._options
            augmented = train and options.augment
            filter_name = options.train_interpolation if augmented else options.test_interpolation
            batch = device_transforms.cropped(self._images, batch, options.input_size, filter_name)
        if batch.is_floating_point():
            return batch
        images = batch / self._full  # (B, 3, S, S)
        return images.sub_(self._norm[0]).div_(self._norm[1]) if self._norm else images


class RecordedGraph:
    """Work on a batch as a CUDA graph: the same kernels, which start together.

    `torch.compile` would make others of them, which round in other ways.
    """

    def __init__(self, work: Callable[[Tensor], Tensor], batch: Tensor) -> None:
        self._batch, self._graph = batch.clone(), torch.cuda.CUDAGraph()
        work(self._batch)  # libraries that it uses start outside of the graph
        torch.cuda.synchronize(batch.device)
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # others go on
            self._result = work(self._batch)

    def __call__(self, batch: Tensor) -> Tensor:
        """The result for a batch of the same shape."""
        self._batch.copy_(batch)
        self._graph.replay()
        return self._result.clone()  # the next call overwrites it


class PlacedSource(ImageSource):
    """Replaces a source whose images are on the device, from a row on; only their shape is stored.

    An item is (`Place`, class id).
    """

    def __init__(self, source: ArraySource, first_row: int) -> None:
        super().__init__(source.targets, source.classes)
        self.first_row, self.shape = first_row, source.images.shape[1:3]
        self._digests = source.digests()

    def image(self, index: int) -> Place:
        """Where an image is."""
        return self.first_row + index, *self.shape

    def digests(self) -> tuple[str, str]:
        """The digests of the source."""
        return self._digests


def build_pipeline(
    on_device: bool | str,
    options: TransformSettings,
    runs: Sequence[Parts],
    device: torch.device,
) -> tuple[ImagePipeline, Sequence[Parts]]:
    """Chooses where all images of a run are preprocessed: stored on the device, or by the workers.

    `runs` has its data, and those of the runs that it continues.

    Returns:
        The pipeline, and the data to use instead.

    Raises:
        ValueError: If `on_device` is true, but the images cannot be stored there; `auto` stores
            them on a GPU where that is possible.
    """
    if on_device is False or (on_device == "auto" and device.type == "cpu"):
        return ImagePipeline(options, device), runs
    sources = [source for split in chain(*runs) for source in split.values()]
    arrays = [source for source in sources if isinstance(source, ArraySource)]
    reason = why_not_on_device(options)
    if len(arrays) < len(sources):
        reason = "the images are files, which are read when they are needed"
    elif (side := max(stored_shape(arrays)[2:])) > options.input_size:
        size = options.input_size
        reason = reason or f"shrinking {side} pixels to --input-size {size} needs {_WORKERS}"
    if on_device is True and reason:
        raise ValueError(f"--data_on_device true: {reason}; leave it out")
    if on_device == "auto" and (reason := reason or _too_large(arrays, device)):
        logger.info("Images are not stored on %s: %s", device, reason)
        return ImagePipeline(options, device), runs
    placed = map(PlacedSource, arrays, accumulate(map(len, arrays), initial=0))
    found = [tuple(dict(zip(split, placed, strict=False)) for split in parts) for parts in runs]
    return ImagePipeline(options, device, store(arrays, device)), cast(list[Parts], found)


def why_not_on_device(options: TransformSettings) -> str | None:
    """Names the options that only the transforms of the workers know; None if there are none."""
    if not options.augment:
        return None
    names = ["--aa", "--color-jitter", "--reprob", "--train_resize", "--train_jpeg"]
    if options.train_interpolation not in device_transforms.FILTERS:
        names.append("--train-interpolation")
    values = [getattr(options, name.strip("-").replace("-", "_")) for name in names]
    flags = [f"{name} {value}" for name, value in zip(names, values, strict=True) if value]
    return f"{', '.join(flags)} need{'s' * (len(flags) == 1)} {_WORKERS}" if flags else None


def _too_large(arrays: Sequence[ArraySource], device: torch.device) -> str | None:
    needed, (free, _) = math.prod(stored_shape(arrays)), torch.cuda.mem_get_info(device)
    return None if needed <= _SHARE_OF_MEMORY * free else f"they take {needed / 1e9:.1f} GB"


def stored_shape(sources: Sequence[ArraySource]) -> tuple[int, int, int, int]:
    """(n, C, H, W) that holds all images; one channel if all are grey."""
    shapes = [(*source.images.shape, 1)[:4] for source in sources]  # (n_i, H_i, W_i, 1 or 3)
    numbers, heights, widths, channels = zip(*shapes, strict=True)
    return sum(numbers), max(channels), max(heights), max(widths)


def store(sources: Sequence[ArraySource], device: torch.device) -> Tensor:
    """Copies all images to the device, in order: (n, C, H, W) uint8, each in the upper left."""
    images = torch.zeros(stored_shape(sources), dtype=torch.uint8, device=device)
    row = 0
    for source in sources:
        array = source.images if source.images.ndim == 4 else source.images[..., None]
        part = torch.from_numpy(array.transpose(0, 3, 1, 2).copy())  # (n_i, 1 or 3, H_i, W_i)
        images[row : row + len(part), :, : part.shape[2], : part.shape[3]] = part
        row += len(part)
    return images
