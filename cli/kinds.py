"""Checks that plain values, from files and command lines, have the types that they must have.

A type is an annotation; `Annotated[int, RANGE]` adds a range, see `cli.flags.Range`. The plain
value of a dataclass is a dict of its fields.
"""

import dataclasses
import functools
import itertools
import math
import reprlib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Union

from cli.terminal import printable

Natural = Annotated[int, ("must be at least 0", lambda x: x >= 0)]
Finite = Annotated[float, ("must be a finite number", math.isfinite)]

#: Deepest nesting of containers; a file with more is damaged.
_DEEPEST = 30

#: The largest whole number that arrays hold.
_LARGEST = 2**63 - 1

#: Containers checked so far, by identity and type: a small file can refer to one many times.
_Seen = set[tuple[int, str]]


@functools.cache
def of_fields(kind: type) -> dict[str, Any]:
    """The types of the fields of a class."""
    return typing.get_type_hints(kind, include_extras=True)


def problems(kinds: Mapping[str, Any], entries: Mapping[str, Any]) -> Iterator[str]:
    """The first thing that is wrong with each of these entries, by name, a line for each."""
    seen = _Seen()
    for name, value in entries.items():
        yield from itertools.islice(_problems(name, value, kinds[name], seen), 1)


def shown(value: Any) -> str:
    """A short text for a value of any kind and size, for messages."""
    try:
        return printable(reprlib.repr(value).splitlines()[0])
    except ValueError:  # a whole number of thousands of digits
        return "a huge number"


def _problems(name: str, value: Any, kind: Any, seen: _Seen, depth: int = 0) -> Iterator[str]:
    """What is wrong with a value of a type, or inside it; only the first is sure to be right."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        base, (must, holds) = args
        yield from _problems(name, value, base, seen, depth)
        if not holds(value):
            yield f"{name} is {shown(value)}: {must}"
    elif origin in (Union, types.UnionType):
        fitting = [one for one in args if _is_a(value, _outer(one))]
        yield from _problems(name, value, (fitting or args)[0], seen, depth)
    elif not _is_a(value, origin or kind):
        yield f"{name} is {shown(value)}: must be {_named(origin or kind)}"
    elif isinstance(value, dict | list | tuple) and (id(value), str(kind)) not in seen:
        if depth > _DEEPEST:
            yield f"{name.partition('[')[0]} is nested too deeply"
        seen.add((id(value), str(kind)))
        parts: Iterable[tuple[Any, Any]] = enumerate(value)
        of_key, of_part = int, (*args, Any)[0]
        if isinstance(value, dict):
            parts, (of_key, of_part) = value.items(), args or (Any, Any)
        for key, part in parts:
            yield from _problems(f"a key of {name}", key, of_key, seen, depth + 1)
            yield from _problems(f"{name}[{shown(key)}]", part, of_part, seen, depth + 1)


def _outer(kind: Any) -> Any:
    """The class of a type, without what must be inside it."""
    origin = typing.get_origin(kind)
    return _outer(typing.get_args(kind)[0]) if origin is Annotated else origin or kind


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value has a type, apart from what is inside it."""
    if isinstance(value, int) and abs(value) > _LARGEST:
        return False
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    if kind in (list, tuple):
        return isinstance(value, list | tuple)
    return kind is Any or isinstance(value, dict if dataclasses.is_dataclass(kind) else kind)


def _named(kind: Any) -> str:
    names: dict[Any, str] = {
        bool: "true or false", int: "a whole number", float: "a number", str: "text",
        list: "a list", tuple: "a list", dict: "values by name", Any: "below 2^63",
    }  # fmt: skip
    kind = dict if dataclasses.is_dataclass(kind) else kind
    return names.get(kind, f"a {getattr(kind, '__name__', kind)}")
