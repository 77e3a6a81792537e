"""Shipped configurations and overlays: what they say, how they combine; rejected command lines."""

import itertools
import re
import warnings

import pytest
import yaml

import main
from cli import configurations
from cli.settings import FLAGS, plain
from continual_datasets.readers import registry
from continual_datasets.scenarios import find_scenario
from experiment import build, network
from helpers.command_lines import SHALLOW, rejections, settings_of
from helpers.tables import assert_says, cases
from helpers.true_formats import write
from prompt import find_selection_rule

OVERLAYS = (
    "linear_probe ncm ft_seq single_prompt joint no_class_mask replay_small replay_large "
    "diversified"
).split()

#: Overlays that are rejected together.
CONTRADICTORY = ({"joint", "replay_small"}, {"joint", "replay_large"},
                 {"linear_probe", "diversified"}, {"ft_seq", "diversified"},
                 {"ncm", "diversified"}, {"ncm", "ft_seq"}, {"ncm", "replay_small"},
                 {"ncm", "replay_large"})  # fmt: skip

#: What the configurations come to. T tasks; M prompts of L tokens, of which K are chosen;
#: coefficient of the pull term; position embeddings of prompts. Rate: what the optimizer gets.
#: Votes: images of a group; own: every image chooses alone. Trained: parameters; prompts (M, L, D),
#: keys (M, D) and head (C, D + 1) at D = 768; CORe50 as released has the 85,798,656 of the ViT,
#: too; the digits' ViT is 128 wide.
COLUMNS, *ROWS = """
configuration                  data         T  M  L K pull place     rate batch votes start  trained
cifar100_l2p                   CIFAR100    10 10  5 5  0.1 class 0.001875    16    16 port    122980
cifar100_l2p_head              CIFAR100    10 10  5 5  0.1 class 0.001875    16    16 port    122980
cifar100_l2p_official_v1       CIFAR100    10 10  5 5  0.1 class    0.015   128    16 jax     122980
cifar100_l2p_official_v2       CIFAR100    10 10 10 4    1 none     0.015   128    16 jax     161380
cifar100_l2p_paper             CIFAR100    10 10  5 5  0.5 none      0.03   128   own jax     122980
five_datasets_l2p              port         5 20 10 4  0.5 class 0.001875    16    16 port    207410
five_datasets_l2p_official     official     5 20 10 4  0.5 none     0.015   128    16 jax     207410
five_datasets_l2p_paper        paper        5 20  5 4  0.5 none      0.03   128   own jax     130610
core50_l2p                     CORe50       8 10  5 4    1 none     0.015   128    16 jax   85883186
core50_l2p_frozen              CORe50       8 10  5 4    1 none     0.015   128    16 jax      84530
cifar100_gaussian_l2p          CIFAR100   200 10 10 4    1 none     0.015   128    16 jax     161380
cifar100_gaussian_l2p_released CIFAR100   200 10 10 4    1 none     0.015   128    16 jax     161380
imagenet_r_l2p                 Imagenet-R  10 10 10 4    1 none   0.00375   192   own jax     238280
digits_l2p                     digits       5 10  1 4  0.1 class 0.001875    16    16 port      3850
small_datasets_l2p             small        5 20 10 4  0.1 class  0.00625    16    16 port     34610
""".strip("\n").splitlines()  # fmt: skip
TABLE = {row.split()[0]: row.split()[1:] for row in ROWS}
CONFIGS = tuple(TABLE)
EITHER = (*CONFIGS, *OVERLAYS)

#: The five data sets in the order of their tasks.
FIVE = {
    "port": ["SVHN", "MNIST", "CIFAR10", "NotMNIST", "FashionMNIST"],
    "official": ["CIFAR10", "MNIST", "SVHN", "NotMNIST", "FashionMNIST"],
    "small": ["digits", "MNIST", "FashionMNIST", "KMNIST", "SVHN"],
    "paper": ["CIFAR10", "MNIST", "FashionMNIST", "SVHN", "NotMNIST"],
}

#: First values of prompts, keys and head.
START = {"port": ("uniform", "uniform", "trunc_normal"), "jax": ("official", "official", "zero")}

