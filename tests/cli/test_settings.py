"""The settings: what is declared, what they default to, and what follows from them."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from cli import configurations
from cli.parser import words_of
from cli.paths import ROOT
from cli.settings import FLAGS, GROUPS, LEGACY_FLAGS, Settings, flags_of, names_of, plain
from continual_datasets.scenarios import SCENARIOS
from helpers.command_lines import settings_of
from prompt import SELECTION_RULES
from vision_transformer import POOLINGS


def test_every_setting_is_declared_once_with_a_help_and_a_sound_default():
    """The launchers' own option has no help."""
    assert [one.name for group in GROUPS.values() for one in flags_of(group)] == list(FLAGS)
    assert len(FLAGS) > 90
    assert [field.name for field in dataclasses.fields(Settings)] == [*GROUPS, "given"]
    for name, one in FLAGS.items():
        assert one.read(words_of(one.default)) == one.default == Settings()[name]
        assert bool(one.help) == (name != "local_rank")
        assert not one.help.endswith("."), name
    registries = {"scenario": SCENARIOS, "diversify": SELECTION_RULES, "head_type": POOLINGS}
    for name, registry in registries.items():
        assert [word for word in registry if word not in FLAGS[name].help] == []
    for old, (name, values) in LEGACY_FLAGS.items():
        assert old not in FLAGS
        assert [FLAGS[name].read([v]) for v in (values or {}).values()] == [
            *(values or {}).values()
        ]


def test_roles_part_the_settings():
    roles = {role: list(names_of(role)) for role in ("method", "place", "compute", "command")}
    assert sorted(name for names in roles.values() for name in names) == sorted(FLAGS)
    assert set(roles["place"]) == {
        *("seed", "data_path", "pretrained", "continue_from", "earlier_data")
    }
    assert set(roles["compute"]) == set(
        "output_dir device num_workers pin_mem print_freq compile grad_checkpointing "
        "data_on_device eval_batch_size test_cache".split()
    )
    assert set(roles["command"]) == set(
        "eval checkpoint speed_test speed_test_only local_rank dist_url resume save_every list "
        "list_models seeds dry_run plots save_predictions tensorboard wandb".split()
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
    for owner, name in ((settings.optimizer, "lr"), (settings, "optimizer")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(owner, name, None)
    other = settings.replace(lr=1.0, freeze=["head"], num_tasks=3, opt="sgd")
    assert (other.optimizer.lr, other.model.freeze, other.tasks.num_tasks) == (1.0, ("head",), 3)
    assert other.optimizer.opt == "sgd"
    assert settings == Settings()
    assert other.prompts is settings.prompts
    with pytest.raises(KeyError):
        settings.replace(learning_rate=1.0)


LINES = """

digits_l2p --clip-grad none --opt-betas 0.8 0.9 --freeze
core50_l2p --domains s1 s2 --lr-noise 0.4 0.9 --decay-milestones 1 2 3
cifar100_l2p_official_v2 diversified --model-kwargs depth=3 a=[1,2] b=none c=True
--output_dir= --class_order none --num_tasks 7 --pretrained w.npz
--data_on_device false --amp bf16 --color-jitter 0.4 --aa original --scale 0.5 1
"""


def test_stored_settings_are_a_configuration_of_the_same_values(tmp_path):
    """Without what a command does."""
    path = tmp_path / "config.yaml"
    for line in [*LINES.splitlines(), *configurations.names()]:
        settings = settings_of(line)
        stored = settings.stored()
        path.write_text(configurations.to_yaml(stored))
        assert yaml.safe_load(path.read_text()) == stored
        assert list(yaml.safe_load(path.read_text())) == sorted({*FLAGS} - {*names_of("command")})
        again = settings_of(path)
        assert again.stored() == stored
        assert [name for name in FLAGS if again[name] != settings[name]] == []
        assert again.given.explicit == set(stored)
    assert [plain(value) for value in ((1, 2), (), None, "a", {})] == [[1, 2], [], None, "a", {}]


def test_command_is_what_was_said_of_the_run():
    line = "digits_l2p joint --lr 0.1 --freeze a b --seed 7 --device cpu --seeds 1 2 --plots false"
    assert settings_of(line).command() == {
        "configurations": ["digits_l2p", "joint"],
        "flags": {"lr": 0.1, "freeze": ["a", "b"], "seed": 7},
    }


GLYPH = "assets/glyph_vit.safetensors"

#: What follows from settings; its value by the command line.
FOLLOWING = [
    (lambda s: s.optimizer.learning_rate(64), {
        "": 0.03 * 16 / 256, "--lr 0.5 --batch-size 128": 0.25, "--lr 0.5 --lr_scale none": 0.5,
        "--lr 0.5 --lr_scale global": 0.125,
    }),
    (lambda s: (s.vote_group_size, s.replayed_per_group, s.replay.has_buffer), {
        "": (16, 0, False), "--replay_batch 8": (16, 0, False), "--buffer_size 9": (16, 16, True),
        "--buffer_per_class 9 --replay_batch 8 --vote_group_size 4": (4, 2, True),
        "--batch-size 32 --vote_group_size 8": (8, 0, False),
    }),
    (lambda s: (s.tasks.schedule_steps, s.tasks.images_per_episode(64)), {
        "": (5, 5 * 64), "--steps_per_task 3": (3, 3 * 64), "--joint": (5, None),
        "--gaussian_reading released": (1, None),
    }),
    (lambda s: s.precision.loss_scaling, {"": False, "--amp bf16": False, "--amp fp16": True}),
    (lambda s: s.output_folder, {"--output_dir=": None, "--output_dir a": Path("a")}),
    (lambda s: str(s.for_seed(4).run.output_dir), {"--output_dir a": "a/seed4"}),
    (lambda s: s.for_seed(4).run.seed, {"--seeds 3 4": 4}),
    (lambda s: (s.model.weight_file, s.model.weight_source), {
        "": (None, "timm"), "--pretrained false": (None, "random"),
        "--pretrained nowhere/w.npz": (Path("nowhere/w.npz"), "w.npz"),
        f"--pretrained {GLYPH}": (ROOT / GLYPH, "glyph_vit.safetensors"),  # from any folder
    }),
]  # fmt: skip


def test_values_follow_from_the_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value, by_line in FOLLOWING:
        for line, wanted in by_line.items():
            assert value(settings_of(line)) == wanted, line
