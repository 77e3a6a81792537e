"""How a setting is declared: default, help, choices and range at the field, once.

A field of a group of settings (`cli/settings.py`) is declared by `flag(...)`. Its name is the name
of the flag and of the key in a configuration, and its annotation says how a value is read. The
parser, `--help`, and the checks of configurations and checkpoints all follow from there.
"""

import ast
import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

T = TypeVar("T")

#: What a setting decides. `method`: what is learned. `place`: which repetition a run is, and where
#: its inputs are; runs of one configuration may differ in it. `compute`: where, how fast and how
#: visibly a run is computed. `command`: what a single command does; never stored.
Role = Literal["method", "place", "compute", "command"]

#: A range: what the message says of it, and the test of a value.
Range = tuple[str, Callable[[Any], bool]]

POSITIVE: Range = ("must be positive and finite", lambda x: 0 < x < math.inf)
LIMIT: Range = ("must be positive and finite (none: no limit)", POSITIVE[1])
NOT_NEGATIVE: Range = ("must be a finite number that is not negative", lambda x: 0 <= x < math.inf)
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

#: Names that the original writes with dashes.
_DASHED = {
    "local_rank", "data_path", "pin_mem", "input_size", "train_interpolation", "color_jitter",
    "model_kwargs", "drop_path", "batch_size", "opt_eps", "opt_betas", "clip_grad", "weight_decay",
    "lr_noise", "lr_noise_pct", "lr_noise_std", "warmup_lr", "min_lr", "decay_epochs",
    "decay_milestones", "warmup_epochs", "cooldown_epochs", "patience_epochs", "decay_rate",
}  # fmt: skip

_YES_NO = {"true": True, "yes": True, "on": True, "1": True}
_YES_NO |= {"false": False, "no": False, "off": False, "0": False}
_MISSING = object()


def at_least(least: int) -> Range:
    """The range of a count."""
    return f"must be at least {least}", lambda x: x >= least


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

        Raises ValueError with one line that names the flag, the words, and what is allowed.
        """
        given = " ".join([self.spelling, *words])
        none = self._none()
        if none is not _MISSING and [word.lower() for word in words] == ["none"]:
            return none
        try:
            value = self._value(words)
        except ValueError as error:
            raise ValueError(f"{given}: {error}") from None
        several = value if self.most_values == math.inf else [value]
        unknown = [v for v in several if v not in self.choices and not isinstance(v, bool)]
        if self.choices and unknown:
            known = [*(["none"] if none is None else []), *self.choices]
            known += ["true", "false"] if self.kind == bool | str else []
            raise ValueError(f"{given} is unknown: choose one of {', '.join(known)}")
        if self.range is not None and not all(map(self.range[1], several)):
            raise ValueError(f"{given}: {self.range[0]}")
        return value

    @property
    def _several(self) -> Any:
        """The annotation without `| None`."""
        match typing.get_args(self.kind):
            case (kind, none) if none is type(None):
                return kind
        return self.kind

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


def read_yes_no(text: str) -> bool:
    """Reads a yes/no word; raises ValueError on any other."""
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
