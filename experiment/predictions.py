"""`--save_predictions`: what was predicted for each test image, by which prompts."""

import logging
import os
from pathlib import Path
from typing import Any

import torch

from reports import files, metrics
from reports.metrics import SELECTIONS
from training.state import Run

logger = logging.getLogger(__name__)


def write(run: Run, path: Path, keep: Path | None = None) -> None:
    """Writes a CSV file of the test images after the last evaluated task, in their order.

    Columns: `test_set`; `image` (path below `--data-path`, or number in the data set); `target`,
    `batch` and `instance` (class, and what was predicted); with a pool also `batch_prompts` and
    `instance_prompts` (numbers from 0, best first). `keep`: new name of an earlier file.
    """
    import pandas as pd

    labels = metrics.class_labels(run.stream.train.classes)
    by_index, tables = {one.index: one for one in run.stream.test_sets}, []
    for evaluation in run.reports[-1].evaluations:
        if evaluation.images is None:
            logger.warning(
                "%s is not written: the run resumed from a state of an earlier version, which has "
                "no predictions; --eval --save_predictions gives them",
                path,
            )
            return
        test_set, images = by_index[evaluation.index], evaluation.images.long()
        names = [test_set.data.source.name_of(index) for index in test_set.data.indices.tolist()]
        folder = run.settings.data.data_path
        names = [os.path.relpath(name, folder) if os.sep in name else name for name in names]
        columns: dict[str, Any] = {"test_set": test_set.name, "image": names}
        for name, ids in zip(("target", *SELECTIONS), images[:, :3].T.tolist(), strict=True):
            columns[name] = [labels[class_id] for class_id in ids]
        if images.shape[1] > 3:
            halves = torch.tensor_split(images[:, 3:], 2, dim=1)
            for name, ids in zip(SELECTIONS, halves, strict=True):
                columns[f"{name}_prompts"] = [" ".join(map(str, row)) for row in ids.tolist()]
        tables.append(pd.DataFrame(columns))
    text = pd.concat(tables).to_csv(index=False, lineterminator="\n")
    files.write_bytes(path, text.encode(errors="surrogateescape"), keep)
    logger.info("Wrote %s", path)
