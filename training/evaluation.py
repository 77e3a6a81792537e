"""One evaluation of one test set, batch-wise and instance-wise in one pass.

The queries of test images come from a frozen network, so they are computed once and cached
(`QueryCache`). Instance-wise, only the images whose own prompts the vote overruled are computed
again.

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
from training.losses import class_mask, count_correct, count_ids, restrict
from training.state import EngineOptions, Evaluation, Loader, Run
from utils import sum_over_processes

if TYPE_CHECKING:
    from continual_datasets.stream import TestSet
    from vision_transformer import PromptedVisionTransformer


@torch.inference_mode()
def evaluate(
    model: PromptedVisionTransformer, loader: Loader, test_set: TestSet, run: Run
) -> Evaluation:
    """Evaluates one test set, in whole vote groups of each process, the same every time.

    `Loss` is the mean over vote groups of the group's mean cross-entropy, so it depends neither on
    the batch nor on the processes.
    """
    model.eval()
    options = run.options
    classes = test_set.classes if options.task_inc else options.all_classes
    allowed = class_mask(classes, model.num_classes, options.device)
    totals = EvaluationTotals(model, allowed, options)
    cached, found = run.queries.of(test_set, model.query_version()), list[Tensor]()
    progress = utils.Progress(f"Test: [{title(test_set)}]", options.print_freq)
    for step, (images, targets) in progress.over(loader, len(loader)):
        run.monitor.in_evaluation()
        query = None if cached is None else cached[totals.num_images :][: len(images)]
        out = model(images, query, vote_group_size=options.vote_group_size)
        if cached is None and "query" in out:
            found.append(out["query"])
        totals.add(out, _instance_logits(model, images, out), targets)
        if step % options.read_every == 0 or step == len(loader) - 1:
            percent, num_images = totals.newest_accuracy()
            progress.update({"Acc@1": percent}, num_images)
    run.queries.store(test_set, found)
    return totals.evaluation(test_set)


def average_stats(evaluations: Sequence[Evaluation], selection: str) -> dict[str, float]:
    """Unweighted mean over test sets of `Acc@1`, `Acc@5` and `Loss`."""
    keys = ("Acc@1", "Acc@5", "Loss")
    return {k: sum(e.stats[selection][k] for e in evaluations) / len(evaluations) for k in keys}


class EvaluationTotals:
    """Sums over the batches of a test set, on the device; `allowed` classes as a mask (C,)."""

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
        """Adds a batch: outputs of the model, and the logits of each image on its own."""
        logits = {"batch": out["logits"], "instance": instance_logits}
        for name in SELECTIONS:
            allowed = restrict(logits[name], self.allowed)
            self.sums[name] += _test_sums(allowed, targets, self.group_size)
        self.num_images += len(targets)
        if not self.num_prompts:
            return
        self.served["batch"] += count_ids(out["prompt_idx"], self.num_prompts)
        self.served["instance"] += count_ids(out["own_prompt_idx"], self.num_prompts)
        own = out["similarity"].gather(1, out["own_prompt_idx"]).double()  # (B, K)
        self.key_similarity += out["similarity"].double().sum(dim=0)  # (M,)
        self.similarity += torch.stack([own.sum(), own.new_full((), own.numel())])

    def newest_accuracy(self) -> tuple[float, int]:
        """Batch-wise accuracy since the last call, in percent, and images; synchronises."""
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
        served = {name: sum_over_processes(counts).tolist() for name, counts in self.served.items()}
        usage = {name: [int(count) for count in counts] for name, counts in served.items()}
        similarity, number = sum_over_processes(self.similarity).tolist()
        of_keys = (sum_over_processes(self.key_similarity) / total).tolist()
        return Evaluation(test_set.index, stats, usage, similarity / number, of_keys)


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
    # Their number is unknown, so this synchronises.
    overruled = (served != own).any(dim=1).nonzero().squeeze(1)
    if len(overruled) == 0:
        return out["logits"]
    again = model(images[overruled], out["query"][overruled], vote_group_size=1)
    return out["logits"].index_copy(0, overruled, again["logits"])
