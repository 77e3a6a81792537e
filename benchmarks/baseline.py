"""The baseline of `benchmark.py`: L2P computed as l2p-pytorch computes it, on today's timm.

It gives the same numbers as the program, which a test checks. Its computations are the original's:

- two complete vision transformers in single precision; each embeds every image and computes every
  token of its last block;
- the query of every image is computed again in each step and in each evaluation;
- each step builds a class mask on the host, checks the loss, and reads loss and accuracies from the
  device;
- worker processes are started for every epoch and every evaluation, and send floats;
- after every task, the whole model is saved.

Two parts are faster than in the original: attention is timm's fused one, and the vote is the
program's own.

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

from cli.settings import TransformSettings
from continual_datasets.images import ImageSource
from continual_datasets.samplers import LoaderOptions
from continual_datasets.stream import Task, TaskStream, TestSet
from training.state import EngineOptions
from vision_transformer import PromptedVisionTransformer


class PromptedCopy(nn.Module):
    """The ViT with prompts: all tokens pass all blocks.

    Args:
        model: Its backbone, pool and head become parts of this module.
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
    """The two copies of the ViT, their training and their evaluation.

    Args:
        model: Its parts are used here and trained; it must not be used elsewhere.
        lr: Learning rate of Adam.
        options: Options of the engine; those that the original lacks are ignored.
        loading: Batch size and workers.
        augmentation: Input size, crops and flips.

    Attributes:
        original: The frozen copy, which computes the query.
        model: The copy with prompts.
    """

    def __init__(
        self,
        model: PromptedVisionTransformer,
        lr: float,
        options: EngineOptions,
        loading: LoaderOptions,
        augmentation: TransformSettings,
    ) -> None:
        self.original = copy.deepcopy(model.backbone).requires_grad_(False).eval()
        self.model = PromptedCopy(model)
        self.lr, self.options = lr, options
        self.loading, self.augmentation = loading, augmentation
        self.renew_optimizer()

    def renew_optimizer(self) -> None:
        """Makes a new optimizer, as the original does for every task."""
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
        images = _Images(stream.train, task.data.indices, self._train_transform)
        return self._loader(images, shuffle=True, drop_last=self.loading.drop_last)

    def test_loader(self, test_set: TestSet) -> DataLoader:
        """Batches of a test set in order."""
        data: Any = test_set.data
        return self._loader(_Images(data.source, data.indices, self._test_transform))

    def _loader(
        self, images: "_Images", shuffle: bool = False, drop_last: bool = False
    ) -> DataLoader:
        return DataLoader(
            images,
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
        given = self.augmentation
        crop = transforms.RandomResizedCrop(given.input_size, given.scale, given.ratio)
        flip = transforms.RandomHorizontalFlip(given.hflip)
        return transforms.Compose([crop, flip, transforms.ToTensor()])

    @cached_property
    def _test_transform(self) -> transforms.Compose:
        size, bicubic = self.augmentation.input_size, InterpolationMode.BICUBIC
        if size <= 32:
            return transforms.Compose(
                [transforms.Resize((size, size), bicubic), transforms.ToTensor()]
            )
        resize = transforms.Resize(int(256 / 224 * size), bicubic)
        return transforms.Compose([resize, transforms.CenterCrop(size), transforms.ToTensor()])


class _Images(Dataset):
    """Some images of a source, as floats in [0, 1]."""

    def __init__(
        self, source: ImageSource, indices: NDArray, transform: transforms.Compose
    ) -> None:
        self.source, self.indices, self.transform = source, indices, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        image, target = self.source[int(self.indices[position])]
        return self.transform(image), target
