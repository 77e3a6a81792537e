"""Whether a file that a run wrote belongs to this run: same data, classes, backbone, settings."""

from pathlib import Path
from typing import Protocol

from cli.settings import plain
from continual_datasets.images import join_names
from continual_datasets.readers import registry
from experiment.build import Experiment
from experiment.checkpoints import CheckpointError
from model import backbone


class Stored(Protocol):
    """Provenance fields that checkpoints and run states share."""

    @property
    def class_order(self) -> list[list[int]] | None:
        """Class ids of each task."""

    @property
    def class_names(self) -> list[str] | None:
        """Name of every class."""

    @property
    def test_sets(self) -> list[str] | None:
        """Name of each test set."""

    @property
    def backbone(self) -> dict[str, str] | None:
        """`name`, `source` and `sha256` of the frozen network."""


def check_same_run(run: Experiment, stored: Stored, path: Path) -> None:
    """Makes sure that a file was written by a run on the same data and the same backbone.

    Raises:
        CheckpointError: Naming what differs.
    """
    test_sets = run.record.test_sets
    if stored.test_sets is not None and stored.test_sets != test_sets:
        raise CheckpointError(
            f"{path} was trained on other data: its test sets are {join_names(stored.test_sets)}, "
            f"those of this run {join_names(test_sets)}"
        )
    if stored.class_order != run.stream.class_order:
        raise CheckpointError(f"{path} has another class order than this run")
    found, wanted = list(run.stream.class_names), stored.class_names or []
    if found != wanted:
        pairs = zip(wanted, found, strict=False)
        differing = next((f"{a!r}, found {b!r}" for a, b in pairs if a != b), "")
        raise CheckpointError(
            f"{path} was trained on other data: it knows {len(wanted)} classes, --data-path has "
            f"{len(found)}" + (f"; expected the class {differing}" if differing else "")
        )
    if stored.backbone is not None and stored.backbone["sha256"] != run.identity.sha256:
        raise CheckpointError(
            f"{path} was trained on the backbone {stored.backbone['name']} "
            f"({stored.backbone['source']}, sha256 {stored.backbone['sha256'][:12]}), found "
            f"{run.identity.name} ({run.identity.source}, {run.identity.sha256[:12]}): "
            "give the same weights with --pretrained"
        )


def same_value(name: str, one: object, other: object) -> bool:
    """Whether two values of a setting mean the same."""
    if name == "model":
        return backbone.resolve_name(str(one)) == backbone.resolve_name(str(other))
    if name == "dataset":
        try:
            return list(registry.find_sources(str(one))) == list(registry.find_sources(str(other)))
        except ValueError:
            return False
    if name == "num_tasks":  # none leaves it to the data; what follows is compared by class order
        return one is None or other is None or one == other
    return plain(one) == plain(other)
