"""The settings: what is declared, what they default to, and what follows from them."""

import dataclasses

import pytest
import yaml

from cli import configurations
from cli.paths import ROOT
from cli.settings import (
    GROUPS,
    LEGACY_FLAGS,
    Settings,
    all_flags,
    find_flag,
    flags_of,
    is_setting,
    names_of,
    plain,
)
from continual_datasets.scenarios import SCENARIOS
from helpers.command_lines import settings_of
from prompt import SELECTION_RULES
from vision_transformer import POOLINGS

NAMES = [one.name for one in all_flags()]


def words_of(value):
    """A value as words of a command line."""
    if isinstance(value, dict):
        return [f"{key}={one}" for key, one in value.items()]
    if isinstance(value, tuple):
        return list(map(str, value))
    return ["none" if value is None else str(value)]


def test_every_setting_is_declared_once():
    assert len(set(NAMES)) == len(NAMES) > 90
    assert [one.name for group in GROUPS.values() for one in flags_of(group)] == NAMES
    assert [field.name for field in dataclasses.fields(Settings)] == [*GROUPS, "given"]


def test_declaration_has_a_help_and_a_default_in_its_own_range():
    """The launchers' own option has no help."""
    for one in all_flags():
        assert one.read(words_of(one.default)) == one.default == Settings()[one.name]
        assert bool(one.help) == (one.name != "local_rank")
        assert not one.help.endswith("."), one.name
    registries = {"scenario": SCENARIOS, "diversify": SELECTION_RULES, "head_type": POOLINGS}
    for name, registry in registries.items():
        for registered in registry:
            assert registered in find_flag(name).help


def test_legacy_names_stand_for_settings_and_their_choices():
    for old, (name, values) in LEGACY_FLAGS.items():
        assert not is_setting(old)
        for value in (values or {}).values():
            assert find_flag(name).read([value]) == value


def test_roles_part_the_settings():
    roles = {role: list(names_of(role)) for role in ("method", "place", "compute", "command")}
    assert sorted(name for names in roles.values() for name in names) == sorted(NAMES)
    assert set(roles["place"]) == {"seed", "data_path", "pretrained"}
    assert set(roles["compute"]) == set(
        "output_dir device num_workers pin_mem print_freq compile grad_checkpointing "
        "data_on_device eval_batch_size test_cache".split()
    )
    assert set(roles["command"]) == set(
        "eval checkpoint speed_test speed_test_only local_rank dist_url resume save_every list "
        "seeds dry_run plots tensorboard wandb".split()
    )


def test_defaults_are_the_originals():
    wanted = yaml.safe_load("""
        {batch_size: 16, epochs: 5, model: vit_base_patch16_224, input_size: 224, pretrained: true,
         drop: 0.0, drop_path: 0.0, opt: adam, opt_eps: 1.0e-8, clip_grad: 1.0, momentum: 0.9,
         weight_decay: 0.0, reinit_optimizer: true, sched: constant, lr: 0.03, warmup_lr: 1.0e-6,
         min_lr: 1.0e-5, decay_epochs: 30.0, warmup_epochs: 5, cooldown_epochs: 10,
         patience_epochs: 10, decay_rate: 0.1, data_path: /local_datasets/, dataset: CIFAR100,
         shuffle: true, output_dir: ./output, seed: 42, num_workers: 4, pin_mem: true,
         num_tasks: null, train_mask: true, task_inc: false, prompt_pool: true, size: 10, length: 5,
         top_k: 5, initializer: uniform, prompt_key: true, prompt_key_init: uniform,
         diversify: none, shared_prompt_pool: false, shared_prompt_key: false,
         batchwise_prompt: true, embedding_key: cls, pull_constraint: true,
         pull_constraint_coeff: 0.1, global_pool: token, head_type: prompt, print_freq: 10,
         freeze: [blocks, patch_embed, cls_token, norm, pos_embed]}
    """)
    settings = settings_of()
    assert {name: plain(settings[name]) for name in wanted} == wanted
    assert settings.given.explicit == frozenset()


