"""How a setting is declared, and how words become its value."""

import math
import re
from dataclasses import dataclass, fields
from typing import Any

import pytest

from cli import settings
from cli.flags import flag, flags_of
from cli.settings import AREA, COUNT, LIMIT, NATURAL, POSITIVE


@dataclass(frozen=True)
class Group:
    """One field of every kind."""

    switch: bool = flag(True, "a switch")
    count: int = flag(3, "a count", range=COUNT)
    opt_eps: int | None = flag(None, "a count or none", range=COUNT)
    rate: float = flag(0.5, "a number", range=POSITIVE)
    limit: float | None = flag(None, "a number or none", range=LIMIT)
    word: str = flag("b", "a word")
    maybe_word: str | None = flag(None, "a word or none")
    empty_word: str = flag("", "a word, empty unless set")
    choice: str = flag("one", "one of two", choices=("one", "two"))
    maybe_choice: str | None = flag(None, "one of two, or none", choices=("one", "two"))
    switch_or_path: bool | str = flag(True, "a switch or a path")
    switch_or_auto: bool | str = flag("auto", "a switch or auto", choices=("auto",))
    pair: tuple[float, float] = flag((0.1, 1.0), "two numbers", range=AREA)
    counts: tuple[int, ...] | None = flag(None, "counts or none", range=NATURAL)
    words: tuple[str, ...] = flag(("a", "b"), "words", at_least_one=False)
    rated: tuple[str, ...] = flag((), "words", range=("must end in !", re.compile(".*!").match))
    mapping: dict[str, Any] = flag({}, "names with values", at_least_one=False)  # noqa: RUF009


FLAGS = {one.name: one for one in flags_of(Group)}


def test_flags_of_a_group_are_its_fields():
    assert list(FLAGS) == [field.name for field in fields(Group)]
    limit = FLAGS["limit"]
    assert (limit.kind, limit.help, limit.spelling) == (float | None, "a number or none", "--limit")
    assert FLAGS["pair"].default == Group().pair == (0.1, 1.0)
    assert Group().mapping == {}
    assert Group().mapping is not Group().mapping
    assert FLAGS["opt_eps"].spelling == "--opt-eps"  # as in the original
    assert {name for name, one in FLAGS.items() if one.is_switch} == {"switch"}
    many = dict.fromkeys(("counts", "words", "rated", "mapping"), math.inf) | {"pair": 2}
    assert {name: one.most_values for name, one in FLAGS.items()} == dict.fromkeys(FLAGS, 1) | many


def test_word_is_accepted_by_its_type():
    """Numbers out of range, too; text, unless it has a form of its own."""
    of_numbers = set("count opt_eps rate limit pair counts".split())
    for word, rejecting in {
        "x": {*of_numbers, "switch", "rated", "mapping"}, "-1": {"switch", "rated", "mapping"},
        "a=x!": {*of_numbers, "switch"},
    }.items():  # fmt: skip
        assert {name for name, one in FLAGS.items() if not one.accepts(word)} == rejecting


VALUES = {
    "switch": dict.fromkeys("true yes on 1 TRUE Yes oN".split(), True)
    | dict.fromkeys("false no off 0 FALSE No oFf".split(), False),
    "count": {"7": 7},
    "opt_eps": {"7": 7, "none": None, "None": None},
    "rate": {"1e-3": 0.001, "2": 2.0},
    "word": {"none": "none", "a=b": "a=b"},
    "maybe_word": {"none": None},
    "empty_word": {"none": ""},
    "choice": {"two": "two"},
    "maybe_choice": {"none": None},
    "switch_or_path": {"off": False, "w.npz": "w.npz"},
    "switch_or_auto": {"yes": True, "auto": "auto"},
    "pair": {"0.2 0.2": (0.2, 0.2)},
    "counts": {"0 5 5": (0, 5, 5), "none": None},
    "words": {"x none": ("x", "none"), "none": (), "": ()},
    "mapping": {"a=1 b=x c=True d=(1,2)": {"a": 1, "b": "x", "c": True, "d": (1, 2)},
                "a=b=c": {"a": "b=c"}, "none": {}, "": {}},
}  # fmt: skip


def test_words_become_the_value_of_the_annotation():
    for name, values in VALUES.items():
        for words, value in values.items():
            found = FLAGS[name].read(words.split())
            assert (found, type(found)) == (value, type(value)), (name, words)


PROBLEMS = """
--switch true false: takes one value
--switch maybe: is not true or false
--switch 2: is not true or false
--switch t: is not true or false
--switch none: is not true or false
--count x: 'x' is not a whole number
--count 1.5: '1.5' is not a whole number
--count 0: must be at least 1
--count none: 'none' is not a whole number
--count: needs a value
--opt-eps 0: must be at least 1
--rate fast: 'fast' is not a number
--rate nan: must be positive and finite
--limit -1: must be positive and finite (none: no limit)
--choice three is unknown: choose one of one, two
--choice none is unknown: choose one of one, two
--maybe_choice three is unknown: choose one of none, one, two
--switch_or_auto maybe is unknown: choose one of auto, true, false
--pair .1: takes 2 values
--pair .1 .2 .3: takes 2 values
--pair .1 x: 'x' is not a number
--pair .5 .1: must be two rising shares of the image, in (0, 1]
--counts 1 x: 'x' is not a whole number
--counts 1 -1: must be at least 0
--counts: needs a value
--mapping a: 'a' is not of the form name=value
--mapping =1: '=1' is not of the form name=value
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
        "POSITIVE": ([1e-9, 3], [0, -1, inf, nan]),
        "LIMIT": ([1e-9, 3], [0, -1, inf, nan]),
        "NOT_NEGATIVE": ([0, 3], [-1e-9, inf, nan]),
        "SHARE": ([0, 0.99], [-0.1, 1, nan]),
        "PROBABILITY": ([0, 1], [-0.1, 1.1, nan]),
        "QUALITY": ([1, 100], [0, 101]),
        "SEED": ([0, 2**32 - 1], [-1, 2**32]),
        "AREA": ([(0.1, 0.1), (0.5, 1)], [(0, 1), (0.5, 0.4), (0.5, 1.1), (nan, 1)]),
        "RATIO": ([(1, 1), (0.5, 2)], [(0, 1), (2, 1), (1, inf), (nan, 1)]),
        "COUNT": ([1, 9], [0, -3]),
        "NATURAL": ([0, 9], [-1]),
    }.items():
        text, holds = getattr(settings, name)
        assert text.startswith("must be ")
        wanted = [True] * len(inside) + [False] * len(outside)
        assert [holds(value) for value in (*inside, *outside)] == wanted, name
