"""The way of an image to the model: as pixels out of the workers, or made on the device.

| | in the workers | on the device |
|---|---|---|
| any data | decode, crop, resize, flip to 8-bit pixels | to the model's input |
| data kept on the device | draw the crop and the flip | crop, resize, flip, to the input |

Both give the same images, to the last bit.

Shapes: B images, S input size in pixels.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cli.settings import TransformSettings
from continual_datasets import device_transforms
from continual_datasets.device_transforms import DeviceImages
from continual_datasets.images import ImageSource
from continual_datasets.transforms import Transform, build_transform, to_input

#: Part of a GPU's free memory that images may take unless they are asked for.
_SHARE_OF_MEMORY = 0.25

logger = logging.getLogger(__name__)


class ToImages(NamedTuple):
    """What makes images (B, 3, S, S) of the first tensor of a batch, which is on the device.

    Attributes:
        train: For training batches.
        test: For test batches.
    """

    train: Callable[[Tensor], Tensor]
    test: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ImagePipeline:
    """What happens to an image, and where.

    Attributes:
        train_transform: What the workers make of a training image.
        test_transform: The same of a test image.
        to_images: What the device makes of batches of these, (B, 3, S, S).
        on_device: Whether the images are stored on the device.
    """

    train_transform: Transform
    test_transform: Transform
    to_images: ToImages
    on_device: bool


def build_pipeline(
    on_device: bool | str,
    options: TransformSettings,
    sources: Sequence[ImageSource],
    device: torch.device,
) -> tuple[ImagePipeline, list[ImageSource]]:
    """Chooses the way and prepares it.

    Args:
        on_device: Whether to store the images on the device, where possible; `auto`: on a GPU, if
            they can.
        options: What happens to an image.
        sources: All images of the run.
        device: Where the model is.

    Returns:
        The way, and the sources to take instead, in the same order.
    """
    finish = to_input(options, device)
    reason = _why_not(on_device, options, sources, device)
    assert on_device is not True or reason is None, reason
    if on_device == "auto" and device.type == "cuda" and reason is not None:
        logger.info("Images are not stored on %s: %s", device, reason)
    if reason is not None:
        build, to_images = build_transform, ToImages(finish, finish)
        placed = list(sources)
    else:
        build = device_transforms.build_draw
        images, placed = device_transforms.place(sources, device)
        to_images = _made_on_device(images, options, finish)
    train, test = build(True, options), build(False, options)
    return ImagePipeline(train, test, to_images, on_device=reason is None), placed


def _made_on_device(
    images: DeviceImages, options: TransformSettings, finish: Callable[[Tensor], Tensor]
) -> ToImages:
    def train(draws: Tensor) -> Tensor:
        return finish(images.train_pixels(draws, options))

    def test(draws: Tensor) -> Tensor:
        return finish(images.test_pixels(draws, options))

    return ToImages(train, test)


def _why_not(
    on_device: bool | str,
    options: TransformSettings,
    sources: Sequence[ImageSource],
    device: torch.device,
) -> str | None:
    """What speaks against images on the device."""
    if on_device is False or (on_device == "auto" and device.type == "cpu"):
        return "not asked for"
    if (reason := device_transforms.why_not_on_device(options)) is not None:
        return reason
    arrays = [source.arrays() for source in sources]
    if any(part is None for part in arrays):
        return "the images are files, which are read when they are needed"
    if on_device is True:
        return None
    needed = device_transforms.num_bytes([array for part in arrays for array in part or ()])
    free, _ = torch.cuda.mem_get_info(device)
    return None if needed <= _SHARE_OF_MEMORY * free else f"they take {needed / 1e9:.1f} GB"
