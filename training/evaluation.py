"""One evaluation of one test set, batch-wise and instance-wise in one pass.

After the last task the predictions and prompts of each image stay on the device, to be copied once.

The queries of test images come from a frozen network, so they are computed once and cached in
`Run.queries`. Instance-wise, only the images whose own prompts the vote overruled are computed
again, gathered over the batches into full ones.

Shapes: B images, C classes, D width, K prompts selected (top-k), M pool size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

import utils
from continual_datasets.stream import title
from reports.metrics import SELECTIONS
from training.losses import class_mask, count_ids, find_best, find_hits, restrict
from training.state import Evaluation, Loader, Run
from utils import gather, sum_over_processes

if TYPE_CHECKING:
    from continual_datasets.stream import TestSet
    from vision_transformer import PromptedVisionTransformer


@torch.inference_mode()
def evaluate(run: Run, loader: Loader, test_set: TestSet, each_image: bool = False) -> Evaluation:
    """Evaluates one test set, in whole vote groups of each process, the same every time.

    `each_image`: whether to keep the predictions of each image.

    `Loss` is the mean over vote groups of the group's mean cross-entropy, so it depends neither on
    the batch nor on the processes.
    """
    settings, model = run.settings, run.model.eval()
    classes = test_set.classes if settings.tasks.task_inc else run.stream.classes
    mask = class_mask(classes, model.num_classes, run.device)
    totals = EvaluationTotals(run, mask, each_image)
    second = SecondPass(run, totals)
    version, (known, cached) = model.query_version(), run.queries.get(test_set.index, (None, None))
    found = list[Tensor]()
    progress = utils.Progress(f"Test: [{title(test_set)}]", settings.output.print_freq)
    for step, (images, targets) in progress.over(loader, len(loader)):
        run.monitor.in_evaluation()
        query = None
        if cached is not None and known == version:
            query = cached[totals.num_images :][: len(images)]
        out = model(images, query, vote_group_size=settings.vote_group_size)
        overruled = find_overruled(model, out)
        group_sizes = _group_sizes(targets, settings.vote_group_size)
        first = totals.num_images
        rows = torch.arange(first, first + len(targets), device=run.device)
        totals.add(out, targets, group_sizes, overruled)
        if "query" in out:
            second.add(overruled, images, out["query"], targets, group_sizes, rows)
            if query is None:
                found.append(out["query"])
        if step % run.read_every == 0 or step == len(loader) - 1:
            percent, num_images = totals.newest_accuracy()
            progress.update({"Acc@1": percent}, num_images)
    second.compute()
    if found:
        run.queries[test_set.index] = version, torch.cat(found)
    return totals.evaluation(test_set)


def average_stats(evaluations: Sequence[Evaluation], selection: str) -> dict[str, float]:
    """Unweighted mean over test sets of `Acc@1`, `Acc@5` and `Loss`."""
    keys = ("Acc@1", "Acc@5", "Loss")
    return {k: sum(e.stats[selection][k] for e in evaluations) / len(evaluations) for k in keys}


def find_overruled(model: PromptedVisionTransformer, out: dict[str, Tensor]) -> Tensor:
    """Which images of a batch are served by other prompts than their own, bool (B,)."""
    if "prompt_idx" not in out:
        return out["logits"].new_zeros(len(out["logits"]), dtype=torch.bool)
    served, own = out["prompt_idx"], out["own_prompt_idx"]
    if not model.prompt_order_matters:
        served, own = served.sort(dim=1).values, own.sort(dim=1).values
    return (served != own).any(dim=1)


class EvaluationTotals:
    """Sums over the images of a test set, on the device; `allowed` classes as a mask (C,)."""

    def __init__(self, run: Run, allowed: Tensor, each_image: bool = False) -> None:
        self.allowed, self.group_size = allowed, run.settings.vote_group_size
        self.num_prompts = size = 0 if run.model.prompt is None else run.model.prompt.size
        # Of each selection the summed `_values`; with a pool also how often each prompt served, in
        # each; sum and number of the similarities to selected keys; sums of those to each key.
        self.sizes = [3, 3, *([size, size, 2, size] if size else [])]
        self.sums = torch.zeros(sum(self.sizes), dtype=torch.float64, device=run.device)
        self.num_images = self.num_groups = 0
        # With `each_image` the rows of `Evaluation.images`, and which predictions change in them.
        self._images: list[Tensor] | None = [] if each_image else None
        self._alone: list[tuple[Tensor, Tensor]] = []
        self._num_read, self._correct_read = 0, 0.0

    def add(
        self, out: dict[str, Tensor], targets: Tensor, group_sizes: Tensor, overruled: Tensor
    ) -> None:
        """Adds a batch of whole vote groups; instance-wise, without the images overruled, (B,)."""
        values, predicted = self._values(out["logits"], targets, group_sizes)
        new = [values.sum(dim=0), values.masked_fill(overruled[:, None], 0).sum(dim=0)]
        if self.num_prompts:
            new += [count_ids(out[k], self.num_prompts) for k in ("prompt_idx", "own_prompt_idx")]
            own = out["similarity"].gather(1, out["own_prompt_idx"]).double()  # (B, K)
            new.append(torch.stack([own.sum(), own.new_full((), own.numel())]))
            new.append(out["similarity"].double().sum(dim=0))  # (M,)
        self.sums += torch.cat(new)
        if self._images is not None:
            prompts = [out[k] for k in ("prompt_idx", "own_prompt_idx") if k in out]
            columns = torch.column_stack([targets, predicted, predicted, *prompts])
            self._images.append(columns.int())
        self.num_images += len(targets)
        self.num_groups += -(-len(targets) // self.group_size)

    def add_alone(self, logits: Tensor, targets: Tensor, group_sizes: Tensor, rows: Tensor) -> None:
        """Adds images that `add` left out: logits with each image's own prompts, number, (B,)."""
        values, predicted = self._values(logits, targets, group_sizes)
        self.sums[3:6] += values.sum(dim=0)
        if self._images is not None:
            self._alone.append((rows.clone(), predicted))

    def newest_accuracy(self) -> tuple[float, int]:
        """Batch-wise accuracy since the last call, in percent, and images; synchronises."""
        correct = self.sums[1].item()
        num_new = self.num_images - self._num_read
        percent = 100 * (correct - self._correct_read) / num_new
        self._num_read, self._correct_read = self.num_images, correct
        return percent, num_new

    def evaluation(self, test_set: TestSet) -> Evaluation:
        """Accuracies, loss and usage over the images of all processes."""
        numbers = self.sums.new_tensor([self.num_images, self.num_groups])
        sums = torch.split(sum_over_processes(torch.cat([numbers, self.sums])), [2, *self.sizes])
        (total, groups), *values = (part.tolist() for part in sums)
        stats = {}
        for name, (loss, *correct) in zip(SELECTIONS, values[:2], strict=True):
            top1, top5 = (100 * c / total for c in correct)
            stats[name] = {"Acc@1": top1, "Acc@5": top5, "Loss": loss / groups}
        images = self._all_images()
        if not self.num_prompts:
            return Evaluation(test_set.index, stats, images=images)
        *served, (similarity, number), keys = values[2:]
        usage = {n: [int(c) for c in counts] for n, counts in zip(SELECTIONS, served, strict=True)}
        of_keys = [similarities / total for similarities in keys]
        return Evaluation(test_set.index, stats, usage, similarity / number, of_keys, images)

    def _all_images(self) -> Tensor | None:
        """`Evaluation.images` of all processes, each of which has a run of the test set."""
        if self._images is None:
            return None
        images = torch.cat([self.allowed.new_zeros(0, dtype=torch.int32), *self._images])
        for rows, predicted in self._alone:
            images[rows, 2] = predicted.int()
        return torch.cat([part for part in gather(images.cpu()) if len(part)])

    def _values(
        self, logits: Tensor, targets: Tensor, group_sizes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of each image its part of the group's mean loss, correct@1 and correct@5, (B, 3).

        And the class that is predicted, (B,).
        """
        logits = restrict(logits, self.allowed)
        losses, best = F.cross_entropy(logits, targets, reduction="none"), find_best(logits)
        each = torch.column_stack([losses.double() / group_sizes, find_hits(best, targets)])
        return each, best[:, 0]


def _group_sizes(targets: Tensor, group_size: int) -> Tensor:
    """Images in the vote group of each image of a batch, (B,); the last group may be smaller."""
    sizes, rest = torch.full_like(targets, group_size), len(targets) % group_size
    sizes[len(targets) - rest :] = rest
    return sizes


class SecondPass:
    """Computes the images that the vote overruled with their own prompts, in full batches.

    So few batch sizes occur: cuDNN plans attention for each, and compiled passes take only full
    ones.
    """

    def __init__(self, run: Run, totals: EvaluationTotals) -> None:
        self._model, self._batching, self._totals = run.model, run.batching, totals
        self._gathered: list[Tensor] = []  # the parts of `add`: a full batch
        self._number = 0  # its rows that are in use

    def add(self, overruled: Tensor, *batch: Tensor) -> None:
        """Gathers the overruled images, bool (B,), of a batch; computes them once they fill one.

        The first batch is full, or the only one.
        """
        if not self._gathered:
            size = self._batching.filled(len(batch[0]))
            self._gathered = [part.new_zeros(size, *part.shape[1:]) for part in batch]
        rows = overruled.nonzero().squeeze(1)  # their number is unknown, so this synchronises
        while len(rows):
            new, rows = rows.tensor_split([len(self._gathered[0]) - self._number])
            end = self._number + len(new)
            for gathered, part in zip(self._gathered, batch, strict=True):
                torch.index_select(part, 0, new, out=gathered[self._number : end])
            self._number = end
            if end == len(self._gathered[0]):
                self.compute()

    def compute(self) -> None:
        """Computes what is gathered; on a GPU, rows not in use fill the batch up."""
        if (number := self._number) == 0:
            return
        filled = (part[: self._batching.filled(number)] for part in self._gathered)
        images, query, targets, group_sizes, rows = filled
        logits = self._model(images, query, vote_group_size=1)["logits"]
        own = (part[:number] for part in (logits, targets, group_sizes, rows))
        self._totals.add_alone(*own)
        self._number = 0
