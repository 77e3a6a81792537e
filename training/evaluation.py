"""One evaluation of one test set, batch-wise and instance-wise in one pass.

The queries of test images come from a frozen network, so they are computed once and cached in
`Run.queries`. Instance-wise, only the images whose own prompts the vote overruled are computed
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
from training.state import Evaluation, Loader, Run
from utils import sum_over_processes

if TYPE_CHECKING:
    from continual_datasets.stream import TestSet
    from vision_transformer import PromptedVisionTransformer


@torch.inference_mode()
def evaluate(run: Run, loader: Loader, test_set: TestSet) -> Evaluation:
    """Evaluates one test set, in whole vote groups of each process, the same every time.

    `Loss` is the mean over vote groups of the group's mean cross-entropy, so it depends neither on
    the batch nor on the processes.
    """
    settings, model = run.settings, run.model.eval()
    classes = test_set.classes if settings.tasks.task_inc else run.stream.classes
    totals = EvaluationTotals(run, class_mask(classes, model.num_classes, run.device))
    version, (known, cached) = model.query_version(), run.queries.get(test_set.index, (None, None))
    found = list[Tensor]()
    progress = utils.Progress(f"Test: [{title(test_set)}]", settings.output.print_freq)
    for step, (images, targets) in progress.over(loader, len(loader)):
        run.monitor.in_evaluation()
        query = None
        if cached is not None and known == version:
            query = cached[totals.num_images :][: len(images)]
        out = model(images, query, vote_group_size=settings.vote_group_size)
        if query is None and "query" in out:
            found.append(out["query"])
        totals.add(out, _instance_logits(model, images, out), targets)
        if step % run.read_every == 0 or step == len(loader) - 1:
            percent, num_images = totals.newest_accuracy()
            progress.update({"Acc@1": percent}, num_images)
    if found:
        run.queries[test_set.index] = version, torch.cat(found)
    return totals.evaluation(test_set)


def average_stats(evaluations: Sequence[Evaluation], selection: str) -> dict[str, float]:
    """Unweighted mean over test sets of `Acc@1`, `Acc@5` and `Loss`."""
    keys = ("Acc@1", "Acc@5", "Loss")
    return {k: sum(e.stats[selection][k] for e in evaluations) / len(evaluations) for k in keys}


class EvaluationTotals:
    """Sums over the batches of a test set, on the device; `allowed` classes as a mask (C,)."""

    def __init__(self, run: Run, allowed: Tensor) -> None:
        self.allowed, self.group_size = allowed, run.settings.vote_group_size
        self.num_prompts = size = 0 if run.model.prompt is None else run.model.prompt.size
        # Of each selection `_test_sums`; with a pool also how often each prompt served, in each
        # selection; sum and number of the similarities to selected keys; sums of those to each key.
        self.sizes = [4, 4, *([size, size, 2, size] if size else [])]
        self.sums = torch.zeros(sum(self.sizes), dtype=torch.float64, device=run.device)
        self.num_images = 0
        self._num_read, self._correct_read = 0, 0.0

    def add(self, out: dict[str, Tensor], instance_logits: Tensor, targets: Tensor) -> None:
        """Adds a batch: outputs of the model, and the logits of each image on its own."""
        logits = (restrict(of, self.allowed) for of in (out["logits"], instance_logits))
        new = [_test_sums(of, targets, self.group_size) for of in logits]
        if self.num_prompts:
            new += [count_ids(out[k], self.num_prompts) for k in ("prompt_idx", "own_prompt_idx")]
            own = out["similarity"].gather(1, out["own_prompt_idx"]).double()  # (B, K)
            new.append(torch.stack([own.sum(), own.new_full((), own.numel())]))
            new.append(out["similarity"].double().sum(dim=0))  # (M,)
        self.sums += torch.cat(new)
        self.num_images += len(targets)

    def newest_accuracy(self) -> tuple[float, int]:
        """Batch-wise accuracy since the last call, in percent, and images; synchronises."""
        correct = self.sums[2].item()
        num_new = self.num_images - self._num_read
        percent = 100 * (correct - self._correct_read) / num_new
        self._num_read, self._correct_read = self.num_images, correct
        return percent, num_new

    def evaluation(self, test_set: TestSet) -> Evaluation:
        """Accuracies, loss and usage over the images of all processes."""
        images = self.sums.new_full((1,), self.num_images)
        sums = torch.split(sum_over_processes(torch.cat([images, self.sums])), [1, *self.sizes])
        (total,), *values = (part.tolist() for part in sums)
        stats = {}
        for name, (loss, groups, *correct) in zip(SELECTIONS, values[:2], strict=True):
            top1, top5 = (100 * c / total for c in correct)
            stats[name] = {"Acc@1": top1, "Acc@5": top5, "Loss": loss / groups}
        if not self.num_prompts:
            return Evaluation(test_set.index, stats)
        *served, (similarity, number), keys = values[2:]
        usage = {n: [int(c) for c in counts] for n, counts in zip(SELECTIONS, served, strict=True)}
        of_keys = [similarities / total for similarities in keys]
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