def test_settings_are_changed_in_a_copy_alone():
    settings = Settings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.optimizer.lr = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.optimizer = None
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
    assert [plain(value) for value in ((1, 2), (), None, "a", {})] == [[1, 2], [], None, "a", {}]


LINES = """

digits_l2p --clip-grad none --opt-betas 0.8 0.9 --freeze
core50_l2p --domains s1 s2 --lr-noise 0.4 0.9 --decay-milestones 1 2 3
cifar100_l2p_official_v2 diversified --model-kwargs depth=3 a=[1,2] b=none c=True
--output_dir= --class_order none --num_tasks 7 --pretrained w.npz
--data_on_device false --amp bf16 --color-jitter 0.4 --aa original --scale 0.5 1
"""


def test_stored_settings_are_a_configuration_of_the_same_values(tmp_path):
    path = tmp_path / "config.yaml"
    for line in [*LINES.splitlines(), *configurations.names()]:
        settings = settings_of(line)
        path.write_text(configurations.to_yaml(settings.stored()))
        assert list(yaml.safe_load(path.read_text())) == sorted(settings.stored())
        again = settings_of(path)
        assert again.stored() == settings.stored()
        assert {one.name for one in all_flags() if again[one.name] != settings[one.name]} == set()
        assert again.given.explicit == set(settings.stored())


def test_command_is_what_was_said_of_the_run():
    line = "digits_l2p joint --lr 0.1 --freeze a b --seed 7 --device cpu --seeds 1 2 --plots false"
    assert settings_of(line).command() == {
        "configurations": ["digits_l2p", "joint"],
        "flags": {"lr": 0.1, "freeze": ["a", "b"], "seed": 7},
    }


def test_values_follow_from_the_settings():
    """Learning rate by the batch; vote groups with replayed images; gaussian episodes; pull."""
    for line, rate in {
        "": 0.03 * 16 / 256,
        "--lr 0.5 --batch-size 128": 0.25,
        "--lr 0.5 --lr_scale none": 0.5,
        "--lr 0.5 --lr_scale global": 0.5 * 64 / 256,
    }.items():
        assert settings_of(line).optimizer.learning_rate(64) == pytest.approx(rate, rel=1e-12)
    for line, wanted in {
        "": (16, 0, False),
        "--replay_batch 8": (16, 0, False),
        "--buffer_size 9": (16, 16, True),
        "--buffer_per_class 9 --replay_batch 8 --vote_group_size 4": (4, 2, True),
        "--batch-size 32 --vote_group_size 8": (8, 0, False),
    }.items():
        one = settings_of(line)
        found = (one.vote_group_size, one.replayed_per_group, one.replay.has_buffer)
        assert found == wanted, line
    for line, wanted in {
        "": (5, 5 * 64),
        "--steps_per_task 3": (3, 3 * 64),
        "--gaussian_reading released": (1, None),
        "--joint": (5, None),
    }.items():
        tasks = settings_of(line).tasks
        assert (tasks.schedule_steps, tasks.images_per_episode(64)) == wanted, line
    assert settings_of().prompts.pull_coeff == 0.1
    assert settings_of("--no-pull_constraint").prompts.pull_coeff == 0.0
    for amp, scaled in (("none", False), ("bf16", False), ("fp16", True)):
        assert settings_of("--amp", amp).precision.loss_scaling is scaled


def test_weights_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    glyph = "assets/glyph_vit.safetensors"
    for pretrained, file, source in (
        ("true", None, "timm"),
        ("false", None, "random"),
        ("nowhere/w.npz", "nowhere/w.npz", "w.npz"),
        (glyph, ROOT / glyph, "glyph_vit.safetensors"),
    ):
        model = settings_of("--pretrained", pretrained).model
        assert (str(model.weight_file), model.weight_source) == (str(file), source)


def test_each_seed_has_a_folder_of_its_own():
    run = settings_of("--seeds 3 4 --output_dir out").for_seed(4)
    assert (run.run.seed, str(run.output_folder)) == (4, "out/seed4")
    assert settings_of("--output_dir=").output_folder is None