#: Settings behind the columns of the table; all others that a configuration changes.
IN_TABLE = set(
    "dataset num_tasks size length top_k pull_constraint_coeff prompt_position lr lr_scale "
    "head_init batch_size vote_group_size batchwise_prompt initializer prompt_key_init".split()
)
BEYOND = yaml.safe_load("""
cifar100_l2p: {}
cifar100_l2p_head: &cropped {shuffle: false, scale: [0.05, 1.0]}
cifar100_l2p_paper: &jax {<<: *cropped, model_kwargs: {act_layer: gelu_tanh}, drop_last: true}
cifar100_l2p_official_v1: &released
  {<<: *jax, train_resize: 256, train_jpeg: 95, test_interpolation: bilinear,
   ratio: [0.75, 1.33], crop_rule: tensorflow}
cifar100_l2p_official_v2: *released
five_datasets_l2p: {<<: *cropped, diversify: mask, shared_prompt_pool: true}
five_datasets_l2p_official: {<<: *released, diversify: mask, shared_prompt_pool: true}
five_datasets_l2p_paper: {<<: *jax, diversify: frequency}
core50_l2p_frozen: &core50 {<<: *released, scenario: domain-incremental, train_mask: false}
core50_l2p: {<<: *core50, opt: sgd, freeze: []}
cifar100_gaussian_l2p_released: &gaussian
  {<<: *released, scenario: gaussian, reinit_optimizer: false, eval_every: 10,
   gaussian_reading: released}
cifar100_gaussian_l2p: {<<: *gaussian, gaussian_reading: paper, epochs: 1}
imagenet_r_l2p: {<<: *jax, epochs: 50}
digits_l2p: &small
  {scale: [0.8, 1.0], hflip: 0.0, input_size: 32, model: vit_tiny_patch16_224, num_workers: 0,
   model_kwargs: {patch_size: 8, embed_dim: 128, depth: 6, num_heads: 4},
   pretrained: assets/glyph_vit.safetensors, output_dir: ./output/digits_l2p}
small_datasets_l2p:
  {<<: *small, shuffle: false, epochs: 3, diversify: frequency,
   output_dir: ./output/small_datasets_l2p}
""")

#: Configurations that differ in backbone, scenario or in what is frozen.
VARIED = "cifar100_l2p cifar100_gaussian_l2p core50_l2p digits_l2p five_datasets_l2p_official"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders as all configurations expect them, hardly anything in them."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("NotMNIST", "CORe50"):
        write(name, folder)
    for number in range(200):
        (folder / "imagenet-r" / f"n{number:08}").mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    folder = tmp_path_factory.mktemp("domains")
    write("domains", folder)
    return folder


def values(settings):
    """Every setting by name, as configurations hold it."""
    return {one.name: plain(settings[one.name]) for one in FLAGS.values()}


def content(name):
    return (configurations.CONFIG_DIR / f"{name}.yaml").read_text()


def header(name):
    """The comment lines that a configuration starts with."""
    return list(itertools.takewhile(lambda line: line[:1] == "#", content(name).splitlines()))


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_list_shows_every_configuration_with_its_line(tmp_path, monkeypatch, capsys):
    """Whatever else the command line says."""
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
    line = "digits_l2p --list --data-path nowhere --top_k 99 --device none"
    assert main.main(line.split()) == 0
    assert capsys.readouterr() == captured
    assert captured.err == ""
    assert list(tmp_path.iterdir()) == []


def test_header_says_what_it_is_and_quotes_the_command():
    """One that can be typed: it parses, and names this file behind what it needs."""
    for name in EITHER:
        assert re.fullmatch(r"# \S.*[^.]\.", header(name)[0]), name
        assert header(name)[0].startswith("# Overlay: ") == (name in OVERLAYS)
        (command,) = (line[1:].strip() for line in header(name) if "python main.py" in line)
        python, program, *argv = command.split()
        assert (python, program) == ("python", "main.py")
        named = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
        assert named[-1] == name
        assert [word in CONFIGS for word in named] == [True, False][: 1 + (name in OVERLAYS)]
        assert rejections(*argv, SHALLOW, elsewhere=True) == [], command


@pytest.mark.parametrize("name", CONFIGS)
def test_resolved_settings_are_those_of_the_table(name, data):
    settings = settings_of(name, "--data-path", data)
    prompts, optimizer = settings.prompts, settings.optimizer
    wanted = dict(zip(COLUMNS.split()[1:], TABLE[name], strict=True))
    names, start = wanted.pop("data"), wanted.pop("start")
    assert list(registry.find_sources(settings.data.dataset)) == FIVE.get(names, [names])
    found = (prompts.initializer, prompts.prompt_key_init, settings.model.head_init)
    assert found == START[start]
    num_classes = 50 if names == "CORe50" else registry.count_classes(settings.data.dataset, data)
    trained = network.outline(settings, num_classes).parameters()
    found = {
        "T": find_scenario(settings).num_tasks(),
        "M": prompts.size,
        "L": prompts.length,
        "K": prompts.top_k,
        "pull": f"{prompts.pull_constraint_coeff:g}",
        "place": settings.model.prompt_position,
        "rate": f"{optimizer.learning_rate(global_batch=optimizer.batch_size):.12g}",
        "batch": optimizer.batch_size,
        "votes": settings.vote_group_size if prompts.batchwise_prompt else "own",
        "trained": sum(p.numel() for p in trained if p.requires_grad),
    }
    assert {key: str(value) for key, value in found.items()} == wanted


