"""Shipped configurations and overlays: what they say, how they combine; rejected command lines."""

import itertools
import re
import warnings

import pytest
import torch
import yaml

import main
from cli import configurations
from cli.parser import UsageError
from cli.parser import parse as read
from cli.settings import all_flags, names_of, plain
from continual_datasets.readers import registry
from continual_datasets.scenarios import find_scenario
from experiment import build
from experiment.validate import validate
from helpers import true_formats
from model.backbone import without_memory
from prompt import find_selection_rule
from utils import Processes

#: Configurations of a paper's or a program's experiment: they name the table that they stand for.
PUBLISHED = (
    "cifar100_gaussian_l2p",
    "cifar100_gaussian_l2p_released",
    "cifar100_l2p",
    "cifar100_l2p_head",
    "cifar100_l2p_official_v1",
    "cifar100_l2p_official_v2",
    "cifar100_l2p_paper",
    "core50_l2p",
    "core50_l2p_frozen",
    "five_datasets_l2p",
    "five_datasets_l2p_official",
    "five_datasets_l2p_paper",
)
CONFIGS = (*PUBLISHED, "digits_l2p", "imagenet_r_l2p")

FROZEN = ["blocks", "patch_embed", "cls_token", "norm", "pos_embed"]
NOT_DIVERSE = {"diversify": "none", "shared_prompt_pool": False, "shared_prompt_key": False}

#: What each overlay sets.
OVERLAYS = {
    "linear_probe": {
        "prompt_pool": False,
        "head_type": "token",
        "freeze": FROZEN,
        **NOT_DIVERSE,
    },
    "ft_seq": {"prompt_pool": False, "head_type": "token", "freeze": [], **NOT_DIVERSE},
    "single_prompt": {
        "size": 1,
        "top_k": 1,
        "batchwise_prompt": False,
        "pull_constraint": False,
        **NOT_DIVERSE,
    },
    "joint": {"joint": True, **NOT_DIVERSE},
    "no_class_mask": {"train_mask": False},
    "replay_small": {"buffer_per_class": 10},
    "replay_large": {"buffer_per_class": 50},
    "diversified": {
        "diversify": "frequency",
        "shared_prompt_pool": False,
        "shared_prompt_key": False,
    },
}

#: Combinations without a meaning of their own, or rejected.
CONTRADICTORY = (
    {"joint", "replay_small"},
    {"joint", "replay_large"},
    {"linear_probe", "diversified"},
    {"ft_seq", "diversified"},
)

CIFAR100 = ["CIFAR100"]
FIVE_PORT = ["SVHN", "MNIST", "CIFAR10", "NotMNIST", "FashionMNIST"]
FIVE_OFFICIAL = ["CIFAR10", "MNIST", "SVHN", "NotMNIST", "FashionMNIST"]
FIVE_PAPER = ["CIFAR10", "MNIST", "FashionMNIST", "SVHN", "NotMNIST"]
CORE50 = ["CORe50"]
SPLIT, DOMAINS, GAUSSIAN = "class-incremental", "domain-incremental", "gaussian"
PORT, OFFICIAL = ("uniform", "uniform", "trunc_normal"), ("official", "official", "zero")
NO, MASK, OFTEN = ("none", False, False), ("mask", True, False), ("frequency", False, False)
S_CROP, CROP = [0.08, 1.0], [0.05, 1.0]

