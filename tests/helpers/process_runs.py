"""Runs in several processes, and what they must agree in."""

import re
from functools import partial

import numpy as np
import pytest
from PIL import Image

import main
from helpers.finished_runs import Run
from helpers.process_groups import by_nobody, together
from helpers.tiny_flags import TINY
from helpers.tiny_model import close_by_name
from reports.metrics import SELECTIONS

#: With queries that differ from image to image, so that votes are held and lost.
SMALL = [
    *TINY, "--size", "20", "--embedding_key", "mean", "--norm", "half", "--lr_scale", "global",
    "--no-shuffle", "--dataset", "ImageFolder", "--print_freq", "1",
    "--save_predictions",
]  # fmt: skip

#: What a process says that loses another.
GONE = "error: another process of the run is gone ("


def run(folder, count, flags, hook=None, **keywords):
    """Runs main.py in so many processes; `more`: flags of the last one alone."""
    more, argv = keywords.pop("more", ()), [str(flag) for flag in flags]
    work = partial(_main, argv, [*argv, *map(str, more)], count - 1, hook)
    return together(folder, count, work, **keywords)


def _main(argv, last_argv, last, hook, rank):
    if hook is not None:
        hook(rank)
    return main.main(last_argv if rank == last else argv)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Two tasks of 13 and 12 training images and 7 test images each, no two of a colour."""
    folder = tmp_path_factory.mktemp("uneven")
    rng = np.random.default_rng(2)
    for split, counts in (("train", (9, 4, 5, 7)), ("val", (5, 2, 4, 3))):
        for name, count in zip("abcd", counts, strict=True):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                coarse = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
                picture = Image.fromarray(coarse).resize((20, 18), Image.Resampling.BICUBIC)
                picture.save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def alone(pictures, tmp_path_factory):
    """Gives the folder of a finished run of one process, by its global batch and vote group."""
    made = {}

    def folder(batch, group):
        if (batch, group) not in made:
            made[batch, group] = output = tmp_path_factory.mktemp("alone")
            flags = shape(batch, group, pictures, output)
            done = run(output, 1, flags, environment=by_nobody)
            assert done.codes == [0], done.text
        return made[batch, group]

    return folder


def shape(batch, group, data, output):
    """Flags of a run whose processes have such a batch."""
    flags = ["--batch-size", batch, "--vote_group_size", group]
    return [*SMALL, *flags, "--data-path", data, "--output_dir", output]


def step_losses(run):
    """Loss of every step in the log, in order, with what was said of its place."""
    found = re.findall(r"^(Train: .*?)  eta: .* Loss: ([\d.]+) ", run.log, re.MULTILINE)
    return [place for place, _ in found], [float(loss) for _, loss in found]


def assert_equal_runs(folder, reference, stopped=False):
    """Evaluations are equal to the last image, losses and parameters to rounding.

    The log of a run that was stopped need not tell the step after which it stopped.
    """
    one, two = Run(reference), Run(folder)
    for selection in SELECTIONS:
        assert two.results[selection] == one.results[selection]
    assert_equal_usage(two.results["prompt_usage"], one.results["prompt_usage"])
    predictions = [(one / "predictions.csv").read_text() for one in (reference, folder)]
    assert predictions[0] == predictions[1]
    for line, other in zip(one.stats, two.stats, strict=True):
        assert other == {
            name: pytest.approx(value, rel=1e-6) if "Loss" in name else value
            for name, value in line.items()
        }
    for task in (1, 2):
        wanted = one.checkpoint(task).model
        close_by_name(two.checkpoint(task).model, wanted, atol=2e-6, rtol=1e-5)
    (places, losses), (same_places, same_losses) = step_losses(one), step_losses(two)
    if stopped and len(same_places) == len(places) - 1:
        pairs = enumerate(zip(places, same_places, strict=False))
        lost = next((i for i, (place, same) in pairs if place != same), -1)
        del places[lost], losses[lost]
    assert same_places == places
    np.testing.assert_allclose(same_losses, losses, atol=2e-4)  # the log has four decimals


def assert_equal_usage(one, two):
    """Prompts are chosen equally often, similarities are equal to rounding."""
    for entry, other in zip(one, two, strict=True):
        names = {"mean_similarity", "key_similarity"} & other.keys()
        near = {name: pytest.approx(other[name], rel=1e-5, abs=2e-6) for name in names}
        assert entry == {**other, **near}  # similarities are written with six decimals
