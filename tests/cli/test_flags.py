"""How a setting is declared, and how words become its value."""

import math
import re

import pytest

from benchmark import BenchmarkOptions
from benchmarks.gpu_check import CheckOptions
from cli import settings
from cli.flags import flags_of
from cli.settings import Settings
from launch.sweep_plan import SweepOptions
from plots import PlotOptions
from run_with_submitit import SubmitOptions
from summarize import TableOptions

#: A setting of every kind; two options of sweep.py have one of their own.
KINDS = (
    "shuffle size num_tasks lr clip_grad model aa global_pool amp pretrained data_on_device scale "
    "seeds freeze model_kwargs"
)
FLAGS = {name: settings.FLAGS[name] for name in KINDS.split()}
FLAGS |= {one.name: one for one in flags_of(SweepOptions) if one.name in ("output_dir", "grid")}


def test_flag_is_declared_by_its_field():
    limit = FLAGS["clip_grad"]
    assert (limit.kind, limit.default, limit.choices) == (float | None, 1.0, ())
    assert (limit.name, limit.spelling) == ("clip_grad", "--clip-grad")  # as in the original
    assert Settings().model.model_kwargs is not Settings().model.model_kwargs
    assert {name for name, one in FLAGS.items() if one.is_switch} == {"shuffle"}
    many = dict.fromkeys(("seeds", "freeze", "grid", "model_kwargs"), math.inf) | {"scale": 2}
    assert {name: one.most_values for name, one in FLAGS.items()} == dict.fromkeys(FLAGS, 1) | many


def test_word_is_accepted_by_its_type():
    """Numbers out of range, too; text, unless it has a form of its own."""
    of_numbers = set("size num_tasks lr clip_grad scale seeds".split())
    for word, rejecting in {
        "x": {*of_numbers, "shuffle", "grid", "model_kwargs"},
        "-1": {"shuffle", "grid", "model_kwargs"},
        "a=x!": {*of_numbers, "shuffle"},
    }.items():
        assert {name for name, one in FLAGS.items() if not one.accepts(word)} == rejecting


VALUES = {
    "shuffle": dict.fromkeys("true yes on 1 TRUE Yes oN".split(), True)
    | dict.fromkeys("false no off 0 FALSE No oFf".split(), False),
    "size": {"7": 7},
    "num_tasks": {"7": 7, "none": None, "None": None},
    "lr": {"1e-3": 0.001, "2": 2.0},
    "model": {"none": "none", "a=b": "a=b"},
    "aa": {"none": None},
    "output_dir": {"none": ""},
    "global_pool": {"avg": "avg"},
    "amp": {"none": None},
    "pretrained": {"off": False, "w.npz": "w.npz"},
    "data_on_device": {"yes": True, "auto": "auto"},
    "scale": {"0.2 0.2": (0.2, 0.2)},
    "seeds": {"0 5 5": (0, 5, 5), "none": None},
    "freeze": {"x none": ("x", "none"), "none": (), "": ()},
    "model_kwargs": {
        "a=1 b=x c=True d=(1,2)": {"a": 1, "b": "x", "c": True, "d": (1, 2)},
        "a=b=c": {"a": "b=c"}, "a=false b=none": {"a": False, "b": None}, "none": {}, "": {},
    },
}  # fmt: skip


def test_words_become_the_value_of_the_annotation():
    for name, values in VALUES.items():
        for words, value in values.items():
            found = FLAGS[name].read(words.split())
            assert (found, type(found)) == (value, type(value)), (name, words)


PROBLEMS = """
--shuffle true false: takes one value
--shuffle maybe: is not true or false
--shuffle 2: is not true or false
--shuffle t: is not true or false
--shuffle none: is not true or false
--size x: 'x' is not a whole number
--size 1.5: '1.5' is not a whole number
--size 0: must be at least 1 and at most 10000
--size none: 'none' is not a whole number
--size: needs a value
--num_tasks 0: must be at least 1 and at most 10000, or none
--lr fast: 'fast' is not a number
--lr nan: must be above 0 and at most 1000
--clip-grad -1: must be above 0 and at most 1000000000, or none
--global_pool three is unknown: choose one of token, avg
--global_pool none is unknown: choose one of token, avg
--amp three is unknown: choose one of none, bf16, fp16
--data_on_device maybe is unknown: choose one of auto, true, false
--scale .1: takes 2 values
--scale .1 .2 .3: takes 2 values
--scale .1 x: 'x' is not a number
--scale .5 .1: must be two rising shares of the image, in (0, 1]
--seeds 1 x: 'x' is not a whole number
--seeds 1 -1: must be in [0, 2^32), or none
--seeds: needs a value
--model-kwargs a: 'a' is not of the form name=value
--model-kwargs =1: '=1' is not of the form name=value
"""


