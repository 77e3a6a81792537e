"""The settings: what is declared, what they default to, and what follows from them."""

import dataclasses
import itertools

import pytest
import yaml

from cli import configurations
from cli.parser import parse
from cli.paths import ROOT
from cli.settings import (
    GROUPS,
    LEGACY_FLAGS,
    Settings,
    all_flags,
    find_flag,
    flags_of,
    group_of,
    is_setting,
    names_of,
    plain,
)
from continual_datasets.scenarios import SCENARIOS
from prompt import SELECTION_RULES
from vision_transformer import POOLINGS

NAMES = [one.name for one in all_flags()]


def settings_of(*argv):
    settings, problems = parse([str(word) for word in argv])
    assert problems == []
    return settings


def words_of(value):
    """A value as words of a command line."""
    if isinstance(value, dict):
        return [f"{key}={one}" for key, one in value.items()]
    if isinstance(value, tuple):
        return list(map(str, value))
    return ["none" if value is None else str(value)]


# Declarations


def test_every_setting_is_declared_once():
    assert len(set(NAMES)) == len(NAMES) > 90
    assert {name: group_of(name) for name in NAMES} == {
        one.name: name for name, group in GROUPS.items() for one in flags_of(group)
    }
    assert [field.name for field in dataclasses.fields(Settings)] == [*GROUPS, "given"]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "local_rank"])
def test_every_setting_has_a_help(name):
    text = find_flag(name).help
    assert text
    assert not text.endswith(".")


def test_launchers_option_has_no_help():
    assert find_flag("local_rank").help == ""


@pytest.mark.parametrize("name", NAMES)
def test_default_passes_its_own_range_and_choices(name):
    one = find_flag(name)
    words = words_of(one.default)
    assert one.read(words) == one.default == Settings()[name]


def test_synonyms_mean_one_setting_and_are_no_settings():
    synonyms = [synonym for one in all_flags() for synonym in one.synonyms]
    assert [s for s in synonyms if synonyms.count(s) > 1] == []
    assert {*synonyms} & {*NAMES, *LEGACY_FLAGS} == set()
    assert [s for s in synonyms if s != s.lower() or "-" in s] == []


def test_legacy_names_stand_for_settings_and_their_choices():
    for old, (name, values) in LEGACY_FLAGS.items():
        assert not is_setting(old)
        for value in (values or {}).values():
            assert find_flag(name).read([value]) == value


@pytest.mark.parametrize(
    ("name", "registry"),
    [("scenario", SCENARIOS), ("diversify", SELECTION_RULES), ("head_type", POOLINGS)],
)
def test_help_names_what_is_registered(name, registry):
    for registered in registry:
        assert registered in find_flag(name).help


def test_roles_part_the_settings():
    roles = ("method", "place", "compute", "command")
    names = [list(names_of(role)) for role in roles]
    assert sorted(itertools.chain(*names)) == sorted(NAMES)
    assert set(names[1]) == {"seed", "data_path", "pretrained"}
    assert set(names[2]) == {
        "output_dir", "device", "num_workers", "pin_mem", "print_freq", "compile",
        "grad_checkpointing", "data_on_device", "eval_batch_size", "test_cache",
    }  # fmt: skip
    assert set(names[3]) == {
        "eval", "checkpoint", "speed_test", "speed_test_only", "local_rank", "dist_url",
        "world_size", "resume", "save_every", "list", "seeds", "dry_run", "plots", "tensorboard",
        "wandb",
    }  # fmt: skip


def test_defaults_are_the_originals():
    settings = settings_of()
    wanted = {
        "batch_size": 16, "epochs": 5, "model": "vit_base_patch16_224", "input_size": 224,
        "pretrained": True, "drop": 0.0, "drop_path": 0.0, "opt": "adam", "opt_eps": 1e-8,
        "clip_grad": 1.0, "momentum": 0.9, "weight_decay": 0.0, "reinit_optimizer": True,
        "sched": "constant", "lr": 0.03, "warmup_lr": 1e-6, "min_lr": 1e-5, "decay_epochs": 30.0,
        "warmup_epochs": 5, "cooldown_epochs": 10, "patience_epochs": 10, "decay_rate": 0.1,
        "data_path": "/local_datasets/", "dataset": "CIFAR100", "shuffle": True,
        "output_dir": "./output", "seed": 42, "num_workers": 4, "pin_mem": True, "num_tasks": None,
        "train_mask": True, "task_inc": False, "prompt_pool": True, "size": 10, "length": 5,
        "top_k": 5, "initializer": "uniform", "prompt_key": True, "prompt_key_init": "uniform",
        "diversify": "none", "shared_prompt_pool": False, "shared_prompt_key": False,
        "batchwise_prompt": True, "embedding_key": "cls", "pull_constraint": True,
        "pull_constraint_coeff": 0.1, "global_pool": "token", "head_type": "prompt",
        "freeze": ("blocks", "patch_embed", "cls_token", "norm", "pos_embed"), "print_freq": 10,
    }  # fmt: skip
    assert {name: settings[name] for name in wanted} == wanted
    assert settings.given.explicit == frozenset()


# Values


def test_settings_cannot_be_written():
    settings = Settings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.optimizer.lr = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.optimizer = None


