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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from cli.paths import PathStr, expanded

T = TypeVar("T")

#: What a setting decides. `method`: what is learned. `place`: which repetition a run is, and where
#: its inputs are; runs of one configuration may differ in it. `compute`: where, how fast and how
#: visibly a run is computed. `command`: what a single command does; never stored.
Role = Literal["method", "place", "compute", "command"]

#: A range: what the message says of it, and the test of a value.
Range = tuple[str, Callable[[Any], Any]]

#: Names that the original writes with dashes.
_DASHED = {
    "local_rank", "data_path", "pin_mem", "input_size", "train_interpolation", "color_jitter",
    "model_kwargs", "drop_path", "batch_size", "opt_eps", "opt_betas", "clip_grad", "weight_decay",
    "lr_noise", "lr_noise_pct", "lr_noise_std", "warmup_lr", "min_lr", "decay_epochs",
    "decay_milestones", "warmup_epochs", "cooldown_epochs", "patience_epochs", "decay_rate",
}  # fmt: skip

_YES_NO = {"true": True, "yes": True, "on": True, "1": True}
_YES_NO |= {"false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True)
class Flag:
    """One setting, as its field declares it."""

    default: Any
    help: str
    choices: tuple[str, ...] = ()  # all values that it can have; empty: any of its type
    range: Range | None = None  # what a value, or each of several, must be
    role: Role = "method"
    at_least_one: bool = True  # whether a flag for several values needs one
    name: str = ""  # of the field
    kind: Any = None  # annotation of the field

    @property
    def spelling(self) -> str:
        """How messages and `--help` write it."""
        return "--" + (self.name.replace("_", "-") if self.name in _DASHED else self.name)

    @property
    def is_switch(self) -> bool:
        """Whether it may be written without a value, and as --no-NAME."""
        return self.kind is bool

    @property
    def most_values(self) -> float:
        """How many values may follow it."""
        return self._shape[1]

    def accepts(self, word: str) -> bool:
        """Whether a word may be meant as its value, or as one of several."""
        kind = self._shape[0]
        try:
            value = _read_one(kind, word)
        except ValueError:
            return False
        return kind is not str or self.range is None or bool(self.range[1](value))

    def read(self, words: Sequence[str]) -> Any:
        """The value that words of a command line or of a configuration stand for.

        Raises ValueError with one line that names the flag, the words, and what is allowed.
        """
        given = " ".join([self.spelling, *words])
        can_be_none = types.NoneType in typing.get_args(self.kind)
        if [word.lower() for word in words] == ["none"]:
            if can_be_none:
                return None
            if not self.at_least_one or self.default == "" or self.kind is PathStr:
                return type(self.default)()
        try:
            value = self._value(words)
        except ValueError as error:
            raise ValueError(f"{given}: {error}") from None
        several = value if self.most_values == math.inf else [value]
        unknown = [v for v in several if v not in self.choices and not isinstance(v, bool)]
        if self.choices and unknown:
            known = ["none"] * can_be_none + [*self.choices]
            known += ["true", "false"] * (self.kind == bool | str)
            raise ValueError(f"{given} is unknown: choose one of {', '.join(known)}")
        if self.range is not None and not all(map(self.range[1], several)):
            none = ", or none" * (can_be_none and self._shape[0] is not str)
            raise ValueError(f"{given}: {self.range[0]}{none}")
        return value

    @property
    def _shape(self) -> tuple[Any, float]:
        """The type of one value, dict for `name=value`, and how many values there may be."""
        kinds = typing.get_args(self.kind)
        kind = kinds[0] if types.NoneType in kinds else self.kind
        origin, elements = typing.get_origin(kind), typing.get_args(kind)
        if origin is tuple:
            return elements[0], math.inf if ... in elements else len(elements)
        return (dict, math.inf) if origin is dict else (kind, 1)

    def _value(self, words: Sequence[str]) -> Any:
        kind, number = self._shape
        if 1 < number < math.inf and len(words) != number:
            raise ValueError(f"takes {number} values")
        if not words and (self.at_least_one or number == 1):
            raise ValueError("needs a value")
        if len(words) > number:
            raise ValueError("takes one value")
        values = [_read_one(kind, word) for word in words]
        if number == 1:
            return values[0]
        return dict(values) if kind is dict else tuple(values)


def between(least: float, most: float, *, above: bool = False) -> Range:
    """The range of a number between two bounds; `above`: the lower one is excluded."""
    text = f"must be {'above' if above else 'at least'} {least:.12g} and at most {most:.12g}"
    return text, lambda x: (least < x if above else least <= x) and x <= most


def flag(default: Any, help: str, **kwargs: Any) -> Any:
    """A field of a group of settings; see `Flag` for the arguments."""
    metadata = {"flag": Flag(default, help, **kwargs)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


#: Fields of the other roles, see `Role`.
command = functools.partial(flag, role="command")
compute = functools.partial(flag, role="compute")
place = functools.partial(flag, role="place")


@functools.cache
def flags_of(group: type) -> tuple[Flag, ...]:
    """The flags that the fields of a group declare, in order."""
    kinds = typing.get_type_hints(group)
    return tuple(
        dataclasses.replace(field.metadata["flag"], name=field.name, kind=kinds[field.name])
        for field in dataclasses.fields(group)
    )


def choose(table: Mapping[str, T], flag: str, name: str) -> T:
    """The entry of a table that a flag names; raises ValueError if there is none."""
    if name not in table:
        raise ValueError(f"{flag} {name} is unknown: choose one of {', '.join(table)}")
    return table[name]


def _read_one(kind: Any, word: str) -> Any:
    """Converts a word to a type: bool, int, float, text, `bool | str`, or a pair for a dict."""
    if kind is dict:
        return _key_value(word)
    *others, kind = typing.get_args(kind) or (kind,)
    if bool in (kind, *others) and word.lower() in _YES_NO:
        return _YES_NO[word.lower()]
    if kind is bool:
        raise ValueError("is not true or false")
    if kind is PathStr:
        return expanded(word)
    try:
        return kind(word)
    except ValueError:
        raise ValueError(f"{word!r} is not a {'whole ' * (kind is int)}number") from None


def _key_value(word: str) -> tuple[str, Any]:
    """Reads `name=value`; the value is a Python literal, or one of YAML, or else a string."""
    name, separator, value = word.partition("=")
    if not separator or not name:
        raise ValueError(f"{word!r} is not of the form name=value")
    try:
        is_constant = value in ("true", "false", "none")
        return name, ast.literal_eval(value.capitalize() if is_constant else value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return name, value
