"""Image transforms on the device: crop, enlarge and flip a whole batch of stored images.

A DataLoader worker draws the crop and the flip of an image as `build_transform` does, but returns
only these numbers; the device makes pixels of them, level for level those of Pillow.

Written by hand because no library does this for a batch: torchvision's `resize` has one box for all
images, and on floats differs from Pillow by up to 31 levels (bicubic, black-and-white patterns),
torch's `grid_sample` by up to 64, since Pillow rounds and clips between its two passes. Here all
sums are multiples of 2^-22 below 2^9, so float64 gives the same levels on every device.

Shapes: B images of a batch, n stored images, C colour channels, H height, W width in pixels (of the
largest stored image), S input size in pixels. Crop parameters (10,) are the number of the image,
whether it is mirrored, and for each axis, vertical first: first pixel and length of the box, the
length it is resized to, and the first of the S pixels wanted of that.
"""

import torch
from torch import Tensor

from cli.settings import TransformSettings
from continual_datasets.transforms import CROP_RULES, LARGEST_UNCROPPED

#: Pillow computes with weights of so many fractional bits.
_WEIGHT_BITS = 22

#: An image on the device: its number among all images there, its height and width in pixels.
Place = tuple[int, int, int]


def random_crop(place: Place, options: TransformSettings) -> Tensor:
    """Draws crop and flip from torch's global generator, as `build_transform(train=True, ...)`."""
    no_pixels = torch.empty(place, device="meta")  # get_params asks for the size alone
    scale, ratio, size = list(options.scale), list(options.ratio), options.input_size
    rule = CROP_RULES[options.crop_rule]
    top, left, height, width = rule.get_params(no_pixels, scale, ratio)
    flip = bool(torch.rand(1) < options.hflip)
    return torch.tensor((place[0], flip, top, height, size, 0, left, width, size, 0))  # (10,)


def central_crop(place: Place, options: TransformSettings) -> Tensor:
    """The whole image, resized and cut as by `build_transform(train=False, ...)`."""
    size, sides = options.input_size, place[1:]
    resized = [size, size]
    if size > LARGEST_UNCROPPED:
        resized = [int(256 / 224 * size) * side // min(sides) for side in sides]
    axes = [(0, a, b, round((b - size) / 2)) for a, b in zip(sides, resized, strict=True)]
    return torch.tensor((place[0], False, *axes[0], *axes[1]))  # (10,)


def cropped(images: Tensor, crops: Tensor, size: int, interpolation: str) -> Tensor:
    """Crops, enlarges and flips; never waits for the device.

    Args:
        images: All stored images, (n, C, H, W) uint8.
        crops: Crop parameters on the device, (B, 10).
        size: S, not below any length of a box.
        interpolation: A key of `FILTERS`.

    Returns:
        Pixels (B, 3, S, S), uint8.
    """
    row, flip, vertical, horizontal = crops.split([1, 1, 4, 4], dim=1)
    chosen = images.index_select(0, row[:, 0]).transpose(1, 2)  # (B, H, C, W)
    places = torch.arange(size, device=crops.device).expand(len(crops), size)  # (B, S)
    mirrored = torch.where(flip == 1, size - 1 - places, places)  # (B, S)
    batch, height, channels, width = chosen.shape
    down = _weights(vertical, places, height, interpolation)  # (B, S, H)
    across = _weights(horizontal, mirrored, width, interpolation)  # (B, S, W)
    lines = _to_levels(chosen.flatten(1, 2).double() @ across.mT)  # (B, H * C, S)
    lines = lines.view(batch, height, channels * size)
    pixels = _to_levels(down @ lines.double()).view(batch, size, channels, size)
    return pixels.transpose(1, 2).expand(-1, 3, -1, -1).contiguous()


def _weights(axis: Tensor, places: Tensor, num_pixels: int, interpolation: str) -> Tensor:
    """Share of every pixel of the images in every pixel (B, S) of the result.

    Returns:
        Multiples of 2^-22, (B, S, H or W) float64.

    Source: Pillow's Resample.c, each operation in its order, so that each is rounded as there.
    """
    first, length, resized, start = axis.unsqueeze(2).unbind(1)  # (B, 1) each
    center = ((start + places).double() + 0.5) * (length.double() / resized)  # (B, S), in the box
    pixels = torch.arange(num_pixels, device=axis.device) - first  # (B, H or W), in the box
    distance = pixels.double().unsqueeze(1) - center.unsqueeze(2) + 0.5  # (B, S, H or W)
    weights = FILTERS[interpolation](distance.abs_())
    weights *= ((pixels >= 0) & (pixels < length)).unsqueeze(1)  # nothing beyond the box
    weights /= weights.sum(2, keepdim=True)
    return weights.mul_(2**_WEIGHT_BITS).round_().mul_(2**-_WEIGHT_BITS)


def _to_levels(sums: Tensor) -> Tensor:
    """Rounds to levels 0..255, half up, as uint8."""
    return sums.add_(0.5).clamp_(0, 255).to(torch.uint8)


def _cubic(distance: Tensor) -> Tensor:
    """Keys' cubic with a = -0.5."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * -0.5
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


#: Weight of a pixel at a distance >= 0.
FILTERS = {"bilinear": lambda distance: (1 - distance).clamp_(min=0), "bicubic": _cubic}
