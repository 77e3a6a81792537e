"""One evaluation of one test set, batch-wise and instance-wise in one pass.

What never changes is computed once: the queries of test images come from the frozen network, so
every later evaluation takes them from a `QueryCache`. Instance-wise, only images are computed again
whose own prompts the vote overruled.

Shapes: B images, C classes, D width, K prompts chosen (top-k), M pool size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

import utils
from continual_datasets.stream import title
from processes import sum_over_processes
from reports.metrics import SELECTIONS

if TYPE_CHECKING:
    from continual_datasets.stream import TestSet
    from engine import EngineOptions, Loader, Monitor
    from vision_transformer import PromptedVisionTransformer


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation of one test set gave.

    Attributes:
        index: Row of the test set in the accuracy matrix.
        stats: `Acc@1`, `Acc@5` (percent) and `Loss` for each of `SELECTIONS`.
        usage: How often each prompt served a test image, for each of `SELECTIONS`; empty without
            a pool.
        mean_similarity: Mean cosine similarity of the images to the keys they choose alone.
        key_similarity: Mean cosine similarity of the images to every key (M,); empty without a
            pool.
    """

    index: int
    stats: dict[str, dict[str, float]]
    usage: dict[str, list[int]] = field(default_factory=dict)
    mean_similarity: float | None = None
    key_similarity: list[float] = field(default_factory=list)


class QueryCache:
    """Queries of this process's test images, by row of the test set; (n, D) each.

    They stay right as long as the network that gives queries does: clear it when that changes.
    """

    def __init__(self) -> None:
        self._known: dict[int, Tensor] = {}

    def clear(self) -> None:
        """Forgets all."""
        self._known.clear()

    def of(self, test_set: TestSet) -> Tensor | None:
        """Queries of a test set in the order of its images; None: not known yet."""
        return self._known.get(test_set.index)

    def keep(self, test_set: TestSet, queries: Sequence[Tensor]) -> None:
        """Keeps the queries of all batches of a test set."""
        if queries:
            self._known[test_set.index] = torch.cat(list(queries))


@torch.inference_mode()
def evaluate(
    model: PromptedVisionTransformer,
    loader: Loader,
    test_set: TestSet,
    options: EngineOptions,
    monitor: Monitor | None = None,
    queries: QueryCache | None = None,
) -> Evaluation:
    """Evaluates one test set.

    Args:
        model: As `vision_transformer.PromptedVisionTransformer`.
        loader: Batches of (images, targets), each of whole vote groups of this process's share, the
            same in every evaluation.
        test_set: What is evaluated.
        options: See there.
        monitor: Is asked before every batch.
        queries: Known queries, to which those of this test set are added; None: none.

    Returns:
        Accuracies over all images of all processes; `Loss` is the mean over vote groups of the
        group's mean cross-entropy, so it depends neither on the batch nor on the processes.
    """
    model.eval()
    classes = test_set.classes if options.task_inc else options.all_classes
    tally = _Tally(model, class_mask(classes, model.num_classes, options.device), options)
    queries = QueryCache() if queries is None else queries
    known, found = queries.of(test_set), list[Tensor]()
    progress = utils.Progress(f"Test: [{title(test_set)}]", options.print_freq)
    for step, (images, targets) in progress.over(loader, len(loader)):
        if monitor is not None:
            monitor.in_evaluation()
        query = None if known is None else known[tally.num_images :][: len(images)]
        out = model(images, query, vote_group_size=options.vote_group_size)
        if known is None and "query" in out:
            found.append(out["query"])
        tally.add(out, _instance_logits(model, images, out), targets)
        if step % options.read_every == 0 or step == len(loader) - 1:
            percent, num_images = tally.newest_accuracy()
            progress.update({"Acc@1": percent}, num_images)
    queries.keep(test_set, found)
    return tally.evaluation(test_set)


