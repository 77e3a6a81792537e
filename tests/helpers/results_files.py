"""Results of runs of two tasks in the files in which runs leave them."""

import json

from cli.settings import Settings

#: Accuracy on test set (row) after task (column), percent.
BATCH = [[90.0, 70.0], [None, 80.0]]
INSTANCE = [[88.0, 60.5], [None, 77.0]]


def content(seed=42, batch=BATCH, instance=INSTANCE, **settings):
    """Results of a run; settings are those that are not at their default."""
    return {
        "batch": {"accuracy_matrix": batch},
        "instance": {"accuracy_matrix": instance},
        "command": {
            "configurations": ["digits_l2p"],
            "flags": {"seed": seed, "output_dir": "out", **settings},
        },
        "run": {"processes": 1, "images_per_step": 16},
        "backbone": {"name": "vit", "sha256": "ab"},
        "seed": seed,
        "config": {**Settings().stored(), "dataset": "digits", "seed": seed, **settings},
    }


def write(folder, results=None, **settings):
    """Writes a run's results; gives its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content(**settings) if results is None else results)
    (folder / "results.json").write_text(text)
    return folder
