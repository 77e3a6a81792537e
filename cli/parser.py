"""The command line: flags and configurations, and one message for everything that is wrong.

    main.py [CONFIG ...] [--flags]

A CONFIG is a file of configs/ (named without its ending) or a path to a .yaml file. They are merged
from left to right; flags win over them; what nobody sets keeps the default of l2p-pytorch. To an
`output_dir` of a configuration the names of those behind it are added: `digits_l2p linear_probe`
writes to `output/digits_l2p_linear_probe`.

Every flag may be written with dashes or underscores. A yes/no flag may be written `--flag`,
`--flag true`, `--flag=false` or `--no-flag`.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cli import configurations
from cli.flags import Flag, flags_of
from cli.settings import FLAGS, GROUPS, LEGACY_FLAGS, REMOVED_FLAGS, Given, Settings, names_of
from cli.terminal import exit_code, one_line

#: What the first characters of a flag look like; a negative number is a value.
FLAG = re.compile(r"--?[A-Za-z]")

#: What can be written: settings, and the original's other names, some of which are yes/no flags.
_SWITCH: dict[str, Any] = {"kind": bool, "choices": ()}
_WRITTEN = FLAGS | {
    old: replace(FLAGS[new], name=old, **(_SWITCH if values else {}))
    for old, (new, values) in LEGACY_FLAGS.items()
}

#: Other words for settings, for "did you mean".
SYNONYMS = Path(__file__).with_name("synonyms.yaml")


class UsageError(ValueError):
    """Everything that is wrong with a command line, one problem a line."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))

    def report(self, program: str) -> int:
        """Prints, a line each, why a program rejects its command line; returns its exit code."""
        lines = ["  - " + one_line(one[:2000]) for one in self.problems]
        print(f"{program}: this command line cannot run:", *lines, sep="\n", file=sys.stderr)
        return 2


def parse(argv: Sequence[str]) -> tuple[Settings, list[str]]:
    """Reads a command line, without the program's name; raises SystemExit after `--help`.

    Returns:
        The settings, with defaults in the place of what could not be read; and all that is wrong.
    """
    if {"-h", "--help"} & {*argv}:
        sys.stdout.write(_help())
        raise SystemExit(exit_code(0))
    problems: list[str] = []
    names, occurrences = _split(argv, problems)
    flags = _read(occurrences, problems)
    configured: dict[str, Any] = {}
    own = {*flags}
    problems.extend(configurations.problems_of_order(names))
    for name in names:
        try:
            values, found = read_mapping(configurations.load(name))
        except ValueError as error:
            problems.append(str(error))
        else:
            if configured.get("output_dir") and "output_dir" not in values:  # a folder of its own
                values["output_dir"] = f"{configured['output_dir']}_{Path(name).stem}"
            configured |= values
            if configurations.is_file_name(name):
                own |= {n for n, value in values.items() if value != FLAGS[n].default}
            problems += [f"{name}: {problem}" for problem in found]
    given = Given(tuple(names), flags, frozenset({*configured, *flags}), frozenset(own))
    return Settings().replace(given, **(configured | flags)), problems