#: What the configurations come to. Pool: M, L, N, pull coefficient. Diversity: --diversify, shared
#: pool, shared keys. Votes: images of a group; None: every image chooses alone. Rate: what the
#: optimizer gets. First values: of prompts, keys, head.
COLUMNS = (
    "data sets", "scenario", "tasks", "shuffled",
    "pool", "diversity", "positions",
    "rate", "batch", "votes", "first values", "epochs", "crop",
)  # fmt: skip
# fmt: off
TABLE = {
    "cifar100_l2p": (
        CIFAR100, SPLIT, 10, True, (10, 5, 5, 0.1), NO, "class",
        0.001875, 16, 16, PORT, 5, S_CROP),
    "cifar100_l2p_head": (
        CIFAR100, SPLIT, 10, False, (10, 5, 5, 0.1), NO, "class",
        0.001875, 16, 16, PORT, 5, CROP),
    "cifar100_l2p_official_v1": (
        CIFAR100, SPLIT, 10, False, (10, 5, 5, 0.1), NO, "class",
        0.015, 128, 16, OFFICIAL, 5, CROP),
    "cifar100_l2p_official_v2": (
        CIFAR100, SPLIT, 10, False, (10, 10, 4, 1.0), NO, "none",
        0.015, 128, 16, OFFICIAL, 5, CROP),
    "cifar100_l2p_paper": (
        CIFAR100, SPLIT, 10, False, (10, 5, 5, 0.5), NO, "none",
        0.03, 128, None, OFFICIAL, 5, CROP),
    "five_datasets_l2p": (
        FIVE_PORT, SPLIT, 5, False, (20, 10, 4, 0.5), MASK, "class",
        0.001875, 16, 16, PORT, 5, CROP),
    "five_datasets_l2p_official": (
        FIVE_OFFICIAL, SPLIT, 5, False, (20, 10, 4, 0.5), MASK, "none",
        0.015, 128, 16, OFFICIAL, 5, CROP),
    "five_datasets_l2p_paper": (
        FIVE_PAPER, SPLIT, 5, False, (20, 5, 4, 0.5), OFTEN, "none",
        0.03, 128, None, OFFICIAL, 5, CROP),
    "core50_l2p": (
        CORE50, DOMAINS, 8, False, (10, 5, 4, 1.0), NO, "none",
        0.015, 128, 16, OFFICIAL, 5, CROP),
    "core50_l2p_frozen": (
        CORE50, DOMAINS, 8, False, (10, 5, 4, 1.0), NO, "none",
        0.015, 128, 16, OFFICIAL, 5, CROP),
    "cifar100_gaussian_l2p": (
        CIFAR100, GAUSSIAN, 200, False, (10, 10, 4, 1.0), NO, "none",
        0.015, 128, 16, OFFICIAL, 1, CROP),
    "cifar100_gaussian_l2p_released": (
        CIFAR100, GAUSSIAN, 200, False, (10, 10, 4, 1.0), NO, "none",
        0.015, 128, 16, OFFICIAL, 5, CROP),
    "imagenet_r_l2p": (
        ["Imagenet-R"], SPLIT, 10, False, (10, 10, 4, 1.0), NO, "none",
        0.00375, 192, None, OFFICIAL, 50, CROP),
    "digits_l2p": (
        ["digits"], SPLIT, 5, True, (10, 1, 4, 0.1), NO, "class",
        0.001875, 16, 16, PORT, 5, [0.8, 1.0]),
}
# fmt: on

#: Settings of single configurations; all others have what `test_settings_beyond_the_table` says.
EXCEPTIONS = {
    "core50_l2p": {"opt": "sgd", "momentum": 0.9, "freeze": [], "train_mask": False},
    "core50_l2p_frozen": {"train_mask": False},
    "cifar100_gaussian_l2p": {
        "reinit_optimizer": False,
        "eval_every": 10,
        "gaussian_reading": "paper",
        "steps_per_task": 5,
        "gaussian_sigma": 50.0,
    },
    "cifar100_gaussian_l2p_released": {
        "reinit_optimizer": False,
        "eval_every": 10,
        "gaussian_reading": "released",
        "gaussian_sigma": 50.0,
    },
    "digits_l2p": {
        "hflip": 0.0,
        "input_size": 32,
        "pretrained": "assets/glyph_vit.safetensors",
        "model": "vit_tiny_patch16_224",
    },
}

#: Trained parameters. Prompts (M, L, D), keys (M, D) and head (C, D + 1) at D = 768; CORe50 as
#: released has the 85,798,656 of the ViT, too; the digits' ViT is 128 wide.
NUM_TRAINED = {
    "cifar100_l2p": 122_980,
    "cifar100_l2p_head": 122_980,
    "cifar100_l2p_official_v1": 122_980,
    "cifar100_l2p_official_v2": 161_380,
    "cifar100_l2p_paper": 122_980,
    "five_datasets_l2p": 207_410,
    "five_datasets_l2p_official": 207_410,
    "five_datasets_l2p_paper": 130_610,
    "core50_l2p": 85_883_186,
    "core50_l2p_frozen": 84_530,
    "cifar100_gaussian_l2p": 161_380,
    "cifar100_gaussian_l2p_released": 161_380,
    "imagenet_r_l2p": 238_280,
    "digits_l2p": 3_850,
}

#: Behind a command line: a model that is built in no time, where only the rest matters.
SHALLOW = ("--model-kwargs", "depth=1", "weight_init=skip")