def test_replace_changes_a_copy():
    settings = Settings()
    other = settings.replace(lr=1.0, freeze=["head"], num_tasks=3)
    assert (other.optimizer.lr, other.model.freeze, other.tasks.num_tasks) == (1.0, ("head",), 3)
    assert settings == Settings()
    assert other.prompts is settings.prompts
    with pytest.raises(KeyError):
        settings.replace(learning_rate=1.0)


def test_stored_settings_are_plain_and_leave_out_what_a_command_does():
    stored = Settings().stored()
    assert set(stored) == set(NAMES) - set(names_of("command"))
    assert yaml.safe_load(yaml.safe_dump(stored)) == stored
    assert stored["scale"] == [0.08, 1.0]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "digits_l2p --clip-grad none --opt-betas 0.8 0.9 --freeze",
        "core50_l2p --domains s1 s2 --lr-noise 0.4 0.9 --decay-milestones 1 2 3",
        "cifar100_l2p_official_v2 diversified --model-kwargs depth=3 a=[1,2] b=none c=True",
        "--output_dir= --class_order none --num_tasks 7 --pretrained w.npz --predefined_key none",
        "--data_on_device false --amp bf16 --color-jitter 0.4 --aa original --scale 0.5 1",
    ],
)
def test_stored_settings_are_a_configuration_of_the_same_values(line, tmp_path):
    settings = settings_of(*line.split())
    path = tmp_path / "config.yaml"
    path.write_text(configurations.to_yaml(settings.stored()))
    again = settings_of(path)
    assert again.stored() == settings.stored()
    assert {one.name for one in all_flags() if again[one.name] != settings[one.name]} == set()
    assert again.given.explicit == set(settings.stored())


def test_command_is_what_was_said_of_the_run():
    line = "digits_l2p joint --lr 0.1 --freeze a b --seed 7 --device cpu --seeds 1 2 --plots false"
    assert settings_of(*line.split()).command() == {
        "configurations": ["digits_l2p", "joint"],
        "flags": {"lr": 0.1, "freeze": ["a", "b"], "seed": 7},
    }


# What follows from them


@pytest.mark.parametrize(
    ("line", "rate"),
    [
        ("", 0.03 * 16 / 256),
        ("--lr 0.5 --batch-size 128", 0.25),
        ("--lr 0.5 --lr_scale none", 0.5),
        ("--lr 0.5 --lr_scale global", 0.5 * 64 / 256),
        ("--lr 0.5 --no-unscale_lr", 0.5 * 64 / 256),
    ],
)
def test_learning_rate_is_scaled_by_the_batch(line, rate):
    assert settings_of(*line.split()).optimizer.learning_rate(64) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    ("line", "votes", "replayed"),
    [
        ("", 16, 0),
        ("--replay_batch 8", 16, 0),
        ("--buffer_size 9", 16, 16),
        ("--buffer_per_class 9 --replay_batch 8 --vote_group_size 4", 4, 2),
        ("--batch-size 32 --vote_group_size 8", 8, 0),
    ],
)
def test_vote_groups_and_replayed_images(line, votes, replayed):
    settings = settings_of(*line.split())
    assert (settings.vote_group_size, settings.replayed_per_group) == (votes, replayed)
    assert settings.replay.has_buffer == ("buffer" in line)


@pytest.mark.parametrize(
    ("line", "steps", "images"),
    [
        ("", 5, 5 * 64),
        ("--steps_per_task 3", 3, 3 * 64),
        ("--gaussian_reading released", 1, None),
        ("--joint", 5, None),
    ],
)
def test_episodes_of_the_gaussian_schedule(line, steps, images):
    tasks = settings_of(*line.split()).tasks
    assert (tasks.schedule_steps, tasks.images_per_episode(64)) == (steps, images)


@pytest.mark.parametrize(
    ("pretrained", "file", "source"),
    [
        ("true", None, "timm"),
        ("false", None, "random"),
        ("nowhere/w.npz", "nowhere/w.npz", "w.npz"),
        ("assets/glyph_vit.safetensors", ROOT / "assets/glyph_vit.safetensors",
         "glyph_vit.safetensors"),
    ],
)  # fmt: skip
def test_weights_are_found_from_any_folder(pretrained, file, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = settings_of("--pretrained", pretrained).model
    assert str(model.weight_file) == str(file)
    assert model.weight_source == source


def test_pull_term_and_loss_scaling_follow_from_their_switches():
    assert settings_of().prompts.pull_coeff == 0.1
    assert settings_of("--no-pull_constraint").prompts.pull_coeff == 0.0
    for amp, scaled in (("none", False), ("bf16", False), ("fp16", True)):
        assert settings_of("--amp", amp).precision.loss_scaling is scaled


def test_each_seed_has_a_folder_of_its_own():
    run = settings_of("--seeds", 3, 4, "--output_dir", "out").for_seed(4)
    assert (run.run.seed, str(run.output_folder)) == (4, "out/seed4")
    assert settings_of("--output_dir=").output_folder is None


def test_plain_values_have_lists():
    assert [plain(value) for value in ((1, 2), (), None, "a", {})] == [[1, 2], [], None, "a", {}]
