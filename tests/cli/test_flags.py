"""How a setting is declared, and how words become its value."""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

import pytest

from cli import flags
from cli.flags import CROP_AREA, LIMIT, POSITIVE, at_least, flag, flags_of, read_yes_no


@dataclass(frozen=True)
class Group:
    """One field of every kind."""

    switch: bool = flag(True, "a switch")
    count: int = flag(3, "a count", range=at_least(1))
    opt_eps: int | None = flag(None, "a count or none", range=at_least(1))
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


def test_flags_of_a_group_are_its_fields_in_order():
    assert list(FLAGS) == [field.name for field in dataclasses.fields(Group)]
    assert FLAGS["limit"].kind == float | None
    assert FLAGS["limit"].help == "a number or none"
    assert FLAGS["pair"].default == Group().pair == (0.1, 1.0)
    one, other = Group(), Group()
    assert one.mapping == other.mapping == {}
    assert one.mapping is not other.mapping


def test_kind_of_a_flag_follows_from_name_and_annotation():
    """Dashes where the original has them; numbers and mappings are no configurations."""
    assert FLAGS["opt_eps"].spelling == "--opt-eps"
    assert FLAGS["empty_word"].spelling == "--empty_word"
    assert {name for name, one in FLAGS.items() if one.is_switch} == {"switch"}
    several = {"pair": 2, "counts": math.inf, "words": math.inf, "mapping": math.inf}
    assert {name: one.most_values for name, one in FLAGS.items()} == {
        name: several.get(name, 1) for name in FLAGS
    }
    of_numbers = set("count opt_eps rate limit pair counts mapping".split())
    assert {name for name, one in FLAGS.items() if not one.takes_text} - {"switch"} == of_numbers


VALUES = {
    "switch": {"true": True, "No": False},
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
        spelling, *words = re.split(": | is ", problem)[0].split()
        with pytest.raises(ValueError) as caught:
            FLAGS[spelling[2:].replace("-", "_")].read(words)
        assert str(caught.value) == problem


def test_yes_no_words_in_any_letter_case():
    for words, value in (("true yes on 1", True), ("false no off 0", False)):
        for word in words.split():
            for spelled in (word, word.upper(), word.capitalize()):
                assert read_yes_no(spelled) is value
    for word in ("", "maybe", "2", "t", "none"):
        with pytest.raises(ValueError, match="is not true or false"):
            read_yes_no(word)


#: What is inside; what is outside.
RANGES = {
    "POSITIVE": ([1e-9, 3], [0, -1, math.inf, math.nan]),
    "LIMIT": ([1e-9, 3], [0, -1, math.inf, math.nan]),
    "NOT_NEGATIVE": ([0, 3], [-1e-9, math.inf, math.nan]),
    "SHARE": ([0, 0.99], [-0.1, 1, math.nan]),
    "PROBABILITY": ([0, 1], [-0.1, 1.1, math.nan]),
    "QUALITY": ([1, 100], [0, 101]),
    "SEED": ([0, 2**32 - 1], [-1, 2**32]),
    "CROP_AREA": ([(0.1, 0.1), (0.5, 1)], [(0, 1), (0.5, 0.4), (0.5, 1.1), (math.nan, 1)]),
    "ASPECT_RATIO": ([(1, 1), (0.5, 2)], [(0, 1), (2, 1), (1, math.inf), (math.nan, 1)]),
    "at_least(2)": ([2, 9], [1, -3]),
}


@pytest.mark.parametrize("name", RANGES)
def test_ranges_hold_what_they_say(name):
    text, holds = at_least(2) if name == "at_least(2)" else getattr(flags, name)
    assert text.startswith("must be ")
    assert [list(map(holds, values)) for values in RANGES[name]] == [
        [inside] * len(values) for inside, values in zip((True, False), RANGES[name], strict=True)
    ]
