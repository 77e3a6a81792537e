"""The command line: spellings, what belongs to what, and everything that is wrong, in one go."""

import re

import pytest

import main
from cli.flags import flags_of
from cli.parser import UsageError, command_words, parse, read_mapping, shown
from cli.settings import GROUPS, LEGACY_FLAGS, Settings, all_flags, find_flag

SWITCHES = [one.name for one in all_flags() if one.is_switch]

#: List settings that `none` can take back, and what it stands for.
LISTS = {
    "model_kwargs": {},
    "opt_betas": None,
    "lr_noise": None,
    "domains": None,
    "freeze": (),
}


def settings_of(*argv):
    settings, problems = parse([str(word) for word in argv])
    assert problems == []
    return settings


def problems_of(*argv):
    return parse([str(word) for word in argv])[1]


def spellings(name):
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))


def write(path, text):
    path.write_text(text)
    return path


# Spellings


@pytest.mark.parametrize("name", [one.name for one in all_flags() if not one.is_switch])
def test_dashes_underscores_and_an_equals_sign_are_the_same(name):
    one = find_flag(name)
    words = ["0.2", "0.9"] if one.most_values == 2 else ["0.25" if one.kind is float else "7"]
    words = [one.choices[0]] if one.choices else words
    words = ["a=1"] if name == "model_kwargs" else words
    expected = one.read(words)
    assert expected != one.default or one.choices
    for spelling in spellings(name):
        assert settings_of(spelling, *words)[name] == expected
        if len(words) == 1:
            assert settings_of(f"{spelling}={words[0]}")[name] == expected


def test_all_yes_no_flags_are_known():
    legacy = {name for name, (_, values) in LEGACY_FLAGS.items() if values is not None}
    assert {*SWITCHES, *legacy} == {
        "pin_mem", "shuffle", "train_mask", "task_inc", "prompt_pool", "prompt_key",
        "use_prompt_mask", "shared_prompt_pool", "shared_prompt_key", "batchwise_prompt",
        "pull_constraint", "reinit_optimizer", "unscale_lr", "eval", "speed_test",
        "speed_test_only", "joint", "drop_last", "list", "tf32", "compile", "grad_checkpointing",
        "dry_run", "plots", "tensorboard", "wandb",
    }  # fmt: skip


@pytest.mark.parametrize("name", SWITCHES)
def test_yes_no_flag_goes_both_ways(name):
    for flag in spellings(name):
        on = ([flag], [flag, "true"], [flag, "True"], [f"{flag}=yes"], [flag, "1"])
        for argv in on:
            assert settings_of(*argv)[name] is True, argv
        negated = [f"--no-{flag[2:]}", f"--no_{flag[2:]}"]
        for argv in ([flag, "false"], [flag, "False"], [f"{flag}=no"], [flag, "0"], *negated):
            argv = [argv] if isinstance(argv, str) else argv
            assert settings_of(*argv)[name] is False, argv


def test_flags_win_over_configurations_and_later_ones_over_earlier(tmp_path):
    one = write(tmp_path / "one.yaml", "size: 7\nlength: 3\ntop_k: 1\n")
    two = write(tmp_path / "two.yaml", "length: 4\ntop_k: 2\n")
    settings = settings_of(one, "--top_k", "6", two)
    prompts = settings.prompts
    assert (prompts.size, prompts.top_k, prompts.length) == (7, 6, 4)
    assert settings.given.explicit == {"size", "length", "top_k"}
    assert settings.given.flags == {"top_k": 6}
    assert settings.given.configurations == (str(one), str(two))
    assert settings_of("--top_k", "6", "--top-k", "3").prompts.top_k == 3


