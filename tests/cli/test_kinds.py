"""Types of the values that files and command lines hold."""

from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

import pytest

from cli import kinds
from helpers.hostile_values import nested


@dataclass
class Inner:
    number: int


class Kind(TypedDict):
    whole: int
    natural: kinds.Natural
    finite: kinds.Finite | None
    text: str
    rows: list[list[float | None]]
    by_name: dict[str, list[bool]]
    pair: Annotated[tuple[int, ...], ("must be two numbers", lambda x: len(x) == 2)]
    inner: Inner
    any: Any


def problems(**entries):
    return list(kinds.problems(kinds.of_fields(Kind), entries))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("whole", -1), ("natural", 0), ("finite", 1), ("finite", 2.5), ("finite", None),
        ("text", "\udcff\x1b"), ("rows", []), ("rows", [[1, 2.5, None], []]), ("by_name", {}),
        ("by_name", {"a": [True]}), ("pair", [1, 2]), ("pair", (1, 2)), ("inner", {"number": 1}),
        ("any", {"a": [1, (None, {2: "x"})]}), ("any", nested(25)), ("any", object()),
    ],
)  # fmt: skip
def test_value_of_its_type_is_no_problem(name, value):
    assert problems(**{name: value}) == []


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("whole", 1.0, "whole is 1.0: must be a whole number"),
        ("whole", True, "whole is True: must be a whole number"),
        ("whole", 2**63, "whole is 9223372036854775808: must be a whole number"),
        ("rows", [[10**5000]], "rows[0][0] is a huge number: must be a number"),
        ("natural", -1, "natural is -1: must be at least 0"),
        ("natural", "\x1b[31m", r"natural is '\x1b[31m': must be a whole number"),
        ("finite", float("nan"), "finite is nan: must be a finite number"),
        ("finite", 10**400, "must be a number"),
        ("finite", True, "must be a number"),
        ("text", 1, "text is 1: must be text"),
        ("rows", [1], "rows[0] is 1: must be a list"),
        ("rows", [[1], [2, "\udcff"]], r"rows[1][1] is '\udcff': must be a number"),
        ("by_name", {1: [True]}, "a key of by_name is 1: must be text"),
        ("by_name", {"a": [0]}, "by_name['a'][0] is 0: must be true or false"),
        ("by_name", [], "by_name is []: must be values by name"),
        ("pair", [1], "pair is [1]: must be two numbers"),
        ("inner", 3, "inner is 3: must be values by name"),
        ("any", nested(5000), "any is nested too deeply"),
        ("any", [{"a": 10**400}], "must be below 2^63"),
    ],
)
def test_problem_names_the_place_the_value_and_what_is_allowed(name, value, problem):
    (found,) = problems(**{name: value})
    assert problem in found
    assert found.isprintable()
    assert len(found) < 200


def test_containers_that_are_referred_to_often_or_by_themselves_are_looked_at_once():
    itself = []
    itself.append(itself)
    assert problems(any=itself) == []
    often = 1
    for _ in range(28):
        often = [often] * 20
    assert problems(any=often) == []
