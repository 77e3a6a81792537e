"""Files of settings: how they are found, read, ordered and written."""

import pytest
import yaml

from cli import configurations
from cli.parser import UsageError, parse
from experiment.validate import validate


def problems_of(*argv):
    return parse([str(word) for word in argv])[1]


def write(path, text):
    path.write_text(text)
    return path


# Names


def test_names_are_those_of_the_files():
    files = sorted(p.name for p in configurations.CONFIG_DIR.glob("*") if p.is_file())
    assert files == [f"{name}.yaml" for name in configurations.names()]


@pytest.mark.parametrize(
    ("word", "is_file"),
    [("own.yaml", True), ("a/own.yml", True), ("own", False), ("own.yaml.bak", False)],
)
def test_files_of_ones_own_are_known_by_their_ending(word, is_file):
    assert configurations.is_file_name(word) is is_file


@pytest.mark.parametrize("name", ["digit_l2p", "Digits_L2P", "digits-l2p"])
def test_misspelled_configuration_is_guessed(name):
    (problem,) = problems_of(name)
    assert "did you mean digits_l2p?" in problem


def test_missing_file_is_named(tmp_path):
    (problem,) = problems_of(tmp_path / "own.yaml")
    assert problem.startswith(f"there is no file {tmp_path / 'own.yaml'}: ")


def test_file_is_found_from_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "own.yaml", "size: 3\n")
    assert configurations.load("~/own.yaml") == {"size": 3}


def test_data_are_not_checked_where_a_configuration_is_missing():
    for word in ("digit_l2p", "own.yaml"):
        with pytest.raises(UsageError) as caught:
            validate(*parse([word]))
        (problem,) = caught.value.problems
        assert word in problem


# Content


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}\n", "null\n"])
def test_empty_file_sets_nothing(tmp_path, text):
    assert configurations.load(str(write(tmp_path / "own.yaml", text))) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sizes: 3\n", "--sizes is no option: did you mean --size?"),
        ("learning_rate: 3\n", "--learning_rate is no option: did you mean --lr?"),
        ("size: many\n", "--size many: 'many' is not a whole number"),
        ("size: null\n", "--size none: 'none' is not a whole number"),
        ("- 1\n", "must hold `name: value` lines"),
        ("a: [\n", "is no YAML"),
        ("epochs: [1, 2]\n", "--epochs 1 2: takes one value"),
        ("epochs: []\n", "--epochs: needs a value"),
        ("scale: 0.5\n", "--scale 0.5: takes 2 values"),
        ("shuffle: maybe\n", "--shuffle maybe: is not true or false"),
        ("batch_size: 0\n", "--batch-size 0: must be at least 1"),
        ("sched: foo\n", "--sched foo is unknown: choose one of constant, "),
        ("model_kwargs: [depth]\n", "--model-kwargs depth: 'depth' is not of the form name=value"),
    ],
)
def test_wrong_configuration_is_named(tmp_path, content, message):
    path = write(tmp_path / "wrong.yaml", content)
    (problem,) = problems_of(path)
    assert message in problem
    assert str(path) in problem


def test_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_bytes(b"\xff\xfe\x00size: 1")
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path} is no YAML: ")


@pytest.mark.parametrize(
    ("content", "twice"),
    [
        ("size: 3\nsize: 4\n", "size"),
        ("size: 3\nlr: 1\nsize: 3\n", "size"),
        ("batch_size: 3\nbatch-size: 4\n", "batch_size"),
        ("top-k: 3\nsize: 1\ntop_k: 4\nsize: 2\n", "size, top_k"),
        ("model_kwargs: {depth: 1, depth: 2}\n", "depth"),
    ],
)
def test_key_that_is_given_twice_is_rejected(tmp_path, content, twice):
    path = write(tmp_path / "own.yaml", content)
    assert problems_of(path) == [f"{path} sets {twice} twice: once is enough"]


@pytest.mark.parametrize("content", ["size: 3\nlength: 3\n", "aa: size\nsize: 3\n"])
def test_keys_that_differ_are_fine(tmp_path, content):
    assert problems_of(write(tmp_path / "own.yaml", content)) == []


# Several on a line


@pytest.mark.parametrize(
    ("line", "problems"),
    [
        ("digits_l2p", []),
        ("joint", []),
        ("digits_l2p joint", []),
        ("digits_l2p single_prompt joint", []),
        ("digits_l2p OWN", []),
        ("OWN digits_l2p", []),
        ("OWN OWN joint", []),
        ("digits_l2p OWN joint OWN", []),
        (
            "digits_l2p cifar100_l2p",
            ["digits_l2p and cifar100_l2p are full configurations, of which a run has one: leave "
             "all but one out (--list shows which ones are overlays)"],
        ),
        (
            "digits_l2p digits_l2p",
            ["digits_l2p and digits_l2p are full configurations, of which a run has one: leave "
             "all but one out (--list shows which ones are overlays)"],
        ),
        (
            "joint digits_l2p",
            ["joint is an overlay: put it behind digits_l2p, which would overwrite it"],
        ),
        (
            "digits_l2p joint cifar100_l2p",
            ["joint is an overlay: put it behind cifar100_l2p, which would overwrite it",
             "digits_l2p and cifar100_l2p are full configurations, of which a run has one: leave "
             "all but one out (--list shows which ones are overlays)"],
        ),
    ],
)  # fmt: skip
def test_a_run_has_one_full_configuration_and_overlays_behind_it(tmp_path, line, problems):
    own = write(tmp_path / "own.yaml", "size: 7\n")
    argv = line.replace("OWN", str(own)).split()
    assert list(configurations.problems_of_order(argv)) == problems
    assert problems_of(*argv) == problems


def test_file_of_ones_own_changes_a_configuration(tmp_path):
    own = write(tmp_path / "own.yaml", "size: 7\n")
    settings, problems = parse(["digits_l2p", str(own), "joint"])
    assert problems == []
    found = settings.prompts.size, settings.data.dataset, settings.tasks.joint
    assert found == (7, "digits", True)


# Written


def test_settings_survive_yaml(tmp_path):
    argv = ["digits_l2p", "--clip-grad", "none", "--opt-betas", "0.8", "0.9", "--freeze"]
    stored = parse(argv)[0].stored()
    path = write(tmp_path / "config.yaml", configurations.to_yaml(stored))
    assert yaml.safe_load(path.read_text()) == stored
    assert list(yaml.safe_load(path.read_text())) == sorted(stored)
    assert parse([str(path)])[0].stored() == stored
