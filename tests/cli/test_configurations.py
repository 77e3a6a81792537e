"""Files of settings: how they are found, read, ordered and written."""

import os
from pathlib import Path

import pytest

from cli import configurations
from helpers.command_lines import problems_of, rejections, settings_of
from helpers.tables import assert_says, cases


def test_names_are_those_of_the_files():
    files = sorted(p.name for p in configurations.CONFIG_DIR.glob("*") if p.is_file())
    assert files == [f"{name}.yaml" for name in configurations.names()]
    for word, is_file in {"own.yaml": 1, "a/own.yml": 1, "own": 0, "own.yaml.bak": 0}.items():
        assert configurations.is_file_name(word) is bool(is_file)


def test_missing_configuration_is_named_and_guessed(tmp_path):
    """Whose data are not checked."""
    for name in ("digit_l2p", "Digits_L2P", "digits-l2p"):
        wanted = [
            f"{name!r} is neither a configuration nor the value of a flag: did you mean digits_l2p?"
            " --list shows the configurations; a file of your own must end in .yaml"
        ]
        assert problems_of(name) == rejections(name) == wanted
    (problem,) = rejections(tmp_path / "own.yaml")
    assert problem.startswith(f"there is no file {tmp_path / 'own.yaml'}: ")


def test_file_may_be_in_the_home_directory_and_empty(tmp_path, monkeypatch, yaml_file):
    monkeypatch.setenv("HOME", str(tmp_path))
    some = {"size: 3": {"size": 3}, "{size: &s 3, length: *s}": {"size": 3, "length": 3}}
    for text, content in [*some.items(), ("", {}), ("# no\n", {}), ("null", {})]:
        yaml_file(text)
        assert configurations.load("~/own.yaml") == content


#: Content of a file; what is said of it, behind its name.
WRONG = """
sizes: 3
  : --sizes is no option: did you mean --size?
size: null
  : --size none: 'none' is not a whole number
- 1
  must hold `name: value` lines
a: [
  is no YAML: .. expected the node content
epochs: [1, 2]
  : --epochs 1 2: takes one value
epochs: []
  : --epochs: needs a value
scale: 0.5
  : --scale 0.5: takes 2 values
model_kwargs: [depth]
  : --model-kwargs depth: 'depth' is not of the form name=value
{size: 3, lr: 1, size: 3}
  sets size twice: once is enough
{batch_size: 3, batch-size: 4}
  sets batch_size twice: once is enough
{top-k: 3, size: 1, top_k: 4, size: 2}
  sets size, top_k twice: once is enough
model_kwargs: {depth: 1, depth: 2}
  sets depth twice: once is enough
{aa: size, size: 3, length: 3}
"""


#: Content that would take forever to read, or that no flag takes; the message.
HOSTILE = {
    "billion laughs": ("a: &a [x]\nb: &b [*a, *a]\nc: [" + "*b, " * 15 + "]", "is no YAML: it has"),
    "in itself": ("size: &a [*a]", "--size: needs a value or a list of values"),
    "deep lists": ("size: " + "[" * 400, "is no YAML: "),
    "deep mappings": ("{a: " * 2000, "is no YAML: "),
    "large": ("# " + "x" * 200_000, "is no YAML: it is larger than 200000 bytes"),
    "long number": ("size: " + "9" * 5000, "is no YAML: Exceeds the limit"),
    "long number of base 16": ("size: 0x" + "9" * 5000, "is no YAML: Exceeds the limit"),
    "no date": ("lr: 2001-99-99", "is no YAML: month must be in"),
    "no number": ("lr: !!float x", "is no YAML: could not convert"),
    "code": ("lr: !!python/object/apply:os.getcwd []", "is no YAML: could not determine"),
    "bytes": ("output_dir: !!binary aGVs", "--output_dir: needs a value or a list of values"),
    "list in a list": ("freeze: [[a]]", "--freeze: needs a value or a list of values"),
    "names": ("model: {a: 1}", "--model: needs a value or a list of values"),
    "surrogate": ('data-path: "\\ud800"', "--data-path \ud800: no file can have that name"),
    "home of nobody": ("output_dir: ~nobody_x/a", "--output_dir ~nobody_x/a: there is no home"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_content_that_no_machine_can_read_is_one_line(name, yaml_file):
    content, problem = HOSTILE[name]
    path = yaml_file(content)
    found = problems_of(path)
    assert_says(found, [f"{path} .. {problem}"])
    assert "\n" not in found[0]


def test_pipe_device_and_folder_are_no_configuration(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zeros.yaml").symlink_to("/dev/zero")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("pipe", "zeros", "folder"):
        (problem,) = problems_of(tmp_path / f"{name}.yaml")
        assert problem.startswith(f"{tmp_path / name}.yaml is no YAML: ")
    for word in ("a" * 300, f"{'a' * 300}.yaml", "a\0.yaml"):
        assert problems_of(Path(word)) == ["no file can have that name, or one so long"]


def test_wrong_content_is_named_with_its_file(yaml_file):
    for text, problems in [*cases(WRONG), (b"\xff\xfe\x00size: 1", ["is no YAML: "])]:
        path = yaml_file(text)
        assert_says(problems_of(path), [f"{path} .. {problem}" for problem in problems])


#: A command line with one's own configuration; what is wrong with it.
ORDERS = """
digits_l2p
joint
digits_l2p single_prompt joint
OWN digits_l2p
digits_l2p OWN joint OWN
digits_l2p digits_l2p
  digits_l2p and digits_l2p are full configurations, of which a run has one: leave all but one out
single_prompt digits_l2p joint
  single_prompt is an overlay: put it behind digits_l2p, which would overwrite it
digits_l2p joint cifar100_l2p
  joint is an overlay: put it behind cifar100_l2p, which would overwrite it
  digits_l2p and cifar100_l2p are full .. (--list shows which ones are overlays)
"""


def test_overlays_write_to_a_folder_of_their_own(yaml_file):
    own = yaml_file("output_dir: there")
    for argv, expected in {
        "digits_l2p": "./output/digits_l2p", "cifar100_l2p joint": "./output",
        "digits_l2p linear_probe joint": "./output/digits_l2p_linear_probe_joint",
        f"digits_l2p {own}": "there", f"{own} joint": "there_joint",
        "digits_l2p joint --output_dir here": "here", "digits_l2p joint --output_dir=": "",
    }.items():  # fmt: skip
        assert settings_of(argv).run.output_dir == expected


def test_a_run_has_one_full_configuration_and_overlays_behind_it(yaml_file):
    path = str(yaml_file("size: 7\n"))
    for line, problems in cases(ORDERS):
        assert_says(problems_of(line.replace("OWN", path)), problems)
    settings = settings_of("digits_l2p", path, "joint")
    found = settings.prompts.size, settings.data.dataset, settings.tasks.joint
    assert found == (7, "digits", True)
