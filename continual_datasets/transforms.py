"""From a picture to the model's input: crops, flips, colours, normalisation.

A picture becomes pixels of one byte, image by image; whole batches of these become the input, on
the device. Random erasing alone needs the input of each image already.

Shapes: B images of a batch, S input size in pixels. A picture is a PIL RGB image, pixels are uint8
tensors (3, S, S), the input is a float tensor (B, 3, S, S).

Source: l2p-pytorch (crop, flip, resize, plain [0, 1] pixels); the official release for what happens
before the crop, and timm for the policies, all of which are off unless asked for.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.auto_augment import (
    augment_and_mix_transform,
    auto_augment_transform,
    rand_augment_transform,
)
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

Transform = Callable[[Image.Image], Tensor]

#: Mean and standard deviation of `--norm`. `none` feeds plain [0, 1], as the original does.
NORMS: dict[str, tuple[Sequence[float], Sequence[float]] | None] = {
    "none": None,
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}
#: Resampling in training; `random` draws bilinear or bicubic for every image.
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "random")
#: Resampling of test images: l2p-pytorch's `bicubic`, or `bilinear` as in the official release.
TEST_INTERPOLATIONS = ("bilinear", "bicubic")
#: Fill of random erasing: black, one random colour, random pixels.
ERASE_MODES = ("const", "rand", "pixel")
#: The original resizes and crops test images only above this input size.
LARGEST_UNCROPPED = 32


@dataclass(frozen=True)
class TransformOptions:
    """What happens to an image before the model sees it.

    Attributes:
        input_size: S, height and width in pixels.
        scale: Range of the random crop's area, as a share of the image.
        ratio: Range of the random crop's width / height.
        hflip: Probability of a horizontal flip.
        interpolation: Resampling of the random crop, one of `INTERPOLATIONS`.
        aa: timm's policy string of RandAugment, AutoAugment or AugMix; None for none.
        color_jitter: Strength of brightness, contrast and saturation jitter; None for none.
        reprob: Probability of random erasing.
        remode: Fill of the erased boxes, one of `ERASE_MODES`.
        recount: Number of boxes erased.
        norm: Normalisation, a key of `NORMS`.
        train_resize: Pixels a side that a training image is resized to (bilinear) before the crop;
            None: it is cropped as it is.
        train_jpeg: Quality of the JPEG file that it is then written to and read from; None: none.
        test_interpolation: Resampling of test images, one of `TEST_INTERPOLATIONS`.

    Raises:
        ValueError: On values out of range; one message with all of them.
    """

    input_size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    interpolation: str = "bilinear"
    aa: str | None = None
    color_jitter: float | None = None
    reprob: float = 0.0
    remode: str = "pixel"
    recount: int = 1
    norm: str = "none"
    train_resize: int | None = None
    train_jpeg: int | None = None
    test_interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        problems = [*_range_problems(self), *_choice_problems(self)]
        if problems:
            raise ValueError("; ".join(problems))


def _range_problems(options: TransformOptions) -> Iterator[str]:
    if options.input_size < 1:
        yield f"--input-size {options.input_size}: must be at least 1"
    if not 0 < options.scale[0] <= options.scale[1] <= 1:
        yield f"--scale {options.scale}: must be two rising shares of the image, in (0, 1]"
    if not 0 < options.ratio[0] <= options.ratio[1]:
        yield f"--ratio {options.ratio}: must be two rising, positive numbers"
    for flag, probability in (("--hflip", options.hflip), ("--reprob", options.reprob)):
        if not 0 <= probability <= 1:
            yield f"{flag} {probability}: must be a probability, in [0, 1]"
    if options.color_jitter is not None and options.color_jitter < 0:
        yield f"--color-jitter {options.color_jitter}: must not be negative"
    if options.train_resize is not None and options.train_resize < 1:
        yield f"--train_resize {options.train_resize}: must be at least 1"
    if options.train_jpeg is not None and not 1 <= options.train_jpeg <= 100:
        yield f"--train_jpeg {options.train_jpeg}: must be a quality, in [1, 100]"
    if options.recount < 1:
        yield f"--recount {options.recount}: must be at least 1"


def _choice_problems(options: TransformOptions) -> Iterator[str]:
    for flag, value, known in (
        ("--train-interpolation", options.interpolation, INTERPOLATIONS),
        ("--test_interpolation", options.test_interpolation, TEST_INTERPOLATIONS),
        ("--remode", options.remode, ERASE_MODES),
        ("--norm", options.norm, tuple(NORMS)),
    ):
        if value not in known:
            yield f"{flag} {value} is unknown: choose one of {', '.join(known)}"
    if options.aa:
        try:
            _augmentation_policy(options.aa, size=224, resampling=None, fill=(128, 128, 128))
        except (AssertionError, LookupError, TypeError, ValueError):
            yield (
                f"--aa {options.aa} is not a policy of timm: give for instance "
                "rand-m9-mstd0.5-inc1, original, v0, 3a or augmix-m5-w4-d2"
            )


def build_transform(train: bool, options: TransformOptions) -> Transform:
    """Build the way from a picture to its pixels.

    Args:
        train: Whether to augment: random crop, flip and whatever `options` ask for. Otherwise
            resize and centre crop, as the original: the short side to 256/224 of the input size;
            up to 32 pixels the whole image is resized instead.
        options: See `TransformOptions`.

    Returns:
        Function from a PIL image to uint8 pixels (3, S, S), for `to_input`; with random erasing,
        which fills with normal noise, to the finished input: a float tensor (3, S, S).
    """
    steps = _train_steps(options) if train else _test_steps(options)
    steps.append(_to_pixels)
    if train and options.reprob:
        steps += [_to_floats, *_normalisation(options), _random_erasing(options)]
    return transforms.Compose(steps)


def to_input(options: TransformOptions, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Build the way from a batch of pixels to the model's input.

    Args:
        options: See `TransformOptions`.
        device: Where the batches are.

    Returns:
        Function from uint8 pixels (B, 3, S, S) to float32 (B, 3, S, S), in [0, 1] unless a `norm`
        is asked for; a float batch is finished and returned as it is. All devices compute the same
        bits.
    """
    full = torch.tensor(255.0, device=device)  # by a plain number CUDA would multiply by 1 / 255
    norm = NORMS[options.norm] or ()
    constants = [torch.tensor(part, device=device).view(3, 1, 1) for part in norm]

    def convert(batch: Tensor) -> Tensor:
        if batch.is_floating_point():
            return batch
        images = batch / full  # (B, 3, S, S)
        if constants:
            mean, std = constants
            images.sub_(mean).div_(std)
        return images

    return convert


