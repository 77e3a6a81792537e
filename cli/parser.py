"""The command line: flags and configurations, and one message for everything that is wrong.

    main.py [CONFIG ...] [--flags]

A CONFIG is a file of configs/ (named without its ending) or a path to a .yaml file. They are merged
from left to right; flags win over them; what nobody sets keeps the default of l2p-pytorch.

Every flag may be written with dashes or underscores. A yes/no flag may be written `--flag`,
`--flag true`, `--flag=false` or `--no-flag`.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cli import configurations
from cli.flags import Flag, flags_of, read_yes_no
from cli.settings import (
    GROUPS,
    LEGACY_FLAGS,
    REMOVED_FLAGS,
    Given,
    Settings,
    all_flags,
    find_flag,
    is_setting,
    names_of,
)

#: What the first characters of a flag look like; a negative number is a value.
FLAG = re.compile(r"--?[A-Za-z]")

#: Other words for settings, for "did you mean".
SYNONYMS = Path(__file__).with_name("synonyms.yaml")


class UsageError(ValueError):
    """Everything that is wrong with a command line, one problem a line."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))

    def message(self, program: str) -> str:
        """What a program prints when it rejects its command line, several lines."""
        lines = "".join(f"  - {problem}\n" for problem in self.problems)
        return f"{program}: this command line cannot run:\n{lines}"


def parse(argv: Sequence[str]) -> tuple[Settings, list[str]]:
    """Reads a command line, without the program's name; raises SystemExit after `--help`.

    Returns:
        The settings, with defaults in the place of what could not be read; and all that is wrong.
    """
    problems: list[str] = []
    names, occurrences = _split(argv, problems)
    flags = _read(occurrences, problems)
    configured: dict[str, Any] = {}
    problems.extend(configurations.problems_of_order(names))
    for name in names:
        configured |= _read_configuration(name, problems)
    given = Given(tuple(names), flags, frozenset({*configured, *flags}))
    return Settings().replace(given, **(configured | flags)), problems


