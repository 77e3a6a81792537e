"""How a setting is declared: default, help, choices and range at the field, once.

A field of a group of settings (`cli/settings.py`) is declared by `flag(...)`. Its name is the name
of the flag and of the key in a configuration, and its annotation says how a value is read. The
parser, `--help`, and the checks of configurations and checkpoints all follow from there.
"""

import ast
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

#: What a setting decides. `method`: what is learned. `place`: which repetition a run is, and where
#: its inputs are; runs of one configuration may differ in it. `compute`: where, how fast and how
#: visibly a run is computed. `command`: what a single command does; never stored.
Role = Literal["method", "place", "compute", "command"]

#: A range: what the message says of it, and the test of a value.
Range = tuple[str, Callable[[Any], bool]]

POSITIVE: Range = ("must be positive and finite", lambda x: 0 < x < math.inf)
LIMIT: Range = ("must be positive and finite (none: no limit)", POSITIVE[1])
NOT_NEGATIVE: Range = (
    "must be a finite number that is not negative",
    lambda x: 0 <= x < math.inf,
)
SHARE: Range = ("must be in [0, 1)", lambda x: 0 <= x < 1)
PROBABILITY: Range = ("must be a probability, in [0, 1]", lambda x: 0 <= x <= 1)
QUALITY: Range = ("must be a quality, in [1, 100]", lambda x: 1 <= x <= 100)
SEED: Range = ("must be in [0, 2^32)", lambda x: 0 <= x < 2**32)
CROP_AREA: Range = (
    "must be two rising shares of the image, in (0, 1]",
    lambda x: 0 < x[0] <= x[1] <= 1,
)
ASPECT_RATIO: Range = (
    "must be two rising, positive numbers",
    lambda x: 0 < x[0] <= x[1] < math.inf,
)

_YES_NO = {"true": True, "yes": True, "on": True, "1": True}
_YES_NO |= {"false": False, "no": False, "off": False, "0": False}
_MISSING = object()


def at_least(least: int) -> Range:
    """The range of a count."""
    return f"must be at least {least}", lambda x: x >= least


@dataclass(frozen=True)
class Flag:
    """One setting, as its field declares it.

    Attributes:
        default: Value where nobody sets it.
        help: What it is for.
        choices: All values that it can have; empty: any of its type.
        range: What a value, or each of several, must be.
        role: See `Role`.
        dashed: Whether the original writes its name with dashes.
        synonyms: Other words for it, which get "did you mean".
        at_least_one: Whether a flag for several values needs one.
        name: Name of the field.
        kind: Annotation of the field.
    """

    default: Any
    help: str
    choices: tuple[str, ...] = ()
    range: Range | None = None
    role: Role = "method"
    dashed: bool = False
    synonyms: tuple[str, ...] = ()
    at_least_one: bool = True
    name: str = ""
    kind: Any = None

    @property
    def spelling(self) -> str:
        """How messages and `--help` write it."""
        return "--" + (self.name.replace("_", "-") if self.dashed else self.name)

    @property
    def is_switch(self) -> bool:
        """Whether it may be written without a value, and as --no-NAME."""
        return self.kind is bool

    @property
    def most_values(self) -> float:
        """How many values may follow it."""
        origin, args = typing.get_origin(self._several), typing.get_args(self._several)
        if origin is dict or (origin is tuple and args[-1] is ...):
            return math.inf
        return len(args) if origin is tuple else 1

    @property
    def takes_text(self) -> bool:
        """Whether any word may be a value, also one that looks like a configuration's name."""
        if typing.get_origin(self._several) is dict:  # of words with an equals sign
            return False
        element = (typing.get_args(self._several) or (self._several,))[0]
        return element not in (int, float)

    def read(self, words: Sequence[str]) -> Any:
        """The value that words of a command line or of a configuration stand for.

        Raises:
            ValueError: With one line that names the flag, the words, and what is allowed.
        """
        given = " ".join([self.spelling, *words])
        none = self._none()
        if [word.lower() for word in words] == ["none"] and none is not _MISSING:
            return none
        try:
            value = self._value(words)
        except ValueError as error:
            raise ValueError(f"{given}: {error}") from None
        if self.choices and value not in self.choices and not isinstance(value, bool):
            known = [*(["none"] if none is None else []), *self.choices]
            known += ["true", "false"] if self.kind == bool | str else []
            raise ValueError(f"{given} is unknown: choose one of {', '.join(known)}")
        if self.range is not None:
            several = value if self.most_values == math.inf else [value]
            if not all(map(self.range[1], several)):
                raise ValueError(f"{given}: {self.range[0]}")
        return value

    @property
    def _several(self) -> Any:
        """The annotation without `| None`."""
        if not isinstance(self.kind, types.UnionType):
            return self.kind
        kinds = [kind for kind in self.kind.__args__ if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else self.kind

    def _none(self) -> Any:
        """The value that `none` stands for, if it is one."""
        if type(None) in typing.get_args(self.kind):
            return None
        if not self.at_least_one:
            return {} if typing.get_origin(self.kind) is dict else ()
        return "" if self.default == "" else _MISSING

    def _value(self, words: Sequence[str]) -> Any:
        number = self.most_values
        if number == 1:
            if len(words) != 1:
                raise ValueError("needs a value" if not words else "takes one value")
            return _read_one(self._several, words[0])
        if number < math.inf and len(words) != number:
            raise ValueError(f"takes {number} values")
        if not words and self.at_least_one:
            raise ValueError("needs a value")
        if typing.get_origin(self.kind) is dict:
            return dict(map(_key_value, words))
        element = typing.get_args(self._several)[0]
        return tuple(_read_one(element, word) for word in words)


def flag(default: Any, help: str, **kwargs: Any) -> Any:
    """A field of a group of settings; see `Flag` for the arguments."""
    metadata = {"flag": Flag(default, help, **kwargs)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@functools.cache
def flags_of(group: type) -> tuple[Flag, ...]:
    """The flags that the fields of a group declare, in order."""
    kinds = typing.get_type_hints(group)
    return tuple(
        dataclasses.replace(field.metadata["flag"], name=field.name, kind=kinds[field.name])
        for field in dataclasses.fields(group)
    )


def read_yes_no(text: str) -> bool:
    """Reads a yes/no word strictly.

    Raises:
        ValueError: On any other word.
    """
    if text.lower() not in _YES_NO:
        raise ValueError("is not true or false")
    return _YES_NO[text.lower()]


def _read_one(kind: Any, word: str) -> Any:
    """A word as a value of a type: bool, int, float, str, or `bool | str`."""
    if kind == bool | str:
        return _YES_NO.get(word.lower(), word)
    if kind is bool:
        return read_yes_no(word)
    if kind is str:
        return word
    try:
        return kind(word)
    except ValueError:
        raise ValueError(f"{word!r} is not a {'whole ' * (kind is int)}number") from None


def _key_value(word: str) -> tuple[str, Any]:
    """Reads `name=value`; the value is a Python literal, or else a string."""
    name, separator, value = word.partition("=")
    if not separator or not name:
        raise ValueError(f"{word!r} is not of the form name=value")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
