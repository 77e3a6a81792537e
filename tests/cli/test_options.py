"""Flags, configurations and their messages."""

import pytest
import yaml

from cli import options

SWITCHES = sorted(options._build().switches)

#: Yes/no flags that are other names of a setting.
RENAMED = ("--unscale_lr", "--unscale-lr", "--use_prompt_mask", "--use-prompt-mask")


def parse(*argv):
    args, problems = options.parse_args(list(argv))
    assert problems == []
    return args


def problems_of(*argv):
    return options.parse_args(list(argv))[1]


def name_of(flag):
    return flag[2:].replace("-", "_")


def test_all_yes_no_flags_are_known():
    assert {name_of(flag) for flag in SWITCHES} == {
        "pin_mem", "shuffle", "train_mask", "task_inc", "prompt_pool", "prompt_key",
        "use_prompt_mask", "shared_prompt_pool", "shared_prompt_key", "batchwise_prompt",
        "pull_constraint", "reinit_optimizer", "unscale_lr", "eval", "speed_test",
        "speed_test_only", "joint", "drop_last", "list", "tf32", "compile", "grad_checkpointing",
        "dry_run", "plots", "tensorboard", "wandb",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["buffer_per_class", "num_tasks", "class_order", "resume", "aa"])
def test_setting_without_default_can_be_taken_back(name, tmp_path):
    value = {"class_order": "x.txt", "resume": "auto", "aa": "original"}.get(name, "3")
    path, null = tmp_path / "one.yaml", tmp_path / "null.yaml"
    path.write_text(f"{name}: {value}\n")
    null.write_text(f"{name.replace('_', '-')}: null\n")
    assert str(getattr(parse(str(path)), name)) == value
    assert getattr(parse(str(path), f"--{name}", "none"), name) is None
    assert getattr(parse(str(path), str(null)), name) is None


def test_unknown_number_is_still_refused_by_its_kind():
    (problem,) = problems_of("--num_tasks", "ten")
    assert "invalid int value: 'ten'" in problem


@pytest.mark.parametrize("name", ["digit_l2p", "Digits_L2P", "digits-l2p"])
def test_misspelled_configuration_is_guessed(name):
    (problem,) = problems_of(name)
    assert "did you mean digits_l2p?" in problem


def test_use_prompt_mask_is_the_originals_name_of_diversify():
    assert parse("--use_prompt_mask").diversify == "mask"
    assert parse("--use_prompt_mask", "false", "--diversify", "frequency").diversify == "frequency"
    assert parse("--diversify", "mask", "--no-use_prompt_mask").diversify == "none"


def test_dr_is_the_originals_short_name_of_decay_rate():
    assert parse("--dr", "0.3").decay_rate == 0.3
    assert parse().decay_rate == 0.1


def test_unscale_lr_is_the_originals_name_of_lr_scale():
    assert parse("--unscale_lr", "true").lr_scale == "per-device"
    assert parse("--no-unscale_lr").lr_scale == "global"
    assert parse("--unscale_lr", "false", "--lr_scale", "none").lr_scale == "none"


@pytest.mark.parametrize("token", ["-h2", "-hx", "-h=1", "-x", "--=3"])
def test_odd_short_flags_end(token):
    assert problems_of("digits_l2p", token)


@pytest.mark.parametrize("flag", [s for s in SWITCHES if s not in RENAMED])
def test_yes_no_flag_goes_both_ways(flag):
    name = name_of(flag)
    for argv in ([flag], [flag, "true"], [flag, "True"], [f"{flag}=yes"], [flag, "1"]):
        assert getattr(parse(*argv), name) is True, argv
    off = ([flag, "false"], [flag, "False"], [f"{flag}=no"], [flag, "0"], [f"--no-{flag[2:]}"])
    for argv in off:
        assert getattr(parse(*argv), name) is False, argv


def test_yes_no_flag_leaves_a_configuration_alone():
    args = parse("--eval", "digits_l2p")
    assert (args.eval, args.dataset) == (True, "digits")


def test_defaults_are_the_originals():
    args = parse()
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
        "freeze": ["blocks", "patch_embed", "cls_token", "norm", "pos_embed"], "print_freq": 10,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in wanted} == wanted
    assert args.explicit == frozenset()


def test_dashes_and_underscores_are_the_same():
    args = parse("--batch_size", "3", "--data_path", "x", "--top-k", "2", "--output-dir", "y")
    assert (args.batch_size, args.data_path, args.top_k, args.output_dir) == (3, "x", 2, "y")


def test_flags_win_over_configurations_and_later_ones_over_earlier(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("size: 7\nlength: 3\ntop_k: 1\n")
    two.write_text("length: 4\ntop_k: 2\n")
    args = parse(str(one), "--top_k", "6", str(two))
    assert (args.size, args.length, args.top_k) == (7, 4, 6)
    assert args.explicit == {"size", "length", "top_k"}


def test_configuration_values_of_every_kind(tmp_path):
    path = tmp_path / "all.yaml"
    path.write_text(
        "freeze: []\nscale: [0.5, 1]\ntrain_mask: false\nopt_eps: 1e-5\nclip_grad: none\n"
        "model_kwargs: {depth: 3, qkv_bias: false}\npretrained: w.npz\nclasses_per_task: null\n"
    )
    args = parse(str(path))
    assert (args.freeze, args.scale, args.train_mask) == ([], [0.5, 1.0], False)
    assert (args.opt_eps, args.clip_grad) == (1e-5, None)
    assert args.model_kwargs == {"depth": 3, "qkv_bias": False}
    assert (args.pretrained, args.classes_per_task) == ("w.npz", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sizes: 3\n", "--sizes is no option: did you mean --size?"),
        ("size: many\n", "invalid int value: 'many'"),
        ("- 1\n", "must hold `name: value` lines"),
        ("a: [\n", "is no YAML"),
        ("epochs: [1, 2]\n", "'2' is one value too many"),
    ],
)
def test_wrong_configuration_is_named(tmp_path, content, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    text = "\n".join(problems_of(str(path)))
    assert message in text
    assert "wrong.yaml" in text


def test_every_problem_of_the_flags_is_told():
    found = problems_of("--size", "x", "--bogus", "--lr", "fast", "--length", "2", "nonsense")
    assert len(found) == 4
    assert any("--bogus is no option" in problem for problem in found)


def test_settings_survive_yaml(tmp_path):
    args = parse("digits_l2p", "--clip-grad", "none", "--opt-betas", "0.8", "0.9", "--freeze")
    settings = {k: v for k, v in vars(args).items() if k not in ("explicit", "command")}
    path = tmp_path / "config.yaml"
    path.write_text(options.to_yaml(settings))
    assert yaml.safe_load(path.read_text()) == settings
    again = vars(parse(str(path)))
    assert {k: again[k] for k in settings} == settings
