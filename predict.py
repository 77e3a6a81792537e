"""Predicts the classes of images by what a run has learned.

    python predict.py RUN PATH ... [--flags]

RUN is the output folder of a run, or a checkpoint; PATH an image, or a folder of images, with its
sub-folders. Each image gets a line: its path, the most probable class with its probability, and the
next ones. Only classes learned so far are predicted. With --csv or --json the predictions go to a
file, in place of the screen.

If the sub-folders of PATH are called as the classes are, accuracy and confusion matrix follow.

In Python: `from predict import load_learner`.

Exit code: 0 done, 1 an image was damaged or something else failed, 2 command line rejected,
130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.flags import between, flag
from cli.imports import quick_imports
from cli.options import take_all
from cli.parser import UsageError
from cli.paths import PathStr
from cli.settings import BATCH, COUNT
from cli.terminal import one_line, printable, run_program
from reports import files, metrics

if TYPE_CHECKING:
    from experiment.learners import Images, Learner

#: Classes and letters of a line that a printed confusion matrix has at most; and confusions that
#: are listed in place of one.
_MOST_CLASSES, _WIDTH, _CONFUSIONS = 20, 100, 10


@dataclass(frozen=True)
class PredictOptions:
    """Options of this program."""

    checkpoint: int | None = flag(
        None, "that after task N, where RUN is a folder (default: the last)", range=COUNT
    )
    top: int = flag(5, "classes that are shown of an image", range=between(1, 10_000))
    csv: PathStr | None = flag(None, "write a table to this file, in place of the screen")
    json: PathStr | None = flag(None, "write all results to this file, in place of the screen")
    vote_group_size: int = flag(
        1, "images that select their prompts together, in the order given; 1: alone", range=BATCH
    )
    batch_size: int = flag(64, "images of a pass through the model", range=BATCH)
    device: str = flag("auto", "cuda, cuda:N, cpu, or auto: CUDA where there is one")
    pretrained: PathStr | None = flag(
        None, "where the weight file of the run is now (default: where it was)"
    )

    def problems(self) -> list[str]:
        """What is wrong with them together."""
        given = {"--csv": self.csv, "--json": self.json}
        return [
            f"{name} {path} is no regular file: name a file"
            for name, path in given.items()
            if path and Path(path).exists() and not Path(path).is_file()
        ]


def load_learner(
    run: str | Path,
    checkpoint: int | None = None,
    *,
    device: str = "auto",
    pretrained: str | None = None,
) -> Learner:
    """Loads what a run has learned, to predict the classes of images.

    Args:
        run: Output folder of a run, or one of its checkpoints.
        checkpoint: 1-based number of a task, whose checkpoint is taken; None: the last one.
        device: `cuda`, `cuda:N`, `cpu`, or `auto`: CUDA where there is one.
        pretrained: Where the weight file of the run is now; None: where it was.

    Returns:
        A function of images: `learner(images)`, with B paths or PIL images, or a tensor
        (B, 3, S, S) of uint8 pixels, gives `classes`, B names; `probabilities` (B, C) in [0, 1];
        `prompts` (B, K), ids of those selected; and `top(5)`, (name, probability) pairs. The C
        columns are `learner.class_names`. It raises DataError, a ValueError, if a file is no image.

    Raises:
        ValueError: With a line: no such checkpoint, damaged, or another backbone than the run's.
    """
    import utils
    from experiment import checkpoints, learners

    stored = checkpoints.find_one(Path(run), "load_learner", checkpoint)
    return learners.Learner(stored, utils.choose_device(device), pretrained)


def main(argv: list[str] | None = None) -> int:
    """Runs a command line, by default that of the process; returns the exit code."""
    options, words, problems = take_all(
        PredictOptions,
        sys.argv[1:] if argv is None else argv,
        prog="predict.py",
        usage="predict.py RUN PATH ... [--flags]",
        description="Predicts the classes of images. RUN is the output folder of a run, or a "
        "checkpoint; PATH an image, or a folder of images, with its sub-folders.",
    )
    if len(words) < 2:
        problems.append("give RUN, the folder of a run, and PATH, an image or a folder of images")
    try:
        return _predict(options, *_load(options, words, problems))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except UsageError as error:
        return error.report("predict.py")
    except (OSError, ValueError) as error:
        _note(str(error))
    except (RuntimeError, MemoryError) as error:
        from utils import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        _note(f"out of memory: give a --batch_size below {options.batch_size}")
    return 1


def _load(options: PredictOptions, words: list[str], problems: list[str]) -> tuple[Learner, Images]:
    """Checks a command line, finds the images, then loads the learner."""
    with quick_imports():
        import utils
        from experiment import checkpoints, hardware, learners
    device: Any = None
    stored: Any = None
    learned: Collection[str] = ()
    images: Images = []
    notes: list[str] = []
    with _gathered(problems):
        device = utils.choose_device(options.device)
        problems += filter(None, [hardware.problem(device)])
    with _gathered(problems):
        if words:
            stored = checkpoints.find_one(Path(words[0]), "predict.py", options.checkpoint)
            learned = learners.learned_classes(stored).values()
    for place in words[1:]:
        with _gathered(problems):
            found, more = learners.find_images(place, learned)
            images += found
            notes += more
    if problems:
        raise UsageError(dict.fromkeys(problems))
    for note in notes:
        _note(note)
    return learners.Learner(stored, device, options.pretrained), images


@contextmanager
def _gathered(problems: list[str]) -> Iterator[None]:
    """Adds what is wrong in its body to the problems."""
    try:
        yield
    except (OSError, ValueError) as error:
        problems.append(str(error))


def _predict(options: PredictOptions, learner: Learner, images: Images) -> int:
    """Predicts all images; prints or writes the results."""
    from tqdm import tqdm

    from experiment.learners import predict_files

    rows: list[dict[str, Any]] = []
    damaged: list[dict[str, Any]] = []
    pairs: list[tuple[str, str]] = []  # true and predicted class
    votes, to_file = options.vote_group_size, options.csv or options.json
    found = predict_files(learner, images, options.top, options.batch_size, votes)
    for row in tqdm(found, total=len(images), unit=" images", leave=False, disable=None):
        if "reason" in row:
            tqdm.write(f"predict.py: skipped {one_line(row['reason'])}", file=sys.stderr)
            damaged.append(row)
            continue
        if row["label"] is not None:
            pairs.append((row["label"], row["top"][0][0]))
        if to_file:
            rows.append(row)
        else:
            shown = ", ".join(f"{name} ({100 * p:.1f} %)" for name, p in row["top"])
            tqdm.write(one_line(f"{row['path']}: {shown}"), file=sys.stdout)
            sys.stdout.flush()
    evaluation, text = _evaluation(pairs, learner.class_names)
    if options.csv:
        files.write_text(Path(options.csv), _table(rows))
    if options.json:
        about = {"task": learner.task, "class_names": learner.class_names, "vote_group_size": votes}
        content = about | evaluation | {"images": rows, "damaged": damaged}
        files.write_json(Path(options.json), content)
    text += "".join(f"Written to {path}\n" for path in (options.csv, options.json) if path)
    print(printable(text), end="")
    return 1 if damaged else 0


def _evaluation(pairs: list[tuple[str, str]], class_names: list[str]) -> tuple[dict[str, Any], str]:
    """Accuracy and confusions from true and predicted classes: as plain values and as text."""
    if not pairs:
        return {}, ""
    from pandas import Categorical, DataFrame, crosstab

    table = DataFrame(pairs, columns=["true class", "predicted"])
    true, predicted = table["true class"], table["predicted"]
    wrong = table[true != predicted]
    accuracy = 100 * (len(table) - len(wrong)) / len(table)
    true_ids, ids = (Categorical(names, class_names).codes for names in (true, predicted))
    content = {"accuracy": accuracy, **metrics.by_class(true_ids, ids, class_names)}
    if true.nunique() > _MOST_CLASSES:
        most = wrong.value_counts().head(_CONFUSIONS)
        lines = (f"{one}, predicted as {other}: {n}\n" for (one, other), n in most.items())
        text = "Most frequent confusions:\n" + "".join(lines)
    else:
        matrix = crosstab(true, predicted).astype(str).replace("0", "-")
        text = f"Confusion matrix:\n{matrix.to_string(line_width=_WIDTH)}\n"
    return content, f"Accuracy: {accuracy:.2f} % of {len(table)} images\n{text}"


def _table(rows: list[dict[str, Any]]) -> str:
    """The predictions as CSV; probabilities in [0, 1], prompts with spaces between them."""
    from pandas import DataFrame

    table = []
    for row in rows:
        line = {"path": one_line(row["path"]), "label": row["label"]}
        for number, (name, probability) in enumerate(row["top"], start=1):
            line |= {f"class_{number}": name, f"probability_{number}": probability}
        table.append(line | {"prompts": " ".join(map(str, row["prompts"]))})
    return DataFrame(table).to_csv(index=False)


def _note(text: str) -> None:
    print(f"predict.py: {one_line(text)}", file=sys.stderr)


if __name__ == "__main__":
    run_program(main)