# What belongs to a flag


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("--eval digits_l2p", {"eval": True}),
        ("--eval true digits_l2p", {"eval": True}),
        ("--no-shuffle digits_l2p", {"shuffle": False}),
        ("--seeds 1 2 digits_l2p", {"seeds": (1, 2)}),
        ("--seeds none digits_l2p", {"seeds": None}),
        ("--scale .5 1 digits_l2p", {"scale": (0.5, 1.0)}),
        ("--lr .5 digits_l2p", {"lr": 0.5}),
        ("--clip-grad none digits_l2p", {"clip_grad": None}),
        ("--output_dir joint digits_l2p", {"output_dir": "joint"}),
        ("--data-path=x digits_l2p", {"data_path": "x"}),
        ("--model-kwargs depth=1 config=cifar100_l2p digits_l2p",
         {"model_kwargs": {"depth": 1, "config": "cifar100_l2p"}}),
        ("--freeze none digits_l2p", {"freeze": ()}),
        ("--freeze joint --seed 1 digits_l2p", {"freeze": ("joint",)}),
        ("--resume auto digits_l2p", {"resume": "auto"}),
    ],
)  # fmt: skip
def test_flag_leaves_a_configuration_alone(line, values):
    settings = settings_of(*line.split())
    assert {name: settings[name] for name in values} == values
    assert settings.given.configurations == ("digits_l2p",)
    assert settings.data.dataset == "digits"


def test_negative_and_scientific_numbers_are_values():
    assert settings_of("--lr", "1e-3").optimizer.lr == 1e-3
    assert problems_of("--seed", "-1") == ["--seed -1: must be in [0, 2^32)"]
    assert settings_of("--lr-noise-pct", "-.5").optimizer.lr_noise_pct == -0.5


def test_misspelled_configuration_behind_a_flag_is_guessed():
    (problem,) = problems_of("--seeds", 1, 2, "digit_l2p")
    assert "'digit_l2p' is neither" in problem
    assert "did you mean digits_l2p?" in problem


# none


@pytest.mark.parametrize("name", ["buffer_per_class", "num_tasks", "class_order", "resume", "aa"])
def test_setting_without_default_can_be_taken_back(name, tmp_path):
    value = {"class_order": "x.txt", "resume": "auto", "aa": "original"}.get(name, "3")
    path = write(tmp_path / "one.yaml", f"{name}: {value}\n")
    null = write(tmp_path / "null.yaml", f"{name.replace('_', '-')}: null\n")
    assert str(settings_of(path)[name]) == value
    assert settings_of(path, f"--{name}", "none")[name] is None
    assert settings_of(path, null)[name] is None


@pytest.mark.parametrize("name", LISTS)
def test_list_can_be_taken_back(name, tmp_path):
    value = "{depth: 3}" if name == "model_kwargs" else "[0.5, 0.9]"
    path = write(tmp_path / "one.yaml", f"{name}: {value}\n")
    assert settings_of(path)[name] not in (None, {}, ())
    for spelling in spellings(name):
        for argv in ([spelling, "none"], [spelling, "None"], [f"{spelling}=none"]):
            assert settings_of(path, *argv)[name] == LISTS[name]
        for word in ("none", "null", "None", "[none]"):
            later = write(tmp_path / "later.yaml", f"{spelling[2:]}: {word}\n")
            assert settings_of(path, later)[name] == LISTS[name]


# Old names


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("--use_prompt_mask", "diversify", "mask"),
        ("--use-prompt-mask true", "diversify", "mask"),
        ("--use_prompt_mask=false", "diversify", "none"),
        ("--no-use_prompt_mask", "diversify", "none"),
        ("--unscale_lr true", "lr_scale", "per-device"),
        ("--unscale-lr", "lr_scale", "per-device"),
        ("--no-unscale_lr", "lr_scale", "global"),
        ("--dr 0.3", "decay_rate", 0.3),
        ("--dr=0.3", "decay_rate", 0.3),
        ("--lr 1", "decay_rate", 0.1),
    ],
)
def test_name_of_the_original_stands_for_a_setting(line, name, value):
    settings = settings_of(*line.split())
    assert settings[name] == value
    assert settings.given.flags.get(name, value) == value


#: Old names beside new ones, and what to say of it: nothing where they say the same.
BOTH_NAMES = [
    ("--dr 0.3 --decay-rate 0.3", ""),
    ("--decay_rate 0.3 --dr 0.3", ""),
    ("--dr 0.3 --decay-rate 0.4", "--dr 0.3 and --decay-rate 0.4"),
    ("--decay-rate 0.4 --dr 0.3", "--decay-rate 0.4 and --dr 0.3"),
    ("--unscale_lr --lr_scale per-device", ""),
    ("--lr_scale global --no-unscale_lr", ""),
    ("--unscale_lr true --lr_scale none", "--unscale_lr true and --lr_scale none"),
    ("--lr_scale global --unscale_lr", "--lr_scale global and --unscale_lr true"),
    ("--use_prompt_mask --diversify mask", ""),
    ("--diversify none --use_prompt_mask false", ""),
    (
        "--use_prompt_mask false --diversify frequency",
        "--use_prompt_mask false and --diversify frequency",
    ),
    ("--diversify mask --no-use_prompt_mask", "--diversify mask and --use_prompt_mask false"),
]


