"""In which order the classes appear, and how many a task gets."""

import json
import math
import re
import reprlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from cli.paths import open_regular


def read_class_order(path: Path, classes: Sequence[str]) -> list[int]:
    """Read the class order, class ids, from a file.

    Args:
        path: JSON (a list, or one list per task as `class_order` of results.json), where strings
            are names and numbers are ids; or plain text (one per line, or separated by blanks or
            commas) of class ids or class names. It may name fewer classes than there are: the
            others are left out. Lists of tasks are joined; `--num_tasks` and `--classes_per_task`
            alone decide where a task ends.
        classes: Class names, indexed by class id.

    Raises:
        ValueError: On whatever is wrong with the file; the message names it.
    """
    ids_by_name = {name: class_id for class_id, name in enumerate(classes)}
    try:
        with open_regular(path) as file:
            text = file.read().decode("utf-8-sig").strip()
        is_json = path.suffix == ".json" or text[:1] in ("[", "{")
        entries = _json_entries(text) if is_json else _text_entries(text, ids_by_name)
        only_names = is_json and any(_number(name) < len(classes) for name in classes)
        order: dict[int, None] = {}
        for entry in entries:
            class_id = _class_id(entry, ids_by_name, only_names)
            if class_id in order:
                raise ValueError(f"class {entry} appears twice")
            order[class_id] = None
        if not order:
            raise ValueError("no classes in the file")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        if isinstance(error, UnicodeDecodeError):
            reason = f"not a text file ({error.reason})"
        raise ValueError(f"--class_order {path}: {reason}") from error
    return list(order)


def _json_entries(text: str) -> list[Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(content, list):
        raise ValueError("expected a list of classes, or a list of such lists")
    return [item for entry in content for item in (entry if isinstance(entry, list) else [entry])]


def _text_entries(text: str, classes: Collection[str]) -> list[str]:
    """Split at commas and blanks, unless a whole line or what stands between commas is a name."""
    entries: list[str] = []
    for line in map(str.strip, text.splitlines()):
        for part in [line] if line in classes else map(str.strip, line.split(",")):
            entries.extend([part] if part in classes else part.split())
    return entries


def _number(text: str) -> float:
    """The id that a text could be; infinite if none."""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else math.inf


def _class_id(entry: Any, ids_by_name: Mapping[str, int], only_names: bool) -> int:
    """The class that an entry names; a string may be an id unless it could be a name, too."""
    by_name, number = None, entry if type(entry) is int else math.inf
    if isinstance(entry, str):
        by_name = ids_by_name.get(entry)
        number = math.inf if only_names else _number(entry)
    is_id = 0 <= number < len(ids_by_name)
    if by_name is None:
        if is_id:
            return int(number)
        given, last = reprlib.repr(entry), len(ids_by_name) - 1
        raise ValueError(f"unknown class {given}: give class names or ids from 0 to {last}")
    if is_id and number != by_name:
        raise ValueError(
            f"{entry} is the name of class {by_name} but could mean the id {entry}: write JSON, "
            f'["{entry}"] for the name or [{entry}] for the id'
        )
    return by_name


def task_sizes(
    num_classes: int,
    num_tasks: int | None,
    classes_per_task: Sequence[int] | None = None,
    first: int | None = None,
) -> list[int]:
    """Classes of each task, from the settings of these names.

    `classes_per_task` has the sizes of all tasks, or one size of each but the `first`; without it,
    all classes are used. With both, the number of tasks may be None; else None is 10.

    Raises:
        ValueError: If there are not enough classes, or some are left over; saying what would fit.
    """
    sizes, rest = list(classes_per_task or ()), num_classes - (first or 0)
    left = "" if first is None else f" left by --first_task_classes {first}"
    if len(sizes) > 1:
        if (wanted := sum(sizes)) > num_classes:
            raise ValueError(
                f"--classes_per_task {' '.join(map(str, sizes))} adds up to {wanted} classes, more "
                f"than the {num_classes} there are: give fewer"
            )
        return sizes
    if num_tasks is None and sizes and first is not None:
        num_tasks = 1 + math.ceil(rest / sizes[0])
    num_tasks = num_tasks or 10
    others = num_tasks - (first is not None)
    if others > rest:
        raise ValueError(
            f"--num_tasks {num_tasks} exceeds the {max(rest, 0)} classes{left}: every task needs "
            "at least one"
        )
    if others == 0:
        return [num_classes - rest]
    per_task = sizes[0] if sizes else rest // others
    if not sizes and rest % others:
        fitting = [str(n + num_tasks - others) for n in range(1, rest + 1) if rest % n == 0]
        each = ", or as many sizes as tasks" * (first is None)
        raise ValueError(
            f"{rest} classes{left} cannot be split evenly over --num_tasks {num_tasks}: choose "
            f"one of {', '.join(fitting)}, or give --classes_per_task {per_task}{each}"
        )
    if (wanted := others * per_task) > rest:
        fewer = max(1, rest // per_task + num_tasks - others)
        raise ValueError(
            f"{others} tasks with --classes_per_task {per_task} are {wanted} classes, more than "
            f"the {rest}{left}: give at most --num_tasks {fewer} or --classes_per_task "
            f"{rest // others}"
        )
    return [num_classes - rest] * (first is not None) + [per_task] * others
