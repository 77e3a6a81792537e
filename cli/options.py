"""Options of the commands beside main.py, declared as its settings are; see `cli.flags`."""

import argparse
import difflib
import math
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeVar

from cli.flags import Flag, flags_of
from cli.parser import FLAG, shown
from cli.terminal import exit_code

Options = TypeVar("Options")


def take(
    kind: type[Options], argv: Sequence[str], once: Collection[str] = (), **about: Any
) -> tuple[Options, list[str], list[str]]:
    """Takes the options of a command out of its command line.

    Args:
        kind: The options, whose method `problems` names what is wrong with them together.
        argv: The arguments.
        once: Names of flags for several values that take one value each time they are given.
        **about: What `--help` says of the command, see `argparse.ArgumentParser`.

    Returns:
        The options; the other arguments; and all that is wrong with the options.

    Raises:
        SystemExit: After `--help`.
    """
    group: type = kind
    flags = {one.name: one for one in flags_of(group)}
    values: dict[str, Any] = {}
    others: list[str] = []
    problems: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            _print_help(flags.values(), about)
            raise SystemExit(exit_code(0))
        spelling, has_value, value = word.partition("=")
        one = flags.get(spelling[2:].replace("-", "_")) if spelling.startswith("--") else None
        if one is None:
            others.append(word)
            continue
        words = [value] if has_value else ["true"] if one.is_switch else []
        most = 0 if words else 1 if one.name in once else one.most_values
        while len(words) < most and rest and not FLAG.match(rest[0]):
            if words and not one.accepts(rest[0]):
                break
            words.append(rest.pop(0))
        _read(one, words, values, problems)
    options: Any = kind(**values)
    return options, others, [*problems, *options.problems()]


def take_all(
    kind: type[Options], argv: Sequence[str], once: Collection[str] = (), **about: Any
) -> tuple[Options, list[str], list[str]]:
    """As `take`, for a command that has no other flags: these are reported."""
    options, others, problems = take(kind, argv, once, **about)
    group: type = kind
    known = ["--help", *(one.spelling for one in flags_of(group))]
    unknown = [word for word in others if FLAG.match(word)]
    hints = [near(word.partition("=")[0], known) or ": see --help" for word in unknown]
    problems += [f"{word} is no option{hint}" for word, hint in zip(unknown, hints, strict=True)]
    return options, [word for word in others if word not in unknown], problems


def near(name: str, known: Sequence[str], most: int = 0) -> str:
    """A hint for a wrong name: the one that was probably meant, or all if they are few."""
    found = difflib.get_close_matches(name, known, n=1)
    names = f": there are {', '.join(known)}" if len(known) <= most else ""
    return f": did you mean {found[0]}?" if found else names


def _read(one: Flag, words: list[str], values: dict[str, Any], problems: list[str]) -> None:
    """Reads the words behind a flag; of several values, those that are right count."""
    is_list = one.most_values == math.inf
    for part in [[word] for word in words] if is_list and words else [words]:
        try:
            value = one.read(part)
        except ValueError as error:
            hint = f" (other arguments go before {one.spelling})" if is_list and one.choices else ""
            problems.append(f"{error}{hint}")
        else:
            values[one.name] = (*values.get(one.name, ()), *(value or ())) if is_list else value


def _print_help(flags: Iterable[Flag], about: dict[str, Any]) -> None:
    parser = argparse.ArgumentParser(**about)
    for one in flags:
        text = f"{one.help} (default: {shown(one.default)})" if one.default else one.help
        metavar = "" if one.is_switch else one.name.upper() + " ..." * (one.most_values > 1)
        parser.add_argument(one.spelling, metavar=metavar, help=text.replace("%", "%%"))
    sys.stdout.write(parser.format_help())
