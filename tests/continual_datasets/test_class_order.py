"""In which order the classes appear, and how many a task gets."""

import os
import random

import pytest

from continual_datasets.class_order import read_class_order, task_sizes
from continual_datasets.scenarios import find_scenario
from helpers.command_lines import settings_of

NAMES = ["maple tree", "oak", "zebra", "1st", "12"]


def read(path, content, names=NAMES):
    """The order in a file of this content, or the message with which it is rejected."""
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        return read_class_order(path, names)
    except ValueError as error:
        return str(error).removeprefix(f"--class_order {path}: ")


def test_class_order_is_the_originals():
    expected = list(range(100))
    random.seed(42)
    random.shuffle(expected)
    random.seed(7)
    before = random.getstate()
    assert find_scenario(settings_of("--seed 42")).class_order(range(100)) == expected
    assert random.getstate() == before
    assert find_scenario(settings_of("--no-shuffle")).class_order(NAMES) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("flat.json", "[4, 0, 2, 1, 3]", [4, 0, 2, 1, 3]),
    ("tasks.json", "[[4, 0], [2, 1]]", [4, 0, 2, 1]),
    ("names.json", '["oak", ["maple tree", "12"]]', [1, 0, 4]),
    ("lines.txt", "\ufeffoak\r\nmaple tree\n\n3\n", [1, 0, 3]),
    ("commas.txt", "zebra, maple tree, 1st\n1", [2, 0, 3, 1]),
    ("blanks.txt", "2 1\t0\n3,12", [2, 1, 0, 3, 4]),
    ("json.txt", " [1, 0] ", [1, 0]),
    ("twice.txt", "1 2 1", "class 1 appears twice"),
    ("same.json", '[1, "oak"]', "class oak appears twice"),
    ("range.txt", "0 5", "unknown class '5': give class names or ids from 0 to 4"),
    ("negative.json", "[-1]", "unknown class -1"),
    ("unknown.txt", "oak, pine", "unknown class 'pine'"),
    ("float.json", "[1.0]", "unknown class 1.0"),
    ("bool.json", "[true]", "unknown class True"),
    ("deep.json", "[[[1]]]", "unknown class [1]"),
    ("bad.json", "[1, 2", "not valid JSON"),
    ("word.json", "oak", "not valid JSON"),
    ("object.json", '{"order": [1]}', "expected a list"),
    ("empty.txt", " \n", "no classes"),
    ("empty.json", "[]", "no classes"),
    ("binary.txt", b"\xff\xfe\x00", "not a text file"),
    ("missing.txt", None, "No such file"),
    ("both", "1\n2", "1 is the name of class 0 but could mean the id 1: write JSON, [\"1\"] for "
     "the name or [1] for the id"),
    ("both.json", "[1, 2]", [1, 2]),
    ("both.json", '["1", "30", ["2"]]', [0, 2, 1]),
    ("both.json", '["1", 1]', [0, 1]),
    ("both.json", '["1", 0]', "class 0 appears twice"),
    ("both.json", '["0"]', "unknown class '0'"),
    ("strings.json", '["0", "2"]', [0, 2]),
    ("nested.json", "[" * 10**5, "not valid JSON"),
    ("huge.json", "[1e999]", "unknown class inf"),
    ("digits.json", f"[{'9' * 5000}]", "not valid JSON"),
    ("digits.txt", "9" * 5000, "unknown class '9999"),
    ("letters.txt", "x" * 5000, "unknown class 'xxxx"),
    ("surrogate.json", '["\\ud800"]', "unknown class '\\ud800'"),
])  # fmt: skip
def test_read_class_order_understands_a_file_or_names_its_problem(
    tmp_path, name, content, expected
):
    found = read(tmp_path / name, content, ["1", "2", "30"] if "both" in name else NAMES)
    assert found == expected if isinstance(expected, list) else found.startswith(expected)
    assert len(found) < 200
    assert "\n" not in found


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_read_class_order_rejects_what_is_no_regular_file(tmp_path, make):
    make(tmp_path / "order.txt")
    assert read(tmp_path / "order.txt", None) == "is no regular file"


@pytest.mark.parametrize(("arguments", "expected"), [
    ((100, 10), [10] * 10), ((100, 10, None), [10] * 10), ((100, 7, [14]), [14] * 7),
    ((5, 5), [1] * 5), ((7, 1), [7]), ((100, 3, (50, 30, 10)), [50, 30, 10]),
    ((100, 6, None, 50), [50, *[10] * 5]), ((100, 3, (20,), 50), [50, 20, 20]),
    ((100, 1, (10,), 100), [100]), ((100, 1, None, 50), [50]),
    ((100, 7), "100 classes cannot be split evenly over --num_tasks 7: choose one of "
     "1, 2, 4, 5, 10, 20, 25, 50, 100, or give --classes_per_task 14, or as many sizes as tasks"),
    ((100, 10, None, 50), "50 classes left by --first_task_classes 50 cannot be split evenly over "
     "--num_tasks 10: choose one of 2, 3, 6, 11, 26, 51, or give --classes_per_task 5"),
    ((100, 6, (20,)), "6 tasks with --classes_per_task 20 are 120 classes, more than the 100: give "
     "at most --num_tasks 5 or --classes_per_task 16"),
    ((100, 6, (20,), 50), "5 tasks with --classes_per_task 20 are 100 classes, more than the 50 "
     "left by --first_task_classes 50: give at most --num_tasks 3 or --classes_per_task 10"),
    ((100, 3, (50, 50, 10)), "--classes_per_task 50 50 10 adds up to 110 classes, more than the "
     "100 there are: give fewer"),
    ((100, 6, None, 96), "--num_tasks 6 exceeds the 4 classes left by --first_task_classes 96"),
    ((100, 1, None, 120), "--num_tasks 1 exceeds the 0 classes left by --first_task_classes 120"),
    ((100, None, (10,), 50), [50, *[10] * 5]), ((100, None, (10,), 100), [100]),
    ((100, None, (15,), 50), "4 tasks with --classes_per_task 15 are 60 classes, more than the 50 "
     "left by --first_task_classes 50: give at most --num_tasks 4 or --classes_per_task 12"),
    ((10, 11), "--num_tasks 11 exceeds the 10 classes"),
])  # fmt: skip
def test_task_sizes_are_returned_or_what_would_fit(arguments, expected):
    if isinstance(expected, list):
        assert task_sizes(*arguments) == expected
        return
    with pytest.raises(ValueError) as caught:
        task_sizes(*arguments)
    assert str(caught.value).startswith(expected)