def test_settings_beyond_the_table():
    """Without a configuration, all but the number of tasks is that of cifar100_l2p."""
    defaults = values(settings_of())
    for name in CONFIGS:
        found = {k: v for k, v in values(settings_of(name)).items() if v != defaults[k]}
        wanted = {k: v for k, v in BEYOND[name].items() if v != defaults[k]}
        assert {k: v for k, v in found.items() if k not in IN_TABLE} == wanted, name
        assert name != "cifar100_l2p" or found == {"num_tasks": 10}


def test_optimizers_of_the_release():
    """128 images of eight processes are trained as those of one; CORe50 with Nesterov momentum."""
    for name in ("cifar100_l2p_official_v1", "cifar100_l2p_official_v2", "core50_l2p_frozen"):
        optimizer = settings_of(name, "--batch-size 16").optimizer
        assert optimizer.learning_rate(global_batch=128) == pytest.approx(0.015)
    settings = settings_of("core50_l2p", SHALLOW)
    optimizer = build.make_optimizer(settings.optimizer, network.outline(settings), lr=0.015)
    for group in optimizer.param_groups:
        assert (group["nesterov"], group["momentum"], group["lr"]) == (True, 0.9, 0.015)


def test_overlays_change_what_they_name_and_nothing_else():
    for name in CONFIGS:
        before = settings_of(name)
        for overlay in OVERLAYS:
            after, wanted = settings_of(name, overlay), yaml.safe_load(content(overlay))
            if "output_dir" in before.given.explicit:  # then each has a folder of its own
                wanted["output_dir"] = f"{before.run.output_dir}_{overlay}"
            assert values(after) == values(before) | wanted
            assert after.given.explicit == before.given.explicit | set(wanted)


def test_overlays_go_with_every_configuration_and_with_each_other(data):
    for name, overlay in itertools.product(CONFIGS, ("", *OVERLAYS)):
        assert rejections(name, overlay, "--data-path", data, SHALLOW) == [], (name, overlay)
    for pair in itertools.combinations(OVERLAYS, 2):
        found = rejections("cifar100_l2p", *pair, SHALLOW, elsewhere=True)
        assert bool(found) == (set(pair) in CONTRADICTORY), (pair, found)


@pytest.mark.parametrize("name", VARIED.split())
def test_overlays_change_what_is_trained(name):
    """The head alone, everything, or one prompt that has no use for its key."""
    pool = network.outline(settings_of(name, SHALLOW))
    probe = network.outline(settings_of(name, "linear_probe", SHALLOW))
    assert probe.prompt is None
    assert trained_names(probe) == {"head.weight", "head.bias"}
    means = network.outline(settings_of(name, "ncm", SHALLOW))
    assert (means.prompt, trained_names(means), means.head_observes) == (None, set(), True)
    fine_tuned = network.outline(settings_of(name, "ft_seq", SHALLOW))
    assert fine_tuned.prompt is None
    assert all(p.requires_grad for p in fine_tuned.parameters())
    assert len(trained_names(fine_tuned)) > 2
    settings = settings_of(name, "single_prompt", SHALLOW)
    single = network.outline(settings)
    assert single.prompt.prompt.shape[:2] == (1, pool.prompt.prompt.shape[1])
    assert not single.prompt.prompt_key.requires_grad
    assert not settings.prompts.pull_constraint
    assert trained_names(single) == trained_names(pool) - {"prompt.prompt_key"}
    diversified = network.outline(settings_of(name, "diversified", SHALLOW))
    assert type(diversified.prompt) is find_selection_rule("frequency")


def test_overlays_without_a_mask_with_replay_or_joint_set_little_else():
    unmixed = {"diversify": "none", "shared_prompt_pool": False, "shared_prompt_key": False}
    for overlay, wanted in {
        "no_class_mask": {"train_mask": False},
        "joint": {"joint": True, **unmixed},
        "replay_small": {"buffer_per_class": 10},
        "replay_large": {"buffer_per_class": 50},
    }.items():
        assert yaml.safe_load(content(overlay)) == wanted


@pytest.fixture
def quietly(data, domains, tmp_path):
    """Everything that is wrong with a command line; a warning is an error."""
    (tmp_path / "order.txt").write_text("\n".join(map(str, range(100))))
    lists = data / "batches_filelists" / "NI_inc" / "run0"
    places = {"DATA": data, "DOMAINS": domains, "ORDER": tmp_path / "order.txt", "LISTS": lists}

    def problems(line):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            words = [places.get(word, word) for word in line.split()]
            return rejections("--data-path", data, *words, SHALLOW)

    return problems


