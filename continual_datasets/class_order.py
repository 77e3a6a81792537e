"""In which order the classes appear, and how many a task gets."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def class_order(num_classes: int, seed: int, shuffle: bool) -> list[int]:
    """Draw the order in which classes appear: natural, or shuffled exactly as the original does.

    Source: l2p-pytorch, which seeds Python's generator and shuffles the list of class ids.
    """
    order = list(range(num_classes))
    if shuffle:
        random.Random(seed).shuffle(order)
    return order


def read_class_order(path: Path, classes: Sequence[str]) -> list[int]:
    """Read the class order from a file.

    Args:
        path: JSON (a list, or one list per task as `class_order` of results.json) or plain text
            (one per line, or separated by blanks or commas) of class ids or class names. It may
            name fewer classes than there are: the others are left out. Lists of tasks are joined;
            `--num_tasks` and `--classes_per_task` alone decide where a task ends.
        classes: Class names, indexed by class id.

    Returns:
        Class ids.

    Raises:
        ValueError: On whatever is wrong with the file; the message names it.
    """
    ids_by_name = {name: class_id for class_id, name in enumerate(classes)}
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
        is_json = path.suffix == ".json" or text[:1] in ("[", "{")
        entries = _json_entries(text) if is_json else _text_entries(text, classes)
        order = [_class_id(entry, ids_by_name) for entry in entries]
        if not order:
            raise ValueError("no classes in the file")
        if twice := [entry for i, entry in enumerate(entries) if order[i] in order[:i]]:
            raise ValueError(f"class {twice[0]} appears twice")
    except OSError as error:
        raise ValueError(f"--class_order {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--class_order {path}: not a text file ({error.reason})") from error
    except ValueError as error:
        raise ValueError(f"--class_order {path}: {error}") from error
    return order


def _json_entries(text: str) -> list[Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(content, list):
        raise ValueError("expected a list of classes, or a list of such lists")
    return [item for entry in content for item in (entry if isinstance(entry, list) else [entry])]


def _text_entries(text: str, classes: Sequence[str]) -> list[str]:
    """Split at commas and blanks, unless a whole line or what stands between commas is a name."""
    entries: list[str] = []
    for line in map(str.strip, text.splitlines()):
        for part in [line] if line in classes else map(str.strip, line.split(",")):
            entries.extend([part] if part in classes else part.split())
    return entries


def _class_id(entry: Any, ids_by_name: dict[str, int]) -> int:
    by_name = ids_by_name.get(entry) if isinstance(entry, str) else None
    is_number = type(entry) is int or (
        isinstance(entry, str) and entry.isascii() and entry.isdigit()
    )
    by_number = int(entry) if is_number and int(entry) in range(len(ids_by_name)) else None
    if by_name is None and by_number is None:
        raise ValueError(
            f"unknown class {entry!r}: give class names or ids from 0 to {len(ids_by_name) - 1}"
        )
    if by_name is not None and by_number not in (None, by_name):
        raise ValueError(
            f"{entry} is the name of class {by_name} but could mean the id {by_number}: write JSON "
            "with plain numbers for ids, or rename the classes"
        )
    return by_name if by_number is None else by_number  # type: ignore[return-value]


def check_split(num_classes: int, num_tasks: int, classes_per_task: int | None = None) -> int:
    """Check that the classes can be split into the tasks asked for.

    Args:
        num_classes: Classes there are.
        num_tasks: T.
        classes_per_task: Classes of every task; None to use all classes.

    Returns:
        Classes per task.

    Raises:
        ValueError: If they cannot; the message says what would fit.
    """
    if num_tasks < 1:
        raise ValueError(f"--num_tasks {num_tasks}: must be at least 1")
    if num_tasks > num_classes:
        raise ValueError(
            f"--num_tasks {num_tasks} exceeds the {num_classes} classes: every task needs at least "
            "one"
        )
    if classes_per_task is None and num_classes % num_tasks:
        fitting = [str(n) for n in range(1, num_classes + 1) if num_classes % n == 0]
        raise ValueError(
            f"{num_classes} classes cannot be split evenly over --num_tasks {num_tasks}: choose "
            f"one of {', '.join(fitting)}, or give --classes_per_task {num_classes // num_tasks}"
        )
    if classes_per_task is None:
        return num_classes // num_tasks
    if classes_per_task < 1:
        raise ValueError(f"--classes_per_task {classes_per_task}: must be at least 1")
    if num_tasks * classes_per_task > num_classes:
        raise ValueError(
            f"--num_tasks {num_tasks} x --classes_per_task {classes_per_task} = "
            f"{num_tasks * classes_per_task} exceeds the {num_classes} classes: lower --num_tasks "
            f"to {max(1, num_classes // classes_per_task)} or --classes_per_task to "
            f"{num_classes // num_tasks}"
        )
    return classes_per_task
