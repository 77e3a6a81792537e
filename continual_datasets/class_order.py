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


def check_split(num_classes: int, num_tasks: int, classes_per_task: int | None = None) -> int:
    """Classes of each task where all have equally many; None: all classes are used.

    Raises:
        ValueError: If there are not enough classes, or some are left over; saying what would fit.
    """
    if num_tasks > num_classes:
        raise ValueError(
            f"--num_tasks {num_tasks} exceeds the {num_classes} classes: every task needs at least "
            "one"
        )
    per_task = classes_per_task or num_classes // num_tasks
    if classes_per_task is None and num_classes % num_tasks:
        fitting = [str(n) for n in range(1, num_classes + 1) if num_classes % n == 0]
        raise ValueError(
            f"{num_classes} classes cannot be split evenly over --num_tasks {num_tasks}: choose "
            f"one of {', '.join(fitting)}, or give --classes_per_task {per_task}"
        )
    if num_tasks * per_task > num_classes:
        raise ValueError(
            f"--num_tasks {num_tasks} x --classes_per_task {per_task} = {num_tasks * per_task} "
            f"exceeds the {num_classes} classes: lower --num_tasks to "
            f"{max(1, num_classes // per_task)} or --classes_per_task to {num_classes // num_tasks}"
        )
    return per_task
