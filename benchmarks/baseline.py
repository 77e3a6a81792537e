"""L2P trained the way l2p-pytorch trains it, on today's timm: what `benchmark.py` measures against.

The mathematics are those of the program, which a test compares number by number. What it takes to
get there is the original's:

- two complete vision transformers in single precision; each embeds every image and computes every
  token of its last block;
- the query of every image anew, in each step and in each evaluation;
- in each step a class mask made on the host, a check of the loss, and loss and accuracies read from
  the device;
- worker processes started for every epoch and every evaluation, which hand over floats;
- after every task the whole model on the disk.

Where today's libraries made it faster than it was, it stays so: attention is timm's fused one, and
the vote is the program's own.

Shapes: B images, C classes, D width, N patches, P prompt tokens.
"""

import copy
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from timm.utils import accuracy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from continual_datasets.images import ImageSource
from continual_datasets.samplers import LoaderOptions
from continual_datasets.stream import Task, TaskStream, TestSet
from continual_datasets.transforms import TransformOptions
from engine import EngineOptions
from vision_transformer import PromptedVisionTransformer


class PromptedCopy(nn.Module):
    """The copy that reads prompts: all tokens through all blocks.

    Args:
        model: Whose backbone, pool and head it takes over.
    """

    def __init__(self, model: PromptedVisionTransformer) -> None:
        super().__init__()
        assert model.prompt is not None, "the baseline has a pool"
        self.vit, self.prompt, self.head = model.backbone, model.prompt, model.head
        self.pos_embed_prompt = model.pos_embed_prompt

    def forward(self, images: Tensor, query: Tensor, vote_group_size: int) -> tuple[Tensor, Tensor]:
        """Classifies a batch.

        Args:
            images: (B, 3, S, S).
            query: (B, D).
            vote_group_size: Consecutive images that vote for prompts together.

        Returns:
            Logits (B, C) and the pull term ().
        """
        chosen = self.prompt(query, vote_group_size=vote_group_size)
        prompts = chosen.tokens  # (B, P, D)
        if self.pos_embed_prompt is not None:
            prompts = prompts + self.pos_embed_prompt
        tokens = self.vit._pos_embed(self.vit.patch_embed(images))  # (B, 1+N, D)
        tokens = torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], dim=1)  # (B, 1+P+N, D)
        tokens = self.vit.norm(self.vit.blocks(self.vit.norm_pre(tokens)))
        features = tokens[:, 1 : 1 + prompts.shape[1]].mean(dim=1)  # (B, D)
        return self.head(features), chosen.reduce_sim