#: Configurations that differ in backbone, scenario or in what is frozen.
VARIED = (
    "cifar100_l2p",
    "cifar100_gaussian_l2p",
    "core50_l2p",
    "digits_l2p",
    "five_datasets_l2p_official",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders as all configurations expect them, hardly anything in them."""
    folder = tmp_path_factory.mktemp("data")
    true_formats.write_not_mnist(folder)
    true_formats.write_core50(folder)
    for number in range(200):
        (folder / "imagenet-r" / f"n{number:08}").mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    folder = tmp_path_factory.mktemp("domains")
    true_formats.write_domains(folder)
    return folder


def parse(*argv):
    settings, problems = read([str(a) for a in argv])
    assert problems == []
    return settings


def values(settings):
    """Every setting by name, as configurations hold it."""
    return {one.name: plain(settings[one.name]) for one in all_flags()}


def problems_of(*argv, elsewhere=False):
    """Everything that is wrong with a command line."""
    settings, problems = read([str(a) for a in argv])
    try:
        validate(settings, problems, elsewhere=elsewhere)
    except UsageError as error:
        return error.problems
    return []


def test_pool_that_is_too_small_for_a_mask_is_rejected_without_the_data(tmp_path):
    flags = ["five_datasets_l2p", "--size", "5", "--data-path", tmp_path / "nowhere", *SHALLOW]
    (problem,) = problems_of(*flags, elsewhere=True)
    assert "--size 5 is too small" in problem


def content(name):
    return (configurations.CONFIG_DIR / f"{name}.yaml").read_text()


def header(name):
    """The comment lines that a configuration starts with."""
    return list(itertools.takewhile(lambda line: line[:1] == "#", content(name).splitlines()))


def model_of(settings, num_classes=2):
    """The model of some settings, without memory."""
    with without_memory():
        return build.build_model(settings, build.build_backbone(settings), num_classes)


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# What there is


def test_all_configurations_are_there():
    assert set(configurations.names()) == {*CONFIGS, *OVERLAYS}


@pytest.mark.parametrize("name", [*CONFIGS, *OVERLAYS])
def test_configuration_is_valid_alone(name, data, tmp_path):
    """With the data at hand, and where they are elsewhere."""
    assert problems_of(name, "--data-path", data, "--output_dir", tmp_path) == []
    nowhere = tmp_path / "nowhere"
    assert problems_of(name, "--data-path", nowhere, elsewhere=True) == []


def test_list_shows_every_configuration_with_its_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main(["--list"]) == 0
    captured = capsys.readouterr()
    first, second = captured.out.rstrip("\n").split("\n\n")
    for block, names in ((first, CONFIGS), (second, OVERLAYS)):
        heading, *lines = block.splitlines()
        assert heading.endswith(":")
        shown = dict(line.split(maxsplit=1) for line in lines)
        assert shown == {name: header(name)[0][2:].removeprefix("Overlay: ") for name in names}
    assert "Overlay: " not in captured.out
    assert captured.err == ""
    assert list(tmp_path.iterdir()) == []


def test_list_wants_nothing_of_the_rest(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["digits_l2p", "--list", "--data-path", "nowhere", "--top_k", "99", "--device", "none"]
    assert main.main(argv) == 0
    assert "digits_l2p" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


# The form of the files


@pytest.mark.parametrize("name", [*CONFIGS, *OVERLAYS])
def test_first_line_says_what_it_is(name):
    line = header(name)[0]
    assert re.fullmatch(r"# \S.*[^.]\.", line), line
    assert line.startswith("# Overlay: ") == (name in OVERLAYS)


@pytest.mark.parametrize("name", [*CONFIGS, *OVERLAYS])
def test_lines_have_at_most_100_characters(name):
    assert [line for line in content(name).splitlines() if len(line) > 100] == []


@pytest.mark.parametrize("name", [*CONFIGS, *OVERLAYS])
def test_header_quotes_the_command(name):
    """One that can be typed: it parses, and names this file behind what it needs."""
    commands = [line[1:].strip() for line in header(name) if "python main.py" in line]
    assert len(commands) == 1
    python, program, *argv = commands[0].split()
    assert (python, program) == ("python", "main.py")
    named = list(itertools.takewhile(lambda token: not token.startswith("-"), argv))
    if name in OVERLAYS:
        assert named[0] in CONFIGS
        assert named[1:] == [name]
    else:
        assert named == [name]
    assert problems_of(*argv, *SHALLOW, elsewhere=True) == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_header_names_the_papers_table(name):
    assert re.search(r"table \d", "\n".join(header(name)))


@pytest.mark.parametrize("name", [*CONFIGS, *OVERLAYS])
def test_numbers_in_the_header_say_where_they_are_from(name):
    """A paragraph with results says that they are quoted, or measured here."""
    text = "\n".join(line[1:].strip() for line in header(name))
    for paragraph in text.split("\n\n"):
        if re.search(r"\d\d\.\d\d", paragraph):
            assert re.search(r"\bquoted\b|\bMeasured\b", paragraph), paragraph


# What they come to


@pytest.mark.parametrize("name", CONFIGS)
def test_resolved_settings_are_those_of_the_table(name, data):
    settings = parse(name, "--data-path", data)
    prompts, optimizer = settings.prompts, settings.optimizer
    found = (
        list(registry.find_sources(settings.data.dataset)),
        settings.tasks.scenario,
        find_scenario(settings).num_tasks(),
        settings.tasks.shuffle,
        (prompts.size, prompts.length, prompts.top_k, prompts.pull_constraint_coeff),
        (prompts.diversify, prompts.shared_prompt_pool, prompts.shared_prompt_key),
        settings.model.prompt_position,
        pytest.approx(optimizer.learning_rate(global_batch=optimizer.batch_size), rel=1e-12),
        optimizer.batch_size,
        settings.vote_group_size if prompts.batchwise_prompt else None,
        (prompts.initializer, prompts.prompt_key_init, settings.model.head_init),
        optimizer.epochs,
        plain(settings.transforms.scale),
    )
    wanted = dict(zip(COLUMNS, TABLE[name], strict=True))
    assert dict(zip(COLUMNS, found, strict=True)) == wanted


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_beyond_the_table(name):
    usual = {
        "model": "vit_base_patch16_224", "pretrained": True, "input_size": 224, "norm": "none",
        "hflip": 0.5, "ratio": [3 / 4, 4 / 3], "opt": "adam", "opt_eps": 1e-8, "opt_betas": None,
        "weight_decay": 0.0, "clip_grad": 1.0, "sched": "constant", "smoothing": 0.0, "drop": 0.0,
        "drop_path": 0.0, "seed": 42, "freeze": FROZEN, "head_type": "prompt", "joint": False,
        "global_pool": "token", "embedding_key": "cls", "prompt_pool": True, "prompt_key": True,
        "pull_constraint": True, "train_mask": True, "task_inc": False, "reinit_optimizer": True,
        "eval_every": 1, "buffer_size": None, "buffer_per_class": None, "file_lists": None,
        "classes_per_task": None, "class_order": None, "color_jitter": None, "aa": None,
        "reprob": 0.0, "vote_ties": "lowest",
    }  # fmt: skip
    wanted = usual | EXCEPTIONS.get(name, {})
    found = values(parse(name))
    assert {key: found[key] for key in wanted} == wanted


@pytest.mark.parametrize("name", CONFIGS)
def test_jax_arithmetic_belongs_to_the_official_configurations(name):
    """GELU by tanh, and only whole batches."""
    settings = parse(name)
    official = settings.prompts.initializer == "official"
    assert settings.optimizer.drop_last is official
    assert settings.model.model_kwargs.get("act_layer") == ("gelu_tanh" if official else None)


@pytest.mark.parametrize("name", CONFIGS)
def test_released_image_pipeline_belongs_to_the_released_configurations(name):
    settings = parse(name)
    options = settings.transforms
    released = settings.prompts.vote_group_size == 16
    assert released == any(word in name for word in ("official", "core50", "gaussian"))
    wanted = (256, 95, "bilinear") if released else (None, None, "bicubic")
    assert (options.train_resize, options.train_jpeg, options.test_interpolation) == wanted


def test_official_rates_do_not_depend_on_the_number_of_processes():
    """128 images of eight processes are trained as those of one."""
    for name in ("cifar100_l2p_official_v1", "cifar100_l2p_official_v2", "core50_l2p_frozen"):
        settings = parse(name, "--batch-size", "16")
        assert settings.optimizer.learning_rate(global_batch=128) == pytest.approx(0.015)


@pytest.mark.parametrize("name", CONFIGS)
def test_number_of_trained_parameters(name, data):
    settings = parse(name, "--data-path", data)
    num_classes = 50 if "core50" in name else registry.count_classes(settings.data.dataset, data)
    model = model_of(settings, num_classes)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == NUM_TRAINED[name]


def test_core50_as_released_has_nesterov_momentum():
    settings = parse("core50_l2p")
    optimizer = build.make_optimizer(settings.optimizer, model_of(settings), lr=0.015)
    for group in optimizer.param_groups:
        assert (group["nesterov"], group["momentum"], group["lr"]) == (True, 0.9, 0.015)


def test_cifar100_l2p_without_a_configuration_is_the_same():
    ours, bare = values(parse("cifar100_l2p")), values(parse())
    assert {k for k in ours if ours[k] != bare[k]} == {"num_tasks"}
    assert find_scenario(parse()).num_tasks() == 10


def test_readings_of_the_gaussian_schedule():
    paper, released = parse("cifar100_gaussian_l2p"), parse("cifar100_gaussian_l2p_released")
    assert paper.tasks.schedule_steps == 5
    assert paper.tasks.images_per_episode(128) == 640
    assert released.tasks.schedule_steps == 1
    assert released.tasks.images_per_episode(128) is None


# Overlays


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_holds_what_it_says(overlay):
    assert yaml.safe_load(content(overlay)) == OVERLAYS[overlay]


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("name", CONFIGS)
def test_overlay_goes_with_every_configuration(name, overlay, data):
    assert problems_of(name, overlay, "--data-path", data, *SHALLOW) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("name", CONFIGS)
def test_overlay_changes_what_it_names_and_nothing_else(name, overlay):
    before, after = parse(name), parse(name, overlay)
    assert values(after) == values(before) | OVERLAYS[overlay]
    assert after.given.explicit == before.given.explicit | set(OVERLAYS[overlay])


def test_overlays_go_with_each_other():
    for pair in itertools.combinations(OVERLAYS, 2):
        if set(pair) not in CONTRADICTORY:
            assert problems_of("cifar100_l2p", *pair, *SHALLOW, elsewhere=True) == [], pair


@pytest.mark.parametrize("name", VARIED)
def test_linear_probe_trains_the_head_alone(name):
    model = model_of(parse(name, "linear_probe", *SHALLOW))
    assert model.prompt is None
    assert trained_names(model) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("name", VARIED)
def test_ft_seq_trains_everything(name):
    model = model_of(parse(name, "ft_seq", *SHALLOW))
    assert model.prompt is None
    assert all(p.requires_grad for p in model.parameters())
    assert len(trained_names(model)) > 2


@pytest.mark.parametrize("name", VARIED)
def test_single_prompt_has_one_prompt_and_no_use_for_its_key(name):
    settings = parse(name, "single_prompt", *SHALLOW)
    model = model_of(settings)
    length = TABLE[name][COLUMNS.index("pool")][1]
    assert model.prompt.prompt.shape[:2] == (1, length)
    assert not model.prompt.prompt_key.requires_grad
    assert build.engine_options(settings, torch.device("cpu"), (0, 1)).pull_coeff == 0
    pool = model_of(parse(name, *SHALLOW))
    assert trained_names(model) == trained_names(pool) - {"prompt.prompt_key"}


def test_single_prompt_is_given_to_every_image():
    settings = parse("digits_l2p", "single_prompt")
    torch.manual_seed(0)
    model = build.build_model(settings, build.build_backbone(settings), num_classes=10).train()
    output = model(torch.rand(4, 3, 32, 32), task_id=0)
    assert output["prompt_idx"].tolist() == [[0]] * 4
    (output["logits"].square().sum() - output["reduce_sim"]).backward()
    assert model.prompt.prompt_key.grad is None
    assert model.prompt.prompt.grad.abs().max() > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_no_class_mask_lets_training_predict_any_class(name):
    def train_mask(*argv):
        return build.engine_options(parse(*argv), torch.device("cpu"), (0, 1)).train_mask

    assert not train_mask(name, "no_class_mask")
    assert train_mask(name) == ("core50" not in name)


@pytest.mark.parametrize(("overlay", "per_class"), [("replay_small", 10), ("replay_large", 50)])
def test_replay_doubles_each_vote_group(overlay, per_class):
    for name in CONFIGS:
        assert parse(name).replayed_per_group == 0
        settings = parse(name, overlay)
        assert settings.replayed_per_group == settings.vote_group_size
    settings = parse("digits_l2p", overlay)
    run = main.assemble(settings, Processes(0, 1, torch.device("cpu")))
    assert (run.buffer.per_class, run.buffer.size) == (per_class, None)


@pytest.mark.parametrize("name", VARIED)
def test_diversified_penalizes_what_was_selected(name):
    model = model_of(parse(name, "diversified", *SHALLOW))
    assert type(model.prompt) is find_selection_rule("frequency")


@pytest.mark.parametrize("name", CONFIGS)
def test_joint_is_one_task_wherever_the_data_are(name, tmp_path):
    settings = parse(name, "joint", "--data-path", tmp_path / "nowhere")
    assert find_scenario(settings).num_tasks() == 1


def test_joint_puts_all_tasks_into_one_and_tests_them_apart():
    plain, joint = (
        build.build_stream(parse("digits_l2p", *overlay), 16, torch.device("cpu"))
        for overlay in ([], ["joint"])
    )
    assert (plain.num_tasks, joint.num_tasks) == (5, 1)
    (task,) = joint.tasks
    assert sorted(task.classes) == list(range(10))
    assert len(task.data) == sum(len(t.data) for t in plain.tasks)
    assert [t.classes for t in task.test_sets] == [t.classes for t in plain.tasks]


# What is rejected


def quietly(*argv):
    """Everything that is wrong with a command line; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return problems_of(*argv, *SHALLOW)


#: A command line, and pieces of each message: the flag with its value, and what to do.
REJECTED = [
    (
        "--scenario online",
        ["--scenario online is unknown", SPLIT, DOMAINS, GAUSSIAN, "dataset-incremental", "joint"],
    ),
    ("--diversify most", ["--diversify most is unknown: choose one of none, mask, frequency"]),
    ("--prompt_position first", ["--prompt_position first is unknown: choose one of class, none"]),
    (
        "--scenario gaussian --epochs 1 --gaussian_reading loose",
        ["--gaussian_reading loose is unknown: choose one of paper, released"],
    ),
    # Data sets
    (
        "--dataset MNIST,CIFAR1000",
        ["--dataset CIFAR1000 is unknown: choose one of CIFAR10, ", "separated by commas"],
    ),
    ("--dataset MNIST,,SVHN", ["--dataset (an empty entry) is unknown: choose one of CIFAR10, "]),
    ("--dataset MNIST,SVHN,mnist", ["--dataset names MNIST 2 times: once is enough"]),
    (
        "--dataset MNIST,ImageFolder",
        ["--dataset MNIST,ImageFolder: ImageFolder cannot be one of several", "name it alone"],
    ),
    (
        "--dataset MNIST,SVHN --num_tasks 3",
        ["--num_tasks 3: the data are 2 tasks (MNIST,SVHN", "or none"],
    ),
    (
        "five_datasets_l2p --num_tasks 10",
        ["--num_tasks 10: the data are 5 tasks", "or none"],
    ),
    (
        "core50_l2p --num_tasks 9",
        ["--num_tasks 9: the data are 8 tasks (CORe50, domain-incremental)", "or none"],
    ),
    (
        "--scenario domain-incremental --dataset ImageFolder --data-path DOMAINS --num_tasks 2",
        ["--num_tasks 2: the data are 3 tasks (ImageFolder, domain-incremental)", "or none"],
    ),
    (
        "--dataset MNIST,SVHN --classes_per_task 2",
        ["--classes_per_task 2: needs a single data set and --scenario class-incremental"],
    ),
    (
        "--dataset MNIST,SVHN --class_order ORDER",
        ["--class_order /", "order.txt: needs a single data set and --scenario class-incremental"],
    ),
    (
        "core50_l2p --classes_per_task 2",
        ["--classes_per_task 2: needs --scenario class-incremental"],
    ),
    (
        "core50_l2p --class_order ORDER",
        ["--class_order /", "order.txt: needs --scenario class-incremental or gaussian"],
    ),
    (
        "cifar100_gaussian_l2p --classes_per_task 2",
        ["--classes_per_task 2: needs --scenario class-incremental"],
    ),
    (
        "cifar100_gaussian_l2p --dataset MNIST,SVHN",
        ["--scenario gaussian takes one data set; several (MNIST,SVHN)", "leave --scenario out"],
    ),
    (
        "--scenario dataset-incremental",
        ["--scenario dataset-incremental makes a task of each data set: name several in --dataset"],
    ),
    (
        "--scenario domain-incremental",
        ["--dataset CIFAR100 has no domains: choose one of CORe50, ImageFolder"],
    ),
    (
        "--dataset CIFAR100 --file_lists DATA",
        ["--file_lists /", ": needs --scenario domain-incremental"],
        ["--file_lists are those of CORe50: leave them out with --dataset CIFAR100"],
    ),
    (
        "core50_l2p --scenario class-incremental --num_tasks 3 --file_lists DATA",
        ["--file_lists /", ": needs --scenario domain-incremental"],
    ),
    # The Gaussian schedule
    (
        "cifar100_gaussian_l2p --epochs 5",
        ["--epochs 5: --gaussian_reading paper", "give --epochs 1, or more --steps_per_task"],
    ),
    (
        "cifar100_gaussian_l2p --num_tasks 19",
        ["19 tasks x 5 steps = 95 positions", "100 classes", "--num_tasks", "--steps_per_task"],
    ),
    (
        "cifar100_gaussian_l2p_released --num_tasks 99",
        ["99 tasks x 1 steps = 99 positions", "100 classes", "--num_tasks"],
    ),
    (
        "--steps_per_task 3 --gaussian_sigma 9 --gaussian_reading released",
        ["--gaussian_reading released: needs --scenario gaussian"],
        ["--steps_per_task 3: needs --scenario gaussian"],
        ["--gaussian_sigma 9.0: needs --scenario gaussian"],
    ),
    ("cifar100_gaussian_l2p --steps_per_task 0", ["--steps_per_task 0: must be at least 1"]),
    ("--domains a b", ["--domains a b: needs --scenario domain-incremental"]),
    (
        "core50_l2p --domains s1 s3 s1",
        ["--domains s1 s3 s1: s3 is no domain, the domains are s1, s2, s4, s5, s6, s8, s9, s11"],
    ),
    ("core50_l2p --domains s1 s1", ["--domains s1 s1: one is named twice, the domains are s1,"]),
    (
        "linear_probe --buffer_size 200 --vote_group_size 12",
        ["--vote_group_size 12 does not divide --batch-size 16"],
    ),
    (
        "--num_tasks 1 --buffer_size 200",
        ["--buffer_size and --buffer_per_class replay earlier tasks: one task has none"],
    ),
    ("--eval_every 0", ["--eval_every 0: must be at least 1"]),
    ("cifar100_gaussian_l2p --gaussian_sigma 0", ["--gaussian_sigma 0: must be positive"]),
    ("cifar100_gaussian_l2p --gaussian_sigma inf", ["--gaussian_sigma inf: must be positive"]),
    ("--num_tasks 0", ["--num_tasks 0: must be at least 1"]),
    # Replay
    ("--buffer_size 99", ["--buffer_size 99 is smaller", "give at least 100, an image for each"]),
    (
        "five_datasets_l2p --buffer_size 49",
        ["--buffer_size 49 is smaller", "give at least 50, an image for each"],
    ),
    (
        "--scenario domain-incremental --dataset ImageFolder --data-path DOMAINS --buffer_size 1",
        ["--buffer_size 1 is smaller", "give at least 2, an image for each"],
    ),
    (
        "--buffer_size 100 --buffer_per_class 1",
        ["--buffer_size and --buffer_per_class are two ways to say one thing: give one"],
    ),
    (
        "replay_small --buffer_size 100",
        ["--buffer_size and --buffer_per_class are two ways to say one thing: give one"],
    ),
    (
        "--replay_batch 3",
        ["--replay_batch needs a buffer: give --buffer_size or --buffer_per_class"],
    ),
    (
        "cifar100_l2p_official_v2 replay_small --replay_batch 20",
        ["--replay_batch 20", "8 vote groups of --batch-size 128", "give a multiple of 8"],
    ),
    ("replay_small --replay_batch 0", ["--replay_batch 0: must be at least 1"]),
    ("--buffer_per_class 0", ["--buffer_per_class 0: must be at least 1"]),
    ("joint replay_large", ["--joint", "nothing to replay: leave the buffer out"]),
    ("joint --buffer_size 100", ["--joint", "nothing to replay: leave the buffer out"]),
    # Diverse prompts
    (
        "--diversify mask --size 49",
        ["--diversify mask", "10 tasks", "--size 49 is too small, use at least 50", "--top_k"],
    ),
    (
        "five_datasets_l2p --size 19",
        ["--diversify mask", "5 tasks", "--size 19 is too small, use at least 20", "--top_k"],
    ),
    (
        "core50_l2p --diversify mask --size 31",
        ["--diversify mask", "8 tasks", "--size 31 is too small, use at least 32", "--top_k"],
    ),
    (
        "cifar100_l2p linear_probe --diversify mask",
        ["--diversify mask needs the prompt pool: leave --prompt_pool on"],
    ),
    (
        "cifar100_l2p linear_probe diversified",
        ["--diversify frequency needs the prompt pool: leave --prompt_pool on"],
    ),
]


@pytest.mark.parametrize("line", REJECTED, ids=lambda line: line[0])
def test_rejection_names_flag_and_remedy(line, data, domains, tmp_path):
    argv, *wanted = line
    order = tmp_path / "order.txt"
    order.write_text("\n".join(map(str, range(100))))
    places = {"DATA": data, "DOMAINS": domains, "ORDER": order}
    found = quietly("--data-path", data, *(places.get(a, a) for a in argv.split()))
    assert len(found) == len(wanted), found
    for problem, pieces in zip(found, wanted, strict=True):
        for piece in pieces:
            assert piece in problem


def test_rejection_is_printed_by_the_program(tmp_path, capsys):
    argv = ["five_datasets_l2p", "--size", "19", "--data-path", tmp_path, "--output_dir", tmp_path]
    assert main.main([str(a) for a in argv]) == 2
    assert "  - --diversify mask gives each of 5 tasks" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_several_rejections_are_reported_at_once(data):
    argv = "cifar100_gaussian_l2p --epochs 5 --num_tasks 7 --buffer_size 9 --replay_batch 3 --joint"
    more = "--diversify most --eval_every 0 --classes_per_task 3 --file_lists DATA --bogus"
    found = "\n".join(quietly("--data-path", data, *argv.split(), *more.split()))
    for piece in (
        "--bogus is no option",
        "--diversify most is unknown",
        "--eval_every 0: must be at least 1",
        "--file_lists DATA: needs --scenario domain-incremental",
        "--classes_per_task 3: needs --scenario class-incremental",
        "--joint learns all tasks at once",
        "--replay_batch 3 cannot be shared by the 8 vote groups",
        "--file_lists are those of CORe50",
        "--buffer_size 9 is smaller than the number of classes",
        "7 tasks x 5 steps = 35 positions",
    ):
        assert piece in found


def test_everything_wrong_with_a_list_is_reported_at_once(data):
    (problem,) = quietly("--data-path", data, "--dataset", ",x,MNIST,MNIST,ImageFolder")
    for piece in ("(an empty entry), x are unknown", "names MNIST 2 times", "ImageFolder cannot"):
        assert piece in problem


def test_task_smaller_than_a_step_is_rejected(tmp_path, capsys):
    """With --drop_last; the images of a task are counted when they are loaded."""
    argv = ["digits_l2p", "--batch-size", "500", "--output_dir", str(tmp_path), "--device", "cpu"]
    assert main.main([*argv, "--drop_last"]) == 1
    text = capsys.readouterr().out
    found = re.search(r"error: --drop_last leaves no step of task1: it has (\d+) images, a step 500"
                      r"; lower --batch-size or leave --drop_last out", text)  # fmt: skip
    assert found, text
    stream = build.build_stream(parse(*argv), 500, torch.device("cpu"))
    assert int(found[1]) == len(stream.tasks[0].data) < 500
    assert not (tmp_path / "results.json").exists()


def test_results_beside_domains_are_rejected(domains, monkeypatch):
    monkeypatch.chdir(domains)
    argv = [
        "--scenario",
        "domain-incremental",
        "--dataset",
        "ImageFolder",
        "--data-path",
        ".",
        "--num_workers",
        "0",
    ]
    assert problems_of(*argv) == [
        "--output_dir ./output would count as a domain of --data-path .",
    ]
    assert problems_of(*argv, "--output_dir", "./output/run") == []


def test_overlay_before_a_configuration_is_rejected():
    _, problems = read(["single_prompt", "digits_l2p", "joint"])
    assert problems == [
        "single_prompt is an overlay: put it behind digits_l2p, which would overwrite it"
    ]
    assert read(["digits_l2p", "single_prompt", "joint"])[1] == []


def test_task_free_order_with_too_few_classes_is_rejected(tmp_path, capsys):
    (tmp_path / "order.txt").write_text("3 1 2")
    argv = ["digits_l2p", "--scenario", "gaussian", "--num_tasks", "20", "--epochs", "1"]
    argv += ["--class_order", str(tmp_path / "order.txt"), "--output_dir", str(tmp_path)]
    assert main.main([*argv, "--device", "cpu"]) == 1
    assert "order.txt names 3 of 10 classes" in capsys.readouterr().out


# What stays possible


@pytest.mark.parametrize(
    "line",
    [
        "--dataset MNIST,SVHN --num_tasks 2",
        "five_datasets_l2p --num_tasks 5",
        "--dataset 5-datasets",
        "core50_l2p --num_tasks 8",
        "core50_l2p --file_lists LISTS",
        "core50_l2p replay_small --buffer_per_class 1",
        "--scenario domain-incremental --dataset ImageFolder --data-path DOMAINS --num_tasks 3",
        "--scenario domain-incremental --dataset ImageFolder --data-path DOMAINS",
        "--scenario domain-incremental --dataset ImageFolder --data-path DOMAINS --buffer_size 2",
        "cifar100_gaussian_l2p --class_order ORDER",
        "cifar100_gaussian_l2p --num_tasks 20",
        "cifar100_gaussian_l2p --steps_per_task 9 joint",
        "--use_prompt_mask --size 50",
        "--buffer_size 100",
        "replay_small --replay_batch 3",
        "cifar100_l2p_official_v2 replay_small --replay_batch 24",
        "five_datasets_l2p --size 4 --joint",
        "--diversify mask --size 5 --joint",
        "cifar100_l2p diversified linear_probe",
        "--num_tasks 3 --classes_per_task 30",
    ],
)
def test_stays_possible(line, data, domains, tmp_path):
    order = tmp_path / "order.txt"
    order.write_text("\n".join(map(str, range(100))))
    lists = data / "batches_filelists" / "NI_inc" / "run0"
    places = {"DOMAINS": domains, "ORDER": order, "LISTS": lists}
    assert quietly("--data-path", data, *(places.get(a, a) for a in line.split())) == []


def test_evaluation_takes_other_batches_whatever_was_replayed():
    """Nothing is replayed then; the vote group comes with the checkpoint."""
    run = "digits_l2p replay_small --replay_batch 16 --vote_group_size 16"
    assert problems_of(*run.split(), "--eval", "--batch-size", "20") == []


@pytest.mark.parametrize("name", CONFIGS)
def test_written_settings_read_back_to_the_same(name, tmp_path):
    """As config.yaml of a run holds them: alone, and with each overlay."""
    of_the_command = {
        "eval", "checkpoint", "speed_test", "speed_test_only", "local_rank", "dist_url",
        "world_size", "resume", "save_every", "list", "seeds", "dry_run", "plots", "tensorboard",
        "wandb",
    }  # fmt: skip
    assert of_the_command == set(names_of("command"))
    path = tmp_path / "config.yaml"
    for overlay in ([], *([overlay] for overlay in OVERLAYS)):
        run = parse(name, *overlay)
        path.write_text(configurations.to_yaml(run.stored()))
        assert values(parse(path)) == values(run)
        assert set(yaml.safe_load(path.read_text())) == set(values(run)) - of_the_command