def read_mapping(content: Mapping[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings by name, from a configuration or a checkpoint; and all that is wrong with it."""
    problems: list[str] = []
    occurrences = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if is_setting(name) or name in LEGACY_FLAGS:
            occurrences.append(_Occurrence(name, f"--{key}", _words(value)))
        elif name not in REMOVED_FLAGS or value:  # older configurations have them, without effect
            problems.append(_unknown(f"--{key}"))
    return _read(occurrences, problems), problems


def shown(value: Any) -> str:
    """A value as people write it on the command line."""
    return " ".join(_words(value)) or "none"


def command_words(command: Mapping[str, Any]) -> str:
    """The configurations and flags of `Settings.command` that identify a configuration."""
    names = ["/".join(Path(name).parts[-2:]) for name in command["configurations"]]
    not_configuration = set(names_of("command", "compute", "place"))
    flags = {n: v for n, v in command["flags"].items() if n not in not_configuration}
    return " ".join([*names, *(f"--{name} {shown(value)}" for name, value in flags.items())])


class _Occurrence(NamedTuple):
    """A setting or a legacy name, as it was written, with the words behind it."""

    name: str
    spelling: str
    words: list[str]

    def __str__(self) -> str:
        return " ".join([self.spelling, *self.words])

    def read(self) -> tuple[str, Any]:
        """Name of the setting and its value; raises ValueError with one line for people."""
        name, values = LEGACY_FLAGS.get(self.name, (self.name, None))
        if values is None:
            return name, find_flag(name).read(self.words)
        try:
            return name, values[read_yes_no(" ".join(self.words))]
        except ValueError as error:
            raise ValueError(f"{self}: {error}") from None


def _split(argv: Sequence[str], problems: list[str]) -> tuple[list[str], list[_Occurrence]]:
    """Configurations, and flags with their words."""
    names: list[str] = []
    occurrences: list[_Occurrence] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if not FLAG.match(token):
            names.append(token)
            continue
        spelling, has_value, value = token.partition("=")
        if spelling in ("-h", "--help"):
            if not has_value:
                _print_help()
                raise SystemExit(0)
            problems.append(f"{token}: takes no value")
            continue
        name = spelling[2:].replace("-", "_") if spelling.startswith("--") else ""
        if is_setting(name) or name in LEGACY_FLAGS:
            words = [value] if has_value else _take_words(name, rest)
            occurrences.append(_Occurrence(name, spelling, words))
        elif name.startswith("no_") and _is_switch(name[3:]) and not has_value:
            occurrences.append(_Occurrence(name[3:], f"--{spelling[5:]}", ["false"]))
        else:
            problems.append(_unknown(spelling))
            while rest and not FLAG.match(rest[0]) and not _is_configuration(rest[0]):
                rest.pop(0)
    return names, occurrences


def _take_words(name: str, rest: list[str]) -> list[str]:
    """Takes the values of a flag from the rest of a command line.

    Any surplus word but a configuration is taken too, so that a message can name the flag.
    """
    one = find_flag(LEGACY_FLAGS.get(name, (name,))[0])
    most = 0 if _is_switch(name) else one.most_values
    words: list[str] = []
    while rest and not FLAG.match(rest[0]):
        complete = len(words) >= most or words == ["none"]
        if _is_configuration(rest[0]) and (complete or not one.takes_text):
            break
        words.append(rest.pop(0))
    return words or (["true"] if most == 0 else [])


def _is_switch(name: str) -> bool:
    name, values = LEGACY_FLAGS.get(name, (name, None))
    return values is not None or (is_setting(name) and find_flag(name).is_switch)


def _is_configuration(word: str) -> bool:
    """Whether a word is meant as a configuration."""
    near = difflib.get_close_matches(word.lower(), configurations.names(), n=1, cutoff=0.85)
    return configurations.is_file_name(word) or ("=" not in word and bool(near))


def _read(occurrences: Iterable[_Occurrence], problems: list[str]) -> dict[str, Any]:
    """Values by name; the last occurrence counts."""
    values: dict[str, Any] = {}
    written: dict[str, _Occurrence] = {}
    for one in occurrences:
        try:
            name, value = one.read()
        except ValueError as error:
            problems.append(str(error))
            with suppress(ValueError):  # a word too many must not hide what the first one says
                name, value = one._replace(words=one.words[:1]).read()
                values[name] = value
            continue
        before = written.setdefault(name, one)
        if before.name != one.name and values[name] != value:
            problems.append(f"{before} and {one} are two names of one setting: give one")
        values[name] = value
    return values


def _unknown(spelling: str) -> str:
    """What to say of a flag that there is not, with the nearest one by meaning or by letters."""
    bare = spelling.lstrip("-").replace("-", "_").lower()
    if bare in REMOVED_FLAGS:
        return f"{spelling} is no option: {REMOVED_FLAGS[bare]}"
    names = {one.name: one.spelling for one in all_flags() if one.help}
    names |= {old: f"--{old}" for old in LEGACY_FLAGS}
    synonyms = yaml.safe_load(SYNONYMS.read_text(encoding="utf-8"))
    words = names | {w: names[name] for name, line in synonyms.items() for w in line.split()}
    near = difflib.get_close_matches(bare, words, n=1, cutoff=0.8)
    near = near or difflib.get_close_matches(bare, names, n=1)
    hint = f"did you mean {words[near[0]]}?" if near else "see main.py --help"
    return f"{spelling} is no option: {hint}"


def _read_configuration(name: str, problems: list[str]) -> dict[str, Any]:
    """Settings of a configuration; what is wrong with it goes to `problems`, under its name."""
    try:
        content = configurations.load(name)
    except ValueError as error:
        problems.append(str(error))
        return {}
    values, found = read_mapping(content)
    problems.extend(f"{name}: {problem}" for problem in found)
    return values


def _words(value: Any) -> list[str]:
    """A value of a configuration as the words that say the same on the command line."""
    if isinstance(value, dict):
        return [f"{key}={one}" for key, one in value.items()]
    if isinstance(value, list | tuple):
        return [str(one) for one in value]
    if value is None or isinstance(value, bool):
        return [str(value).lower()]
    return [str(value)]


def _print_help() -> None:
    """Prints what `--help` shows, from the declarations of the settings."""
    parser = argparse.ArgumentParser(
        prog="main.py",
        usage="main.py [CONFIG ...] [--flags]",
        description="Learning to Prompt (L2P): training and evaluation.",
        epilog="Yes/no flags: --flag, --flag true, --flag false, --no-flag. Dashes and "
        "underscores are the same. "
        "Example: main.py digits_l2p linear_probe --seeds 42 43 --output_dir output",
    )
    names = ", ".join(configurations.names())
    parser.add_argument(
        "config", nargs="*", metavar="CONFIG", help=f"configurations, merged left to right: {names}"
    )
    for group in GROUPS.values():
        add = parser.add_argument_group((group.__doc__ or "").rstrip(".")).add_argument
        for one in flags_of(group):
            if one.help:
                add(one.spelling, metavar=_metavar(one), help=_help(one))
            for old, (new, values) in LEGACY_FLAGS.items():
                if new == one.name:
                    means = [f"; {shown(key)}: {value}" for key, value in (values or {}).items()]
                    text = f"{one.spelling} of the original{''.join(means)}"
                    add(f"--{old}", metavar="BOOL" if values else _metavar(one), help=text)
    sys.stdout.write(parser.format_help())


def _metavar(one: Flag) -> str:
    if one.is_switch:
        return "BOOL"
    return one.name.upper() + (" ..." if one.most_values > 1 else "")


def _help(one: Flag) -> str:
    unnamed = [c for c in one.choices if not re.search(rf"(?<!\w){re.escape(c)}(?!\w)", one.help)]
    choices = f"; one of {', '.join(one.choices)}" if unnamed else ""
    return f"{one.help}{choices} (default: {shown(one.default)})".replace("%", "%%")