class _Tally:
    """Sums over the batches of a test set, kept on the device.

    Args:
        model: The model.
        allowed: Which classes may be predicted, bool (C,).
        options: See there.
    """

    def __init__(
        self, model: PromptedVisionTransformer, allowed: Tensor, options: EngineOptions
    ) -> None:
        self.allowed, self.group_size = allowed, options.vote_group_size
        self.num_prompts = 0 if model.prompt is None else model.prompt.size
        new = torch.zeros(4, dtype=torch.float64, device=options.device)
        self.sums = {name: new.clone() for name in SELECTIONS}
        self.served = {name: new.new_zeros(self.num_prompts) for name in SELECTIONS}
        self.similarity = new.new_zeros(2)  # sum, number
        self.key_similarity = new.new_zeros(self.num_prompts)  # sum
        self.num_images = 0
        self._num_read, self._correct_read = 0, 0.0

    def add(self, out: dict[str, Tensor], instance_logits: Tensor, targets: Tensor) -> None:
        """Adds a batch: what the model answered, and what it answers image by image."""
        logits = {"batch": out["logits"], "instance": instance_logits}
        for name in SELECTIONS:
            allowed = restrict(logits[name], self.allowed)
            self.sums[name] += _test_sums(allowed, targets, self.group_size)
        self.num_images += len(targets)
        if not self.num_prompts:
            return
        for name, key in zip(SELECTIONS, ("prompt_idx", "own_prompt_idx"), strict=True):
            self.served[name] += count_ids(out[key], self.num_prompts)
        own = out["similarity"].gather(1, out["own_prompt_idx"]).double()  # (B, K)
        self.key_similarity += out["similarity"].double().sum(dim=0)  # (M,)
        self.similarity += torch.stack([own.sum(), own.new_full((), own.numel())])

    def newest_accuracy(self) -> tuple[float, int]:
        """Batch-wise accuracy since it was last asked for, in percent, and its number of images.

        Waits for the device.
        """
        correct = self.sums["batch"][2].item()
        num_new = self.num_images - self._num_read
        percent = 100 * (correct - self._correct_read) / num_new
        self._num_read, self._correct_read = self.num_images, correct
        return percent, num_new

    def evaluation(self, test_set: TestSet) -> Evaluation:
        """Accuracies, loss and usage over the images of all processes."""
        images = self.similarity.new_full((), self.num_images)
        total = sum_over_processes(images).item()
        stats = {}
        for name in SELECTIONS:
            loss, groups, *correct = sum_over_processes(self.sums[name]).tolist()
            top1, top5 = (100 * c / total for c in correct)
            stats[name] = {"Acc@1": top1, "Acc@5": top5, "Loss": loss / groups}
        if not self.num_prompts:
            return Evaluation(test_set.index, stats)
        usage = {
            name: [int(count) for count in sum_over_processes(served).tolist()]
            for name, served in self.served.items()
        }
        similarity, number = sum_over_processes(self.similarity).tolist()
        of_keys = (sum_over_processes(self.key_similarity) / total).tolist()
        return Evaluation(test_set.index, stats, usage, similarity / number, of_keys)


def class_mask(classes: Sequence[int], num_classes: int, device: torch.device) -> Tensor:
    """Which classes may be predicted, bool (C,)."""
    mask = torch.zeros(num_classes, dtype=torch.bool)
    mask[list(classes)] = True
    return mask.to(device)


def restrict(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """Logits with -inf for the classes that may not be predicted, (B, C)."""
    return logits if allowed is None else logits.masked_fill(~allowed, -math.inf)


def count_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """How often the target is the first, and among the first five, (2,)."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5)
    hits = best == targets[:, None]
    return torch.stack([hits[:, 0].sum(), hits.sum()])


def count_ids(ids: Tensor, size: int) -> Tensor:
    """How often each prompt occurs among ids, (M,); unlike `bincount` without waiting."""
    flat = ids.flatten()
    counts = torch.zeros(size, device=ids.device)
    return counts.scatter_add_(0, flat, counts.new_ones(1).expand_as(flat))


def _test_sums(logits: Tensor, targets: Tensor, group_size: int) -> Tensor:
    """Sum of the vote groups' mean losses, their number, correct@1 and correct@5, (4,)."""
    losses = F.cross_entropy(logits, targets, reduction="none").double()  # (B,)
    full, rest = divmod(len(losses), group_size)
    means = losses[: full * group_size].sum() / group_size
    if rest:
        means = means + losses[full * group_size :].mean()
    groups = losses.new_full((), full + (rest > 0))
    return torch.cat([torch.stack([means, groups]), count_correct(logits, targets).double()])


def _instance_logits(
    model: PromptedVisionTransformer, images: Tensor, out: dict[str, Tensor]
) -> Tensor:
    """Logits with each image's own prompts; only images that the vote overruled are computed."""
    if "prompt_idx" not in out:
        return out["logits"]
    served, own = out["prompt_idx"], out["own_prompt_idx"]
    if not model.prompt_order_matters:
        served, own = served.sort(dim=1).values, own.sort(dim=1).values
    overruled = (served != own).any(dim=1).nonzero().squeeze(1)  # waits: their number is not known
    if len(overruled) == 0:
        return out["logits"]
    again = model(images[overruled], out["query"][overruled], vote_group_size=1)
    return out["logits"].index_copy(0, overruled, again["logits"])