@pytest.mark.parametrize(("line", "problem"), BOTH_NAMES)
def test_two_names_of_a_setting_must_agree(line, problem):
    expected = [f"{problem} are two names of one setting: give one"] if problem else []
    assert problems_of(*line.split()) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("dr: 0.3\ndecay_rate: 0.3\n", ""),
        ("dr: 0.3\ndecay_rate: 0.4\n", "--dr 0.3 and --decay_rate 0.4"),
        ("lr_scale: none\nunscale_lr: true\n", "--lr_scale none and --unscale_lr true"),
        ("diversify: mask\nuse-prompt-mask: true\n", ""),
        ("diversify: none\nuse_prompt_mask: true\n", "--diversify none and --use_prompt_mask true"),
    ],
)
def test_two_names_of_a_setting_must_agree_in_a_configuration(tmp_path, text, problem):
    path = write(tmp_path / "own.yaml", text)
    expected = [f"{path}: {problem} are two names of one setting: give one"] if problem else []
    assert problems_of(path) == expected


def test_new_name_wins_over_an_old_one_of_a_configuration(tmp_path):
    path = write(tmp_path / "own.yaml", "dr: 0.3\n")
    assert settings_of(path).optimizer.decay_rate == 0.3
    assert settings_of(path, "--decay-rate", "0.4").optimizer.decay_rate == 0.4


# Names that there are not

MEANT = {
    "learning_rate": "lr", "base_lr": "lr", "wd": "weight-decay", "gpu": "device",
    "gpus": "device", "cuda": "device", "data_dir": "data-path", "data_root": "data-path",
    "root": "data-path", "pool_size": "size", "num_prompts": "size", "prompt_length": "length",
    "prompt_len": "length", "topk": "top_k", "bs": "batch-size", "num_epochs": "epochs",
    "optimizer": "opt", "scheduler": "sched", "grad_clip": "clip-grad", "img_size": "input-size",
    "workers": "num_workers", "out_dir": "output_dir", "backbone": "model", "arch": "model",
    "memory_size": "buffer_size", "evaluate": "eval", "label_smoothing": "smoothing",
    "fp16": "amp", "dropout": "drop", "increment": "classes_per_task", "class_mask": "train_mask",
    # by letters
    "lerning-rate": "lr", "prompt_pol": "prompt_pool", "use_prompt_maks": "use_prompt_mask",
    "no-shufle": "shuffle", "imagesize": "input-size", "sizes": "size",
}  # fmt: skip


@pytest.mark.parametrize(("written", "meant"), MEANT.items())
def test_unknown_flag_gets_the_nearest_by_meaning(written, meant):
    """Its values are not mistaken for configurations; what is one stays one."""
    for flag in spellings(written):
        settings, problems = parse([flag, "0", "1", "digits_l2p"])
        assert problems == [f"{flag} is no option: did you mean --{meant}?"]
        assert settings.given.configurations == ("digits_l2p",)
        assert problems_of(f"{flag}=3") == problems


@pytest.mark.parametrize("synonym", [s for one in all_flags() for s in one.synonyms])
def test_every_synonym_gets_its_setting(synonym):
    (one,) = [one for one in all_flags() if synonym in one.synonyms]
    assert problems_of(f"--{synonym}") == [
        f"--{synonym} is no option: did you mean {one.spelling}?"
    ]


