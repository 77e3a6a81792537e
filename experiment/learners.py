"""Predictions of a finished run: the classes of any images, one by one or in files.

Shapes: B images of a batch, C classes learned so far, K prompts selected, S input size in pixels.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import utils
from cli.settings import Settings
from continual_datasets.images import DataError, join_names, open_image, to_rgb
from continual_datasets.pipeline import ImagePipeline
from continual_datasets.readers import class_folders
from continual_datasets.transforms import Transform
from experiment import checkpoints, network, precision
from experiment.checkpoints import Checkpoint, CheckpointError
from model import backbone

#: Path and class of each image; None: none of its folders is called as a learned class.
Images = list[tuple[str, str | None]]

#: Images of a pass through the model unless asked for.
BATCH_SIZE = 64


@dataclass(frozen=True)
class Predictions:
    """What a learner predicts for B images.

    Attributes:
        class_names: The C classes learned so far, in the order of the columns.
        probabilities: Softmax over these classes, float64 (B, C) on the CPU, in [0, 1].
        prompts: Ids of the prompts that served each image, best first, int64 (B, K) on the CPU;
            K is 0 if the run has no prompts.
    """

    class_names: list[str]
    probabilities: Tensor
    prompts: Tensor

    @property
    def classes(self) -> list[str]:
        """Name of the most probable class of each image, (B,)."""
        return [self.class_names[best] for best in self.probabilities.argmax(dim=1)]

    def top(self, count: int = 5) -> list[list[tuple[str, float]]]:
        """The most probable classes of each image, best first: name and probability in [0, 1]."""
        best = self.probabilities.topk(min(count, len(self.class_names)), dim=1)
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [[(self.class_names[i], p) for i, p in zip(*row, strict=True)] for row in rows]


class Learner:
    """The model of a checkpoint, ready to predict; see `predict.load_learner`.

    Attributes:
        class_names: The C classes that were learned so far; no other is predicted.
        task: 1-based number of the last task that was learned.
        transform: From an RGB image to its uint8 pixels (3, S, S).

    Raises:
        CheckpointError: If settings or names of classes are damaged or missing, or the backbone is
            not that of the run.
        WeightsError: If weights are missing, damaged or do not fit.
    """

    def __init__(
        self, stored: Checkpoint, device: torch.device, pretrained: str | None = None
    ) -> None:
        learned = learned_classes(stored)
        values = checkpoints.stored_settings(stored.config, stored.path)
        values = {k: v for k, v in values.items() if k not in checkpoints.OF_A_COMMAND}
        settings = Settings().replace(**values)
        if pretrained is not None:
            settings = settings.replace(pretrained=pretrained)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(settings.run.seed)  # for a random backbone
            size = settings.transforms.input_size
            vit = backbone.build_backbone(settings.model, size, pretrained=True)
            identity = backbone.identify(vit, settings.model.model, settings.model.weight_source)
            checkpoints.check_same_backbone(identity, stored)
            model = network.build_model(settings, vit, len(stored.class_names or ())).to(device)
        precision.apply(settings.precision, model, ())
        model.load_trained_state(stored.model, str(stored.path))
        self._model, self._size, self._device = model.eval(), size, device
        self._votes = settings.prompts.prompt_pool and settings.prompts.batchwise_prompt
        self._columns = torch.tensor([*learned], device=device)  # (C,)
        self._pipeline = ImagePipeline(settings.transforms, device)
        self.class_names, self.task = [*learned.values()], stored.task
        self.transform: Transform = self._pipeline.test_transform

    @torch.no_grad()
    def __call__(
        self, images: Any, vote_group_size: int = 1, batch_size: int = BATCH_SIZE
    ) -> Predictions:
        """Predicts the classes of B images, any number of them.

        Args:
            images: Paths of image files and PIL images, which are resized and cut as the run's test
                images; or a tensor (B, 3, S, S) of uint8 pixels, or of the floats that the model
                takes: in [0, 1], and normalised if the run has a `--norm`.
            vote_group_size: V, images that select their prompts together, in the order given; 1:
                each image alone.
            batch_size: Images of a pass through the model, rounded to whole vote groups.

        Raises:
            DataError: If a file is missing, damaged or no image.
            ValueError: If there are no images, a tensor has another shape, or images of this run do
                not vote.
        """
        if isinstance(images, str | Path | Image.Image):
            images = [images]
        size, votes = self._size, vote_group_size
        is_tensor = isinstance(images, Tensor)
        if is_tensor and (images.ndim != 4 or images.shape[1:] != (3, size, size)):
            raise ValueError(
                f"a tensor of images must be (B, 3, {size}, {size}), found {tuple(images.shape)}"
            )
        if not len(images):
            raise ValueError("there are no images to predict")
        if votes > 1 and not self._votes:
            raise ValueError("images of this run do not vote: leave vote_group_size out")
        step, found = max(1, batch_size // votes) * votes, []
        for part in (images[at : at + step] for at in range(0, len(images), step)):
            batch = part if is_tensor else torch.stack([self._pixels(image) for image in part])
            out = self._model(
                self._pipeline.to_input(batch.to(self._device), train=False), vote_group_size=votes
            )
            logits = out["logits"].index_select(1, self._columns)  # (B, C)
            served = out.get("prompt_idx", torch.empty(len(part), 0, dtype=torch.int64))
            found.append((logits.double().softmax(dim=1).cpu(), served.cpu()))
        return Predictions(self.class_names, *map(torch.cat, zip(*found, strict=True)))

    def _pixels(self, image: Any) -> Tensor:
        is_image = isinstance(image, Image.Image)
        return self.transform(to_rgb(image) if is_image else open_image(image))


def learned_classes(stored: Checkpoint) -> dict[int, str]:
    """Names of the classes that were learned so far, by class id, ascending.

    Raises:
        CheckpointError: If the checkpoint has no names, or not of all classes.
    """
    names, order = stored.class_names or [], stored.class_order or []
    if not names or not order or max(chain(*order), default=0) >= len(names):
        raise CheckpointError(
            f"{stored.path} does not name its classes, as those of l2p-pytorch: main.py --eval "
            "--checkpoint FILE evaluates it"
        )
    return {i: names[i] for i in sorted({*chain(*order[: stored.task])})}


# Files


def find_images(place: str, learned: Collection[str]) -> tuple[Images, list[str]]:
    """Finds images: a file, or what is in a folder and its sub-folders but for hidden files.

    Returns:
        The images; and notes on what is left out, or not counted in the accuracy.

    Raises:
        DataError: If there are none.
        OSError: If a folder cannot be read.
    """
    folder = Path(place)
    if folder.is_file():
        return [(place, None)], []
    if not folder.is_dir():
        raise DataError(f"{place} is neither a file nor a folder: name images or folders")
    names, unread = class_folders.images_below(folder)
    formats = f"only {class_folders.EXTENSIONS} are read"
    if unread:
        formats += f", convert the others ({len(unread)}, such as {unread[0]})"
    if not names:
        raise DataError(f"no image in {place}: {formats}")
    notes = [f"left out in {place}: {formats}"] if unread else []
    labels: dict[str, str | None] = {}
    for name in names:
        parents = map(str, Path(name).parents)  # a class may be called MNIST/7
        labels[name] = next((parent for parent in parents if parent in learned), None)
    others = {Path(name).parts[0] for name in names if labels[name] is None and os.sep in name}
    spellings = {name.casefold() for name in others}
    similar = [name for name in learned if name.casefold() in spellings]
    if similar or (others and any(labels.values())):
        hint = f" (is {join_names(similar)} meant?)" if similar else ""
        shown = join_names(sorted(others))
        notes.append(
            f"not counted in the accuracy: {shown} in {place}, no classes learned so far{hint}"
        )
    return [(str(folder / name), label) for name, label in labels.items()], notes


def predict_files(
    learner: Learner, images: Images, top: int, batch_size: int, vote_group_size: int
) -> Iterator[dict[str, Any]]:
    """Predicts the classes of image files, in batches of whole vote groups.

    Yields of each image `path`, `label`, its `top` classes with their probabilities, and `prompts`;
    of one that cannot be read, which takes no place in a vote group, `path` and `reason`.
    """
    size = max(1, batch_size // vote_group_size) * vote_group_size
    sound: list[tuple[dict[str, Any], Tensor]] = []
    all_pixels = _read([path for path, _ in images], learner.transform, size)
    for number, ((path, label), pixels) in enumerate(zip(images, all_pixels, strict=True), start=1):
        if isinstance(pixels, DataError):
            yield {"path": path, "reason": str(pixels)}
        else:
            sound.append(({"path": path, "label": label}, pixels))
        if sound and (len(sound) == size or number == len(images)):
            rows, batch = zip(*sound, strict=True)
            found = learner(torch.stack(batch), vote_group_size, size)
            of_each = zip(rows, found.top(top), found.prompts.tolist(), strict=True)
            yield from ({**row, "top": best, "prompts": own} for row, best, own in of_each)
            sound.clear()


def _read(paths: Sequence[str], transform: Transform, number: int) -> Iterator[Tensor | DataError]:
    """Pixels of image files, (3, S, S), or why one cannot be read; so many are read at a time."""

    def read(path: str) -> Tensor | DataError:
        try:
            return transform(open_image(path))
        except DataError as error:
            return error

    with ThreadPoolExecutor(utils.usable_cores()) as pool:
        for first in range(0, len(paths), number):
            yield from pool.map(read, paths[first : first + number])