def test_words_that_are_no_value_name_the_flag():
    for problem in PROBLEMS.strip().splitlines():
        spelling, *words = re.split(": | is (?!not)", problem)[0].split()
        with pytest.raises(ValueError) as caught:
            FLAGS[spelling[2:].replace("-", "_")].read(words)
        assert str(caught.value) == problem


def test_ranges_hold_what_they_say():
    nan, inf = math.nan, math.inf
    for name, (inside, outside) in {
        "POSITIVE": ([1e-9, 3], [0, -1, inf, nan]),  # as all that begin above a number
        "NOT_NEGATIVE": ([0, 3], [-1e-9, inf, nan]),
        "PIXELS": ([1, 4096], [0, 4097]),  # as all that begin at one
        "SHARE": ([0, 0.99], [-0.1, 1, nan]),
        "SEED": ([0, 2**32 - 1], [-1, 2**32]),
        "AREA": ([(0.1, 0.1), (0.5, 1)], [(0, 1), (0.5, 0.4), (0.5, 1.1), (nan, 1)]),
        "NORM": (
            ["none", "model", "0.4,0.5,0.6,0.2,0.2,0.2"],
            ["cifar", "0.5", "0.5,0.5,0.5,0.2,0,0.2", "0.5,0.5,nan,0.2,0.2,0.2"],
        ),
        "RATIO": ([(1, 1), (0.5, 2)], [(0, 1), (2, 1), (1, inf), (nan, 1), (inf, inf)]),
    }.items():
        text, holds = getattr(settings, name)
        assert text.startswith("must be ")
        wanted = [True] * len(inside) + [False] * len(outside)
        assert [holds(value) for value in (*inside, *outside)] == wanted, name


@pytest.mark.parametrize("word", ["nan", "inf", "-inf", "-1", "1" + "0" * 30, "9" * 400, "1e400"])
def test_every_number_has_a_range_that_ends(word):
    """Also of options of the commands; one that is added without a range fails here."""
    options = [one for kind in (CheckOptions, SubmitOptions) for one in flags_of(kind)]
    options += [*settings.FLAGS.values(), *flags_of(SweepOptions), *flags_of(BenchmarkOptions)]
    numbers = [one for one in options if one.accepts("1") and not one.accepts("x")]
    numbers = [one for one in numbers if not one.is_switch]
    assert len(numbers) > 60
    for one in numbers:
        several = 2 if one.most_values == 2 else 1
        with pytest.raises(ValueError, match=rf"{one.spelling} {word}\b.*: "):
            one.read([word] * several)


PATHS = "output_dir resume continue_from checkpoint data_path file_lists class_order pretrained"
PATHS = PATHS.split()


def is_path(one):
    return "PathStr" in str(one.kind)


def test_every_path_may_begin_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    kinds = (SweepOptions, SubmitOptions, BenchmarkOptions, PlotOptions, TableOptions, CheckOptions)
    found = [[one.name for one in flags_of(kind) if is_path(one)] for kind in kinds]
    paths = [
        ["output_dir"],
        ["shared_folder"],
        ["json"],
        ["output_dir"],
        ["compare", "output"],
        ["out"],
    ]
    assert found == paths
    found = [name for name, one in settings.FLAGS.items() if is_path(one)]
    assert [name for name in found if name != "earlier_data"] == PATHS  # which takes several
    assert settings.FLAGS["earlier_data"].read(["~/a", "b"]) == ("/home/somebody/a", "b")
    for name in PATHS:
        one = settings.FLAGS[name]
        assert one.read(["~/a/~"]) == "/home/somebody/a/~"
        assert one.read(["./~"]) == "./~"
        for word in ("~nobody_of_that_name/a", "a\0b", "\ud800", "a" * 256, "a/" * 2048):
            with pytest.raises(ValueError, match=f"{one.spelling} .*: (there is no home|no file)"):
                one.read([word])
    kept = {"resume": {"auto": "auto"}, "pretrained": {"true": True, "false": False}}
    kept |= {"class_order": {"none": None}, "output_dir": {"": "", "none": ""}}
    for name, values in kept.items():
        assert {word: settings.FLAGS[name].read([word]) for word in values} == values
