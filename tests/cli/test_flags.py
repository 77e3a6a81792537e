"""How a setting is declared, and how words become its value."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest

from cli.flags import (
    ASPECT_RATIO,
    CROP_AREA,
    LIMIT,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    QUALITY,
    SEED,
    SHARE,
    at_least,
    flag,
    flags_of,
    read_yes_no,
)


@dataclass(frozen=True)
class Group:
    """One field of every kind."""

    switch: bool = flag(True, "a switch")
    count: int = flag(3, "a count", range=at_least(1), dashed=True)
    batch_limit: int | None = flag(None, "a count or none", range=at_least(1), dashed=True)
    rate: float = flag(0.5, "a number", range=POSITIVE)
    limit: float | None = flag(None, "a number or none", range=LIMIT)
    word: str = flag("b", "a word")
    maybe_word: str | None = flag(None, "a word or none")
    empty_word: str = flag("", "a word, empty unless set")
    choice: str = flag("one", "one of two", choices=("one", "two"))
    maybe_choice: str | None = flag(None, "one of two, or none", choices=("one", "two"))
    switch_or_path: bool | str = flag(True, "a switch or a path")
    switch_or_auto: bool | str = flag("auto", "a switch or auto", choices=("auto",))
    pair: tuple[float, float] = flag((0.1, 1.0), "two numbers", range=CROP_AREA)
    counts: tuple[int, ...] | None = flag(None, "counts or none", range=at_least(0))
    words: tuple[str, ...] = flag(("a", "b"), "words", at_least_one=False)
    mapping: dict[str, Any] = flag({}, "names with values", at_least_one=False)  # noqa: RUF009


FLAGS = {one.name: one for one in flags_of(Group)}


def read(name, words):
    return FLAGS[name].read(words.split())


# Declarations


def test_flags_of_a_group_are_its_fields_in_order():
    assert list(FLAGS) == [field.name for field in dataclasses.fields(Group)]
    assert FLAGS["limit"].kind == float | None
    assert FLAGS["limit"].help == "a number or none"
    assert FLAGS["pair"].default == Group().pair == (0.1, 1.0)


def test_mappings_of_two_groups_are_not_shared():
    one, other = Group(), Group()
    assert one.mapping == other.mapping == {}
    assert one.mapping is not other.mapping


@pytest.mark.parametrize(
    ("name", "spelling"), [("batch_limit", "--batch-limit"), ("empty_word", "--empty_word")]
)
def test_spelling_is_that_of_the_original(name, spelling):
    assert FLAGS[name].spelling == spelling


@pytest.mark.parametrize("name", FLAGS)
def test_switches_are_the_yes_no_fields(name):
    assert FLAGS[name].is_switch == (name == "switch")


def test_most_values_follow_from_the_annotation():
    several = {"pair": 2, "counts": math.inf, "words": math.inf, "mapping": math.inf}
    assert {name: one.most_values for name, one in FLAGS.items()} == {
        name: several.get(name, 1) for name in FLAGS
    }


def test_numbers_and_mappings_are_told_from_configurations():
    of_numbers = {"count", "batch_limit", "rate", "limit", "pair", "counts", "mapping"}
    assert {name for name, one in FLAGS.items() if not one.takes_text} - {"switch"} == of_numbers


# Reading

VALUES = [
    ("switch", "true", True),
    ("switch", "No", False),
    ("count", "7", 7),
    ("batch_limit", "7", 7),
    ("batch_limit", "none", None),
    ("batch_limit", "None", None),
    ("rate", "1e-3", 1e-3),
    ("rate", "2", 2.0),
    ("limit", "none", None),
    ("word", "none", "none"),
    ("word", "a=b", "a=b"),
    ("maybe_word", "none", None),
    ("empty_word", "none", ""),
    ("choice", "two", "two"),
    ("maybe_choice", "two", "two"),
    ("maybe_choice", "none", None),
    ("switch_or_path", "off", False),
    ("switch_or_path", "w.npz", "w.npz"),
    ("switch_or_auto", "yes", True),
    ("switch_or_auto", "auto", "auto"),
    ("pair", "0.2 0.2", (0.2, 0.2)),
    ("counts", "0 5 5", (0, 5, 5)),
    ("counts", "none", None),
    ("words", "x", ("x",)),
    ("words", "x none", ("x", "none")),
    ("words", "none", ()),
    ("words", "", ()),
    ("mapping", "a=1 b=x c=True d=(1,2)", {"a": 1, "b": "x", "c": True, "d": (1, 2)}),
    ("mapping", "a=b=c", {"a": "b=c"}),
    ("mapping", "none", {}),
    ("mapping", "", {}),
]


@pytest.mark.parametrize(("name", "words", "value"), VALUES)
def test_words_become_the_value_of_the_annotation(name, words, value):
    found = read(name, words)
    assert (found, type(found)) == (value, type(value))


PROBLEMS = [
    ("switch", "maybe", "--switch maybe: is not true or false"),
    ("switch", "true false", "--switch true false: takes one value"),
    ("count", "x", "--count x: 'x' is not a whole number"),
    ("count", "1.5", "--count 1.5: '1.5' is not a whole number"),
    ("count", "0", "--count 0: must be at least 1"),
    ("count", "none", "--count none: 'none' is not a whole number"),
    ("count", "3 4", "--count 3 4: takes one value"),
    ("count", "", "--count: needs a value"),
    ("batch_limit", "0", "--batch-limit 0: must be at least 1"),
    ("rate", "fast", "--rate fast: 'fast' is not a number"),
    ("rate", "nan", "--rate nan: must be positive and finite"),
    ("rate", "inf", "--rate inf: must be positive and finite"),
    ("limit", "-1", "--limit -1: must be positive and finite (none: no limit)"),
    ("word", "a b", "--word a b: takes one value"),
    ("choice", "three", "--choice three is unknown: choose one of one, two"),
    ("choice", "none", "--choice none is unknown: choose one of one, two"),
    ("maybe_choice", "three", "--maybe_choice three is unknown: choose one of none, one, two"),
    (
        "switch_or_auto",
        "maybe",
        "--switch_or_auto maybe is unknown: choose one of auto, true, false",
    ),
    ("pair", ".1", "--pair .1: takes 2 values"),
    ("pair", ".1 .2 .3", "--pair .1 .2 .3: takes 2 values"),
    ("pair", ".1 x", "--pair .1 x: 'x' is not a number"),
    ("pair", ".5 .1", "--pair .5 .1: must be two rising shares of the image, in (0, 1]"),
    ("counts", "1 x", "--counts 1 x: 'x' is not a whole number"),
    ("counts", "1 -1", "--counts 1 -1: must be at least 0"),
    ("counts", "", "--counts: needs a value"),
    ("mapping", "a", "--mapping a: 'a' is not of the form name=value"),
    ("mapping", "=1", "--mapping =1: '=1' is not of the form name=value"),
]


@pytest.mark.parametrize(("name", "words", "problem"), PROBLEMS)
def test_words_that_are_no_value_name_the_flag(name, words, problem):
    with pytest.raises(ValueError) as caught:
        read(name, words)
    assert str(caught.value) == problem


@pytest.mark.parametrize(
    ("word", "value"),
    [(word, value) for value, words in ((True, "true yes on 1"), (False, "false no off 0"))
     for word in words.split()],
)  # fmt: skip
def test_yes_no_words_in_any_letter_case(word, value):
    for spelled in (word, word.upper(), word.capitalize()):
        assert read_yes_no(spelled) is value


@pytest.mark.parametrize("word", ["", "maybe", "2", "t", "none"])
def test_other_words_are_neither_yes_nor_no(word):
    with pytest.raises(ValueError, match="is not true or false"):
        read_yes_no(word)


# Ranges


@pytest.mark.parametrize(
    ("range", "inside", "outside"),
    [
        (POSITIVE, [1e-9, 3], [0, -1, math.inf, math.nan]),
        (LIMIT, [1e-9, 3], [0, -1, math.inf, math.nan]),
        (NOT_NEGATIVE, [0, 3], [-1e-9, math.inf, math.nan]),
        (SHARE, [0, 0.99], [-0.1, 1, math.nan]),
        (PROBABILITY, [0, 1], [-0.1, 1.1, math.nan]),
        (QUALITY, [1, 100], [0, 101]),
        (SEED, [0, 2**32 - 1], [-1, 2**32]),
        (CROP_AREA, [(0.1, 0.1), (0.5, 1)], [(0, 1), (0.5, 0.4), (0.5, 1.1), (math.nan, 1)]),
        (ASPECT_RATIO, [(1, 1), (0.5, 2)], [(0, 1), (2, 1), (1, math.inf), (math.nan, 1)]),
        (at_least(2), [2, 9], [1, -3]),
    ],
    ids=lambda range: range[0] if isinstance(range, tuple) else "",
)
def test_ranges_hold_what_they_say(range, inside, outside):
    text, holds = range
    assert text.startswith("must be ")
    assert [holds(value) for value in inside] == [True] * len(inside)
    assert [holds(value) for value in outside] == [False] * len(outside)
