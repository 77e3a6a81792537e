"""Queries of several small training batches in one pass, before the steps that use them.

Queries come from a frozen network, so they do not depend on what the steps train. A GPU computes
one large batch faster than several small ones.

Shapes: B images of a batch, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from training.state import Run


def with_queries(
    run: Run, batches: Iterable[list[Tensor]], first: int
) -> Iterator[tuple[list[Tensor], Tensor | None]]:
    """Adds to each batch its queries, (B, D), or None: the step computes them.

    `run.queries_ahead` batches share a pass: those between two readings of the results, where a
    run can resume, so that a resumed run computes the same numbers. `first` is the step of the
    first batch.
    """
    number = run.queries_ahead
    if number < 2 or run.model.prompt is None:
        yield from ((batch, None) for batch in batches)
        return
    passes = groupby(enumerate(batches, first), lambda item: -(-item[0] // number))
    for _, group in passes:
        together = [batch for _, batch in group]
        images = [batch[0] for batch in together]
        queries = torch.split(run.model.query(torch.cat(images)), [len(one) for one in images])
        yield from zip(together, queries, strict=True)