#: More of a scenario alone is in test_scenarios.py, of a single value in test_parser.py.
REJECTED = """
core50_l2p --num_tasks 9
  --num_tasks 9: the data are 8 tasks (CORe50, domain-incremental) .. or none
cifar100_gaussian_l2p --num_tasks 19
  19 tasks x 5 steps = 95 positions .. 100 classes .. --num_tasks .. --steps_per_task
core50_l2p --domains s1 s3 s1
  --domains s1 s3 s1: s3 is no domain, the domains are s1, s2, s4, s5, s6, s8, s9, s11
--earlier_data DATA
  --earlier_data needs --continue_from or --eval: leave it out
--buffer_size 99
  --buffer_size 99 is smaller .. give at least 100, an image for each
--scenario domain-incremental --dataset ImageFolder --data-path DOMAINS --buffer_size 1
  --buffer_size 1 is smaller .. give at least 2, an image for each
replay_small --buffer_size 100
  --buffer_per_class and --buffer_size are two ways to say one thing: give one
--replay_batch 3
  --replay_batch needs --buffer_size or --buffer_per_class: give one of them
cifar100_l2p_official_v2 replay_small --replay_batch 20
  --replay_batch 20 .. 8 vote groups of --batch-size 128 .. give a multiple of 8
--aa rand-m9-n1000
  --aa rand-m9-n1000 is not a policy of timm
--aa rand-m9-mstdnan
  --aa rand-m9-mstdnan is not a policy of timm
--sched cosine --warmup-epochs 0 --lr-noise 0.5 0.2
  --lr-noise 0.5 0.2: give its start, or its start and then
--sched step --warmup-epochs 0 --decay-epochs 1e-300
--sched step --warmup-epochs 0 --decay-epochs 1e-3 --decay-rate 10
  --sched step with --decay-rate 10 cannot be computed: OverflowError
--sched step --warmup-epochs 0 --decay-epochs 1 --decay-rate 100 --lr 100
  --sched step with --decay-rate 100 makes the learning rate 1e+10
--head nearest
  --head nearest is unknown: choose one of linear, ncm
ncm ft_seq
  --head ncm takes means of features that do not change, and blocks, .. would train: turn off
--head ncm
  --head ncm takes means .. and prompt would train: turn off --prompt_pool
ncm replay_small
  --buffer_per_class needs --head other than ncm: its means count each image once; leave it out
--diversify mask --size 49
  --diversify mask .. 10 tasks .. --size 49 is too small, use at least 50 .. --top_k
"""


@pytest.mark.parametrize(("line", "expected"), cases(REJECTED))
def test_rejection_names_flag_and_remedy(line, expected, quietly):
    assert_says(quietly(line), expected)


def test_number_of_tasks_is_checked_without_the_data_unless_tasks_are_folders():
    line = "five_datasets_l2p --size 5 --num_tasks 3 --buffer_size 1"
    assert_says(
        rejections(line, SHALLOW, elsewhere=True), ["--num_tasks 3: the", "--size 5 is too small"]
    )
    assert rejections("core50_l2p --num_tasks 3", SHALLOW, elsewhere=True) == []


def test_results_beside_domains_are_rejected(domains, monkeypatch):
    monkeypatch.chdir(domains)
    line = "--scenario domain-incremental --dataset ImageFolder --data-path ."
    wanted = ["--output_dir ./output would count as a domain of --data-path ."]
    assert rejections(line) == wanted
    assert rejections(line, "--output_dir ./output/run") == []


POSSIBLE = """
--dataset MNIST,SVHN --num_tasks 2
--dataset 5-datasets
core50_l2p --num_tasks 8
core50_l2p --file_lists LISTS
core50_l2p replay_small --buffer_per_class 1
--scenario domain-incremental --dataset ImageFolder --data-path DOMAINS --num_tasks 3
--scenario domain-incremental --dataset ImageFolder --data-path DOMAINS --buffer_size 2
cifar100_gaussian_l2p --class_order ORDER
cifar100_gaussian_l2p --num_tasks 20
cifar100_gaussian_l2p --steps_per_task 9 joint
--use_prompt_mask --size 50
--buffer_size 100
replay_small --replay_batch 3
cifar100_l2p_official_v2 replay_small --replay_batch 24
--diversify mask --size 5 --joint
cifar100_l2p diversified linear_probe
--num_tasks 3 --classes_per_task 30
digits_l2p replay_small --replay_batch 16 --vote_group_size 16 --eval --batch-size 20
"""


def test_what_contradicts_nothing_stays_possible(quietly):
    """The last line: nothing is replayed then; the vote group comes with the checkpoint."""
    assert {line: quietly(line) for line, _ in cases(POSSIBLE) if quietly(line)} == {}