def _train_steps(options: TransformOptions) -> list[Callable]:
    steps: list[Callable] = []
    if options.train_resize is not None:
        size = (options.train_resize, options.train_resize)
        steps.append(transforms.Resize(size, InterpolationMode.BILINEAR))
    if options.train_jpeg is not None:
        steps.append(partial(_through_jpeg, quality=options.train_jpeg))
    steps.append(_random_crop(options))
    steps.append(transforms.RandomHorizontalFlip(options.hflip))
    if options.aa:
        norm = NORMS[options.norm] or NORMS["half"]
        assert norm is not None
        resampling = None if options.interpolation == "random" else options.interpolation
        fill = tuple(round(255 * mean) for mean in norm[0])
        steps.append(_augmentation_policy(options.aa, options.input_size, resampling, fill))
    if options.color_jitter:
        steps.append(transforms.ColorJitter(*[options.color_jitter] * 3))
    return steps


def _through_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def _random_crop(options: TransformOptions) -> Callable:
    names = [options.interpolation]
    if options.interpolation == "random":
        names = ["bilinear", "bicubic"]
    crops = [
        transforms.RandomResizedCrop(
            options.input_size, options.scale, options.ratio, InterpolationMode(name)
        )
        for name in names
    ]
    return crops[0] if len(crops) == 1 else transforms.RandomChoice(crops)


def _augmentation_policy(
    policy: str, size: int, resampling: str | None, fill: tuple[int, ...]
) -> Callable:
    hparams: dict[str, Any] = {"translate_const": int(size * 0.45), "img_mean": fill}
    if resampling is not None:
        hparams["interpolation"] = Image.Resampling[resampling.upper()]
    if policy.startswith("rand"):
        built = rand_augment_transform(policy, hparams)
    elif policy.startswith("augmix"):
        built = augment_and_mix_transform(policy, {**hparams, "translate_pct": 0.3})
    else:
        built = auto_augment_transform(policy, hparams)
    ops = built.ops if hasattr(built, "ops") else [op for ops in built.policy for op in ops]
    for op in ops:
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterize
    return built


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the upper bits. timm asks for 0 bits (black), which Pillow 13 refuses."""
    dropped = 8 - min(max(bits, 0), 8)
    return image.point([value >> dropped << dropped for value in range(256)] * 3)


def _random_erasing(options: TransformOptions) -> Callable:
    return RandomErasing(
        options.reprob,
        mode=options.remode,
        min_count=options.recount,
        max_count=options.recount,
        device="cpu",
    )


def _to_pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())  # (3, S, S)


def _to_floats(pixels: Tensor) -> Tensor:
    """As torchvision's ToTensor, bit for bit, but not through torch's thread pool.

    On two busy cores the pool made it 8 ms per image of 224 pixels instead of 0.1.
    """
    return torch.from_numpy(pixels.numpy().astype(np.float32) / np.float32(255))


def _normalisation(options: TransformOptions) -> list[Callable]:
    norm = NORMS[options.norm]
    return [] if norm is None else [transforms.Normalize(*norm)]


def _test_steps(options: TransformOptions) -> list[Callable]:
    size, mode = options.input_size, InterpolationMode(options.test_interpolation)
    if size <= LARGEST_UNCROPPED:
        return [transforms.Resize((size, size), mode)]
    return [
        transforms.Resize(int(256 / 224 * size), mode),
        transforms.CenterCrop(size),
    ]