def read_mapping(content: Mapping[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings by name, from a configuration or a checkpoint; and all that is wrong with it."""
    problems: list[str] = []
    occurrences = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in _WRITTEN and _fits(_WRITTEN[name], value):
            occurrences.append(_Occurrence(name, f"--{key}", words_of(value)))
        elif name in _WRITTEN:
            problems.append(f"--{key}: needs a value or a list of values")
        elif name not in REMOVED_FLAGS or value:  # older configurations have them, without effect
            problems.append(_unknown(f"--{key}"))
    return _read(occurrences, problems), problems


def _fits(one: Flag, value: Any) -> bool:
    """Whether a value of a file has the form that a flag takes."""
    parts = value if isinstance(value, list | tuple) else [value]
    has_parts = any(isinstance(part, dict | list | tuple | set | bytes) for part in parts)
    return not has_parts or isinstance(one.default, dict)


def shown(value: Any) -> str:
    """A value as people write it on the command line, in one line."""
    return one_line(" ".join(words_of(value))) or "none"


def command_words(command: Mapping[str, Any]) -> str:
    """The configurations and flags of `Settings.command` that identify a configuration."""
    names = ["/".join(Path(name).parts[-2:]) for name in command["configurations"]]
    not_configuration = set(names_of("command", "compute", "place"))
    flags = {n: v for n, v in command["flags"].items() if n not in not_configuration}
    words = [*names, *(f"--{name} {shown(value)}" for name, value in flags.items())]
    return one_line(" ".join(words))


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
        value = _WRITTEN[self.name].read(self.words)
        return name, values[value] if values else value


def _split(argv: Sequence[str], problems: list[str]) -> tuple[list[str], list[_Occurrence]]:
    """Configurations, and flags with their words."""
    names: list[str] = []
    occurrences: list[_Occurrence] = []
    switches = {name for name, one in _WRITTEN.items() if one.is_switch}
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        spelling, has_value, value = token.partition("=")
        name = spelling[2:].replace("-", "_") if spelling.startswith("--") else ""
        if not FLAG.match(token):
            names.append(token)
        elif name in _WRITTEN:
            words = [value] if has_value else _take_words(_WRITTEN[name], rest)
            occurrences.append(_Occurrence(name, spelling, words))
        elif name.startswith("no_") and name[3:] in switches and not has_value:
            occurrences.append(_Occurrence(name[3:], f"--{spelling[5:]}", ["false"]))
        elif spelling in ("-h", "--help"):
            problems.append(f"{token}: takes no value")
        else:
            problems.append(_unknown(spelling))
            while rest and not FLAG.match(rest[0]) and not _is_configuration(rest[0]):
                rest.pop(0)
    return names, occurrences


def _take_words(one: Flag, rest: list[str]) -> list[str]:
    """Takes the values of a flag from the rest of a command line.

    Any surplus word but a configuration is taken too, so that a message can name the flag.
    """
    most = 0 if one.is_switch else one.most_values
    words: list[str] = []
    while rest and not FLAG.match(rest[0]):
        is_complete = len(words) >= most or words == ["none"]
        if _is_configuration(rest[0]) and (is_complete or not one.accepts(rest[0])):
            break
        words.append(rest.pop(0))
    return words or ["true"] * (most == 0)


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
    names = {name: one.spelling for name, one in _WRITTEN.items() if one.help}
    synonyms = yaml.safe_load(SYNONYMS.read_text(encoding="utf-8"))
    words = names | {w: names[name] for name, line in synonyms.items() for w in line.split()}
    near = difflib.get_close_matches(bare, words, n=1, cutoff=0.8)
    near = near or difflib.get_close_matches(bare, names, n=1)
    hint = f"did you mean {words[near[0]]}?" if near else "see main.py --help"
    return f"{spelling} is no option: {hint}"


def words_of(value: Any) -> list[str]:
    """A value of a configuration as the words that say the same on the command line."""
    if isinstance(value, dict):
        return [f"{key}={one}" for key, one in value.items()]
    if isinstance(value, list | tuple):
        return [str(one) for one in value]
    if value is None or isinstance(value, bool):
        return [str(value).lower()]
    return [str(value)]


def _help() -> str:
    """What `--help` shows, from the declarations of the settings."""
    parser = argparse.ArgumentParser(
        prog="main.py",
        usage="main.py [CONFIG ...] [--flags]",
        description="Learning to Prompt (L2P): training and evaluation.",
        epilog="Yes/no flags: --flag, --flag true, --flag false, --no-flag. Dashes and "
        "underscores are the same. "
        "Example: main.py digits_l2p linear_probe --seeds 42 43 --output_dir output",
    )
    names = f"configurations, merged left to right: {', '.join(configurations.names())}"
    parser.add_argument("config", nargs="*", metavar="CONFIG", help=names)
    for group in GROUPS.values():
        add = parser.add_argument_group((group.__doc__ or "").rstrip(".")).add_argument
        for one in flags_of(group):
            metavar = "BOOL" if one.is_switch else one.name.upper() + " ..." * (one.most_values > 1)
            is_named = (re.search(rf"(?<!\w){re.escape(c)}(?!\w)", one.help) for c in one.choices)
            choices = "" if all(is_named) else f"; one of {', '.join(one.choices)}"
            text = f"{one.help}{choices} (default: {shown(one.default)})".replace("%", "%%")
            if one.help:
                add(one.spelling, metavar=metavar, help=text)
            for old, (new, values) in LEGACY_FLAGS.items():
                if new == one.name:
                    means = [f"; {shown(key)}: {value}" for key, value in (values or {}).items()]
                    text = f"{one.spelling} of the original{''.join(means)}"
                    add(f"--{old}", metavar="BOOL" if values else metavar, help=text)
    return parser.format_help()
