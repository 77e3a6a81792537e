"""Results of all kinds of runs, with numbers that are easy to follow through tables and figures."""

import json

from cli.settings import Settings

#: Accuracy on test set (row) after task (column), percent.
BATCH = [[90.0, 70.0, 40.0], [None, 80.0, 60.0], [None, None, 100.0]]
INSTANCE = [[88.0, 60.5, 30.0], [None, 77.0, 50.0], [None, None, 10.0]]

#: Twenty images of each test set, of which each is served by two of four prompts.
USAGE = [([20, 20, 0, 0], [20, 15, 4, 1]), ([0, 0, 20, 20], [1, 2, 19, 18]), ([10] * 4, [10] * 4)]
#: Mean similarity of each prompt's key on each test set.
SIMILARITY = [[0.31, -0.2, 0.0, 0.1], [0.1, 0.2, -0.004, 0.25], [0.0, 0.0, 0.0, 0.0]]

#: Images of each class by prediction; there is none of a cat.
CONFUSION = {"ant": {"ant": 3, "cat": 1}, "bee": {"bee": 5}}


def usage_of(after_task=3, counts=USAGE, similarity=SIMILARITY):
    """How often each prompt was chosen on each test set."""
    return [
        {"after_task": after_task, "test_set": row, "batch": batch, "instance": instance}
        | {"name": None, "key_similarity": similarity[row]}
        for row, (batch, instance) in enumerate(counts)
    ]


def curve_of(num_tasks=3, epochs=2, rate=lambda epoch: 0.1):
    """Training means of every epoch."""
    return [
        {"task": t + 1, "epoch": e, "Lr": rate(e), "Loss": t + 1 / e, "Acc@1": 80.0 + e}
        for t in range(num_tasks)
        for e in range(1, epochs + 1)
    ]


def make_results(batch=BATCH, instance=INSTANCE, settings=None, **parts):
    """Results of a small run with everything that is stored.

    Settings are those that are given on the command line; parts that are dictionaries are merged.
    """
    flags = {"seed": 42, "output_dir": "out", **(settings or {})}
    results = {
        "batch": {"accuracy_matrix": batch, "confusion_matrix": CONFUSION},
        "instance": {"accuracy_matrix": instance, "confusion_matrix": CONFUSION},
        "class_names": ["ant", "bee", "cat"],
        "class_order": [[2, 0], [1]],
        "command": {"configurations": ["digits_l2p"], "flags": flags},
        "run": {"processes": 1, "images_per_step": 16},
        "backbone": {"name": "vit", "sha256": "ab"},
        "test_sets": [f"task{row + 1}" for row in range(len(batch))],
        "training_curve": curve_of(),
        "prompt_usage": usage_of(),
        "seed": flags["seed"],
        "config": {**Settings().stored(), "dataset": "Digits", "top_k": 2, "size": 4, **flags},
    }
    for name, part in parts.items():
        results[name] = results[name] | part if isinstance(part, dict) else part
    return results


def write(folder, results=None, batch=BATCH, instance=INSTANCE, **settings):
    """Writes the results of a run, or of a small one with some settings; gives its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    results = make_results(batch, instance, settings) if results is None else results
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def joint():
    """A run that learned three named data sets at once."""
    names = ["SVHN", "MNIST", "a data set with a very long name"]
    given = {"test_sets": names, "prompt_usage": usage_of(1), "training_curve": curve_of(1)}
    return make_results([[90.0], [60.0], [30.0]], [[80.0], [50.0], [20.0]], **given)


def long_run():
    """200 tasks, one test set that is evaluated after every tenth."""
    row = [float(t) / 2 if t % 10 == 0 else None for t in range(1, 201)]
    usage = usage_of(190, USAGE[:1]) + usage_of(200, USAGE[:1])
    usage[0]["batch"] = usage[0]["instance"] = [40, 0, 0, 0]
    return make_results([row], [row], prompt_usage=usage, training_curve=curve_of(200, 1))


def begun(**parts):
    """A run of three tasks that ended after the second."""
    batch = [[90.0, 70.0, None], [None, 80.0, None], [None] * 3]
    instance = [[80.0, 0.0, None], [None, 70.0, None], [None] * 3]
    given = {"prompt_usage": usage_of(2, USAGE[:2]), "training_curve": curve_of(2), **parts}
    return make_results(batch, instance, **given)


def whole_pool():
    """A run in which every image is served by the whole pool."""
    return make_results(INSTANCE, INSTANCE, {"top_k": 4})


def without_pool():
    """A run that has no prompts to choose from."""
    return make_results(settings={"prompt_pool": False}, prompt_usage=[])


def old():
    """Results of the first versions."""
    results = make_results()
    for name in ("command", "run", "training_curve", "test_sets"):
        del results[name]
    for name in ("tf32", "norm", "vote_ties"):  # settings that came later
        del results["config"][name]
    for name in ("batch", "instance"):
        results[name] = {"accuracy_matrix": results[name]["accuracy_matrix"]}
    for entry in results["prompt_usage"]:
        del entry["key_similarity"]
    return results


def wide(num_tasks, size=4):
    """A triangle of tasks, each served by two of the prompts."""
    matrix = [[None if row > t else 50.0 for t in range(num_tasks)] for row in range(num_tasks)]
    counts = [([20, 20, *[0] * (size - 2)], [20, 20, *[0] * (size - 2)])] * num_tasks
    usage = usage_of(num_tasks, counts, [[0.1] * size] * num_tasks)
    return make_results(matrix, matrix, prompt_usage=usage, training_curve=curve_of(num_tasks))
