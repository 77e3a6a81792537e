"""Files of settings: how they are found, read, ordered and written."""

import pytest

from cli import configurations
from helpers.command_lines import problems_of, rejections, settings_of
from helpers.tables import cases


@pytest.fixture
def own(tmp_path):
    """Writes a configuration of one's own; gives its path."""

    def write(text):
        path = tmp_path / "own.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_names_are_those_of_the_files():
    files = sorted(p.name for p in configurations.CONFIG_DIR.glob("*") if p.is_file())
    assert files == [f"{name}.yaml" for name in configurations.names()]
    for word, is_file in {"own.yaml": 1, "a/own.yml": 1, "own": 0, "own.yaml.bak": 0}.items():
        assert configurations.is_file_name(word) is bool(is_file)


def test_missing_configuration_is_named_and_guessed(tmp_path):
    """Whose data are not checked."""
    for name in ("digit_l2p", "Digits_L2P", "digits-l2p"):
        assert problems_of(name) == [
            f"{name!r} is neither a configuration nor the value of a flag: did you mean digits_l2p?"
            " --list shows the configurations; a file of your own must end in .yaml"
        ]
    (problem,) = problems_of(tmp_path / "own.yaml")
    assert problem.startswith(f"there is no file {tmp_path / 'own.yaml'}: ")
    for name in ("digit_l2p", "own.yaml"):
        (problem,) = rejections(name)
        assert name in problem


def test_file_is_found_from_the_home_directory(tmp_path, monkeypatch, own):
    monkeypatch.setenv("HOME", str(tmp_path))
    own("size: 3\n")
    assert configurations.load("~/own.yaml") == {"size": 3}


def test_empty_file_sets_nothing(own):
    for text in ("", "# nothing\n", "{}\n", "null\n"):
        assert configurations.load(str(own(text))) == {}


#: Content of a file; what is said of it, behind or in front of its name.
WRONG = """
sizes: 3
  --sizes is no option: did you mean --size?
size: null
  --size none: 'none' is not a whole number
- 1
  must hold `name: value` lines
a: [
  is no YAML
epochs: [1, 2]
  --epochs 1 2: takes one value
epochs: []
  --epochs: needs a value
scale: 0.5
  --scale 0.5: takes 2 values
model_kwargs: [depth]
  --model-kwargs depth: 'depth' is not of the form name=value
"""


def test_wrong_content_is_named_with_its_file(own):
    for text, (message,) in cases(WRONG):
        path = own(text)
        (problem,) = problems_of(path)
        assert problem.startswith(f"{path}: {message}") or problem.startswith(f"{path} {message}")
    path = own(b"\xff\xfe\x00size: 1")
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path} is no YAML: ")


def test_key_that_is_given_twice_is_rejected(own):
    for text, twice in {
        "size: 3\nlr: 1\nsize: 3\n": "size",
        "batch_size: 3\nbatch-size: 4\n": "batch_size",
        "top-k: 3\nsize: 1\ntop_k: 4\nsize: 2\n": "size, top_k",
        "model_kwargs: {depth: 1, depth: 2}\n": "depth",
    }.items():
        path = own(text)
        assert problems_of(path) == [f"{path} sets {twice} twice: once is enough"]
    assert problems_of(own("aa: size\nsize: 3\nlength: 3\n")) == []


ORDERS = """
digits_l2p
joint
digits_l2p single_prompt joint
OWN digits_l2p
digits_l2p OWN joint OWN
digits_l2p digits_l2p
  digits_l2p and digits_l2p are full configurations
single_prompt digits_l2p joint
  single_prompt is an overlay: put it behind digits_l2p, which would overwrite it
digits_l2p joint cifar100_l2p
  joint is an overlay: put it behind cifar100_l2p, which would overwrite it
  digits_l2p and cifar100_l2p are full configurations
"""
OF_WHICH = ", of which a run has one: leave all but one out (--list shows which ones are overlays)"


def test_a_run_has_one_full_configuration_and_overlays_behind_it(own):
    path = str(own("size: 7\n"))
    for line, problems in cases(ORDERS):
        argv = line.replace("OWN", path).split()
        wanted = [p + OF_WHICH if p.endswith("configurations") else p for p in problems]
        assert list(configurations.problems_of_order(argv)) == problems_of(*argv) == wanted
    settings = settings_of("digits_l2p", path, "joint")
    found = settings.prompts.size, settings.data.dataset, settings.tasks.joint
    assert found == (7, "digits", True)