@pytest.mark.parametrize(
    "flag", ["--bogus", "--nonsense", "--no-idea", "-x", "-h2", "-hx", "-h2=1"]
)
def test_flag_like_no_other_points_to_the_help(flag, capsys):
    name = flag.partition("=")[0]
    assert problems_of("digits_l2p", flag) == [f"{name} is no option: see main.py --help"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("word", ["--=3", "--", "-", "-1", "nonsense"])
def test_odd_words_are_rejected(word):
    (problem,) = problems_of("digits_l2p", word)
    assert problem.startswith(f"{word!r} is neither a configuration nor the value of a flag")


@pytest.mark.parametrize("word", ["-h=1", "--help=yes"])
def test_help_takes_no_value(word, capsys):
    assert problems_of("digits_l2p", word) == [f"{word}: takes no value"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("flag", ["--no-lr", "--no-shuffle=true", "--no-dr"])
def test_only_yes_no_flags_can_be_negated(flag):
    (problem,) = problems_of(flag)
    assert "is no option" in problem


# Values that there are not


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("--shuffle maybe", "--shuffle maybe: is not true or false"),
        ("--eval tru digits_l2p", "--eval tru: is not true or false"),
        ("--unscale_lr 2", "--unscale_lr 2: is not true or false"),
        ("--use-prompt-mask x", "--use-prompt-mask x: is not true or false"),
        ("--input_size 224 224", "--input-size 224 224: takes one value"),
        ("--dataset MNIST CIFAR100", "--dataset MNIST CIFAR100: takes one value"),
        ("--seeds 1 x", "--seeds 1 x: 'x' is not a whole number"),
        ("--seeds -1", "--seeds -1: must be in [0, 2^32)"),
        ("--scale .1", "--scale .1: takes 2 values"),
        ("--scale .1 .2 .3", "--scale .1 .2 .3: takes 2 values"),
        ("--num_tasks ten", "--num_tasks ten: 'ten' is not a whole number"),
        ("--num_tasks --eval", "--num_tasks: needs a value"),
        ("--num_tasks digits_l2p", "--num_tasks: needs a value"),
        ("--top-k=", "--top_k : '' is not a whole number"),
        ("--lr x", "--lr x: 'x' is not a number"),
        ("--batch_size 0", "--batch-size 0: must be at least 1"),
        ("--clip-grad 0", "--clip-grad 0: must be positive and finite (none: no limit)"),
        ("--dr x", "--decay-rate x: 'x' is not a number"),
        ("--model_kwargs depth", "--model-kwargs depth: 'depth' is not of the form name=value"),
        ("--opt-betas", "--opt-betas: needs a value"),
        ("--amp fp8", "--amp fp8 is unknown: choose one of none, bf16, fp16"),
        (
            "--sched foo",
            "--sched foo is unknown: choose one of constant, cosine, tanh, step, multistep, poly, "
            "plateau",
        ),
        (
            "--data_on_device maybe",
            "--data_on_device maybe is unknown: choose one of auto, true, false",
        ),
    ],
)
def test_wrong_value_names_its_flag(line, problem):
    assert problems_of(*line.split()) == [problem]


def test_transforms_report_everything_wrong_at_once():
    line = (
        "--input_size 0 --scale .5 .1 --ratio 0 1 --hflip 1.5 --train-interpolation cubic "
        "--color-jitter -1.0 --reprob -0.1 --remode noise --recount 0 --norm cifar "
        "--train_resize 0 --train_jpeg 101 --test_interpolation nearest"
    )
    message = "\n".join(problems_of(*line.split()))
    flags = "--input-size 0|--scale|--ratio|--hflip 1.5|--train-interpolation cubic"
    flags += "|--color-jitter -1.0|--reprob -0.1|--remode noise|--recount 0|--norm cifar"
    flags += "|--train_resize 0|--train_jpeg 101|--test_interpolation nearest"
    for flag in flags.split("|"):
        assert flag in message
    assert len(message.splitlines()) == 13
    assert "none, half, imagenet" in message


def test_all_problems_are_reported_in_one_go(tmp_path):
    path = write(tmp_path / "own.yaml", "sizes: 3\nlength: x\n")
    settings, problems = parse([
        "--size", "x", "--bogus", "--lr", "fast", "--top_k", "2", "--length", "2", "nonsense",
        "--gpu", "0", "--shuffle", "maybe", "--dr", "1", "--decay-rate", "2", "digits_l2p",
        "cifar100_l2p", str(path), "digit_l2p",
    ])  # fmt: skip
    assert sorted(problems) == sorted([
        "--bogus is no option: see main.py --help",
        "--gpu is no option: did you mean --device?",
        "--size x: 'x' is not a whole number",
        "--lr fast: 'fast' is not a number",
        "--length 2 nonsense: takes one value",
        "--shuffle maybe: is not true or false",
        "--dr 1 and --decay-rate 2 are two names of one setting: give one",
        "digits_l2p and cifar100_l2p are full configurations, of which a run has one: leave all "
        "but one out (--list shows which ones are overlays)",
        f"{path}: --sizes is no option: did you mean --size?",
        f"{path}: --length x: 'x' is not a whole number",
        "'digit_l2p' is neither a configuration nor the value of a flag: did you mean digits_l2p? "
        "--list shows the configurations; a file of your own must end in .yaml",
    ])  # fmt: skip
    defaults = Settings()
    for name in ("size", "lr", "shuffle"):
        assert settings[name] == defaults[name]
    assert (settings.prompts.top_k, settings.prompts.length) == (2, 2)