class TwoCopies:
    """Both copies, and how they learn and are evaluated.

    Args:
        model: Whose parts are taken over; nobody else may use it afterwards.
        lr: Learning rate of Adam.
        options: Of these, what the original has too.
        loading: Batch size and workers.
        looks: Crops and flips.

    Attributes:
        original: The untouched copy, which gives the query.
        model: The copy that reads prompts.
    """

    def __init__(
        self,
        model: PromptedVisionTransformer,
        lr: float,
        options: EngineOptions,
        loading: LoaderOptions,
        looks: TransformOptions,
    ) -> None:
        self.original = copy.deepcopy(model.backbone).requires_grad_(False).eval()
        self.model = PromptedCopy(model)
        self.lr, self.options, self.loading, self.looks = lr, options, loading, looks
        self.renew_optimizer()

    def renew_optimizer(self) -> None:
        """Begins with a fresh optimizer, as every task does."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, self.lr)

    def run(self, stream: TaskStream, folder: Path) -> None:
        """Learns all tasks, evaluates on all test sets so far after each, and saves the model."""
        for task in stream.tasks:
            self.renew_optimizer()
            for _ in range(self.options.epochs):
                for images, targets in self.train_loader(stream, task):
                    self.train_step(images, targets, task.classes)
            for test_set in task.test_sets:
                self.evaluate(test_set)
            self.save(folder / f"task{task.index + 1}_checkpoint.pth")

    def train_step(
        self, images: Tensor, targets: Tensor, classes: Sequence[int]
    ) -> tuple[float, ...]:
        """One step; returns loss, accuracy@1 and accuracy@5 in percent."""
        self.model.train()
        images, targets = self._to_device(images), self._to_device(targets)
        logits, reduce_sim = self._forward(images)
        if self.options.train_mask:
            others = [c for c in range(logits.shape[1]) if c not in classes]
            logits = logits.index_fill(1, self._to_device(torch.tensor(others)).long(), -math.inf)
        loss = F.cross_entropy(logits, targets) - self.options.pull_coeff * reduce_sim
        top1, top5 = accuracy(logits, targets, topk=(1, 5))
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"loss is {loss.item()}")
        self.optimizer.zero_grad()
        loss.backward()
        if self.options.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_grad)
        self.optimizer.step()
        if self.options.device.type == "cuda":
            torch.cuda.synchronize(self.options.device)
        return loss.item(), top1.item(), top5.item()

    @torch.no_grad()
    def evaluate(self, test_set: TestSet) -> dict[str, float]:
        """Batch-wise accuracy@1 and @5 in percent, and the mean loss over batches."""
        self.model.eval()
        sums, num_images, num_batches = [0.0, 0.0, 0.0], 0, 0
        for images, targets in self.test_loader(test_set):
            images, targets = self._to_device(images), self._to_device(targets)
            logits, _ = self._forward(images)
            hits = (len(images) * a.item() for a in accuracy(logits, targets, topk=(1, 5)))
            values = (*hits, F.cross_entropy(logits, targets).item())
            sums = [total + value for total, value in zip(sums, values, strict=True)]
            num_images, num_batches = num_images + len(images), num_batches + 1
        top1, top5, loss = sums
        return {
            "Acc@1": top1 / num_images, "Acc@5": top5 / num_images, "Loss": loss / num_batches
        }  # fmt: skip

    def save(self, path: Path) -> None:
        """Writes the whole prompted copy."""
        torch.save({"model": self.model.state_dict()}, path)

    def train_loader(self, stream: TaskStream, task: Task) -> DataLoader:
        """Batches of a task in random order."""
        pictures = _Pictures(stream.train, task.data.indices, self._train_transform)
        return self._loader(pictures, shuffle=True, drop_last=self.loading.drop_last)

    def test_loader(self, test_set: TestSet) -> DataLoader:
        """Batches of a test set in order."""
        data: Any = test_set.data
        return self._loader(_Pictures(data.source, data.indices, self._test_transform))

    def _loader(
        self, pictures: "_Pictures", shuffle: bool = False, drop_last: bool = False
    ) -> DataLoader:
        return DataLoader(
            pictures,
            self.loading.batch_size,
            shuffle=shuffle,
            num_workers=self.loading.num_workers,
            pin_memory=self.loading.pin_memory,
            drop_last=drop_last,
        )

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            query = self.original.forward_features(images)[:, 0]  # (B, D)
        return self.model(images, query, self.options.vote_group_size)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.options.device, non_blocking=True)

    @cached_property
    def _train_transform(self) -> transforms.Compose:
        looks = self.looks
        crop = transforms.RandomResizedCrop(looks.input_size, looks.scale, looks.ratio)
        flip = transforms.RandomHorizontalFlip(looks.hflip)
        return transforms.Compose([crop, flip, transforms.ToTensor()])

    @cached_property
    def _test_transform(self) -> transforms.Compose:
        size, bicubic = self.looks.input_size, InterpolationMode.BICUBIC
        if size <= 32:
            return transforms.Compose(
                [transforms.Resize((size, size), bicubic), transforms.ToTensor()]
            )
        resize = transforms.Resize(int(256 / 224 * size), bicubic)
        return transforms.Compose([resize, transforms.CenterCrop(size), transforms.ToTensor()])


class _Pictures(Dataset):
    """Part of a source, as floats in [0, 1]."""

    def __init__(
        self, source: ImageSource, indices: NDArray, transform: transforms.Compose
    ) -> None:
        self.source, self.indices, self.transform = source, indices, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        image, target = self.source[int(self.indices[position])]
        return self.transform(image), target
