"""Image transforms, from a PIL image to the input of the model: crops, flips, colours, norm.

A PIL image becomes uint8 pixels, image by image; whole batches of these become the input, on
the device. Random erasing alone needs the input of each image already.

Shapes: B images of a batch, S input size in pixels. An image is a PIL RGB image, pixels are uint8
tensors (3, S, S), the input is a float tensor (B, 3, S, S).

Source: l2p-pytorch (crop, flip, resize, plain [0, 1] pixels); the official release for what happens
before the crop, and timm for the policies, all of which are off unless asked for.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import transforms_imagenet_train
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import get_dimensions

from cli.settings import TransformSettings, norm_numbers

Transform = Callable[[Image.Image], Tensor]

#: Mean and deviation of names of `--norm`. `none` feeds plain [0, 1], as the original does.
NORMS: dict[str, tuple[Sequence[float], ...]] = {
    "none": (),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}


def norm_of(options: TransformSettings) -> tuple[Sequence[float], ...]:
    """Mean and deviation of `--norm`, (3,) each; nothing for plain [0, 1]; `model` has none."""
    numbers = norm_numbers(options.norm)
    return NORMS.get(options.norm, (numbers[:3], numbers[3:]))


#: Numbers in a policy that would take forever, or that are not finite.
_ENDLESS = re.compile(r"nan|inf|-[nwd]\d{3}|(?<![.\d])\d{4}")

#: The original resizes and crops test images only above this input size.
LARGEST_UNCROPPED = 32


def policy_problem(policy: str) -> str | None:
    """What is wrong with a policy of `--aa`; None: nothing."""
    try:
        if _ENDLESS.search(policy):
            raise ValueError("a number of operations, or a strength, that has no use")
        _policies(TransformSettings(aa=policy))
    except (AssertionError, LookupError, TypeError, ValueError):
        return (
            f"--aa {policy} is not a policy of timm: give for instance "
            "rand-m9-mstd0.5-inc1, original, v0, 3a or augmix-m5-w4-d2"
        )
    return None


def build_transform(train: bool, options: TransformSettings) -> Transform:
    """Builds the transform from a PIL image to its pixels.

    In training, unless `options.augment` is off, the image is augmented: random crop, flip and
    whatever `options` ask for. A test image is resized and cut in the centre, as in the original:
    the short side to 256/224 of the input size; up to 32 pixels the whole image is resized instead.

    Returns:
        Function from a PIL image to uint8 pixels (3, S, S); with random erasing, which fills with
        normal noise, to the finished input: a float tensor (3, S, S).
    """
    train = train and options.augment
    steps = _train_steps(options) if train else _test_steps(options)
    steps.append(_to_pixels)
    if train and options.reprob:
        steps.append(_to_floats)
        if norm := norm_of(options):
            steps.append(transforms.Normalize(*norm))
        mode, count = options.remode, options.recount
        steps.append(RandomErasing(options.reprob, mode=mode, min_count=count, device="cpu"))
    return transforms.Compose(steps)


def _test_steps(options: TransformSettings) -> list[Callable]:
    size, mode = options.input_size, InterpolationMode(options.test_interpolation)
    if size <= LARGEST_UNCROPPED:
        return [transforms.Resize((size, size), mode)]
    return [transforms.Resize(int(256 / 224 * size), mode), transforms.CenterCrop(size)]


def _train_steps(options: TransformSettings) -> list[Callable]:
    steps: list[Callable] = []
    if (side := options.train_resize) is not None:
        steps.append(transforms.Resize((side, side), InterpolationMode.BILINEAR))
    if options.train_jpeg is not None:
        steps.append(partial(_through_jpeg, quality=options.train_jpeg))
    flip = transforms.RandomHorizontalFlip(options.hflip)
    return [*steps, _random_crop(options), flip, *_policies(options)]


def _through_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


class TensorFlowCrop(transforms.RandomResizedCrop):
    """A random crop of uniform height, where torchvision's has a uniform area; smaller on average.

    Source: `tf.image.sample_distorted_bounding_box` without boxes. After 100 attempts it takes the
    whole image; it never draws the last possible position.
    """

    @staticmethod
    def get_params(
        img: Any, scale: Sequence[float], ratio: Sequence[float]
    ) -> tuple[int, int, int, int]:
        """Top, left, height and width of a crop, from torch's global generator."""
        _, height, width = get_dimensions(img)
        areas = [share * height * width for share in scale]
        for _ in range(100):
            aspect = torch.empty(1).uniform_(*ratio).item()  # width / height
            low, high = (round(math.sqrt(area / aspect)) for area in areas)
            high = min(high, height, int((width + 0.5) / aspect))
            rows = int(torch.randint(min(low, high), high + 1, (1,)))
            if rows * round(rows * aspect) < areas[0]:
                rows += 1
            if rows * round(rows * aspect) > areas[1]:
                rows -= 1
            columns = round(rows * aspect)
            fits = rows <= height and columns <= width
            if fits and areas[0] <= rows * columns <= areas[1]:
                free = height - rows, width - columns
                top, left = (int(torch.randint(max(1, places), (1,))) for places in free)
                return top, left, rows, columns
        return 0, 0, height, width


#: The crop of each `--crop_rule`.
CROP_RULES: dict[str, type[transforms.RandomResizedCrop]] = {
    "torchvision": transforms.RandomResizedCrop,
    "tensorflow": TensorFlowCrop,
}


def _random_crop(options: TransformSettings) -> Callable:
    is_random = options.train_interpolation == "random"
    names = ["bilinear", "bicubic"] if is_random else [options.train_interpolation]
    where = options.input_size, options.scale, options.ratio
    rule = CROP_RULES[options.crop_rule]
    crops = [rule(*where, InterpolationMode(name)) for name in names]
    return transforms.RandomChoice(crops) if is_random else crops[0]


def _policies(options: TransformSettings) -> list[Any]:
    """Augmentation policy and colour jitter, as far as they are asked for, as timm makes them."""
    arguments: dict[str, Any] = {
        "color_jitter": options.color_jitter or None,
        "auto_augment": options.aa,
        "interpolation": options.train_interpolation,
        "mean": (norm_of(options) or NORMS["half"])[0],
    }
    _, policies, _ = transforms_imagenet_train(
        options.input_size, **arguments, force_color_jitter=True, separate=True
    )
    for policy in policies.transforms:
        ops = getattr(policy, "ops", None) or chain(*getattr(policy, "policy", []))
        for op in ops:
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterize
    return policies.transforms


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the upper bits. timm asks for 0 bits (black), which Pillow 13 rejects."""
    dropped = 8 - min(max(bits, 0), 8)
    return image.point([value >> dropped << dropped for value in range(256)] * 3)


def _to_pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())  # (3, S, S)


def _to_floats(pixels: Tensor) -> Tensor:
    """As torchvision's ToTensor, bit for bit, but not through torch's thread pool.

    On two busy cores the pool made it 8 ms per image of 224 pixels instead of 0.1.
    """
    return torch.from_numpy(pixels.numpy().astype(np.float32) / np.float32(255))