def test_message_has_a_line_for_each_problem():
    error = UsageError(iter(["--a is wrong", "--b too"]))
    assert error.problems == ["--a is wrong", "--b too"]
    assert error.message("main.py") == (
        "main.py: this command line cannot run:\n  - --a is wrong\n  - --b too\n"
    )


# Mappings


def test_values_of_every_kind_in_a_configuration(tmp_path):
    path = write(
        tmp_path / "all.yaml",
        "freeze: []\nscale: [0.5, 1]\ntrain_mask: false\nopt_eps: 1e-5\nclip_grad: none\n"
        "model_kwargs: {depth: 3, qkv_bias: false}\npretrained: w.npz\nclasses_per_task: null\n",
    )
    settings = settings_of(path)
    assert settings.model.freeze == ()
    assert (settings.transforms.scale, settings.tasks.train_mask) == ((0.5, 1.0), False)
    assert (settings.optimizer.opt_eps, settings.optimizer.clip_grad) == (1e-5, None)
    assert settings.model.model_kwargs == {"depth": 3, "qkv_bias": False}
    assert (settings.model.pretrained, settings.tasks.classes_per_task) == ("w.npz", None)


def test_mapping_is_read_as_the_command_line():
    values, problems = read_mapping({
        "lr": 0.5, "use-prompt-mask": True, "scale": (0.5, 1), "top_k": "x", "learning_rate": 1,
        "seeds": None, 3: 4,
    })  # fmt: skip
    assert values == {"lr": 0.5, "diversify": "mask", "scale": (0.5, 1.0), "seeds": None}
    assert problems == [
        "--learning_rate is no option: did you mean --lr?",
        "--3 is no option: see main.py --help",
        "--top_k x: 'x' is not a whole number",
    ]


# Values for people


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"), ("", "none"), ((), "none"), ({}, "none"), (True, "true"), (0.5, "0.5"),
        ((1, 2), "1 2"), (["a"], "a"), ({"a": 1, "b": "x"}, "a=1 b=x"),
    ],
)  # fmt: skip
def test_values_are_shown_as_on_the_command_line(value, text):
    assert shown(value) == text


def test_command_words_are_what_tells_configurations_apart(tmp_path):
    command = {
        "configurations": ["digits_l2p", "/far/away/own/try.yaml"],
        "flags": {"lr": 0.5, "freeze": ["a", "b"], "seed": 3, "device": "cpu", "plots": False},
    }
    assert command_words(command) == "digits_l2p own/try.yaml --lr 0.5 --freeze a b"


# Help


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_shows_every_setting_and_ends(flag, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main.main(["digits_l2p", "--top_k", "99", flag])
    assert ended.value.code == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert list(tmp_path.iterdir()) == []
    found = re.findall(r"^  (--[\w-]+) ", captured.out, re.MULTILINE)
    documented = [one.spelling for one in all_flags() if one.help]
    assert [f for f in found if f[2:] not in LEGACY_FLAGS] == documented
    assert {f[2:] for f in found} - {f[2:] for f in documented} == LEGACY_FLAGS.keys()
    letters = "".join(captured.out.split())
    for one in all_flags():
        if one.help:
            start = f"{one.spelling} {one.name.upper()}" if not one.is_switch else one.spelling
            assert "".join(start.split()) in letters
            assert "".join(one.help.split()) in letters
            assert all(choice in letters for choice in one.choices)
    for group in GROUPS.values():
        assert f"\n{group.__doc__.rstrip('.')}:\n" in captured.out
        assert flags_of(group)
    assert "--local" not in captured.out
    assert "digits_l2p" in captured.out
